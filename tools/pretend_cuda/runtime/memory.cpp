// Memory: host memory that counts as the device's or as pinned; copies and memsets are made.
//
// Fresh device memory reads as zeros. A captured copy or memset is made again at every replay, as
// long as what it touches is still there.
#include "pretend.h"

#include <cstring>

#include <sys/mman.h>

namespace pretend {
namespace {

struct Block {
  size_t size;
  Kind kind;
  int device;
  bool mapped;  // by us; registered memory is the program's
};

std::map<const char*, Block>& blocks() {
  static auto* all = new std::map<const char*, Block>;  // outlives static destructors
  return *all;
}
std::map<int, size_t> used;  // bytes, by device

// Reserved, not backed: a page costs nothing until something is written to it.
void* map_pages(size_t size) {
  void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return start == MAP_FAILED ? nullptr : start;
}

cudaError_t allocate(void** address, size_t size, Kind kind) {
  Lock lock(mutex());
  *address = nullptr;
  if (size == 0) return cudaSuccess;
  int device = current_device();
  bool on_device = kind == Kind::device;
  if (on_device && used[device] + size > device_memory()) return failed(cudaErrorMemoryAllocation);
  *address = map_pages(size);
  if (!*address) return failed(cudaErrorMemoryAllocation);
  blocks()[static_cast<char*>(*address)] = {size, kind, device, true};
  if (on_device) used[device] += size;
  return cudaSuccess;
}

cudaError_t release(void* address, Kind kind) {
  if (!address) return cudaSuccess;
  Lock lock(mutex());
  auto found = blocks().find(static_cast<char*>(address));
  if (found == blocks().end() || found->second.kind != kind) return failed(cudaErrorInvalidValue);
  const Block& block = found->second;
  if (kind == Kind::device) used[block.device] -= block.size;
  if (block.mapped) munmap(address, block.size);
  blocks().erase(found);
  return cudaSuccess;
}

bool within(const void* address, size_t size) {
  Place place = place_of(address);
  return place.kind != Kind::none &&
         static_cast<const char*>(address) + size <= place.start + place.size;
}

// With PRETEND_CUDA_TRUE, small values read off the device are 0 and one-byte ones true: what a
// program asks of its numbers is answered as if all was well.
void answer(void* target, size_t size) {
  static const bool wanted = flag("PRETEND_CUDA_TRUE");
  if (!wanted || size > 8) return;
  memset(target, 0, size);
  if (size == 1) *static_cast<char*>(target) = 1;
}

cudaMemcpyKind kind_of(const void* to, const void* from) {
  bool to_device = place_of(to).kind == Kind::device;
  bool from_device = place_of(from).kind == Kind::device;
  if (to_device) return from_device ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice;
  return from_device ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost;
}

const char* copy_name(cudaMemcpyKind kind) {
  switch (kind) {
    case cudaMemcpyHostToHost: return "memcpy HtoH";
    case cudaMemcpyHostToDevice: return "memcpy HtoD";
    case cudaMemcpyDeviceToHost: return "memcpy DtoH";
    default: return "memcpy DtoD";
  }
}

struct Rows {
  char* to;
  size_t to_pitch;
  const char* from;
  size_t from_pitch, width, height;
};

cudaError_t copy(Rows rows, cudaMemcpyKind kind, cudaStream_t stream) {
  if (rows.width == 0 || rows.height == 0) return cudaSuccess;
  if (kind == cudaMemcpyDefault) kind = kind_of(rows.to, rows.from);
  size_t to_size = (rows.height - 1) * rows.to_pitch + rows.width;
  size_t from_size = (rows.height - 1) * rows.from_pitch + rows.width;
  bool known = within(rows.to, to_size) && within(rows.from, from_size);
  {
    // A copy of pageable memory is staged by the driver, which cannot be recorded.
    Lock lock(mutex());
    Stream& target = stream_of(stream);
    if (target.capture && !known) {
      break_capture(*target.capture, "a copy from or to pageable memory");
      return failed(cudaErrorStreamCaptureUnsupported);
    }
  }
  return submit(stream, copy_name(kind), [=] {
    if (known && !(within(rows.to, to_size) && within(rows.from, from_size))) {
      log("STALE: a replayed copy touches memory that was freed");
      return;
    }
    for (size_t row = 0; row < rows.height; ++row)
      memmove(rows.to + row * rows.to_pitch, rows.from + row * rows.from_pitch, rows.width);
    if (kind == cudaMemcpyDeviceToHost && rows.height == 1) answer(rows.to, rows.width);
  });
}

Rows one_row(void* to, const void* from, size_t size) {
  return {static_cast<char*>(to), size, static_cast<const char*>(from), size, size, 1};
}

}  // namespace

Place place_of(const void* address) {
  Lock lock(mutex());
  auto after = blocks().upper_bound(static_cast<const char*>(address));
  if (after == blocks().begin()) return {};
  const auto& [start, block] = *--after;
  if (static_cast<const char*>(address) >= start + block.size) return {};
  return {block.kind, block.device, start, block.size};
}

}  // namespace pretend

using namespace pretend;

EXPORT cudaError_t cudaMalloc(void** address, size_t size) {
  if (cudaError_t error = refuse_while_capturing("cudaMalloc")) return error;
  return allocate(address, size, Kind::device);
}
EXPORT cudaError_t cudaFree(void* address) {
  if (cudaError_t error = refuse_while_capturing("cudaFree")) return error;
  return release(address, Kind::device);
}
// Ordered by a stream, so they may be captured; as nodes they neither take nor give back memory.
EXPORT cudaError_t cudaMallocAsync(void** address, size_t size, cudaStream_t stream) {
  if (stream_of(stream).capture)
    if (cudaError_t error = submit(stream, "memory alloc")) return error;
  return allocate(address, size, Kind::device);
}
EXPORT cudaError_t cudaFreeAsync(void* address, cudaStream_t stream) {
  if (stream_of(stream).capture) return submit(stream, "memory free");
  return release(address, Kind::device);
}
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  Lock lock(mutex());
  *total = device_memory();
  *free = *total - used[current_device()];
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** address, size_t size, unsigned) {
  if (cudaError_t error = refuse_while_capturing("cudaHostAlloc")) return error;
  return allocate(address, size, Kind::pinned);
}
EXPORT cudaError_t cudaFreeHost(void* address) {
  if (cudaError_t error = refuse_while_capturing("cudaFreeHost")) return error;
  return release(address, Kind::pinned);
}
EXPORT cudaError_t cudaHostRegister(void* address, size_t size, unsigned) {
  if (cudaError_t error = refuse_while_capturing("cudaHostRegister")) return error;
  Lock lock(mutex());
  blocks()[static_cast<char*>(address)] = {size, Kind::pinned, current_device(), false};
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostUnregister(void* address) {
  if (cudaError_t error = refuse_while_capturing("cudaHostUnregister")) return error;
  return release(address, Kind::pinned);
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* found, const void* address) {
  Place place = place_of(address);
  memset(found, 0, sizeof *found);
  found->type = cudaMemoryTypeUnregistered;
  found->device = -2;  // cudaInvalidDeviceId, as for memory that CUDA does not know
  if (place.kind == Kind::none) return cudaSuccess;
  found->type = place.kind == Kind::device ? cudaMemoryTypeDevice : cudaMemoryTypeHost;
  found->device = place.device;
  found->devicePointer = const_cast<void*>(address);
  if (place.kind == Kind::pinned) found->hostPointer = const_cast<void*>(address);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t size, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
  return copy(one_row(to, from, size), kind, stream);
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t size, cudaMemcpyKind kind) {
  if (cudaError_t error = refuse_while_capturing("cudaMemcpy")) return error;
  return copy(one_row(to, from, size), kind, cudaStreamLegacy);
}
EXPORT cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                     size_t width, size_t height, cudaMemcpyKind kind,
                                     cudaStream_t stream) {
  Rows rows{static_cast<char*>(to), to_pitch,  static_cast<const char*>(from), from_pitch,
            width,                  height};
  return copy(rows, kind, stream);
}
EXPORT cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t size,
                                       cudaStream_t stream) {
  return copy(one_row(to, from, size), cudaMemcpyDeviceToDevice, stream);
}
EXPORT cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return refuse_while_capturing("cudaMemcpyToSymbol");  // kernels read no symbols here
}
EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t size, cudaStream_t stream) {
  return submit(stream, "memset", [=] {
    if (size == 0) return;
    if (within(to, size)) memset(to, value, size);
    else log("STALE: a memset of memory that is not the device's");
  });
}
EXPORT cudaError_t cudaMemset(void* to, int value, size_t size) {
  if (cudaError_t error = refuse_while_capturing("cudaMemset")) return error;
  return cudaMemsetAsync(to, value, size, cudaStreamLegacy);
}
EXPORT cudaError_t cudaGetSymbolAddress(void** address, const void* symbol) {
  Lock lock(mutex());
  static auto* symbols = new std::map<const void*, void*>;
  void*& known = (*symbols)[symbol];
  if (!known) {
    constexpr size_t page = 4096;  // more than any symbol that torch asks for
    known = map_pages(page);
    blocks()[static_cast<char*>(known)] = {page, Kind::device, current_device(), true};
  }
  *address = known;
  return cudaSuccess;
}

// Pools of stream-ordered memory: there is one, which keeps nothing.
EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  static int only;
  *pool = reinterpret_cast<cudaMemPool_t>(&only);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }
EXPORT cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) {
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  *static_cast<unsigned long long*>(value) = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return cudaSuccess;
}

// Memory and events shared between processes are not pretended.
EXPORT cudaError_t cudaIpcGetMemHandle(cudaIpcMemHandle_t*, void*) {
  return failed(cudaErrorNotSupported);
}
EXPORT cudaError_t cudaIpcOpenMemHandle(void**, cudaIpcMemHandle_t, unsigned) {
  return failed(cudaErrorNotSupported);
}
EXPORT cudaError_t cudaIpcCloseMemHandle(void*) { return failed(cudaErrorNotSupported); }
EXPORT cudaError_t cudaIpcGetEventHandle(cudaIpcEventHandle_t*, cudaEvent_t) {
  return failed(cudaErrorNotSupported);
}
EXPORT cudaError_t cudaIpcOpenEventHandle(cudaEvent_t*, cudaIpcEventHandle_t) {
  return failed(cudaErrorNotSupported);
}

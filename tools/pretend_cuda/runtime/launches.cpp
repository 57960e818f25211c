// Kernels that nvcc compiled into a program: registered by name, launched without computing.
#include "pretend.h"

#include <cstdlib>
#include <cstring>
#include <unordered_map>

#include <cxxabi.h>

namespace pretend {
namespace {

struct Function {
  std::string mangled, name;  // the readable name is found when it is first launched
  size_t shared_limit = kSharedDefault;
};

std::unordered_map<const void*, Function>& functions() {
  static auto* all = new std::unordered_map<const void*, Function>;
  return *all;
}

std::string readable(const std::string& mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : mangled;
  free(text);
  return result;
}

struct Configuration {
  dim3 grid, block;
  size_t shared = 0;
  void* stream = nullptr;
};
thread_local std::vector<Configuration> configurations;

cudaError_t launched(const void* host, Launch launch, cudaStream_t stream) {
  std::string name;
  {
    Lock lock(mutex());
    Function& function = functions()[host];
    if (function.name.empty())
      function.name = function.mangled.empty() ? "kernel" : readable(function.mangled);
    name = function.name;
    launch.shared_limit = function.shared_limit;
  }
  if (cudaError_t error = checked(name, launch)) return failed(error);
  return submit(stream, name);
}

bool fits(dim3 size, dim3 limit) {
  return size.x && size.y && size.z && size.x <= limit.x && size.y <= limit.y && size.z <= limit.z;
}

}  // namespace

int resident_blocks(int threads, size_t shared, int registers) {
  if (threads <= 0 || threads > 1024) return 0;
  int warps = (threads + 31) / 32;
  int by_warps = 64 / warps;
  int by_shared = static_cast<int>(233472 / (shared + 1024));  // 1 KiB a block is the system's
  int rounded = (registers + 7) / 8 * 8;                       // registers come in eights
  int by_registers = rounded ? 65536 / (rounded * 32 * warps) : by_warps;
  return std::min({32, by_warps, by_shared, by_registers});
}

cudaError_t checked(const std::string& name, const Launch& launch) {
  const dim3 &grid = launch.grid, &block = launch.block;
  size_t threads = size_t{block.x} * block.y * block.z;
  cudaError_t error = cudaSuccess;
  if (!fits(grid, {2147483647, 65535, 65535}) || !fits(block, {1024, 1024, 64}) || threads > 1024)
    error = cudaErrorInvalidConfiguration;
  else if (launch.shared > launch.shared_limit)
    error = cudaErrorInvalidValue;
  else if (launch.cooperative) {
    size_t room = 132 * static_cast<size_t>(resident_blocks(static_cast<int>(threads),
                                                            launch.shared, launch.registers));
    if (size_t{grid.x} * grid.y * grid.z > room) error = cudaErrorCooperativeLaunchTooLarge;
  }
  if (error)
    log("BAD LAUNCH: %s grid %u %u %u block %u %u %u shared %zu of %zu: %s", name.c_str(), grid.x,
        grid.y, grid.z, block.x, block.y, block.z, launch.shared, launch.shared_limit,
        cudaGetErrorName(error));
  return error;
}

}  // namespace pretend

using namespace pretend;

// -- what nvcc's generated code calls -------------------------------------------------------------

EXPORT void** __cudaRegisterFatBinary(void*) { return static_cast<void**>(calloc(1, 64)); }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void** handle) { free(handle); }
EXPORT char __cudaInitModule(void**) { return 0; }
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*,
                                   uint3*, dim3*, dim3*, int*) {
  Lock lock(mutex());
  functions()[host].mangled = name;
}
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared,
                                              void* stream) {
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**,
                                      size_t shared, cudaStream_t stream) {
  return launched(kernel, {grid, block, shared}, stream);
}

// -- launches -------------------------------------------------------------------------------------

EXPORT cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void**, size_t shared,
                                    cudaStream_t stream) {
  return launched(host, {grid, block, shared}, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host,
                                       void**) {
  Launch launch{config->gridDim, config->blockDim, config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == cudaLaunchAttributeCooperative)
      launch.cooperative = config->attrs[i].val.cooperative != 0;
  return launched(host, launch, config->stream);
}
EXPORT cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void**,
                                               size_t shared, cudaStream_t stream) {
  Launch launch{grid, block, shared};
  launch.cooperative = true;
  return launched(host, launch, stream);
}

// -- what a kernel says of itself -----------------------------------------------------------------

EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* found, const void* host) {
  Lock lock(mutex());
  memset(found, 0, sizeof *found);
  found->maxThreadsPerBlock = 1024;
  found->numRegs = 32;
  found->ptxVersion = found->binaryVersion = 90;
  found->maxDynamicSharedSizeBytes = static_cast<int>(functions()[host].shared_limit);
  return cudaSuccess;
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* host, cudaFuncAttribute attribute, int value) {
  Lock lock(mutex());
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || static_cast<size_t>(value) > kSharedOptin) return failed(cudaErrorInvalidValue);
  functions()[host].shared_limit = value;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*,
                                                                          int threads,
                                                                          size_t shared, unsigned) {
  *blocks = resident_blocks(threads, shared, 32);
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*,
                                                                 int threads, size_t shared) {
  *blocks = resident_blocks(threads, shared, 32);
  return cudaSuccess;
}

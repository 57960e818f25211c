// The devices: how many, their name and what they say of themselves (an H100 or an H200).
#include "pretend.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pretend {
namespace {

// What differs between the two. Inductor's cache key holds the name.
struct Model {
  const char* name;
  size_t memory;  // bytes that torch reports
  int l2;         // bytes
  int memory_clock, memory_bus;
};
const Model kModels[] = {
    {"NVIDIA H100 80GB HBM3", 85017493504, 50 << 20, 2619000, 5120},
    {"NVIDIA H200", 150023897088, 60 << 20, 3201000, 6144},
};

const Model& model() {
  static const Model chosen = [] {
    const char* name = getenv("PRETEND_CUDA_NAME");
    if (!name || !*name) return kModels[0];
    for (const Model& known : kModels)
      if (!strcmp(known.name, name)) return known;
    Model other = kModels[0];  // an unknown name: an H100 that is called so
    other.name = name;
    return other;
  }();
  return chosen;
}

thread_local int device = 0;

}  // namespace

int device_count() {
  static const int count = [] {
    const char* text = getenv("PRETEND_CUDA_DEVICES");
    int number = text ? atoi(text) : 1;
    return number > 0 ? number : 1;
  }();
  return count;
}
int current_device() { return device; }
const char* device_name() { return model().name; }
size_t device_memory() { return model().memory; }

// Compute capability 9.0, 132 multiprocessors. An attribute that is not named is 0.
int device_attribute(int attribute) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return 2147483647;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return kSharedDefault;
    case cudaDevAttrTotalConstantMemory: return 65536;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxPitch: return 2147483647;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrGpuOverlap: return 1;
    case cudaDevAttrMultiProcessorCount: return 132;
    case cudaDevAttrCanMapHostMemory: return 1;
    case cudaDevAttrConcurrentKernels: return 1;
    case cudaDevAttrPciBusId: return 1;
    case cudaDevAttrMemoryClockRate: return model().memory_clock;
    case cudaDevAttrGlobalMemoryBusWidth: return model().memory_bus;
    case cudaDevAttrL2CacheSize: return model().l2;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrUnifiedAddressing: return 1;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrComputeCapabilityMinor: return 0;
    case cudaDevAttrStreamPrioritiesSupported: return 1;
    case cudaDevAttrGlobalL1CacheSupported: return 1;
    case cudaDevAttrLocalL1CacheSupported: return 1;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrManagedMemory: return 1;
    case cudaDevAttrConcurrentManagedAccess: return 1;
    case cudaDevAttrComputePreemptionSupported: return 1;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return kSharedOptin;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxPersistingL2CacheSize: return 33554432;
    case cudaDevAttrMaxAccessPolicyWindowSize: return 134213632;
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1024;
    case cudaDevAttrMemoryPoolsSupported: return 1;
    case CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH: return 1;
    case CU_DEVICE_ATTRIBUTE_TENSOR_MAP_ACCESS_SUPPORTED: return 1;
    default: return 0;
  }
}

}  // namespace pretend

using namespace pretend;

EXPORT cudaError_t cudaGetDeviceCount(int* count) {
  *count = device_count();
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDevice(int* number) {
  *number = device;
  return cudaSuccess;
}
EXPORT cudaError_t cudaSetDevice(int number) {
  if (number < 0 || number >= device_count()) return failed(cudaErrorInvalidDevice);
  device = number;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = 13000;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number < 0 || number >= device_count()) return failed(cudaErrorInvalidDevice);
  *value = device_attribute(attribute);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int number) {
  if (number < 0 || number >= device_count()) return failed(cudaErrorInvalidDevice);
  auto value = [](cudaDeviceAttr attribute) { return device_attribute(attribute); };
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", device_name());
  p->uuid.bytes[0] = static_cast<char>(number + 1);
  p->totalGlobalMem = device_memory();
  p->sharedMemPerBlock = kSharedDefault;
  p->sharedMemPerBlockOptin = kSharedOptin;
  p->sharedMemPerMultiprocessor = value(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->reservedSharedMemPerBlock = value(cudaDevAttrReservedSharedMemoryPerBlock);
  p->regsPerBlock = value(cudaDevAttrMaxRegistersPerBlock);
  p->regsPerMultiprocessor = value(cudaDevAttrMaxRegistersPerMultiprocessor);
  p->warpSize = value(cudaDevAttrWarpSize);
  p->memPitch = value(cudaDevAttrMaxPitch);
  p->maxThreadsPerBlock = value(cudaDevAttrMaxThreadsPerBlock);
  p->maxThreadsPerMultiProcessor = value(cudaDevAttrMaxThreadsPerMultiProcessor);
  p->maxBlocksPerMultiProcessor = value(cudaDevAttrMaxBlocksPerMultiprocessor);
  p->maxThreadsDim[0] = value(cudaDevAttrMaxBlockDimX);
  p->maxThreadsDim[1] = value(cudaDevAttrMaxBlockDimY);
  p->maxThreadsDim[2] = value(cudaDevAttrMaxBlockDimZ);
  p->maxGridSize[0] = value(cudaDevAttrMaxGridDimX);
  p->maxGridSize[1] = value(cudaDevAttrMaxGridDimY);
  p->maxGridSize[2] = value(cudaDevAttrMaxGridDimZ);
  p->totalConstMem = value(cudaDevAttrTotalConstantMemory);
  p->major = value(cudaDevAttrComputeCapabilityMajor);
  p->minor = value(cudaDevAttrComputeCapabilityMinor);
  p->textureAlignment = value(cudaDevAttrTextureAlignment);
  p->multiProcessorCount = value(cudaDevAttrMultiProcessorCount);
  p->unifiedAddressing = p->managedMemory = p->concurrentManagedAccess = 1;
  p->concurrentKernels = p->canMapHostMemory = p->cooperativeLaunch = 1;
  p->streamPrioritiesSupported = p->memoryPoolsSupported = 1;
  p->memoryBusWidth = value(cudaDevAttrGlobalMemoryBusWidth);
  p->l2CacheSize = value(cudaDevAttrL2CacheSize);
  p->persistingL2CacheMaxSize = value(cudaDevAttrMaxPersistingL2CacheSize);
  p->accessPolicyMaxWindowSize = value(cudaDevAttrMaxAccessPolicyWindowSize);
  p->asyncEngineCount = value(cudaDevAttrAsyncEngineCount);
  p->pciBusID = number + 1;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  if (least) *least = 0;
  if (greatest) *greatest = -5;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) {
  *can = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) {
  return failed(cudaErrorPeerAccessUnsupported);
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int size, int number) {
  snprintf(text, size, "0000:%02x:00.0", number + 1);
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceSynchronize() {
  return refuse_while_capturing("cudaDeviceSynchronize");
}
EXPORT cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORT cudaError_t cudaProfilerStop() { return cudaSuccess; }

// The driver API, as Triton's launcher and torch's lazy driver calls use it.
#include "pretend.h"

#include <cstdio>
#include <cstring>

#include <dlfcn.h>

namespace {
using namespace pretend;

int context;  // there is one; only its address matters

struct Module {
  std::map<std::string, Kernel> kernels;
};

CUresult driver_error(cudaError_t error) {
  // An invalid configuration is an invalid value to the driver; the other codes agree.
  if (error == cudaErrorInvalidConfiguration) return CUDA_ERROR_INVALID_VALUE;
  return static_cast<CUresult>(error);
}

Kernel& kernel_of(CUfunction function) { return *reinterpret_cast<Kernel*>(function); }
CUcontext this_context() { return reinterpret_cast<CUcontext>(&context); }

CUresult launched(CUfunction function, Launch launch, CUstream stream) {
  if (!function) return CUDA_ERROR_INVALID_HANDLE;
  const Kernel& kernel = kernel_of(function);
  launch.shared_limit = kernel.shared_limit;
  launch.registers = kernel.registers;
  std::string name = "triton:" + kernel.name;
  if (cudaError_t error = checked(name, launch)) return driver_error(error);
  return driver_error(submit(stream, name));
}

// An entry point of ours by its name, also where the header gives it a version's suffix.
void* entry_point(const char* name) {
  void* found = nullptr;
  for (const char* suffix : {"_v2", ""}) {
    found = dlsym(RTLD_DEFAULT, (std::string(name) + suffix).c_str());
    if (found) break;
  }
  return found;
}

}  // namespace

// -- devices and contexts -------------------------------------------------------------------------

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) {
  *version = 13000;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetCount(int* count) {
  *count = device_count();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGet(CUdevice* device, int number) {
  if (number < 0 || number >= device_count()) return CUDA_ERROR_INVALID_DEVICE;
  *device = number;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetName(char* name, int size, CUdevice) {
  snprintf(name, size, "%s", device_name());
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
  *value = device_attribute(attribute);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDeviceTotalMem_v2(size_t* size, CUdevice) {
  *size = device_memory();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* found, CUdevice) {
  *found = this_context();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice) { return CUDA_SUCCESS; }
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* found) {
  *found = this_context();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext* found) {
  if (found) *found = this_context();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetDevice(CUdevice* device) {
  *device = current_device();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit) {
  *value = 8 << 20;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuCtxSynchronize() { return driver_error(cudaDeviceSynchronize()); }
EXPORT CUresult cuStreamGetCtx(CUstream, CUcontext* found) {
  *found = this_context();
  return CUDA_SUCCESS;
}
EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  return driver_error(cudaStreamSynchronize(stream));
}

// -- modules --------------------------------------------------------------------------------------

EXPORT CUresult cuModuleLoadData(CUmodule* made, const void* image) {
  if (cudaError_t error = refuse_while_capturing("cuModuleLoadData")) return driver_error(error);
  auto* module = new Module{kernels_of(image)};
  if (module->kernels.empty()) {
    delete module;
    return CUDA_ERROR_INVALID_IMAGE;
  }
  *made = reinterpret_cast<CUmodule>(module);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoadDataEx(CUmodule* made, const void* image, unsigned, CUjit_option*,
                                   void**) {
  return cuModuleLoadData(made, image);
}
EXPORT CUresult cuModuleLoad(CUmodule* made, const char* path) {
  FILE* file = fopen(path, "rb");
  if (!file) return CUDA_ERROR_FILE_NOT_FOUND;
  std::vector<char> image;
  char part[4096];
  for (size_t size; (size = fread(part, 1, sizeof part, file)) > 0;)
    image.insert(image.end(), part, part + size);
  fclose(file);
  return cuModuleLoadData(made, image.empty() ? nullptr : image.data());
}
EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }  // graphs may hold its kernels
EXPORT CUresult cuModuleGetFunction(CUfunction* found, CUmodule handle, const char* name) {
  auto& kernels = reinterpret_cast<Module*>(handle)->kernels;
  auto kernel = kernels.find(name);
  if (kernel == kernels.end()) return CUDA_ERROR_NOT_FOUND;
  *found = reinterpret_cast<CUfunction>(&kernel->second);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetModule(CUmodule*, CUfunction) { return CUDA_ERROR_NOT_SUPPORTED; }
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute,
                                   CUfunction function) {
  const Kernel& kernel = kernel_of(function);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel.registers; break;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *value = 1024; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES:
      *value = static_cast<int>(kernel.shared_static);
      break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute,
                                   int value) {
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  if (value < 0 || static_cast<size_t>(value) > kSharedOptin) return CUDA_ERROR_INVALID_VALUE;
  kernel_of(function).shared_limit = value;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
// nvJitLink's predecessor, which torch's compiler asks for in vain.
EXPORT CUresult cuLinkCreate_v2(unsigned, CUjit_option*, void**, CUlinkState*) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
EXPORT CUresult cuLinkAddData_v2(CUlinkState, CUjitInputType, void*, size_t, const char*, unsigned,
                                 CUjit_option*, void**) {
  return CUDA_ERROR_NOT_SUPPORTED;
}
EXPORT CUresult cuLinkComplete(CUlinkState, void**, size_t*) { return CUDA_ERROR_NOT_SUPPORTED; }

// -- launches -------------------------------------------------------------------------------------

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz,
                               unsigned bx, unsigned by, unsigned bz, unsigned shared,
                               CUstream stream, void**, void**) {
  return launched(function, {{gx, gy, gz}, {bx, by, bz}, shared}, stream);
}
EXPORT CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned gx, unsigned gy,
                                          unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                          unsigned shared, CUstream stream, void**) {
  Launch launch{{gx, gy, gz}, {bx, by, bz}, shared};
  launch.cooperative = true;
  return launched(function, launch, stream);
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**,
                                 void**) {
  Launch launch{{config->gridDimX, config->gridDimY, config->gridDimZ},
                {config->blockDimX, config->blockDimY, config->blockDimZ},
                config->sharedMemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i)
    if (config->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
      launch.cooperative = config->attrs[i].value.cooperative != 0;
  return launched(function, launch, config->hStream);
}
EXPORT CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, CUfunction function,
                                                            int threads, size_t shared) {
  *blocks = resident_blocks(threads, shared, kernel_of(function).registers);
  return CUDA_SUCCESS;
}
EXPORT CUresult cuOccupancyMaxActiveClusters(int* clusters, CUfunction, const CUlaunchConfig*) {
  *clusters = 16;  // of the portable size 8 on 132 multiprocessors
  return CUDA_SUCCESS;
}
EXPORT CUresult cuTensorMapEncodeTiled(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*,
                                       const cuuint64_t*, const cuuint64_t*, const cuuint32_t*,
                                       const cuuint32_t*, CUtensorMapInterleave,
                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                       CUtensorMapFloatOOBfill) {
  return CUDA_SUCCESS;  // the kernels that would read it compute nothing
}

// -- memory ---------------------------------------------------------------------------------------

EXPORT CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void* from, size_t size,
                                     CUstream stream) {
  void* target = reinterpret_cast<void*>(to);
  return driver_error(cudaMemcpyAsync(target, from, size, cudaMemcpyHostToDevice, stream));
}
EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute attribute,
                                      CUdeviceptr address) {
  Place place = place_of(reinterpret_cast<void*>(address));
  if (place.kind == Kind::none) return CUDA_ERROR_INVALID_VALUE;
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      *static_cast<CUdeviceptr*>(value) = address;
      return CUDA_SUCCESS;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL:
      *static_cast<int*>(value) = place.device;
      return CUDA_SUCCESS;
    default: memset(value, 0, sizeof(int)); return CUDA_SUCCESS;
  }
}

// -- entry points by name -------------------------------------------------------------------------

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** found, unsigned,
                                                    unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *found = entry_point(name);
  if (result) *result = *found ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
EXPORT CUresult cuGetProcAddress_v2(const char* name, void** found, int, cuuint64_t,
                                    CUdriverProcAddressQueryResult* result) {
  *found = entry_point(name);
  if (result)
    *result = *found ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *found ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

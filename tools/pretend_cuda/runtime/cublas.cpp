// cuBLAS and cuBLASLt: products that are noted and not made.
#include "library.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

using namespace pretend;

namespace {
constexpr int kNotInitialized = 1, kExecutionFailed = 13;
constexpr int kVersion = 130100;
constexpr size_t kDescriptor = 1024;  // bytes; larger than any of cuBLASLt's
}  // namespace

EXPORT int cublasCreate_v2(void** handle) {
  return make_library(handle, "cublasCreate") ? 0 : kNotInitialized;
}
EXPORT int cublasDestroy_v2(void* handle) {
  delete &library_of(handle);
  return 0;
}
EXPORT int cublasSetStream_v2(void* handle, cudaStream_t stream) {
  library_of(handle).stream = stream;
  return 0;
}
EXPORT int cublasGetStream_v2(void* handle, cudaStream_t* stream) {
  *stream = library_of(handle).stream;
  return 0;
}
EXPORT int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
EXPORT int cublasSetMathMode(void* handle, int mode) {
  library_of(handle).math_mode = mode;
  return 0;
}
EXPORT int cublasGetMathMode(void* handle, int* mode) {
  *mode = library_of(handle).math_mode;
  return 0;
}
EXPORT int cublasSetPointerMode_v2(void* handle, int mode) {
  library_of(handle).pointer_mode = mode;
  return 0;
}
EXPORT int cublasGetPointerMode_v2(void* handle, int* mode) {
  *mode = library_of(handle).pointer_mode;
  return 0;
}
EXPORT int cublasGetVersion_v2(void*, int* version) {
  *version = kVersion;
  return 0;
}
EXPORT size_t cublasGetCudartVersion() { return 13000; }

#define WORK(NAME) LIBRARY_WORK(NAME, kExecutionFailed)
#define WORK_SDCZ(NAME) \
  WORK(cublasS##NAME) WORK(cublasD##NAME) WORK(cublasC##NAME) WORK(cublasZ##NAME)
WORK_SDCZ(gemm_v2)
WORK_SDCZ(gemv_v2)
WORK_SDCZ(gemmBatched)
WORK_SDCZ(gemmStridedBatched)
WORK_SDCZ(trsm_v2)
WORK_SDCZ(trsmBatched)
WORK_SDCZ(trmm_v2)
WORK_SDCZ(gelsBatched)
WORK_SDCZ(geqrfBatched)
WORK_SDCZ(getrfBatched)
WORK_SDCZ(getrsBatched)
WORK_SDCZ(axpy_v2)
WORK_SDCZ(scal_v2)
WORK_SDCZ(copy_v2)
WORK_SDCZ(swap_v2)
WORK(cublasSdot_v2)
WORK(cublasDdot_v2)
WORK(cublasCdotu_v2)
WORK(cublasCdotc_v2)
WORK(cublasZdotu_v2)
WORK(cublasZdotc_v2)
WORK(cublasDotEx)
WORK(cublasGemmEx)
WORK(cublasSgemmEx)
WORK(cublasGemmStridedBatchedEx)

// -- cuBLASLt -------------------------------------------------------------------------------------

#define DESCRIPTOR(NAME) \
  EXPORT int NAME##Create(void** made, ...) { \
    *made = calloc(1, kDescriptor); \
    return 0; \
  } \
  EXPORT int NAME##Destroy(void* made) { \
    free(made); \
    return 0; \
  } \
  EXPORT int NAME##SetAttribute(void*, ...) { return 0; }
DESCRIPTOR(cublasLtMatmulDesc)
DESCRIPTOR(cublasLtMatmulPreference)
DESCRIPTOR(cublasLtMatrixLayout)

namespace {
// As cublasLtMatmulHeuristicResult_t: which algorithm, its workspace in bytes, whether it works.
struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
}  // namespace

EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*,
                                          int wanted, Heuristic* results, int* found) {
  *found = wanted > 0 ? 1 : 0;
  if (*found) memset(results, 0, sizeof *results);
  return 0;
}
EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*,
                          const void*, const void*, void*, void*, void*, const void*, void*, size_t,
                          cudaStream_t stream) {
  return submit(stream, "cublasLtMatmul") ? kExecutionFailed : 0;
}
EXPORT size_t cublasLtGetVersion() { return kVersion; }

// cuDNN's older API, by which torch runs batch norms.
#include "library.h"

#include <cstdlib>

namespace {
constexpr int kExecutionFailed = 5000;
constexpr size_t kDescriptor = 512;  // bytes
constexpr size_t kWorkspace = 1024;  // bytes
}  // namespace

#define DESCRIPTOR(NAME) \
  EXPORT int cudnnCreate##NAME(void** made) { \
    *made = calloc(1, kDescriptor); \
    return 0; \
  } \
  EXPORT int cudnnDestroy##NAME(void* made) { \
    free(made); \
    return 0; \
  }
DESCRIPTOR(TensorDescriptor)
DESCRIPTOR(ActivationDescriptor)
EXPORT int cudnnSetTensorNdDescriptor(void*, ...) { return 0; }
EXPORT int cudnnSetActivationDescriptor(void*, ...) { return 0; }

EXPORT int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*,
                                                                    void*, void*, void*,
                                                                    size_t* size) {
  *size = kWorkspace;
  return 0;
}
EXPORT int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*,
                                                                size_t* size) {
  *size = kWorkspace;
  return 0;
}
EXPORT int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*,
                                                             void*, void*, void*, void*,
                                                             size_t* size) {
  *size = kWorkspace;
  return 0;
}
LIBRARY_WORK(cudnnBatchNormalizationForwardTrainingEx, kExecutionFailed)
LIBRARY_WORK(cudnnBatchNormalizationBackwardEx, kExecutionFailed)
LIBRARY_WORK(cudnnBatchNormalizationForwardInference, kExecutionFailed)

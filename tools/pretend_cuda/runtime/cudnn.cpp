// cuDNN's backend API, by which torch runs convolutions: an operation, its engine, its plan.
//
// Descriptors keep which others they were made of. A plan is named by the operations it leads to.
// The heuristics always offer one engine, which needs no workspace.
#include "library.h"

#include <cstdint>
#include <cstdio>
#include <cstring>

#include <cudnn_graph.h>

namespace {
using namespace pretend;

struct Descriptor {
  cudnnBackendDescriptorType_t type;
  std::vector<Descriptor*> parts;
};

std::set<Descriptor*>& descriptors() {
  static auto* all = new std::set<Descriptor*>;
  return *all;
}

Descriptor* known(void* handle) {
  auto* descriptor = static_cast<Descriptor*>(handle);
  return descriptors().count(descriptor) ? descriptor : nullptr;
}

const char* operation(cudnnBackendDescriptorType_t type) {
  switch (type) {
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR: return " fprop";
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_DATA_DESCRIPTOR: return " dgrad";
    case CUDNN_BACKEND_OPERATION_CONVOLUTION_BACKWARD_FILTER_DESCRIPTOR: return " wgrad";
    case CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR: return " pointwise";
    case CUDNN_BACKEND_OPERATION_MATMUL_DESCRIPTOR: return " matmul";
    default: return "";
  }
}

void describe(Descriptor* descriptor, std::set<Descriptor*>& seen, std::string& text) {
  if (!known(descriptor) || !seen.insert(descriptor).second) return;
  text += operation(descriptor->type);
  for (Descriptor* part : descriptor->parts) describe(part, seen, text);
}

size_t bytes_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_VOID_PTR: return 8;
    case CUDNN_TYPE_CHAR: return 1;
    default: return 4;
  }
}

}  // namespace

EXPORT size_t cudnnGetVersion() { return CUDNN_VERSION; }
EXPORT size_t cudnnGetCudartVersion() { return 13000; }
EXPORT const char* cudnnGetErrorString(cudnnStatus_t status) {
  return status == CUDNN_STATUS_SUCCESS ? "CUDNN_STATUS_SUCCESS" : "CUDNN_STATUS_EXECUTION_FAILED";
}
EXPORT void cudnnGetLastErrorString(char* text, size_t size) {
  if (size) snprintf(text, size, "%s", "the stream refused the work");
}
EXPORT cudnnStatus_t cudnnCreate(cudnnHandle_t* handle) {
  bool made = make_library(reinterpret_cast<void**>(handle), "cudnnCreate");
  return made ? CUDNN_STATUS_SUCCESS : CUDNN_STATUS_NOT_INITIALIZED;
}
EXPORT cudnnStatus_t cudnnDestroy(cudnnHandle_t) { return CUDNN_STATUS_SUCCESS; }
EXPORT cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) {
  library_of(handle).stream = stream;
  return CUDNN_STATUS_SUCCESS;
}
EXPORT cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t* stream) {
  *stream = library_of(handle).stream;
  return CUDNN_STATUS_SUCCESS;
}
EXPORT cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type,
                                                  cudnnBackendDescriptor_t* made) {
  Lock lock(mutex());
  auto* descriptor = new Descriptor{type, {}};
  descriptors().insert(descriptor);
  *made = descriptor;
  return CUDNN_STATUS_SUCCESS;
}
// Kept: plans that are cached still speak of the descriptors they were made of.
EXPORT cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t) {
  return CUDNN_STATUS_SUCCESS;
}
EXPORT cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t) {
  return CUDNN_STATUS_SUCCESS;
}
EXPORT cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t handle,
                                              cudnnBackendAttributeName_t,
                                              cudnnBackendAttributeType_t type, int64_t count,
                                              const void* values) {
  Lock lock(mutex());
  Descriptor* descriptor = known(handle);
  if (!descriptor) return CUDNN_STATUS_BAD_PARAM;
  if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR) return CUDNN_STATUS_SUCCESS;
  auto* parts = static_cast<Descriptor* const*>(values);
  descriptor->parts.insert(descriptor->parts.end(), parts, parts + count);
  return CUDNN_STATUS_SUCCESS;
}
// A descriptor that is handed over to be filled comes to be made of the one that fills it.
EXPORT cudnnStatus_t cudnnBackendGetAttribute(cudnnBackendDescriptor_t handle,
                                              cudnnBackendAttributeName_t,
                                              cudnnBackendAttributeType_t type, int64_t room,
                                              int64_t* count, void* values) {
  Lock lock(mutex());
  Descriptor* descriptor = known(handle);
  if (!descriptor) return CUDNN_STATUS_BAD_PARAM;
  bool notes = type == CUDNN_TYPE_NUMERICAL_NOTE || type == CUDNN_TYPE_BEHAVIOR_NOTE ||
               type == CUDNN_TYPE_CHAR;  // none; names are empty
  if (values && room > 0) {
    if (type != CUDNN_TYPE_BACKEND_DESCRIPTOR) {
      memset(values, 0, bytes_of(type));
    } else if (Descriptor* filled = known(static_cast<void**>(values)[0])) {
      filled->parts.push_back(descriptor);
    }
  }
  if (count) *count = notes ? 0 : 1;
  return CUDNN_STATUS_SUCCESS;
}
EXPORT cudnnStatus_t cudnnBackendExecute(cudnnHandle_t handle, cudnnBackendDescriptor_t plan,
                                         cudnnBackendDescriptor_t) {
  std::string name = "cudnn";
  {
    Lock lock(mutex());
    std::set<Descriptor*> seen;
    describe(static_cast<Descriptor*>(plan), seen, name);
  }
  cudaError_t error = submit(library_of(handle).stream, name);
  return error ? CUDNN_STATUS_EXECUTION_FAILED : CUDNN_STATUS_SUCCESS;
}

// What cuBLAS, cuDNN and cuSOLVER have in common here: a handle with a stream, and calls that are
// one piece of work on it.
//
// Only the handle is read of most calls. In the x86-64 calling convention a variadic function finds
// its first arguments where any caller puts them, so one definition serves signatures of any
// length, and their headers are not needed.
#pragma once

#include "pretend.h"

#if !defined(__x86_64__)
#error "The pretended libraries rely on the calling convention of x86-64."
#endif

namespace pretend {

struct Library {
  cudaStream_t stream = nullptr;
  int math_mode = 0;
  int pointer_mode = 0;
};

inline Library& library_of(void* handle) { return *static_cast<Library*>(handle); }

// A handle takes memory of the device, so it cannot be made while a capture forbids that.
inline bool make_library(void** handle, const char* call) {
  if (refuse_while_capturing(call)) return false;
  *handle = new Library;
  return true;
}

}  // namespace pretend

// A call whose first argument is the handle and which launches work; STATUS if the stream refuses.
#define LIBRARY_WORK(NAME, STATUS) \
  EXPORT int NAME(void* handle, ...) { \
    return pretend::submit(pretend::library_of(handle).stream, #NAME) ? STATUS : 0; \
  }

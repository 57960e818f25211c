// cuSOLVER: factorizations and eigenvalues that are noted and not made. Their info flags are read
// off memory that nothing wrote: 0, all was well. torch copies them to the host, which no capture
// survives.
#include "library.h"

#include <cstdarg>

using namespace pretend;

namespace {

constexpr int kNotInitialized = 1, kExecutionFailed = 6;
constexpr int kWorkspace = 1024;  // of the type's elements, or bytes in the generic API

// The argument at a place (the handle's is 1), and how the values go on after it.
void* argument(va_list& values, int place) {
  void* found = nullptr;
  for (int i = 2; i <= place; ++i) found = va_arg(values, void*);
  return found;
}

int answer_elements(va_list& values, int place) {
  *static_cast<int*>(argument(values, place)) = kWorkspace;
  return 0;
}
// The generic API asks for the device's and the host's workspace, one after the other.
int answer_bytes(va_list& values, int place) {
  *static_cast<size_t*>(argument(values, place)) = kWorkspace;
  *static_cast<size_t*>(va_arg(values, void*)) = kWorkspace;
  return 0;
}

int made_any(void** made) {
  *made = new int;
  return 0;
}

}  // namespace

EXPORT int cusolverDnCreate(void** handle) {
  return make_library(handle, "cusolverDnCreate") ? 0 : kNotInitialized;
}
EXPORT int cusolverDnDestroy(void* handle) {
  delete &library_of(handle);
  return 0;
}
EXPORT int cusolverDnSetStream(void* handle, cudaStream_t stream) {
  library_of(handle).stream = stream;
  return 0;
}

#define PARAMETERS(NAME) \
  EXPORT int cusolverDnCreate##NAME(void** made) { return made_any(made); } \
  EXPORT int cusolverDnDestroy##NAME(void*) { return 0; }
PARAMETERS(Params)
PARAMETERS(GesvdjInfo)
PARAMETERS(SyevjInfo)
EXPORT int cusolverDnXgesvdjSetTolerance(void*, double) { return 0; }
EXPORT int cusolverDnXgesvdjSetMaxSweeps(void*, int) { return 0; }
EXPORT int cusolverDnXgesvdjSetSortEig(void*, int) { return 0; }

// A routine and the question for its workspace, whose answer goes to the argument at PLACE.
#define WORK(NAME) LIBRARY_WORK(cusolverDn##NAME, kExecutionFailed)
#define SIZE(NAME, PLACE, ANSWER) \
  EXPORT int cusolverDn##NAME##_bufferSize(void* handle, ...) { \
    va_list values; \
    va_start(values, handle); \
    int status = ANSWER(values, PLACE); \
    va_end(values); \
    return status; \
  }
#define ROUTINE(NAME, PLACE) WORK(NAME) SIZE(NAME, PLACE, answer_elements)
#define GENERIC(NAME, PLACE) WORK(NAME) SIZE(NAME, PLACE, answer_bytes)
#define REAL(NAME, PLACE) ROUTINE(S##NAME, PLACE) ROUTINE(D##NAME, PLACE)
#define COMPLEX(NAME, PLACE) ROUTINE(C##NAME, PLACE) ROUTINE(Z##NAME, PLACE)
#define BOTH(NAME, PLACE) REAL(NAME, PLACE) COMPLEX(NAME, PLACE)
#define ALONE(NAME) WORK(S##NAME) WORK(D##NAME) WORK(C##NAME) WORK(Z##NAME)

BOTH(potrf, 6)
BOTH(getrf, 6)
BOTH(geqrf, 6)
BOTH(sytrf, 5)
BOTH(gesvd, 4)
BOTH(gesvdj, 13)
BOTH(gesvdjBatched, 12)
BOTH(gesvdaStridedBatched, 17)
REAL(orgqr, 8)
COMPLEX(ungqr, 8)
REAL(ormqr, 12)
COMPLEX(unmqr, 12)
REAL(syevd, 8)
COMPLEX(heevd, 8)
REAL(syevj, 8)
COMPLEX(heevj, 8)
REAL(syevjBatched, 8)
COMPLEX(heevjBatched, 8)
ALONE(potrs)
ALONE(potrfBatched)
ALONE(potrsBatched)
ALONE(getrs)
GENERIC(Xpotrf, 9)
GENERIC(Xgeqrf, 11)
GENERIC(Xsyevd, 12)
GENERIC(XsyevBatched, 12)
GENERIC(Xgeev, 18)
GENERIC(Xsytrs, 12)
WORK(Xpotrs)

// Streams and events. Uncaptured work is done when it is sent, so nothing is ever waited for.
#include "pretend.h"

#include <algorithm>
#include <unordered_set>

namespace pretend {
namespace {

struct Event {
  bool recorded = false;
  double at = 0;                   // of the device's clock, microseconds
  unsigned long long capture = 0;  // the capture that recorded it last; 0: none
  std::vector<Node*> frontier;     // what a stream that waits for it comes after
};

std::unordered_set<void*>& handles() {
  static auto* all = new std::unordered_set<void*>;
  return *all;
}
int next_stream = 1;
double clock_us = 0;

Event* event_of(cudaEvent_t handle) {
  return handles().count(handle) ? reinterpret_cast<Event*>(handle) : nullptr;
}

// The two streams that every device has.
Stream& own_stream(bool legacy) {
  static auto* streams = new std::map<std::pair<int, bool>, Stream>;
  Stream& stream = (*streams)[{current_device(), legacy}];
  stream.device = current_device();
  stream.legacy = legacy;
  return stream;
}

// Asking for the state of captured work: it is not scheduled, so there is none.
cudaError_t refuse_captured(Event& event, const char* call) {
  if (!event.capture) return cudaSuccess;
  if (Capture* capture = running(event.capture))
    break_capture(*capture, std::string(call) + " of a captured event");
  return failed(cudaErrorCapturedEvent);
}

cudaError_t refuse_captured(Stream& stream, const char* call) {
  if (!stream.capture) return cudaSuccess;
  break_capture(*stream.capture, std::string(call) + " of a captured stream");
  return failed(cudaErrorStreamCaptureUnsupported);
}

// Whether a capture forbids the legacy stream: it would wait for the capture's blocking stream.
bool legacy_forbidden(const Stream& stream) {
  if (!stream.legacy) return false;
  for (Capture* capture : captures())
    if (capture->origin->device == stream.device &&
        !(capture->origin->flags & cudaStreamNonBlocking)) {
      break_capture(*capture, "the legacy stream beside a capturing blocking stream");
      return true;
    }
  return false;
}

void join(std::vector<Node*>& frontier, const std::vector<Node*>& more) {
  for (Node* node : more)
    if (std::find(frontier.begin(), frontier.end(), node) == frontier.end())
      frontier.push_back(node);
}

}  // namespace

Stream& stream_of(cudaStream_t handle) {
  if (!handle || handle == cudaStreamLegacy) return own_stream(true);
  if (handle == cudaStreamPerThread) return own_stream(false);
  return *reinterpret_cast<Stream*>(handle);
}

double now_us() { return clock_us; }
void advance(double microseconds) { clock_us += microseconds; }

// Kernels, copies and memsets all come here.
cudaError_t submit(cudaStream_t handle, const std::string& name, Effect effect) {
  {
    Lock lock(mutex());
    Stream& stream = stream_of(handle);
    if (Capture* capture = stream.capture) {
      if (capture->broken) return failed(cudaErrorStreamCaptureInvalidated);
      auto node = std::make_unique<Node>();
      node->name = &interned(name);
      node->effect = std::move(effect);
      node->after = stream.frontier;
      for (Node* before : node->after) before->followed = true;
      stream.frontier = {node.get()};
      (*capture->graph)->nodes.push_back(std::move(node));
      return cudaSuccess;
    }
    if (legacy_forbidden(stream)) return failed(cudaErrorStreamCaptureImplicit);
    for (Capture* capture : captures())
      if (pthread_equal(capture->owner, pthread_self())) count_escape(name);
    count_launch(name);
    advance(3);  // about what a small launch takes
  }
  if (effect) effect();  // without the lock: a collective waits for other processes
  return cudaSuccess;
}

}  // namespace pretend

using namespace pretend;

// -- streams --------------------------------------------------------------------------------------

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* made, unsigned flags, int priority) {
  Lock lock(mutex());
  auto* stream = new Stream;
  stream->number = next_stream++;
  stream->device = current_device();
  stream->flags = flags;
  stream->priority = priority;
  *made = reinterpret_cast<cudaStream_t>(stream);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* made, unsigned flags) {
  return cudaStreamCreateWithPriority(made, flags, 0);
}
EXPORT cudaError_t cudaStreamCreate(cudaStream_t* made) {
  return cudaStreamCreateWithPriority(made, cudaStreamDefault, 0);
}
// Kept, for captures and programs may still speak of it.
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  *priority = stream_of(handle).priority;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetFlags(cudaStream_t handle, unsigned* flags) {
  *flags = stream_of(handle).flags;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t handle) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  if (cudaError_t error = refuse_captured(stream, "cudaStreamQuery")) return error;
  if (legacy_forbidden(stream)) return failed(cudaErrorStreamCaptureImplicit);
  return refuse_while_capturing("cudaStreamQuery");
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  if (cudaError_t error = refuse_captured(stream, "cudaStreamSynchronize")) return error;
  if (legacy_forbidden(stream)) return failed(cudaErrorStreamCaptureImplicit);
  return refuse_while_capturing("cudaStreamSynchronize");
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  Event* event = event_of(event_handle);
  if (!event) return failed(cudaErrorInvalidResourceHandle);
  if (Capture* capture = running(event->capture)) {
    if (capture->broken) return failed(cudaErrorStreamCaptureInvalidated);
    if (stream.legacy) {
      break_capture(*capture, "the legacy stream waits for captured work");
      return failed(cudaErrorStreamCaptureImplicit);
    }
    if (stream.capture && stream.capture != capture) {
      break_capture(*capture, "two captures merged");
      break_capture(*stream.capture, "two captures merged");
      return failed(cudaErrorStreamCaptureMerge);
    }
    if (!stream.capture) {  // it joins the capture
      stream.capture = capture;
      stream.frontier.clear();
      capture->streams.insert(&stream);
    }
    join(stream.frontier, event->frontier);
    return cudaSuccess;
  }
  if (event->capture) return failed(cudaErrorCapturedEvent);  // of a capture that has ended
  if (stream.capture && event->recorded) {
    break_capture(*stream.capture, "a captured stream waits for uncaptured work");
    return failed(cudaErrorStreamCaptureIsolation);
  }
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t handle, cudaStreamCallback_t callback,
                                         void* data, unsigned) {
  {
    Lock lock(mutex());
    Stream& stream = stream_of(handle);
    if (cudaError_t error = refuse_captured(stream, "cudaStreamAddCallback")) return error;
  }
  callback(handle, cudaSuccess, data);
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void* data) {
  return submit(handle, "host function", [=] { function(data); });
}

// -- events ---------------------------------------------------------------------------------------

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* made, unsigned) {
  Lock lock(mutex());
  *made = reinterpret_cast<cudaEvent_t>(new Event);
  handles().insert(*made);
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventCreate(cudaEvent_t* made) { return cudaEventCreateWithFlags(made, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  Lock lock(mutex());
  Event* event = event_of(handle);
  if (!event) return failed(cudaErrorInvalidResourceHandle);
  handles().erase(handle);
  delete event;
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event_handle, cudaStream_t handle,
                                            unsigned flags) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  Event* event = event_of(event_handle);
  if (!event) return failed(cudaErrorInvalidResourceHandle);
  if (legacy_forbidden(stream)) return failed(cudaErrorStreamCaptureImplicit);
  if (stream.capture) {
    if (stream.capture->broken) return failed(cudaErrorStreamCaptureInvalidated);
    if (flags & cudaEventRecordExternal) return submit(handle, "event record");
    event->capture = stream.capture->id;
    event->frontier = stream.frontier;
  } else {
    event->capture = 0;
    event->frontier.clear();
  }
  event->recorded = true;
  event->at = now_us();
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t handle) {
  Lock lock(mutex());
  Event* event = event_of(handle);
  if (!event) return failed(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_captured(*event, "cudaEventQuery")) return error;
  return refuse_while_capturing("cudaEventQuery");
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  Lock lock(mutex());
  Event* event = event_of(handle);
  if (!event) return failed(cudaErrorInvalidResourceHandle);
  if (cudaError_t error = refuse_captured(*event, "cudaEventSynchronize")) return error;
  return refuse_while_capturing("cudaEventSynchronize");
}
EXPORT cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t from, cudaEvent_t to) {
  Lock lock(mutex());
  Event *first = event_of(from), *second = event_of(to);
  if (!first || !second || !first->recorded || !second->recorded)
    return failed(cudaErrorInvalidResourceHandle);
  if (first->capture || second->capture) return failed(cudaErrorCapturedEvent);
  // Never 0: programs divide by it.
  *milliseconds = static_cast<float>((second->at - first->at) / 1e3 + 1e-3);
  return cudaSuccess;
}

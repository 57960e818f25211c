// Stream capture and its rules, as the CUDA programming guide gives them.
#include "pretend.h"

#include <algorithm>
#include <utility>

#include <execinfo.h>
#include <unistd.h>

namespace pretend {
namespace {

unsigned long long next_capture = 1;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

// A thread of global mode heeds every global capture and those it began itself; one of thread-local
// mode only the latter; a relaxed one none. A capture that was begun relaxed forbids nothing.
bool forbids(const Capture& capture) {
  bool own = pthread_equal(capture.owner, pthread_self());
  bool strict = capture.mode != cudaStreamCaptureModeRelaxed;
  switch (thread_mode) {
    case cudaStreamCaptureModeGlobal:
      return capture.mode == cudaStreamCaptureModeGlobal || (own && strict);
    case cudaStreamCaptureModeThreadLocal: return own && strict;
    default: return false;
  }
}

// Every node must lead back to the stream where the capture began.
bool joined(const Capture& capture) {
  const std::vector<Node*>& ends = capture.origin->frontier;
  for (const auto& node : (*capture.graph)->nodes)
    if (!node->followed && std::find(ends.begin(), ends.end(), node.get()) == ends.end()) {
      log("UNJOINED: %s leads nowhere", node->name->c_str());
      return false;
    }
  return true;
}

}  // namespace

std::vector<Capture*>& captures() {
  static auto* all = new std::vector<Capture*>;
  return *all;
}

Capture* running(unsigned long long id) {
  for (Capture* capture : captures())
    if (capture->id == id) return capture;
  return nullptr;
}

void break_capture(Capture& capture, const std::string& why) {
  if (capture.broken) return;
  capture.broken = true;
  log("BROKEN: capture %llu: %s", capture.id, why.c_str());
  static const bool wanted = flag("PRETEND_CUDA_STACK");
  if (!wanted) return;
  void* frames[32];
  backtrace_symbols_fd(frames, backtrace(frames, 32), STDERR_FILENO);
}

cudaError_t refuse_while_capturing(const char* call) {
  Lock lock(mutex());
  bool refused = false;
  for (Capture* capture : captures())
    if (forbids(*capture)) {
      break_capture(*capture, std::string("unsafe call ") + call);
      refused = true;
    }
  return refused ? failed(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

}  // namespace pretend

using namespace pretend;

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode mode) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  if (stream.legacy) return failed(cudaErrorStreamCaptureUnsupported);
  if (stream.capture) return failed(cudaErrorIllegalState);
  auto* graph = new GraphHandle(std::make_shared<Graph>());
  auto* capture = new Capture{next_capture++, mode, &stream, pthread_self(), graph, {&stream}};
  stream.capture = capture;
  stream.frontier.clear();
  captures().push_back(capture);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* made) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  Capture* capture = stream.capture;
  *made = nullptr;
  if (!capture) return failed(cudaErrorIllegalState);
  if (capture->origin != &stream) {
    break_capture(*capture, "ended on another stream than it began");
    return failed(cudaErrorStreamCaptureUnmatched);
  }
  bool own = pthread_equal(capture->owner, pthread_self());
  if (!own && capture->mode != cudaStreamCaptureModeRelaxed) {
    break_capture(*capture, "ended by another thread");
    return failed(cudaErrorStreamCaptureWrongThread);
  }
  bool all_joined = joined(*capture);
  for (Stream* member : capture->streams) {
    member->capture = nullptr;
    member->frontier.clear();
  }
  captures().erase(std::find(captures().begin(), captures().end(), capture));
  std::unique_ptr<Capture> ended(capture);
  if (ended->broken || !all_joined) {
    delete ended->graph;
    return failed(ended->broken ? cudaErrorStreamCaptureInvalidated
                                : cudaErrorStreamCaptureUnjoined);
  }
  remember_graph(**ended->graph);
  *made = reinterpret_cast<cudaGraph_t>(ended->graph);
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  Lock lock(mutex());
  Stream& stream = stream_of(handle);
  if (stream.legacy)
    for (Capture* capture : captures())
      if (capture->origin->device == stream.device &&
          !(capture->origin->flags & cudaStreamNonBlocking))
        return failed(cudaErrorStreamCaptureImplicit);  // asking breaks nothing
  *status = !stream.capture          ? cudaStreamCaptureStatusNone
            : stream.capture->broken ? cudaStreamCaptureStatusInvalidated
                                     : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status,
                                            unsigned long long* id, cudaGraph_t* graph,
                                            const cudaGraphNode_t** nodes,
                                            const cudaGraphEdgeData** edges, size_t* count) {
  Lock lock(mutex());
  if (cudaError_t error = cudaStreamIsCapturing(handle, status)) return error;
  Stream& stream = stream_of(handle);
  Capture* capture = stream.capture;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = capture ? reinterpret_cast<cudaGraph_t>(capture->graph) : nullptr;
  if (nodes) *nodes = reinterpret_cast<const cudaGraphNode_t*>(stream.frontier.data());
  if (edges) *edges = nullptr;  // all of the usual kind
  if (count) *count = capture ? stream.frontier.size() : 0;
  return cudaSuccess;
}

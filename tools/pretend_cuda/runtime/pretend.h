// What the parts of the pretended CUDA runtime share. Each part says what it stands for at its top.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

// Seen by the programs that preload the library; everything else stays inside it.
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace pretend {

// One lock for all state. Recursive, because entry points call each other.
using Lock = std::lock_guard<std::recursive_mutex>;
std::recursive_mutex& mutex();

// -- log and census -------------------------------------------------------------------------------

void log(const char* format, ...) __attribute__((format(printf, 1, 2)));
bool flag(const char* variable);  // whether an environment variable is there and not "0"
const std::string& interned(const std::string& name);
void count_launch(const std::string& name);
void count_escape(const std::string& name);

// -- graphs ---------------------------------------------------------------------------------------

// What a piece of work does to memory: copies and memsets do, kernels do nothing.
using Effect = std::function<void()>;

struct Node {
  const std::string* name;
  std::vector<Node*> after;
  bool followed = false;  // by another node; a leaf is not
  Effect effect;
};

struct Graph {
  std::deque<std::unique_ptr<Node>> nodes;
};
using GraphHandle = std::shared_ptr<Graph>;  // cudaGraph_t and cudaGraphExec_t point to one

void remember_graph(const Graph& graph);  // for pretend_cuda_graphs

// -- streams, events and captures -----------------------------------------------------------------

struct Stream;

struct Capture {
  unsigned long long id;
  cudaStreamCaptureMode mode;
  Stream* origin;
  pthread_t owner;
  GraphHandle* graph;
  std::set<Stream*> streams;
  bool broken = false;
};

struct Stream {
  int number = 0;
  int device = 0;
  unsigned flags = 0;
  int priority = 0;
  bool legacy = false;
  Capture* capture = nullptr;
  std::vector<Node*> frontier;  // the nodes that the next captured node comes after
};

Stream& stream_of(cudaStream_t handle);
std::vector<Capture*>& captures();  // those that are going on
Capture* running(unsigned long long id);
double now_us();  // the pretended device's clock: it goes on with the work, not with time
void advance(double microseconds);

// Refuses a call that may not be made while a capture is going on, by thread and mode.
cudaError_t refuse_while_capturing(const char* call);
void break_capture(Capture& capture, const std::string& why);

// Sends work to a stream: a node where the stream is captured, else it is done at once.
cudaError_t submit(cudaStream_t stream, const std::string& name, Effect effect = {});

// -- errors and devices ---------------------------------------------------------------------------

cudaError_t failed(cudaError_t error);  // keeps it for cudaGetLastError
int device_count();
int current_device();
const char* device_name();
size_t device_memory();
int device_attribute(int attribute);

// -- memory ---------------------------------------------------------------------------------------

enum class Kind { none, device, pinned };
struct Place {
  Kind kind = Kind::none;
  int device = 0;
  const char* start = nullptr;
  size_t size = 0;
};
Place place_of(const void* address);

// -- launches -------------------------------------------------------------------------------------

struct Launch {
  dim3 grid, block;
  size_t shared = 0;        // dynamic, bytes
  size_t shared_limit = 0;  // what the function was allowed, bytes
  int registers = 32;
  bool cooperative = false;
};
cudaError_t checked(const std::string& name, const Launch& launch);
int resident_blocks(int threads, size_t shared, int registers);  // on one multiprocessor

constexpr size_t kSharedDefault = 48 << 10;
constexpr size_t kSharedOptin = 232448;

// -- cubins ---------------------------------------------------------------------------------------

struct Kernel {
  std::string name;
  int registers = 0;
  size_t shared_static = 0;
  size_t shared_limit = kSharedDefault;
};
// The kernels of an ELF image that ptxas made, by name; empty where it is none.
std::map<std::string, Kernel> kernels_of(const void* image);

}  // namespace pretend

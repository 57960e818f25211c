// The log, the count of what was launched, and what ctypes reads of both.
#include "pretend.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <unordered_set>

namespace pretend {
namespace {

std::map<std::string, long> census;
long launches = 0;
long escapes = 0;

struct Recorded {
  std::map<std::string, long> names;
  size_t nodes;
};
std::vector<Recorded> recorded;

FILE* log_file() {
  static FILE* file = [] {
    const char* path = getenv("PRETEND_CUDA_LOG");
    FILE* opened = path ? fopen(path, "a") : nullptr;
    return opened ? opened : stderr;
  }();
  return file;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char letter : text) {
    if (letter == '"' || letter == '\\') result += '\\';
    result += letter;
  }
  return result + '"';
}

std::string json(const std::map<std::string, long>& counts) {
  std::string result = "{";
  for (const auto& [name, count] : counts) {
    if (result.size() > 1) result += ", ";
    result += quoted(name) + ": " + std::to_string(count);
  }
  return result + "}";
}

// The text stays until the same thread asks again.
const char* kept(std::string text) {
  static thread_local std::string last;
  last = std::move(text);
  return last.c_str();
}

struct CensusAtExit {
  ~CensusAtExit() {
    const char* path = getenv("PRETEND_CUDA_CENSUS");
    FILE* file = path ? fopen(path, "a") : nullptr;
    if (!file) return;
    fprintf(file, "== %ld launches\n", launches);
    for (const auto& [name, count] : census) fprintf(file, "%8ld %s\n", count, name.c_str());
    fclose(file);
  }
} census_at_exit;

}  // namespace

std::recursive_mutex& mutex() {
  static auto* only = new std::recursive_mutex;  // outlives static destructors
  return *only;
}

void log(const char* format, ...) {
  Lock lock(mutex());
  va_list values;
  va_start(values, format);
  vfprintf(log_file(), format, values);
  va_end(values);
  fputc('\n', log_file());
  fflush(log_file());
}

bool flag(const char* variable) {
  const char* value = getenv(variable);
  return value && *value && strcmp(value, "0") != 0;
}

const std::string& interned(const std::string& name) {
  static auto* names = new std::unordered_set<std::string>;
  Lock lock(mutex());
  return *names->insert(name).first;
}

void count_launch(const std::string& name) {
  ++launches;
  ++census[name];
}

void count_escape(const std::string& name) {
  ++escapes;
  log("NOT CAPTURED: %s, by a thread that captures, on a stream that is not captured",
      name.c_str());
}

void remember_graph(const Graph& graph) {
  Recorded entry{{}, graph.nodes.size()};
  for (const auto& node : graph.nodes) ++entry.names[*node->name];
  log("GRAPH: %zu nodes", entry.nodes);
  recorded.push_back(std::move(entry));
}

}  // namespace pretend

using namespace pretend;

// Forgets what was counted and recorded.
EXPORT void pretend_cuda_reset() {
  Lock lock(mutex());
  census.clear();
  recorded.clear();
  launches = escapes = 0;
}

// Kernels, copies, memsets and graphs sent to the device; a captured node is none of them.
EXPORT long pretend_cuda_launches() {
  Lock lock(mutex());
  return launches;
}

// Work of a capturing thread that its capture does not hold: a replay will not do it.
EXPORT long pretend_cuda_escapes() {
  Lock lock(mutex());
  return escapes;
}

// {name: count} of the launches.
EXPORT const char* pretend_cuda_census() {
  Lock lock(mutex());
  return kept(json(census));
}

// [[{name: count}, nodes], ...] of the graphs captured, in their order.
EXPORT const char* pretend_cuda_graphs() {
  Lock lock(mutex());
  std::string text = "[";
  for (const Recorded& entry : recorded) {
    if (text.size() > 1) text += ", ";
    text += "[" + json(entry.names) + ", " + std::to_string(entry.nodes) + "]";
  }
  return kept(text + "]");
}

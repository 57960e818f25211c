// Graphs: what a capture left, made ready and launched. A replay does its copies and memsets.
#include "pretend.h"

namespace {
using namespace pretend;

GraphHandle& graph_of(void* handle) { return *static_cast<GraphHandle*>(handle); }
}  // namespace

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                                 unsigned long long) {
  if (cudaError_t error = refuse_while_capturing("cudaGraphInstantiate")) return error;
  *made = reinterpret_cast<cudaGraphExec_t>(new GraphHandle(graph_of(graph)));
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiate(cudaGraphExec_t* made, cudaGraph_t graph,
                                        unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(made, graph, flags);
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  GraphHandle graph = graph_of(exec);  // kept while it runs
  return submit(stream, "graph launch", [graph] {
    {
      Lock lock(mutex());
      advance(static_cast<double>(graph->nodes.size()));  // about 1 us a node
    }
    for (const auto& node : graph->nodes)
      if (node->effect) node->effect();
  });
}
EXPORT cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete &graph_of(exec);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete &graph_of(graph);
  return cudaSuccess;
}
// Without room for the nodes: how many there are.
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t handle, cudaGraphNode_t* nodes, size_t* count) {
  const Graph& graph = *graph_of(handle);
  size_t room = nodes ? std::min(*count, graph.nodes.size()) : 0;
  for (size_t i = 0; i < room; ++i)
    nodes[i] = reinterpret_cast<cudaGraphNode_t>(graph.nodes[i].get());
  *count = nodes ? room : graph.nodes.size();
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t handle, cudaGraphNode_t* nodes,
                                                cudaGraphEdgeData*, size_t* count) {
  const std::vector<Node*>& after = reinterpret_cast<const Node*>(handle)->after;
  size_t room = nodes ? std::min(*count, after.size()) : 0;
  for (size_t i = 0; i < room; ++i) nodes[i] = reinterpret_cast<cudaGraphNode_t>(after[i]);
  *count = nodes ? room : after.size();
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) {
  return cudaSuccess;
}

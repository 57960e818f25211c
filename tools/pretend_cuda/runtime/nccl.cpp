// NCCL: communicators of processes on this machine. A collective is one node on its stream, under
// the rules of capture, and its data is exchanged when it is sent or when its graph is replayed.
//
// The exchange waits where it is sent and not on a stream: ranks that use two communicators in
// different orders would get along on GPUs and do not here.
#include "pretend.h"

#include "exchange.h"
#include "reduction.h"

#include <atomic>
#include <cstring>
#include <stdexcept>

#include <sys/random.h>

struct ncclComm {
  std::unique_ptr<pretend::Exchange> exchange;
  int device = 0;
  int splits = 0;
  std::atomic<ncclResult_t> error{ncclSuccess};
  std::string last_error;
};

namespace {
using namespace pretend;

// What a collective sends and receives, and what it then does with that.
struct Plan {
  std::vector<Message> messages;
  std::function<void()> finish = [] {};
  std::vector<std::vector<char>> buffers;
};
using Planner = std::function<void(Plan&, int ranks, int me)>;

struct Collective {
  std::string name;
  ncclComm_t comm;
  cudaStream_t stream;
  Planner plan;
};

thread_local int group_depth = 0;
thread_local std::vector<Collective> group;

const char* kWords[] = {"no error",         "unhandled cuda error", "unhandled system error",
                        "internal error",   "invalid argument",     "invalid usage",
                        "remote process exited or there was a network error", "in progress"};

ncclResult_t complain(ncclComm_t comm, ncclResult_t error, const std::string& why) {
  log("NCCL: %s: %s", ncclGetErrorString(error), why.c_str());
  if (comm) {
    comm->error = error;
    comm->last_error = why;
  }
  return error;
}

void exchange(const std::vector<Collective>& collectives) {
  ncclComm_t comm = collectives.front().comm;
  std::deque<Plan> plans;  // a deque: finish() may hold on to its plan
  std::vector<Message> messages;
  for (const Collective& collective : collectives) {
    Plan& plan = plans.emplace_back();
    collective.plan(plan, comm->exchange->ranks, comm->exchange->rank);
    messages.insert(messages.end(), plan.messages.begin(), plan.messages.end());
  }
  try {
    comm->exchange->run(std::move(messages));
    for (Plan& plan : plans) plan.finish();
  } catch (const std::runtime_error& error) {
    complain(comm, ncclRemoteError, error.what());
  }
}

// The collectives of one communicator and stream: a node each; the last one moves the data of all,
// so that sends and receives of a group do not wait for each other in turn.
ncclResult_t send_off(const std::vector<Collective>& collectives) {
  for (size_t i = 0; i < collectives.size(); ++i) {
    const Collective& one = collectives[i];
    Effect effect;
    if (i + 1 == collectives.size()) effect = [collectives] { exchange(collectives); };
    if (submit(one.stream, one.name, std::move(effect)))
      return complain(nullptr, ncclUnhandledCudaError, one.name + " on a stream that refuses it");
  }
  return collectives.front().comm->error;
}

ncclResult_t enqueue(Collective collective) {
  if (!collective.comm) return ncclInvalidArgument;
  if (ncclResult_t error = collective.comm->error) return error;
  if (group_depth == 0) return send_off({std::move(collective)});
  group.push_back(std::move(collective));
  return ncclSuccess;
}

bool on_device(const void* address, size_t size) {
  return size == 0 || place_of(address).kind == Kind::device;
}
ncclResult_t not_on_device(ncclComm_t comm, const char* call) {
  return complain(comm, ncclInvalidArgument, std::string(call) + " of memory not on the device");
}

// NCCL does not write what it sends.
char* bytes(const void* address) { return static_cast<char*>(const_cast<void*>(address)); }

std::string reduction_name(const char* call, ncclDataType_t type, ncclRedOp_t op) {
  static const char* names[] = {"sum", "prod", "max", "min", "avg"};
  return std::string("nccl ") + call + " " + names[op] + " " + name_of(type);
}
std::string plain_name(const char* call, ncclDataType_t type) {
  return std::string("nccl ") + call + " " + name_of(type);
}

// Receives a part from every other rank, to be reduced with our own into `to`.
void gather_and_reduce(Plan& plan, int ranks, int me, const void* own, void* to, size_t count,
                       ncclDataType_t type, ncclRedOp_t op) {
  size_t size = count * size_of(type);
  plan.buffers.resize(ranks);
  for (int peer = 0; peer < ranks; ++peer) {
    if (peer == me) continue;
    plan.buffers[peer].resize(size);
    plan.messages.push_back({false, peer, plan.buffers[peer].data(), size});
  }
  plan.finish = [&plan, ranks, me, own, to, count, type, op] {
    std::vector<const char*> parts;
    for (int rank = 0; rank < ranks; ++rank)
      parts.push_back(rank == me ? bytes(own) : plan.buffers[rank].data());
    reduce(bytes(to), parts, count, type, op);
  };
}

std::string hex(const ncclUniqueId& id) {
  std::string text;
  for (int i = 0; i < 16; ++i) {
    char digits[3];
    snprintf(digits, sizeof digits, "%02x", static_cast<unsigned char>(id.internal[i]));
    text += digits;
  }
  return text;
}

ncclResult_t join(ncclComm_t* made, const std::string& name, int ranks, int rank) {
  *made = nullptr;
  // The real one allocates and waits, which a capture forbids.
  if (refuse_while_capturing("ncclCommInitRank"))
    return complain(nullptr, ncclUnhandledCudaError, "a communicator made inside a capture");
  auto comm = std::make_unique<ncclComm>();
  comm->device = current_device();
  try {
    comm->exchange = std::make_unique<Exchange>(name, ranks, rank, comm->device);
  } catch (const std::runtime_error& error) {
    return complain(nullptr, ncclInvalidUsage, error.what());
  }
  *made = comm.release();
  return ncclSuccess;
}

}  // namespace

// -- communicators --------------------------------------------------------------------------------

EXPORT ncclResult_t ncclGetVersion(int* version) {
  *version = NCCL_VERSION_CODE;
  return ncclSuccess;
}
EXPORT const char* ncclGetErrorString(ncclResult_t error) {
  return error >= 0 && error < ncclNumResults ? kWords[error] : "unknown result code";
}
EXPORT const char* ncclGetLastError(ncclComm_t comm) {
  return comm ? comm->last_error.c_str() : "";
}
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId* id) {
  bool filled = getrandom(id->internal, sizeof id->internal, 0) == sizeof id->internal;
  return filled ? ncclSuccess : ncclSystemError;
}
EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t* made, int ranks, ncclUniqueId id, int rank,
                                           ncclConfig_t*) {
  return join(made, "/pretend-nccl-" + hex(id), ranks, rank);
}
EXPORT ncclResult_t ncclCommInitRank(ncclComm_t* made, int ranks, ncclUniqueId id, int rank) {
  return ncclCommInitRankConfig(made, ranks, id, rank, nullptr);
}
EXPORT ncclResult_t ncclCommInitRankScalable(ncclComm_t* made, int ranks, int rank, int,
                                             ncclUniqueId* ids, ncclConfig_t* config) {
  return ncclCommInitRankConfig(made, ranks, ids[0], rank, config);
}
EXPORT ncclResult_t ncclCommInitAll(ncclComm_t*, int, const int*) {
  return complain(nullptr, ncclInvalidUsage, "several devices in one process are not pretended");
}
// Ranks of one colour, ordered by key, get a communicator of their own.
EXPORT ncclResult_t ncclCommSplit(ncclComm_t comm, int colour, int key, ncclComm_t* made,
                                  ncclConfig_t*) {
  Exchange& parent = *comm->exchange;
  struct Wish {
    int colour, key, rank;
  };
  std::vector<Wish> wishes(parent.ranks);
  Wish own{colour, key, parent.rank};
  wishes[parent.rank] = own;
  std::vector<Message> messages;
  for (int peer = 0; peer < parent.ranks; ++peer)
    if (peer != parent.rank) {
      messages.push_back({true, peer, reinterpret_cast<char*>(&own), sizeof own});
      messages.push_back({false, peer, reinterpret_cast<char*>(&wishes[peer]), sizeof own});
    }
  try {
    parent.run(std::move(messages));
  } catch (const std::runtime_error& error) {
    return complain(comm, ncclRemoteError, error.what());
  }
  std::string split = "-" + std::to_string(comm->splits++) + "-" + std::to_string(colour);
  *made = nullptr;
  if (colour == NCCL_SPLIT_NOCOLOR) return ncclSuccess;
  int ranks = 0, rank = 0;
  for (const Wish& wish : wishes) {
    if (wish.colour != colour) continue;
    ++ranks;
    if (std::make_pair(wish.key, wish.rank) < std::make_pair(key, parent.rank)) ++rank;
  }
  return join(made, parent.name + split, ranks, rank);
}
EXPORT ncclResult_t ncclCommShrink(ncclComm_t, int*, int, ncclComm_t*, ncclConfig_t*, int) {
  return complain(nullptr, ncclInvalidUsage, "shrinking is not pretended");
}
EXPORT ncclResult_t ncclCommFinalize(ncclComm_t) { return ncclSuccess; }
// Kept: graphs that hold its collectives may live longer.
EXPORT ncclResult_t ncclCommDestroy(ncclComm_t) { return ncclSuccess; }
EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) {
  comm->exchange->abort();
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t* error) {
  *error = comm->error;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommCount(ncclComm_t comm, int* ranks) {
  *ranks = comm->exchange->ranks;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommCuDevice(ncclComm_t comm, int* device) {
  *device = comm->device;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommUserRank(ncclComm_t comm, int* rank) {
  *rank = comm->exchange->rank;
  return ncclSuccess;
}

// -- memory: registering it changes nothing here --------------------------------------------------

EXPORT ncclResult_t ncclMemAlloc(void** address, size_t size) {
  return cudaMalloc(address, size) ? ncclUnhandledCudaError : ncclSuccess;
}
EXPORT ncclResult_t ncclMemFree(void* address) {
  return cudaFree(address) ? ncclUnhandledCudaError : ncclSuccess;
}
EXPORT ncclResult_t ncclCommRegister(ncclComm_t, void* address, size_t, void** handle) {
  *handle = address;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommDeregister(ncclComm_t, void*) { return ncclSuccess; }
EXPORT ncclResult_t ncclCommWindowRegister(ncclComm_t, void* address, size_t, ncclWindow_t* window,
                                           int) {
  *window = static_cast<ncclWindow_t>(address);
  return ncclSuccess;
}
EXPORT ncclResult_t ncclCommWindowDeregister(ncclComm_t, ncclWindow_t) { return ncclSuccess; }
EXPORT ncclResult_t ncclDevCommCreate(ncclComm_t comm, const void*, void*) {
  return complain(comm, ncclInvalidUsage, "communication from kernels is not pretended");
}
EXPORT ncclResult_t ncclDevCommDestroy(ncclComm_t, const void*) { return ncclSuccess; }
EXPORT ncclResult_t ncclRedOpCreatePreMulSum(ncclRedOp_t*, void*, ncclDataType_t,
                                             ncclScalarResidence_t, ncclComm_t comm) {
  return complain(comm, ncclInvalidUsage, "operations made by a user are not pretended");
}
EXPORT ncclResult_t ncclRedOpDestroy(ncclRedOp_t, ncclComm_t) { return ncclSuccess; }

// -- groups ---------------------------------------------------------------------------------------

EXPORT ncclResult_t ncclGroupStart() {
  ++group_depth;
  return ncclSuccess;
}
EXPORT ncclResult_t ncclGroupEnd() {
  if (group_depth == 0) return ncclInvalidUsage;
  if (--group_depth > 0) return ncclSuccess;
  std::vector<std::vector<Collective>> sets;  // by communicator and stream, in order of appearance
  for (Collective& collective : group) {
    auto same = [&](const std::vector<Collective>& set) {
      return set[0].comm == collective.comm && set[0].stream == collective.stream;
    };
    auto found = std::find_if(sets.begin(), sets.end(), same);
    if (found == sets.end()) found = sets.insert(sets.end(), std::vector<Collective>{});
    found->push_back(std::move(collective));
  }
  group.clear();
  ncclResult_t result = ncclSuccess;
  for (const auto& set : sets)
    if (ncclResult_t error = send_off(set)) result = error;
  return result;
}
EXPORT ncclResult_t ncclGroupSimulateEnd(ncclSimInfo_t*) {
  group.clear();
  group_depth = 0;
  return ncclInvalidUsage;
}

// -- collectives ----------------------------------------------------------------------------------

EXPORT ncclResult_t ncclAllReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                                  ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  if (!can_reduce(type, op)) return complain(comm, ncclInvalidArgument, "AllReduce of this type");
  if (!on_device(from, count) || !on_device(to, count)) return not_on_device(comm, "AllReduce");
  auto plan = [=](Plan& plan, int ranks, int me) {
    for (int peer = 0; peer < ranks; ++peer)
      if (peer != me)
        plan.messages.push_back({true, peer, bytes(from), count * size_of(type)});
    gather_and_reduce(plan, ranks, me, from, to, count, type, op);
  };
  return enqueue({reduction_name("AllReduce", type, op), comm, stream, plan});
}
EXPORT ncclResult_t ncclReduce(const void* from, void* to, size_t count, ncclDataType_t type,
                               ncclRedOp_t op, int root, ncclComm_t comm, cudaStream_t stream) {
  if (!can_reduce(type, op)) return complain(comm, ncclInvalidArgument, "Reduce of this type");
  if (!on_device(from, count)) return not_on_device(comm, "Reduce");
  auto plan = [=](Plan& plan, int ranks, int me) {
    if (me == root)
      gather_and_reduce(plan, ranks, me, from, to, count, type, op);
    else
      plan.messages.push_back({true, root, bytes(from), count * size_of(type)});
  };
  return enqueue({reduction_name("Reduce", type, op), comm, stream, plan});
}
EXPORT ncclResult_t ncclReduceScatter(const void* from, void* to, size_t count, ncclDataType_t type,
                                      ncclRedOp_t op, ncclComm_t comm, cudaStream_t stream) {
  if (!can_reduce(type, op))
    return complain(comm, ncclInvalidArgument, "ReduceScatter of this type");
  if (!on_device(from, count) || !on_device(to, count)) return not_on_device(comm, "ReduceScatter");
  auto plan = [=](Plan& plan, int ranks, int me) {
    size_t size = count * size_of(type);
    for (int peer = 0; peer < ranks; ++peer)
      if (peer != me) plan.messages.push_back({true, peer, bytes(from) + peer * size, size});
    gather_and_reduce(plan, ranks, me, bytes(from) + me * size, to, count, type, op);
  };
  return enqueue({reduction_name("ReduceScatter", type, op), comm, stream, plan});
}
EXPORT ncclResult_t ncclBroadcast(const void* from, void* to, size_t count, ncclDataType_t type,
                                  int root, ncclComm_t comm, cudaStream_t stream) {
  if (!on_device(to, count)) return not_on_device(comm, "Broadcast");
  size_t size = count * size_of(type);
  auto plan = [=](Plan& plan, int ranks, int me) {
    if (me != root) {
      plan.messages.push_back({false, root, bytes(to), size});
      return;
    }
    for (int peer = 0; peer < ranks; ++peer)
      if (peer != me) plan.messages.push_back({true, peer, bytes(from), size});
    plan.finish = [=] { memmove(to, from, size); };
  };
  return enqueue({plain_name("Broadcast", type), comm, stream, plan});
}
EXPORT ncclResult_t ncclBcast(void* data, size_t count, ncclDataType_t type, int root,
                              ncclComm_t comm, cudaStream_t stream) {
  return ncclBroadcast(data, data, count, type, root, comm, stream);
}
EXPORT ncclResult_t ncclAllGather(const void* from, void* to, size_t count, ncclDataType_t type,
                                  ncclComm_t comm, cudaStream_t stream) {
  if (!on_device(from, count) || !on_device(to, count)) return not_on_device(comm, "AllGather");
  size_t size = count * size_of(type);
  auto plan = [=](Plan& plan, int ranks, int me) {
    for (int peer = 0; peer < ranks; ++peer) {
      if (peer == me) continue;
      plan.messages.push_back({true, peer, bytes(from), size});
      plan.messages.push_back({false, peer, bytes(to) + peer * size, size});
    }
    plan.finish = [=] { memmove(bytes(to) + me * size, from, size); };
  };
  return enqueue({plain_name("AllGather", type), comm, stream, plan});
}
EXPORT ncclResult_t ncclAlltoAll(const void* from, void* to, size_t count, ncclDataType_t type,
                                 ncclComm_t comm, cudaStream_t stream) {
  if (!on_device(from, count) || !on_device(to, count)) return not_on_device(comm, "AlltoAll");
  size_t size = count * size_of(type);
  auto plan = [=](Plan& plan, int ranks, int me) {
    for (int peer = 0; peer < ranks; ++peer) {
      if (peer == me) continue;
      plan.messages.push_back({true, peer, bytes(from) + peer * size, size});
      plan.messages.push_back({false, peer, bytes(to) + peer * size, size});
    }
    plan.finish = [=] { memmove(bytes(to) + me * size, bytes(from) + me * size, size); };
  };
  return enqueue({plain_name("AlltoAll", type), comm, stream, plan});
}
EXPORT ncclResult_t ncclSend(const void* from, size_t count, ncclDataType_t type, int peer,
                             ncclComm_t comm, cudaStream_t stream) {
  if (!on_device(from, count)) return not_on_device(comm, "Send");
  auto plan = [=](Plan& plan, int, int) {
    plan.messages.push_back({true, peer, bytes(from), count * size_of(type)});
  };
  return enqueue({plain_name("Send", type), comm, stream, plan});
}
EXPORT ncclResult_t ncclRecv(void* to, size_t count, ncclDataType_t type, int peer, ncclComm_t comm,
                             cudaStream_t stream) {
  if (!on_device(to, count)) return not_on_device(comm, "Recv");
  auto plan = [=](Plan& plan, int, int) {
    plan.messages.push_back({false, peer, bytes(to), count * size_of(type)});
  };
  return enqueue({plain_name("Recv", type), comm, stream, plan});
}

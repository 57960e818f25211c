// The shared memory holds a mailbox for every ordered pair of ranks. A message goes through it in
// pieces: the sender fills an empty one, the receiver empties a full one.
#include "exchange.h"

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

namespace pretend {
namespace {

constexpr size_t kPiece = 256 << 10;  // bytes
constexpr int kMostRanks = 16;
constexpr auto kPatience = std::chrono::minutes(10);  // another rank may compile meanwhile

using Clock = std::chrono::steady_clock;

// Sleeps a little longer each time, so that a waiting rank leaves the processor to the others.
class Patience {
 public:
  void wait() {
    if (Clock::now() - since_ > kPatience) throw std::runtime_error("another rank does not come");
    usleep(turns_ < 50 ? 20 : 500);
    ++turns_;
  }
  void renew() {
    since_ = Clock::now();
    turns_ = 0;
  }
  bool time_to_look() const { return turns_ % 200 == 199; }

 private:
  Clock::time_point since_ = Clock::now();
  int turns_ = 0;
};

}  // namespace

struct Exchange::Mailbox {
  std::atomic<size_t> filled;  // bytes of the piece that lies in it; 0: empty
  size_t whole;                // bytes of the message that it belongs to
  char piece[kPiece];
};

struct Exchange::Shared {
  std::atomic<int> arrived;
  std::atomic<bool> aborted;
  std::atomic<int> pids[kMostRanks];
  std::atomic<int> devices[kMostRanks];
};

Exchange::Exchange(const std::string& name, int ranks, int rank, int device)
    : name(name), ranks(ranks), rank(rank) {
  if (ranks > kMostRanks) throw std::runtime_error("more ranks than are pretended");
  size_ = sizeof(Shared) + sizeof(Mailbox) * ranks * ranks;
  int file = shm_open(name.c_str(), O_CREAT | O_RDWR, 0600);
  if (file < 0 || ftruncate(file, static_cast<off_t>(size_)) != 0)
    throw std::runtime_error("no shared memory: " + std::string(strerror(errno)));
  void* start = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  close(file);
  if (start == MAP_FAILED) throw std::runtime_error("the shared memory cannot be mapped");
  shared_ = static_cast<Shared*>(start);  // fresh memory is zeros: no rank has arrived, all boxes are empty
  shared_->pids[rank] = getpid();
  shared_->devices[rank] = device;
  ++shared_->arrived;
  for (Patience patience; shared_->arrived < ranks; patience.wait())
    if (patience.time_to_look()) look_for_ended();
  if (rank == 0) shm_unlink(name.c_str());  // all have it mapped
  for (int other = 0; other < ranks; ++other)
    if (other != rank && shared_->devices[other] == device)
      throw std::runtime_error("two ranks on device " + std::to_string(device));
}

Exchange::~Exchange() { munmap(shared_, size_); }

void Exchange::abort() { shared_->aborted = true; }

Exchange::Mailbox& Exchange::mailbox(int from, int to) {
  auto* boxes = reinterpret_cast<Mailbox*>(shared_ + 1);
  return boxes[from * ranks + to];
}

void Exchange::look_for_ended() const {
  if (shared_->aborted) throw std::runtime_error("another rank aborted");
  for (int other = 0; other < ranks; ++other) {
    int pid = shared_->pids[other];
    if (pid && kill(pid, 0) != 0 && errno == ESRCH)
      throw std::runtime_error("rank " + std::to_string(other) + " has ended");
  }
}

// Moves one piece if the mailbox allows it.
bool Exchange::step(Message& message) {
  size_t piece = std::min(kPiece, message.size - message.done);
  Mailbox& box = message.send ? mailbox(rank, message.peer) : mailbox(message.peer, rank);
  size_t filled = box.filled.load(std::memory_order_acquire);
  if (message.send ? filled != 0 : filled == 0) return false;
  char* place = message.data + message.done;
  if (message.send) {
    memcpy(box.piece, place, piece);
    box.whole = message.size;
    box.filled.store(piece, std::memory_order_release);
  } else {
    if (box.whole != message.size)
      throw std::runtime_error("rank " + std::to_string(message.peer) + " sends " +
                               std::to_string(box.whole) + " bytes where " +
                               std::to_string(message.size) + " are awaited");
    piece = filled;
    memcpy(place, box.piece, piece);
    box.filled.store(0, std::memory_order_release);
  }
  message.done += piece;
  return true;
}

void Exchange::run(std::vector<Message> messages) {
  std::lock_guard<std::mutex> lock(one_at_a_time_);
  Patience patience;
  for (bool all_done = false; !all_done;) {
    bool moved = false;
    all_done = true;
    // Messages of one peer and one direction go one after another.
    std::vector<bool> busy(2 * static_cast<size_t>(ranks));
    for (Message& message : messages) {
      if (message.done == message.size) continue;
      size_t lane = 2 * static_cast<size_t>(message.peer) + (message.send ? 1 : 0);
      if (busy[lane]) continue;
      moved |= step(message);
      if (message.done < message.size) {
        busy[lane] = true;
        all_done = false;
      }
    }
    if (moved || all_done) {
      patience.renew();
    } else {
      if (patience.time_to_look()) look_for_ended();
      patience.wait();
    }
  }
}

}  // namespace pretend

// Bytes between the ranks of a communicator: processes of one machine that share a piece of memory.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace pretend {

struct Message {
  bool send;
  int peer;
  char* data;
  size_t size;
  size_t done = 0;
};

// One for each rank of a communicator. All ranks must run messages that match, in one order.
class Exchange {
 public:
  // Waits until all ranks have come. Throws std::runtime_error where one does not, or where two of
  // them use one device.
  Exchange(const std::string& name, int ranks, int rank, int device);
  ~Exchange();
  Exchange(const Exchange&) = delete;
  Exchange& operator=(const Exchange&) = delete;

  // Sends and receives until all is done. Throws std::runtime_error where a rank has ended or does
  // not come, or sends another size than is awaited.
  void run(std::vector<Message> messages);
  void abort();  // the others' waiting ends

  const std::string name;
  const int ranks, rank;

 private:
  struct Shared;
  struct Mailbox;
  Mailbox& mailbox(int from, int to);
  bool step(Message& message);
  void look_for_ended() const;

  Shared* shared_;
  size_t size_;
  std::mutex one_at_a_time_;
};

}  // namespace pretend

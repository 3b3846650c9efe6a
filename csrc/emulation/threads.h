// The state of a block's threads and warps, used by machine.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

#include "fibers.h"
#include "mma_on_cpu.h"

namespace [[gnu::visibility("hidden")]] emulation {

// A line of a kernel. As a default argument, current() is the line of the call.
struct SourceLocation {
  const char* file;
  int line;
  static constexpr SourceLocation current(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// An operation at which threads wait for each other. Operations on different lines are different, unlike on a GPU.
struct SyncPoint {
  const char* operation = "";
  SourceLocation location = {"", 0};

  bool operator==(const SyncPoint& other) const {
    return location.line == other.location.line && is_same(operation, other.operation) &&
           is_same(location.file, other.location.file);
  }

 private:
  static bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};

class Random {  // splitmix64
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t x = state_ += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
  }
  uint64_t below(uint64_t n) { return next() % n; }
  template <class T>
  void shuffle(T* values, size_t count) {
    for (size_t i = count; i > 1; i--) std::swap(values[i - 1], values[below(i)]);
  }

 private:
  uint64_t state_;
};

// An asynchronous copy for which its thread has not waited yet.
struct Copy {
  char* to;
  const char* from;  // null: zeros
  int group;
  bool is_done;
  SourceLocation location;

  void finish() {
    if (is_done) return;
    is_done = true;
    if (from) {
      std::memcpy(to, from, 16);
    } else {
      std::memset(to, 0, 16);
    }
  }
};

enum class State { kRunning, kAtWarpOperation, kAtBarrier, kExited };

struct Thread {
  Context context;
  Stack stack;
  State state = State::kRunning;
  SyncPoint sync_point;  // where the thread waits
  std::vector<Copy> copies;
  int committed_groups = 0;

  // Whether both threads are in the same state at the same location.
  bool is_at_same_point(const Thread& other) const {
    const bool waits = state == State::kAtWarpOperation || state == State::kAtBarrier;
    return state == other.state && (!waits || sync_point == other.sync_point);
  }
};

struct Warp {
  uint32_t ready = 0;  // lanes that can run, except the running one
  uint32_t exited = 0;
  int arrived = 0;      // number of lanes at `sync_point`
  unsigned cursor = 0;  // index into order
  uint8_t order[kLanes];
  SyncPoint sync_point;
  WarpMemory memory;

  int next_lane() {
    int lane;
    do lane = order[cursor++ % kLanes];
    while (!(ready >> lane & 1));
    ready &= ~(1u << lane);
    return lane;
  }
};

}  // namespace emulation

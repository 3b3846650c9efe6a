// Runs the blocks of a grid sequentially, in random order, and the threads of a block as fibers, which switch where
// threads wait: at warp operations (shuffle, ldmatrix, mma, __syncwarp), at block barriers and at their end.
//
// What the hardware does not specify is random, from a seed: the order of lanes, which warp runs, and for how long. In
// most cases one warp runs as far ahead of the others as barriers permit. If all ran in lockstep, missing barriers
// would not be detected.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cuda_types.h"
#include "race_detector.h"
#include "threads.h"

namespace [[gnu::visibility("hidden")]] emulation {

constexpr size_t kMaxSharedBytes = size_t(99) << 10;  // per block, on sm_86 and sm_120
constexpr int kMaxThreads = 1024;

class Machine {
 public:
  cudaError_t run(dim3 grid, int thread_count, size_t shared_bytes, const std::function<void()>& kernel);

  void set_seed(uint64_t seed) { chosen_seed_ = seed; }
  uint64_t seed() const {
    if (chosen_seed_) return *chosen_seed_;
    const char* text = std::getenv("FASTSIMCLR_EMULATION_SEED");
    return text ? std::strtoull(text, nullptr, 10) : 1;
  }
  cudaError_t take_last_error() { return std::exchange(last_error_, cudaSuccess); }

  // Used by kernels.
  int thread_index() const { return current_; }
  int lane() const { return current_ % kLanes; }
  WarpMemory& memory() { return warps_[current_ / kLanes]->memory; }
  Thread& thread() { return *threads_[current_]; }
  Random& random() { return random_; }
  char* shared() { return shared_; }
  bool is_shared(const void* address, size_t bytes) const {
    const auto offset = uintptr_t(address) - uintptr_t(shared_);
    return offset < shared_bytes_ && bytes <= shared_bytes_ - offset;
  }

  // All lanes must call this. The last one calls complete(memory()); then all continue, in any order.
  template <class F>
  void sync_warp(const SyncPoint& sync_point, F complete) {
    const races::DetectionPause pause;
    Warp& warp = *warps_[current_ / kLanes];
    wait_at(State::kAtWarpOperation, sync_point);
    if (warp.arrived == 0) warp.sync_point = sync_point;
    if (!(warp.sync_point == sync_point)) fail("lanes of a warp are at different operations");
    if (++warp.arrived == kLanes) {
      complete(warp.memory);
      warp.arrived = 0;
      warp.ready = ~0u;
      if (random_.below(16) == 0) random_.shuffle(warp.order, kLanes);
    }
    run_next_thread();
  }

  // All threads that have not exited must call this.
  void sync_block(const SyncPoint& sync_point) {
    const races::DetectionPause pause;
    wait_at(State::kAtBarrier, sync_point);
    if (at_barrier_ == 0) barrier_ = sync_point;
    if (!(barrier_ == sync_point)) fail("threads wait at different barriers");
    at_barrier_++;
    release_barrier_if_complete();
    run_next_thread();
  }

  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

 private:
  static void run_thread();
  bool run_block(int thread_count);
  void exit_thread();
  void wait_at(State state, const SyncPoint& sync_point) {
    thread().state = state;
    thread().sync_point = sync_point;
  }

  void release_barrier_if_complete() {
    if (at_barrier_ == 0 || at_barrier_ < alive_) return;
    races::at_block_barrier();
    at_barrier_ = 0;
    ready_warps_ = 0;
    for (int w = 0; w < warp_count_; w++) make_ready(w);
    choose_warp();
  }

  void make_ready(int w) {
    Warp& warp = *warps_[w];
    warp.ready = ~warp.exited;
    random_.shuffle(warp.order, kLanes);
    if (warp.ready) ready_warps_ |= 1u << w;
  }

  void choose_warp() {
    if (ready_warps_ == 0) fail("no thread can continue");
    uint32_t candidates = ready_warps_;
    for (auto skip = random_.below(uint64_t(__builtin_popcount(candidates))); skip > 0; skip--)
      candidates &= candidates - 1;
    warp_ = __builtin_ctz(candidates);
    // Counts switches of lanes: from a few to far more than there are between two barriers.
    steps_left_ = 1 + int64_t(random_.below(uint64_t(1) << random_.below(20)));
  }

  // Returns the thread to run next. Only this function checks the bit of the current warp in ready_warps_.
  int next_thread() {
    if (--steps_left_ <= 0) choose_warp();
    while (warps_[warp_]->ready == 0) {
      if (warps_[warp_]->arrived > 0) fail("the other lanes of warp %d will never arrive", warp_);
      ready_warps_ &= ~(1u << warp_);
      choose_warp();
    }
    return warp_ * kLanes + warps_[warp_]->next_lane();
  }

  void run_next_thread() {
    const int next = next_thread();
    Thread& from = thread();
    if (next != current_) resume(from, next, false);
    from.state = State::kRunning;
  }

  void resume(Thread& from, int next, bool is_last) {
    current_ = next;
    threadIdx.x = unsigned(next);
    switch_context(from.context, threads_[next]->context, is_last);
  }

  void report(const char* format, va_list arguments);

  std::mutex mutex_;  // one launch at a time
  std::vector<std::unique_ptr<Thread>> threads_;
  std::vector<std::unique_ptr<Warp>> warps_;
  Context host_;
  const std::function<void()>* kernel_ = nullptr;
  Random random_{0};
  std::optional<uint64_t> chosen_seed_;
  cudaError_t last_error_ = cudaSuccess;
  char* shared_ = nullptr;
  size_t shared_bytes_ = 0;
  // State of the running block:
  int current_ = 0, warp_ = 0, warp_count_ = 0, alive_ = 0, at_barrier_ = 0;
  uint32_t ready_warps_ = 0;
  int64_t steps_left_ = 0;
  SyncPoint barrier_;
  bool failed_ = false;
};

inline Machine machine;

inline void Machine::run_thread() {
  arrive(machine.thread().context);
  races::begin_thread();
  (*machine.kernel_)();
  races::end_thread();
  machine.exit_thread();
}

inline void Machine::exit_thread() {
  Thread& self = thread();
  if (!self.copies.empty())
    fail("exits without waiting for %zu of its asynchronous copies; the first is at %s:%d", self.copies.size(),
         self.copies[0].location.file, self.copies[0].location.line);
  self.state = State::kExited;
  warps_[current_ / kLanes]->exited |= 1u << lane();
  if (--alive_ == 0) switch_context(self.context, host_, true);
  release_barrier_if_complete();
  resume(self, next_thread(), true);
  std::abort();  // not reached
}

// Aborts the kernel: its fibers are not resumed, and the objects on their stacks are not destroyed.
inline void Machine::fail(const char* format, ...) {
  races::end_thread();
  va_list arguments;
  va_start(arguments, format);
  report(format, arguments);
  va_end(arguments);
  failed_ = true;
  switch_context(thread().context, host_, true);
  std::abort();  // not reached
}

inline void Machine::report(const char* format, va_list arguments) {
  std::fprintf(stderr, "CUDA emulation: block (%u, %u, %u), thread %d: ", blockIdx.x, blockIdx.y, blockIdx.z, current_);
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, " (seed %llu)\n", static_cast<unsigned long long>(seed()));
  // Prints one line per location with the ranges of threads that are there.
  std::vector<std::pair<const Thread*, std::string>> groups;
  const int count = warp_count_ * kLanes;
  for (int begin = 0, end; begin < count; begin = end) {
    const Thread& first = *threads_[begin];
    for (end = begin + 1; end < count && threads_[end]->is_at_same_point(first); end++) {
    }
    auto group = groups.begin();
    while (group != groups.end() && !group->first->is_at_same_point(first)) ++group;
    if (group == groups.end()) group = groups.insert(group, {&first, ""});
    group->second += " " + std::to_string(begin);
    if (end > begin + 1) group->second += "-" + std::to_string(end - 1);
  }
  for (const auto& [thread, ranges] : groups) {
    const SourceLocation location = thread->sync_point.location;
    if (thread->state == State::kExited) {
      std::fprintf(stderr, "  have exited:%s\n", ranges.c_str());
    } else if (thread->state == State::kRunning) {
      std::fprintf(stderr, "  not waiting:%s\n", ranges.c_str());
    } else {
      std::fprintf(stderr, "  at %s, %s:%d:%s\n", thread->sync_point.operation, location.file, location.line,
                   ranges.c_str());
    }
  }
}

// Returns whether all threads ended normally.
inline bool Machine::run_block(int thread_count) {
  alive_ = thread_count;
  at_barrier_ = 0;
  ready_warps_ = 0;
  for (int i = 0; i < thread_count; i++) {
    Thread& thread = *threads_[i];
    thread.state = State::kRunning;
    thread.sync_point = {};
    thread.copies.clear();
    thread.committed_groups = 0;
    start_context(thread.context, thread.stack, size_t(i), run_thread);
  }
  for (int w = 0; w < warp_count_; w++) {
    Warp& warp = *warps_[w];
    warp.exited = 0;
    warp.arrived = 0;
    std::iota(warp.order, warp.order + kLanes, uint8_t(0));
    make_ready(w);
  }
  std::memset(shared_, 0xff, shared_bytes_);  // NaNs: no values of the previous block remain
  races::begin_block(shared_, shared_bytes_);
  choose_warp();
  current_ = next_thread();
  threadIdx.x = unsigned(current_);
  switch_context(host_, thread().context, false);
  return !failed_;
}

inline cudaError_t Machine::run(dim3 grid, int thread_count, size_t shared_bytes, const std::function<void()>& kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  constexpr unsigned kMaxGrid = (1u << 31) - 1, kMaxGridYZ = (1u << 16) - 1;
  const bool is_grid =
      grid.x >= 1 && grid.y >= 1 && grid.z >= 1 && grid.x <= kMaxGrid && grid.y <= kMaxGridYZ && grid.z <= kMaxGridYZ;
  if (!is_grid || thread_count < 1 || thread_count > kMaxThreads || shared_bytes > kMaxSharedBytes)
    return last_error_ = cudaErrorInvalidValue;
  if (thread_count % kLanes != 0) {
    std::fprintf(stderr, "CUDA emulation: %d threads are not a multiple of a warp, which is not emulated\n",
                 thread_count);
    return last_error_ = cudaErrorInvalidValue;
  }

  while (int(threads_.size()) < thread_count) threads_.push_back(std::make_unique<Thread>());
  while (int(warps_.size()) < thread_count / kLanes) warps_.push_back(std::make_unique<Warp>());
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, shared_bytes) != 0) std::abort();
  shared_ = static_cast<char*>(shared);
  shared_bytes_ = shared_bytes;
  warp_count_ = thread_count / kLanes;
  kernel_ = &kernel;
  failed_ = false;
  random_ = Random(seed());
  gridDim = grid;
  blockDim = dim3(unsigned(thread_count));
  races::begin_launch();

  std::vector<uint64_t> blocks(uint64_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), uint64_t(0));
  random_.shuffle(blocks.data(), blocks.size());
  for (const uint64_t block : blocks) {
    blockIdx = {unsigned(block % grid.x), unsigned(block / grid.x % grid.y), unsigned(block / grid.x / grid.y)};
    if (!run_block(thread_count)) break;
  }
  std::free(shared);
  shared_ = nullptr;
  shared_bytes_ = 0;
  return failed_ ? last_error_ = cudaErrorLaunchFailure : cudaSuccess;
}

}  // namespace emulation

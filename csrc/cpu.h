// For the CPU sources: functions compiled for several kinds of CPU, vectors, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <future>
#include <vector>

// The version for this CPU is selected when the library is loaded. AddressSanitizer checks only one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
#define FASTSIMCLR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSIMCLR_CLONES
#endif
// Inlined into the clones, so that they are compiled for the clone's CPU; also lambdas, as calls prevent vectorization.
#define FASTSIMCLR_LAMBDA __attribute__((always_inline))
#define FASTSIMCLR_INLINE inline FASTSIMCLR_LAMBDA

namespace fastsimclr {

// Sixteen floats, in as many registers as the CPU needs.
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float))));
// The same in memory. Not by an alignment of Lanes: GCC 12 forgets it where it splits a vector into registers.
struct __attribute__((packed, may_alias)) LanesInMemory {
  Lanes lanes;
};

// Calls work(next) on `threads` threads, or fewer at a limit of the system, and throws what a call throws. next()
// returns the index of the next item, or at least `items` at the end.
template <class Work>
void in_threads(int threads, int64_t items, const Work& work) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return taken++; };
  std::vector<std::future<void>> workers;
  for (int64_t i = 1; i < std::min<int64_t>(threads, items); i++) workers.push_back(std::async([&] { work(next); }));
  work(next);
  for (std::future<void>& worker : workers) worker.get();
}

}  // namespace fastsimclr

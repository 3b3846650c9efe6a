// For the C++ sources that work on CPUs: a function compiled for several kinds of CPU, vectors, threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

// The machine's own of these is chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTSIMCLR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSIMCLR_CLONES
#endif
// Into the clones, so that they are compiled for the clone's CPU; lambdas too: a call in the middle of a loop ends it.
#define FASTSIMCLR_LAMBDA __attribute__((always_inline))
#define FASTSIMCLR_INLINE inline FASTSIMCLR_LAMBDA

namespace fastsimclr {

// Sixteen floats anywhere in memory, in as many registers as the CPU needs.
constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(kLanes * sizeof(float)), aligned(alignof(float)), may_alias));

// work(next) on each of `threads` threads; next() is the number of the next item, `items` or more when there is none.
template <class Work>
void in_threads(int threads, int64_t items, const Work& work) {
  std::atomic<int64_t> taken{0};
  const auto next = [&] { return taken++; };
  std::vector<std::thread> helpers;
  for (int64_t i = 1; i < std::min<int64_t>(threads, items); i++) helpers.emplace_back([&] { work(next); });
  work(next);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace fastsimclr

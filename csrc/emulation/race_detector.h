// Detects data races exactly, independent of the schedule: kernels compiled with -fsanitize=thread call a hook before
// each memory access, and race_detector.cpp, linked instead of libtsan, records which threads accessed each word. In
// other builds all functions are empty.
//
// A race: two threads access the same byte, at least one writes, not both are atomic, and nothing orders the accesses:
//   __syncthreads  orders the threads of a block (exited ones included)
//   __syncwarp     orders the lanes of a warp
//   shuffles, mma, ldmatrix order nothing: lanes wait for each other, but no memory fence is implied (CUDA C++
//                  Programming Guide, "Warp Shuffle Functions")
//   blocks         of one launch are never ordered; launches always are
//   cp.async       writes its target from its issue until its thread waits for it: until then no thread may access it,
//                  afterwards it is a write by that thread at the wait. Its source is read at the issue and at the
//                  wait.
// Each row of ldmatrix is read by all lanes of the warp.
#pragma once

#include <cstddef>

#include "threads.h"

#if defined(__SANITIZE_THREAD__) && !defined(FASTSIMCLR_EMULATION_RACES)
#define FASTSIMCLR_EMULATION_RACES 1
#endif

namespace [[gnu::visibility("hidden")]] emulation {
namespace races {

enum class Access { kRead, kWrite, kAtomic };

#if FASTSIMCLR_EMULATION_RACES

void begin_launch();
void begin_block(const char* shared, size_t shared_bytes);
void begin_thread();  // accesses are recorded from here on
void end_thread();    // accesses are no longer recorded
void at_block_barrier();
void at_warp_barrier();
void access(Access kind, const void* address, size_t bytes, SourceLocation location);
void read_by_warp(const void* address, size_t bytes, SourceLocation location);
void begin_copy(const Copy& copy);
void end_copy(const Copy& copy);

// Accesses in its scope are not recorded: they are accesses of the emulation itself.
class DetectionPause {
 public:
  DetectionPause();
  ~DetectionPause();
  DetectionPause(const DetectionPause&) = delete;
  DetectionPause& operator=(const DetectionPause&) = delete;

 private:
  bool was_detecting_;
};

#else

inline void begin_launch() {}
inline void begin_block(const char*, size_t) {}
inline void begin_thread() {}
inline void end_thread() {}
inline void at_block_barrier() {}
inline void at_warp_barrier() {}
inline void access(Access, const void*, size_t, SourceLocation) {}
inline void read_by_warp(const void*, size_t, SourceLocation) {}
inline void begin_copy(const Copy&) {}
inline void end_copy(const Copy&) {}
struct DetectionPause {
  DetectionPause() {}  // avoids a warning about unused variables
};

#endif

}  // namespace races
}  // namespace emulation

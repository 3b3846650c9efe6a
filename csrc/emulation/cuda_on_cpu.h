// The subset of CUDA that the kernels use, for g++, so that tests can run them on a CPU. Wrappers of PTX have the same
// names as in mma.cuh. What depends on the timing of the hardware is random, seeded by FASTSIMCLR_EMULATION_SEED
// (machine.h).
//
// Always detected:
//   - a deadlock, or a barrier in divergent code: cudaErrorLaunchFailure, and a list of where threads wait
//   - misaligned addresses of ldmatrix and cp.async, bank conflicts of ldmatrix, copies that are never waited for
//   - shared memory that is read before it is written: it contains NaN
//   - most missing barriers and cp.async waits: wrong results with some seeds
// With -fsanitize=thread and race_detector.cpp: every data race in shared and global memory, whatever the seed, and
// even if the result is correct. Accesses by memcpy are not checked.
//
// With -fsanitize=address,undefined: every access out of bounds.
//
// Floating-point arithmetic is the host's, except mma (mma_on_cpu.h) and exp2_approx: functions such as expf may differ
// from the GPU's in the last bit.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda_types.h"
#include "machine.h"

// The only shared memory is dynamic_shared(); `__shared__` is undefined, so that using it is a compilation error.
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace [[gnu::visibility("hidden")]] emulation {

// Sets the seed of the following launches, which overrides the environment variable.
inline void set_seed(uint64_t seed) { machine.set_seed(seed); }

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From) && std::is_trivially_copyable<From>::value, "the same bits as another type");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline void check_mask(unsigned mask, const char* operation, SourceLocation location) {
  if (mask != ~0u) machine.fail("%s, %s:%d: only whole warps are emulated", operation, location.file, location.line);
}

template <class T>
T shuffle(const char* operation, unsigned mask, T value, int source, SourceLocation location) {
  static_assert(sizeof(T) == sizeof(uint32_t), "a shuffle of 32 bits");
  check_mask(mask, operation, location);
  const races::DetectionPause pause;
  WarpMemory& memory = machine.memory();
  const int lane = machine.lane();
  memory.offered[lane] = bit_cast<uint32_t>(value);
  memory.source[lane] = source;
  machine.sync_warp({operation, location}, [](WarpMemory& all) { all.shuffle(); });
  return bit_cast<T>(memory.result[lane][0]);
}

template <class F>
void load_matrices(const char* operation, uint32_t (&r)[4], const void* shared_row, SourceLocation location, F load) {
  const races::DetectionPause pause;
  if (uintptr_t(shared_row) % 16 != 0 || !machine.is_shared(shared_row, 16))
    machine.fail("%s, %s:%d: a row's address is not a multiple of 16 in shared memory", operation, location.file,
                 location.line);
  races::read_by_warp(shared_row, 16, location);
  WarpMemory& memory = machine.memory();
  const int lane = machine.lane();
  memory.row[lane] = static_cast<const char*>(shared_row);
  machine.sync_warp({operation, location}, [&](WarpMemory& all) {
    if (const int m = all.matrix_with_bank_conflict(); m >= 0)
      machine.fail("%s, %s:%d: bank conflict: the rows of matrix %d (lanes %d-%d) share a group of four banks",
                   operation, location.file, location.line, m, 8 * m, 8 * m + 7);
    load(all);
  });
  std::memcpy(r, memory.result[lane], sizeof(r));
}

inline void finish_copies(int pending_groups) {
  const races::DetectionPause pause;
  Thread& thread = machine.thread();
  size_t kept = 0;
  for (Copy& copy : thread.copies) {
    if (copy.group < thread.committed_groups - pending_groups) {
      copy.finish();
      races::end_copy(copy);
    } else {
      thread.copies[kept++] = copy;
    }
  }
  thread.copies.resize(kept);
}

inline uint32_t round_to_bf16(float x) {
  if (std::isnan(x)) return 0x7fff;
  const auto bits = bit_cast<uint32_t>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

}  // namespace emulation

inline void __syncthreads(emulation::SourceLocation location = emulation::SourceLocation::current()) {
  emulation::machine.sync_block({"__syncthreads", location});
}

inline void __syncwarp(unsigned mask = ~0u, emulation::SourceLocation location = emulation::SourceLocation::current()) {
  emulation::check_mask(mask, "__syncwarp", location);
  emulation::machine.sync_warp({"__syncwarp", location},
                               [](emulation::WarpMemory&) { emulation::races::at_warp_barrier(); });
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source,
              emulation::SourceLocation location = emulation::SourceLocation::current()) {
  return emulation::shuffle("__shfl_sync", mask, value, source & 31, location);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask,
                  emulation::SourceLocation location = emulation::SourceLocation::current()) {
  return emulation::shuffle("__shfl_xor_sync", mask, value, (emulation::machine.lane() ^ lane_mask) & 31, location);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta,
                   emulation::SourceLocation location = emulation::SourceLocation::current()) {
  const int lane = emulation::machine.lane();
  return emulation::shuffle("__shfl_down_sync", mask, value, lane + delta < 32 ? int(lane + delta) : lane, location);
}

inline float atomicAdd(float* address, float value,
                       emulation::SourceLocation location = emulation::SourceLocation::current()) {
  const emulation::races::DetectionPause pause;
  emulation::races::access(emulation::races::Access::kAtomic, address, sizeof(float), location);
  const float old = *address;
  *address = old + value;
  return old;
}

inline float __uint_as_float(uint32_t bits) { return emulation::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float x) { return emulation::bit_cast<uint32_t>(x); }

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
#if !defined(__GLIBC_PREREQ) || !__GLIBC_PREREQ(2, 42)  // since 2.42 it is in <cmath>
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
#endif

struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(Bf16 x) { return emulation::float_of_bf16(x.bits); }
inline float to_float(Half x) { return float(emulation::bit_cast<_Float16>(x.bits)); }

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Bf16 from_float<Bf16>(float x) {
  return {uint16_t(emulation::round_to_bf16(x))};
}
template <>
inline Half from_float<Half>(float x) {
  return {emulation::bit_cast<uint16_t>(_Float16(x))};
}

inline uint32_t pack_bf16(float low, float high) {
  return emulation::round_to_bf16(low) | emulation::round_to_bf16(high) << 16;
}

// The error is -2 to 2 ulp, as PTX permits for ex2.approx. It is a hash of x, so the result is deterministic. Integers
// are exact, and subnormal inputs and results are 0.
inline float exp2_approx(float x) {
  float y = std::exp2(x);
  if (std::isnormal(x) && std::isnormal(y) && x != std::trunc(x)) {
    const auto error = uint32_t(emulation::Random(__float_as_uint(x)).below(5)) - 2;
    y = __uint_as_float(__float_as_uint(y) + error);
  }
  return std::fpclassify(y) == FP_SUBNORMAL ? 0.0f : y;
}

inline char* dynamic_shared() { return emulation::machine.shared(); }

inline void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row,
                        emulation::SourceLocation location = emulation::SourceLocation::current()) {
  emulation::load_matrices("ldmatrix_x4", r, shared_row, location,
                           [](emulation::WarpMemory& memory) { memory.load_matrices(); });
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row,
                              emulation::SourceLocation location = emulation::SourceLocation::current()) {
  emulation::load_matrices("ldmatrix_x4_trans", r, shared_row, location,
                           [](emulation::WarpMemory& memory) { memory.load_matrices_transposed(); });
}

inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                     emulation::SourceLocation location = emulation::SourceLocation::current()) {
  const emulation::races::DetectionPause pause;
  emulation::WarpMemory& memory = emulation::machine.memory();
  const int lane = emulation::machine.lane();
  memory.put_fragments(lane, c, a, b0, b1);
  emulation::machine.sync_warp({"mma_bf16", location}, [](emulation::WarpMemory& all) { all.multiply(); });
  memory.take_fragment(lane, c);
}

// At random, the data is copied immediately, which detects a copy that starts while its target is still read, or not
// before the wait for it, which detects a missing wait.
inline void cp_async_16(void* shared, const void* global, bool valid,
                        emulation::SourceLocation location = emulation::SourceLocation::current()) {
  const emulation::races::DetectionPause pause;
  if (uintptr_t(shared) % 16 != 0 || !emulation::machine.is_shared(shared, 16))
    emulation::machine.fail("cp_async_16, %s:%d: the target is not a multiple of 16 in shared memory", location.file,
                            location.line);
  if (uintptr_t(global) % 16 != 0)
    emulation::machine.fail("cp_async_16, %s:%d: the source is not a multiple of 16", location.file, location.line);
  if (valid) {  // reports a read out of bounds at this line of the kernel, not at the wait
    volatile char first = static_cast<const char*>(global)[0], last = static_cast<const char*>(global)[15];
    (void)first, (void)last;
  }
  emulation::Thread& thread = emulation::machine.thread();
  thread.copies.push_back({static_cast<char*>(shared), valid ? static_cast<const char*>(global) : nullptr,
                           thread.committed_groups, false, location});
  emulation::races::begin_copy(thread.copies.back());
  if (emulation::machine.random().below(2) == 0) thread.copies.back().finish();
}

inline void cp_async_commit() {
  const emulation::races::DetectionPause pause;
  emulation::machine.thread().committed_groups++;
}

template <int kPending>
void cp_async_wait() {
  static_assert(kPending >= 0, "a number of groups");
  emulation::finish_copies(kPending);
}

inline cudaError_t cudaGetLastError() { return emulation::machine.take_last_error(); }

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
  }
  return "unrecognized error code";
}

inline const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
  }
  return "unrecognized error code";
}

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) { return device == 0 ? cudaSuccess : cudaErrorInvalidDevice; }

// Synchronous: the kernel has finished when this returns.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t /*stream*/,
                   const Params& params) {
  static_assert(std::is_trivially_copyable<Params>::value && sizeof(Params) <= 4096, "required for kernel parameters");
  return emulation::machine.run(grid, threads, shared_bytes, [&] { kernel(params); });
}

template <class Params>
cudaError_t load(void (*)(Params)) {
  return cudaSuccess;
}

// The size of the GPU determines how the work is split. The default is small, so that small tests have several splits.
inline int multiprocessors() {
  const char* text = std::getenv("FASTSIMCLR_EMULATION_MULTIPROCESSORS");
  return text ? std::atoi(text) : 4;
}

template <class Params>
int blocks_per_multiprocessor(void (*)(Params), int /*threads*/, size_t /*shared_bytes*/) {
  return 1;
}

// Sums over tiles that cp.async loads into two alternating buffers: the pipeline of the loss's kernels.
#include "mma.cuh"

namespace {

constexpr int kThreads = 128, kTile = 4 * kThreads;  // each thread copies 16 bytes of a tile

struct StreamParams {
  const float* in;  // (count,), a multiple of 4
  int count;
  float* out;  // (kTile,): sums of the elements at this position over all tiles
};

__global__ void stream_kernel(StreamParams p) {
  auto* buffers = reinterpret_cast<float*>(dynamic_shared());  // (2, kTile)
  const int thread = int(threadIdx.x);
  const auto fetch = [&](int begin) {
    const int i = begin + 4 * thread;
    const bool valid = i < p.count;
    cp_async_16(buffers + begin / kTile % 2 * kTile + 4 * thread, p.in + i, valid);
  };
  float sum[4] = {};
  fetch(0);
  cp_async_commit();
  for (int begin = 0; begin < p.count; begin += kTile) {
    cp_async_wait<0>();
    __syncthreads();  // the tile is there, and all are done with the one before
    if (begin + kTile < p.count) fetch(begin + kTile);
    cp_async_commit();
    const float* tile = buffers + begin / kTile % 2 * kTile;
    for (int i = 0; i < 4; i++) sum[i] += tile[kTile - 1 - thread - i * kThreads];  // other warps' copies
  }
  for (int i = 0; i < 4; i++) p.out[kTile - 1 - thread - i * kThreads] = sum[i];
}

// Two groups of copies: the first is read while the second may be in flight.
__global__ void groups_kernel(StreamParams p) {
  auto* buffers = reinterpret_cast<float*>(dynamic_shared());  // (2, kTile)
  const int i = 4 * int(threadIdx.x);
  for (int group = 0; group < 2; group++) {
    cp_async_16(buffers + group * kTile + i, p.in + group * kTile + i, true);
    cp_async_commit();
  }
  cp_async_wait<1>();
  __syncthreads();  // the first group of every thread is there
  for (int j = int(threadIdx.x); j < kTile; j += kThreads) p.out[j] = buffers[kTile - 1 - j];
  cp_async_wait<0>();
  __syncthreads();  // and the second one
  for (int j = int(threadIdx.x); j < kTile; j += kThreads) p.out[j] += 1000 * buffers[kTile + kTile - 1 - j];
}

}  // namespace

extern "C" int stream(const float* in, int count, float* out) {
  return launch(stream_kernel, dim3(), kThreads, 2 * kTile * sizeof(float), nullptr, StreamParams{in, count, out});
}

extern "C" int groups(const float* in, int count, float* out) {
  return launch(groups_kernel, dim3(), kThreads, 2 * kTile * sizeof(float), nullptr, StreamParams{in, count, out});
}

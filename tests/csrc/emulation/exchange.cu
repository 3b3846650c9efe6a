// Data exchange between threads: through shared memory, within a block and within a warp, and by shuffles.
#include "mma.cuh"

namespace {

struct ExchangeParams {
  const float* in;  // (blocks, threads)
  float* out;       // the shape of `in`; for shuffles (5, threads)
};

// Reverses each block's numbers.
__global__ void reverse_kernel(ExchangeParams p) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const unsigned thread = threadIdx.x, last = blockDim.x - 1, begin = blockIdx.x * blockDim.x;
  shared[thread] = p.in[begin + thread];
  __syncthreads();  // all are written
  p.out[begin + thread] = shared[last - thread];
}

// Inclusive prefix sums within each warp.
__global__ void prefix_sum_kernel(ExchangeParams p) {
  auto* shared = reinterpret_cast<volatile float*>(dynamic_shared());
  const unsigned thread = threadIdx.x, lane = thread % 32;
  float sum = p.in[thread];
  for (unsigned distance = 1; distance < 32; distance *= 2) {
    shared[thread] = sum;
    __syncwarp();  // written by all
    if (lane >= distance) sum += shared[thread - distance];
    __syncwarp();  // read by all
  }
  p.out[thread] = sum;
}

__global__ void shuffle_kernel(ExchangeParams p) {
  constexpr unsigned kAll = 0xffffffffu;
  const int thread = int(threadIdx.x), threads = int(blockDim.x);
  const float x = p.in[thread];
  p.out[thread] = __shfl_xor_sync(kAll, x, 5);
  p.out[threads + thread] = __shfl_down_sync(kAll, x, 3);
  p.out[2 * threads + thread] = __shfl_sync(kAll, x, thread * 7 % 32);
  p.out[3 * threads + thread] = float(__shfl_xor_sync(kAll, thread, 1));
  p.out[4 * threads + thread] = __uint_as_float(__shfl_sync(kAll, __float_as_uint(x), 31));
}

__global__ void total_kernel(ExchangeParams p) { atomicAdd(p.out, p.in[blockIdx.x * blockDim.x + threadIdx.x]); }

}  // namespace

extern "C" int reverse(const float* in, float* out, int blocks, int threads, int shared_bytes) {
  return launch(reverse_kernel, dim3(unsigned(blocks)), threads, size_t(shared_bytes), nullptr,
                ExchangeParams{in, out});
}

extern "C" int prefix_sum(const float* in, float* out, int threads) {
  return launch(prefix_sum_kernel, dim3(), threads, size_t(threads) * sizeof(float), nullptr, ExchangeParams{in, out});
}

extern "C" int shuffles(const float* in, float* out, int threads) {
  return launch(shuffle_kernel, dim3(), threads, 0, nullptr, ExchangeParams{in, out});
}

extern "C" int total(const float* in, float* out, int blocks, int threads) {
  return launch(total_kernel, dim3(unsigned(blocks)), threads, 0, nullptr, ExchangeParams{in, out});
}

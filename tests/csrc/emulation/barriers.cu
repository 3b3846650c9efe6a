// Threads that diverge before a barrier. The tests copy this file and replace the marked line.
#include "mma.cuh"

namespace {

struct BarrierParams {
  float* out;  // (threads,)
};

__global__ void barrier_kernel(BarrierParams p) {
  const unsigned thread = threadIdx.x, lane = thread % 32;
  float x = float(thread);
  if (thread >= 64) x += 1;  // here
  x = __shfl_xor_sync(0xffffffffu, x, 1);
  __syncthreads();  // prevents no race: the barrier itself is tested
  p.out[thread] = x + float(lane);
}

}  // namespace

extern "C" int barriers(float* out, int threads, int shared_bytes, int blocks) {
  return launch(barrier_kernel, dim3(unsigned(blocks)), threads, size_t(shared_bytes), nullptr, BarrierParams{out});
}

extern "C" int last_error() { return cudaGetLastError(); }
extern "C" const char* name_of_error(int error) { return cudaGetErrorName(cudaError_t(error)); }

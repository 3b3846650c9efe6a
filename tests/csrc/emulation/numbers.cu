// Number conversions, one number per thread.
#include "mma.cuh"

namespace {

struct NumbersParams {
  const float* in;   // (blocks * threads,)
  uint16_t* bf16;    // each number as bf16
  uint16_t* half;    // each number as half
  uint32_t* packed;  // the number and its negative
  float* exp2;       // 2^x
  float* from_bf16;  // the bits index % 2^16 as bf16
  float* from_half;  // the bits index % 2^16 as half
};

__global__ void numbers_kernel(NumbersParams p) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  const float x = p.in[i];
  p.bf16[i] = from_float<Bf16>(x).bits;
  p.half[i] = from_float<Half>(x).bits;
  p.packed[i] = pack_bf16(x, -x);
  p.exp2[i] = exp2_approx(x);
  p.from_bf16[i] = to_float(Bf16{uint16_t(i)});
  p.from_half[i] = to_float(Half{uint16_t(i)});
}

}  // namespace

extern "C" int numbers(const float* in, uint16_t* bf16, uint16_t* half, uint32_t* packed, float* exp2, float* from_bf16,
                       float* from_half, int blocks) {
  return launch(numbers_kernel, dim3(unsigned(blocks)), 128, 0, nullptr,
                NumbersParams{in, bf16, half, packed, exp2, from_bf16, from_half});
}

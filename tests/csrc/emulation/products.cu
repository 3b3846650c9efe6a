// Matrix products with ldmatrix and mma, as in the kernels of the loss.
#include "mma.cuh"

namespace {

struct ProductParams {
  const uint16_t* a;  // (M, K) bf16
  const uint16_t* b;  // (K, N) bf16, or (N, K) if b_is_transposed
  float* c;           // (M, N)
  bool b_is_transposed;
};

// A single mma, 16 x 8 x 16, with fragments loaded element by element in the layout of the PTX manual.
__global__ void single_product_kernel(ProductParams p) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const auto a = [&](int row, int column) { return uint32_t(p.a[row * 16 + column]); };
  const auto b = [&](int row, int column) { return uint32_t(p.b[row * 8 + column]); };
  uint32_t a_fragment[4], b_fragment[2];
  for (int i = 0; i < 4; i++) {
    const int row = g + i % 2 * 8, column = 2 * t + i / 2 * 8;
    a_fragment[i] = a(row, column) | a(row, column + 1) << 16;
  }
  for (int i = 0; i < 2; i++) b_fragment[i] = b(2 * t + 8 * i, g) | b(2 * t + 8 * i + 1, g) << 16;
  float c[4] = {};
  mma_bf16(c, a_fragment, b_fragment[0], b_fragment[1]);
  for (int i = 0; i < 4; i++) p.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

constexpr int kSize = 64, kPitch = kSize + 8;  // 8: the rows of an 8x8 matrix in different banks

// 64 x 64 x 64, with four warps of 16 rows each.
__global__ void product_kernel(ProductParams p) {
  auto* a_shared = reinterpret_cast<uint16_t*>(dynamic_shared());
  uint16_t* b_shared = a_shared + kSize * kPitch;
  for (int chunk = int(threadIdx.x); chunk < kSize * kSize / 8; chunk += int(blockDim.x)) {
    const int row = chunk / (kSize / 8), column = chunk % (kSize / 8) * 8;
    cp_async_16(a_shared + row * kPitch + column, p.a + row * kSize + column, true);
    cp_async_16(b_shared + row * kPitch + column, p.b + row * kSize + column, true);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();  // all threads' copies are there

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int n = 0; n < kSize; n += 16) {
    float c[2][4] = {};
    for (int k = 0; k < kSize; k += 16) {
      uint32_t a[4], b[4];
      ldmatrix_x4(a, a_shared + (warp * 16 + lane % 16) * kPitch + k + lane / 16 * 8);
      if (p.b_is_transposed) {
        ldmatrix_x4(b, b_shared + (n + lane / 16 * 8 + lane % 8) * kPitch + k + lane / 8 % 2 * 8);
      } else {
        ldmatrix_x4_trans(b, b_shared + (k + lane % 16) * kPitch + n + lane / 16 * 8);
      }
      for (int half = 0; half < 2; half++) mma_bf16(c[half], a, b[2 * half], b[2 * half + 1]);
    }
    for (int half = 0; half < 2; half++)
      for (int i = 0; i < 4; i++) {
        const int row = warp * 16 + lane / 4 + i / 2 * 8, column = n + half * 8 + lane % 4 * 2 + i % 2;
        p.c[row * kSize + column] = c[half][i];
      }
  }
}

// Repeated products of ones.
struct RepeatParams {
  float* out;
  int products;
};

__global__ void repeat_kernel(RepeatParams p) {
  float c[4] = {};
  const uint32_t one = pack_bf16(1, 1), a[4] = {one, one, one, one};
  for (int i = 0; i < p.products; i++) mma_bf16(c, a, one, one);
  p.out[threadIdx.x] = c[0];
}

}  // namespace

extern "C" int single_product(const uint16_t* a, const uint16_t* b, float* c) {
  return launch(single_product_kernel, dim3(), 32, 0, nullptr, ProductParams{a, b, c, false});
}

extern "C" int product(const uint16_t* a, const uint16_t* b, float* c, int b_is_transposed) {
  constexpr size_t kSharedBytes = 2 * kSize * kPitch * sizeof(uint16_t);
  return launch(product_kernel, dim3(), 128, kSharedBytes, nullptr, ProductParams{a, b, c, b_is_transposed != 0});
}

extern "C" int repeated_product(float* out, int products) {
  return launch(repeat_kernel, dim3(), 128, 0, nullptr, RepeatParams{out, products});
}

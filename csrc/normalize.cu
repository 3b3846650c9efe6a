// normalize: unit rows for the products, the norm of each row, and the cosine of each positive pair. project: the
// gradient through the normalization, from the sums over the negatives.
//
// One warp processes one image, row i of z1 and row i of z2, so it has both views of a pair.
//
// The cosines of the positives are computed from the rounded rows. The similarity of a hard negative, nearly as close
// as the positive, then has the same rounding error of the anchor row, and the error cancels in the loss, which is a
// difference of similarities.
#include "mma.cuh"
#include "nt_xent.h"
#include "tile.cuh"

namespace fastsimclr {
namespace {

constexpr int kWarpsPerBlock = 4;

__device__ float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Row `image` of both views. Neighboring lanes read neighboring elements along d, whatever the strides.
template <class T>
struct Pair {
  const T* z1;
  const T* z2;
  int64_t stride_1, stride_2;

  __device__ Pair(const Projections& z, int64_t image)
      : z1(static_cast<const T*>(z.z1) + image * z.row_stride_1),
        z2(static_cast<const T*>(z.z2) + image * z.row_stride_2),
        stride_1(z.column_stride_1),
        stride_2(z.column_stride_2) {}
  __device__ float first(int k) const { return to_float(z1[k * stride_1]); }
  __device__ float second(int k) const { return to_float(z2[k * stride_2]); }
};

// Stores x rounded to the planes, as used by the products, and returns the rounded value.
__device__ float store_unit(uint16_t* row, int planes, int width, int k, float x) {
  const Bf16 high = from_float<Bf16>(x);
  row[k] = high.bits;
  if (planes == 1) return to_float(high);
  const Bf16 low = from_float<Bf16>(x - to_float(high));  // the rounding error of `high`
  row[width + k] = low.bits;
  return to_float(high) + to_float(low);
}

__device__ float clamped_norm(float squares) {
  const float norm = sqrtf(squares);
  if (norm > 1e30f) return norm - norm;      // NaN: it is infinite, and z / infinity would be a row of zeros
  return norm < kNormEps ? kNormEps : norm;  // keeps NaN
}

template <class T>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) normalize_kernel(NormalizeParams p) {
  const int64_t image = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (image >= p.z.n) return;  // the whole warp
  const Pair<T> z(p.z, image);

  float squares_1 = 0, squares_2 = 0;
  for (int k = lane; k < p.z.d; k += 32) {
    const float x1 = z.first(k), x2 = z.second(k);
    squares_1 += x1 * x1;
    squares_2 += x2 * x2;
  }
  const float norm_1 = clamped_norm(warp_sum(squares_1)), norm_2 = clamped_norm(warp_sum(squares_2));

  const float inverse_1 = 1 / norm_1, inverse_2 = 1 / norm_2;  // a division per element spills registers on sm_120
  uint16_t* row_1 = p.unit + image * p.planes * p.width;
  uint16_t* row_2 = row_1 + int64_t(p.z.n) * p.planes * p.width;
  float cosine = 0;
  for (int k = lane; k < p.width; k += 32) {
    const bool inside = k < p.z.d;
    const float u1 = store_unit(row_1, p.planes, p.width, k, inside ? z.first(k) * inverse_1 : 0.0f);
    const float u2 = store_unit(row_2, p.planes, p.width, k, inside ? z.second(k) * inverse_2 : 0.0f);
    cosine += u1 * u2;
  }
  cosine = warp_sum(cosine);
  if (lane == 0) {
    p.norm[image] = norm_1;
    p.norm[p.z.n + image] = norm_2;
    p.positive[image] = cosine;
  }
}

// With unit rows u, sums over the negatives a, and pull = g_i q_i + g_pos q_pos:
//   dẑ_i = scale / temperature * (a_i - pull u_pos),   dz_i = (dẑ_i - (u_i·dẑ_i) u_i) / |z_i|
template <class T>
__global__ void __launch_bounds__(32 * kWarpsPerBlock) project_kernel(ProjectParams p) {
  const int64_t image = int64_t(blockIdx.x) * kWarpsPerBlock + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (image >= p.z.n) return;
  const Pair<T> z(p.z, image);
  const int64_t row_1 = image, row_2 = p.z.n + image, rows = 2 * int64_t(p.z.n);
  const float norm_1 = p.norm[row_1], norm_2 = p.norm[row_2];
  const float g_1 = p.weights ? p.weights[row_1] : 1.0f, g_2 = p.weights ? p.weights[row_2] : 1.0f;
  const float pull = g_1 * p.q[row_1] + g_2 * p.q[row_2];

  struct Both {
    float u_1, u_2, d_1, d_2;
  };
  const auto gradients = [&](int k) {
    Both both{z.first(k) / norm_1, z.second(k) / norm_2, 0, 0};
    for (int64_t split = 0; split < p.splits; split++) {  // fixed order: bitwise reproducible
      both.d_1 += p.sums[(split * rows + row_1) * p.width + k];
      both.d_2 += p.sums[(split * rows + row_2) * p.width + k];
    }
    both.d_1 -= pull * both.u_2;
    both.d_2 -= pull * both.u_1;
    return both;
  };

  float along_1 = 0, along_2 = 0;
  for (int k = lane; k < p.z.d; k += 32) {
    const Both both = gradients(k);
    along_1 += both.u_1 * both.d_1;
    along_2 += both.u_2 * both.d_2;
  }
  along_1 = warp_sum(along_1);
  along_2 = warp_sum(along_2);

  const float scale = *p.scale * p.factor / value_of(p.temperature);
  if (lane == 0) {
    p.along[row_1] = along_1 * scale;
    p.along[row_2] = along_2 * scale;
  }
  if (!(norm_1 > kNormEps)) along_1 = 0;  // as in F.normalize, whose norm is constant below eps
  if (!(norm_2 > kNormEps)) along_2 = 0;
  T* dz_1 = static_cast<T*>(p.dz1) + image * p.z.d;
  T* dz_2 = static_cast<T*>(p.dz2) + image * p.z.d;
  for (int k = lane; k < p.z.d; k += 32) {
    const Both both = gradients(k);  // the second read hits the cache
    dz_1[k] = from_float<T>((both.d_1 - along_1 * both.u_1) * (scale / norm_1));
    dz_2[k] = from_float<T>((both.d_2 - along_2 * both.u_2) * (scale / norm_2));
  }
}

template <class Params>
cudaError_t launch_for_images(void (*kernel)(Params), const Params& params, cudaStream_t stream) {
  const auto blocks = unsigned((params.z.n + kWarpsPerBlock - 1) / kWarpsPerBlock);
  return launch(kernel, dim3(blocks), 32 * kWarpsPerBlock, 0, stream, params);
}

}  // namespace

cudaError_t normalize(const NormalizeParams& params, cudaStream_t stream) {
  switch (params.z.dtype) {
    case DataType::kFloat32:
      return launch_for_images(normalize_kernel<float>, params, stream);
    case DataType::kBfloat16:
      return launch_for_images(normalize_kernel<Bf16>, params, stream);
    case DataType::kFloat16:
      return launch_for_images(normalize_kernel<Half>, params, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t project(const ProjectParams& params, cudaStream_t stream) {
  switch (params.z.dtype) {
    case DataType::kFloat32:
      return launch_for_images(project_kernel<float>, params, stream);
    case DataType::kBfloat16:
      return launch_for_images(project_kernel<Bf16>, params, stream);
    case DataType::kFloat16:
      return launch_for_images(project_kernel<Half>, params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastsimclr

// Crops of images in GPU memory: a thread block computes kColumns columns of one view. Its threads first resize the
// crop horizontally, into shared memory as uint8, and then vertically. Weights are computed where they are used, which
// is cheaper than sharing a table of them.
#include "crop.h"
#include "mma.cuh"

namespace fastsimclr {
namespace {

constexpr int kColumns = 32, kThreads = 256;
constexpr int64_t kMaxShared = 99 << 10;  // per block, on every GPU since sm_80

// Pixel i of the view: the weighted mean of pixels of the crop. at(j): value of pixel j of the side.
template <class At>
__device__ __forceinline__ uint8_t weighted_mean(const Side& side, int i, At at) {
  float sum = 0, weights = 0;
  const int end = side.end(i);
  for (int j = side.first(i); j < end; j++) {
    const float weight = side.weight(i, j);
    sum += weight * float(at(j));
    weights += weight;
  }
  return rounded_level(sum / weights);
}

__global__ void __launch_bounds__(kThreads) crop_kernel(CropParams p) {
  const int tiles = (p.size + kColumns - 1) / kColumns;
  const int64_t view = blockIdx.x / unsigned(tiles);
  const int column0 = int(blockIdx.x % unsigned(tiles)) * kColumns;
  const int row_size =
      3 * (p.size - column0 < kColumns ? p.size - column0 : kColumns);  // pixels and channels of a row of this block
  const ViewParams view_params = p.view_params[view];
  const Side columns(view_params.left, view_params.width, p.size, p.bicubic),
      rows(view_params.top, view_params.height, p.size, p.bicubic);
  const uint8_t* image = p.images + p.index[view] * p.height * p.width * 3;
  auto* horizontal = reinterpret_cast<uint8_t*>(dynamic_shared());  // (rows of the crop, row_size)

  for (int n = int(threadIdx.x); n < view_params.height * row_size; n += kThreads) {
    const int y = n / row_size, x = column0 + n % row_size / 3, channel = n % row_size % 3;
    const uint8_t* row = image + (int64_t(view_params.top + y) * p.width + view_params.left) * 3 + channel;
    horizontal[n] =
        weighted_mean(columns, view_params.flip ? p.size - 1 - x : x, [=](int j) { return row[3 * int64_t(j)]; });
  }
  __syncthreads();  // the rows that a pixel needs are written by other threads
  uint8_t* out = p.out + (view * p.size * p.size + column0) * 3;
  for (int n = int(threadIdx.x); n < p.size * row_size; n += kThreads) {
    const int y = n / row_size, x = n % row_size;
    out[int64_t(y) * p.size * 3 + x] = weighted_mean(rows, y, [=](int j) { return horizontal[j * row_size + x]; });
  }
}

}  // namespace

cudaError_t crop(const CropParams& params, cudaStream_t stream) {
  if (params.num_views == 0) return cudaSuccess;
  const int64_t shared = int64_t(params.height) * kColumns * 3;
  if (shared > kMaxShared) return cudaErrorInvalidValue;
  const int64_t blocks = params.num_views * ((params.size + kColumns - 1) / kColumns);
  return launch(crop_kernel, dim3(unsigned(blocks)), kThreads, size_t(shared), stream, params);
}

}  // namespace fastsimclr

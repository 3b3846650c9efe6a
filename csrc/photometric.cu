// A view's colors in two kernels, the fewest that contrast and blur allow: the first sums the luma that contrast is
// about, for which every pixel must be seen; the second does everything else and writes once.
//
// A block of the second one makes a tile of one view in shared memory. Where that view is blurred, the tile's
// surroundings are computed with it, as far as the blur reaches: cheaper than to write the changed view and to read it
// again. Shared memory holds interleaved floats: neighbouring threads are at neighbouring banks in each of its uses,
// and what is written to memory is contiguous.
#include <cmath>

#include "mma.cuh"
#include "photometric.h"
#include "pixel.h"

namespace fastsimclr {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;                 // side of a block's tile of a view, in pixels
constexpr int kRun = 4;                   // neighbouring results of one thread, which share what they read
constexpr int64_t kMaxShared = 99 << 10;  // of a block on every GPU from sm_80 on
constexpr unsigned kAllLanes = 0xffffffffu;

struct Kernel {
  PhotometricParams p;
  float* parts;  // (images, kLumaParts): sums of luma
  int max_radius;
};

__device__ __forceinline__ Pixel read_pixel(const PhotometricParams& p, int64_t image, int64_t pixel) {
  const uint8_t* from = p.crops + 3 * (image * p.height * p.width + pixel);
  return {float(from[0]), float(from[1]), float(from[2])};
}

__device__ __forceinline__ int step_of_contrast(const ViewParams& view_params) {
  int step = 0;
  while (step < 3 && view_params.order[step] != kContrast) step++;
  return step;
}

// Steps [begin, end) of the jitter; mean_term: of contrast alone.
__device__ __forceinline__ Pixel jittered(Pixel x, const ViewParams& view_params, int begin, int end, float mean_term) {
  for (int step = begin; step < end; step++) {
    const int change = view_params.order[step];  // the same in all threads
    const float factor = view_params.factors[change];
    if (change == kBrightness) x = brightness(x, factor);
    if (change == kContrast) x = blend(x, factor, mean_term);
    if (change == kSaturation) x = saturation(x, factor);
    if (change == kHue && factor != 0) x = hue(x, sixths(factor));
  }
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Block (part, image) sums the luma of one of the image's kLumaParts parts, as contrast will find it.
__global__ void __launch_bounds__(kThreads) luma_kernel(Kernel kernel) {
  const PhotometricParams& p = kernel.p;
  const int64_t image = blockIdx.x / kLumaParts, part = blockIdx.x % kLumaParts;
  const ViewParams& view_params = p.view_params[image];  // read where it is used: a copy would lie in local memory
  if (!view_params.jitter) return;
  const int64_t pixels = int64_t(p.height) * p.width;
  const int64_t begin = pixels * part / kLumaParts, end = pixels * (part + 1) / kLumaParts;
  const int contrast = step_of_contrast(view_params);
  uint32_t sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    sum += uint32_t(luma(jittered(read_pixel(p, image, i), view_params, 0, contrast, 0)));
  auto* sums = reinterpret_cast<float*>(dynamic_shared());
  const float of_warp = warp_sum(float(sum));
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = of_warp;
  __syncthreads();  // the warps' sums are there
  if (threadIdx.x != 0) return;
  float of_part = 0;
  for (int warp = 0; warp < kThreads / 32; warp++) of_part += sums[warp];
  kernel.parts[image * kLumaParts + part] = of_part;
}

// Weights of a Gaussian kernel's middle and one side, into shared memory. Those beyond four standard deviations are
// left out: together they are 6e-5. Returns how far it reaches; by all threads, between barriers.
__device__ __forceinline__ int make_kernel(float* weights, float sigma, int max_radius) {
  const int reach = int(ceilf(4 * sigma));
  const int radius = reach < max_radius ? reach : max_radius;
  if (int(threadIdx.x) <= radius) {
    float sum = 0;
    for (int k = -radius; k <= radius; k++) sum += expf(-0.5f * (float(k) / sigma) * (float(k) / sigma));
    const float x = float(threadIdx.x) / sigma;
    weights[threadIdx.x] = expf(-0.5f * x * x) / sum;
  }
  return radius;
}

// results[n] = sum over k of weights[|k|] from[(n + k) stride] for n < kRun.
__device__ __forceinline__ void weigh(float (&results)[kRun], const float* weights, int radius, const float* from,
                                      int stride) {
  float window[kRun];  // from[(n + k) stride], which moves along with k
#pragma unroll
  for (int n = 0; n < kRun; n++) {
    results[n] = 0;
    window[n] = from[(n - radius) * stride];
  }
  for (int k = -radius; k <= radius; k++) {
    const float weight = weights[k < 0 ? -k : k];
#pragma unroll
    for (int n = 0; n < kRun; n++) results[n] += weight * window[n];
#pragma unroll
    for (int n = 0; n + 1 < kRun; n++) window[n] = window[n + 1];
    if (k < radius) window[kRun - 1] = from[(kRun + k) * stride];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) photometric_kernel(Kernel kernel) {
  const PhotometricParams& p = kernel.p;
  const unsigned tiles_x = unsigned(p.width + kTile - 1) / kTile, tiles_y = unsigned(p.height + kTile - 1) / kTile;
  const int64_t image = blockIdx.x / (tiles_x * tiles_y);
  const int x0 = int(blockIdx.x % tiles_x) * kTile, y0 = int(blockIdx.x / tiles_x % tiles_y) * kTile;
  const ViewParams& view_params = p.view_params[image];  // read where it is used: a copy would lie in local memory
  float* weights = reinterpret_cast<float*>(dynamic_shared());  // (max_radius + 1,)
  float* tile = weights + kernel.max_radius + 1;                // (side, side, 3), with its surroundings
  const int radius = view_params.sigma > 0 ? make_kernel(weights, view_params.sigma, kernel.max_radius) : 0;
  const int side = kTile + 2 * radius, pitch = 3 * side;

  float mean_term = 0;
  if (view_params.jitter) {
    static_assert(kLumaParts == 32, "one for each lane");
    const float total = warp_sum(kernel.parts[image * kLumaParts + threadIdx.x % 32]);
    mean_term = total / float(int64_t(p.height) * p.width) * (1 - view_params.factors[kContrast]);
  }
  for (int n = int(threadIdx.x); n < side * side; n += kThreads) {
    int x = mirrored(x0 - radius + n % side, p.width), y = mirrored(y0 - radius + n / side, p.height);
    x = x < 0 ? 0 : x;  // of a tile that the view does not fill: pixels that nothing is made of
    y = y < 0 ? 0 : y;
    Pixel pixel = read_pixel(p, image, int64_t(y) * p.width + x);
    if (view_params.jitter) pixel = jittered(pixel, view_params, 0, 4, mean_term);
    if (view_params.grayscale) pixel = grayscale(pixel);
    tile[3 * n] = pixel.r;
    tile[3 * n + 1] = pixel.g;
    tile[3 * n + 2] = pixel.b;
  }
  __syncthreads();  // the tile and the weights are there
  if (radius > 0) {
    float* wide = tile + side * pitch;  // (side, kTile, 3): blurred along the rows
    constexpr int kRuns = 3 * kTile / kRun;
    for (int n = int(threadIdx.x); n < side * kRuns; n += kThreads) {
      const int y = n / kRuns, channel = n % kRuns % 3, x = n % kRuns / 3 * kRun;
      float results[kRun];
      weigh(results, weights, radius, tile + y * pitch + 3 * (radius + x) + channel, 3);
      for (int i = 0; i < kRun; i++) wide[(y * kTile + x + i) * 3 + channel] = results[i];
    }
    __syncthreads();  // all rows are blurred, and the tile has been read
    for (int n = int(threadIdx.x); n < kTile / kRun * 3 * kTile; n += kThreads) {
      const int y = n / (3 * kTile) * kRun, x = n % (3 * kTile);  // x: pixel and channel
      float results[kRun];
      weigh(results, weights, radius, wide + (y + radius) * 3 * kTile + x, 3 * kTile);
      for (int i = 0; i < kRun; i++) tile[(y + i) * 3 * kTile + x] = float(int(results[i] + 0.5f));
    }
    __syncthreads();  // the blurred tile is there, (kTile, kTile, 3)
  }
  T* out = static_cast<T*>(p.out) + image * p.height * p.width * 3;
  for (int n = int(threadIdx.x); n < kTile * kTile * 3; n += kThreads) {
    const int y = y0 + n / (3 * kTile), x = x0 + n % (3 * kTile) / 3, channel = n % 3;
    if (y >= p.height || x >= p.width) continue;
    const float value = view_params.solarize ? solarize(tile[n]) : tile[n];
    const float scale = channel == 0 ? p.scale[0] : channel == 1 ? p.scale[1] : p.scale[2];  // no array to index:
    const float shift = channel == 0 ? p.shift[0] : channel == 1 ? p.shift[1] : p.shift[2];  // that is local memory
    out[(int64_t(y) * p.width + x) * 3 + channel] = from_float<T>(value * scale + shift);
  }
}

template <class T>
cudaError_t launch_photometric(const Kernel& kernel, size_t shared, cudaStream_t stream) {
  const PhotometricParams& p = kernel.p;
  const int64_t tiles = int64_t((p.width + kTile - 1) / kTile) * ((p.height + kTile - 1) / kTile);
  return launch(photometric_kernel<T>, dim3(unsigned(p.images * tiles)), kThreads, shared, stream, kernel);
}

int64_t shared_bytes(int64_t radius) {
  const int64_t side = kTile + 2 * radius;
  return 4 * (radius + 1 + 3 * side * side + (radius > 0 ? 3 * side * kTile : 0));
}

}  // namespace

int max_blur_radius() {
  int radius = 0;
  while (shared_bytes(radius + 1) <= kMaxShared) radius++;
  return radius;
}

cudaError_t load_views() { return load(luma_kernel); }

cudaError_t photometric(const PhotometricParams& params, float* parts, float max_sigma, cudaStream_t stream) {
  if (params.images == 0) return cudaSuccess;
  const int smaller = params.height < params.width ? params.height : params.width;
  const int taps = params.blur_taps < 2 * smaller - 1 ? params.blur_taps : 2 * smaller - 1;  // a mirror has no more
  const int reach = int(std::ceil(4 * max_sigma));
  const Kernel kernel{params, parts, reach < taps / 2 ? reach : taps / 2};
  if (kernel.max_radius > max_blur_radius()) return cudaErrorInvalidValue;
  const auto shared = size_t(shared_bytes(kernel.max_radius));
  const cudaError_t error = launch(luma_kernel, dim3(unsigned(params.images * kLumaParts)), kThreads,
                                   kThreads / 32 * sizeof(float), stream, kernel);
  if (error != cudaSuccess) return error;
  switch (params.dtype) {
    case PixelType::kFloat32:
      return launch_photometric<float>(kernel, shared, stream);
    case PixelType::kBfloat16:
      return launch_photometric<Bf16>(kernel, shared, stream);
    case PixelType::kFloat16:
      return launch_photometric<Half>(kernel, shared, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastsimclr

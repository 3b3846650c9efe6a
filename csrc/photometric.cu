// The color operations of views in two kernels, the minimum that contrast and blur allow: the first sums the luma for
// contrast, which needs all pixels; the second does everything else and writes once.
//
// A thread block of the second kernel computes a tile of one view in shared memory. If the view is blurred, the tile
// includes a border of the blur's radius: recomputing it is cheaper than writing the view before the blur and
// reading it again. Shared memory holds interleaved floats: neighboring threads access neighboring banks, and global
// writes are contiguous.
#include <cmath>

#include "mma.cuh"
#include "photometric.h"
#include "pixel.h"

namespace fastsimclr {
namespace {

constexpr int kThreads = 256;
constexpr int kTile = 32;                 // side of a tile, in pixels
constexpr int kRun = 4;                   // neighboring outputs per thread, which share their inputs
constexpr int64_t kMaxShared = 99 << 10;  // per block, on every GPU since sm_80
constexpr unsigned kAllLanes = 0xffffffffu;

struct KernelParams {
  PhotometricParams p;
  float* parts;  // (images, kLumaParts): sums of luma
  int max_radius;
};

__device__ __forceinline__ Pixel read_pixel(const PhotometricParams& p, int64_t image, int64_t pixel) {
  const uint8_t* from = static_cast<const uint8_t*>(p.crops) + 3 * (image * p.height * p.width + pixel);
  return {float(from[0]), float(from[1]), float(from[2])};
}

__device__ __forceinline__ int step_of_contrast(const ViewParams& view_params) {
  int step = 0;
  while (step < 3 && view_params.order[step] != kContrast) step++;
  return step;
}

// Steps [begin, end) of the jitter; mean_term: only for contrast.
__device__ __forceinline__ Pixel jittered(Pixel x, const ViewParams& view_params, int begin, int end, float mean_term) {
  for (int step = begin; step < end; step++) {
    const int op = view_params.order[step];  // uniform over the threads
    const float factor = view_params.factors[op];
    if (op == kBrightness) x = brightness(x, factor);
    if (op == kContrast) x = blend(x, factor, mean_term);
    if (op == kSaturation) x = saturation(x, factor);
    if (op == kHue && factor != 0) x = hue(x, hue_in_sixths(factor));
  }
  return x;
}

__device__ __forceinline__ float warp_sum(float x) {
  for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(kAllLanes, x, mask);
  return x;
}

// Each block sums the luma of one of the kLumaParts parts of an image, after the jitter steps before contrast.
__global__ void __launch_bounds__(kThreads) luma_kernel(KernelParams args) {
  const PhotometricParams& p = args.p;
  const int64_t image = blockIdx.x / kLumaParts, part = blockIdx.x % kLumaParts;
  const ViewParams& view_params = p.view_params[image];  // not copied: a copy would be in local memory
  if (!view_params.jitter) return;
  const int64_t pixels = int64_t(p.height) * p.width;
  const int64_t begin = pixels * part / kLumaParts, end = pixels * (part + 1) / kLumaParts;
  const int contrast = step_of_contrast(view_params);
  uint32_t sum = 0;
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads)
    sum += uint32_t(luma(jittered(read_pixel(p, image, i), view_params, 0, contrast, 0)));
  auto* sums = reinterpret_cast<float*>(dynamic_shared());
  const float warp_total = warp_sum(float(sum));
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = warp_total;
  __syncthreads();  // the warps' sums are written
  if (threadIdx.x != 0) return;
  float part_total = 0;
  for (int warp = 0; warp < kThreads / 32; warp++) part_total += sums[warp];
  args.parts[image * kLumaParts + part] = part_total;
}

// Writes the center and one side of a Gaussian kernel to shared memory and returns its radius. Omits weights beyond
// four standard deviations, 6e-5 in total. Called by all threads, between barriers.
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
__device__ __forceinline__ void convolve(float (&results)[kRun], const float* weights, int radius, const float* from,
                                         int stride) {
  float window[kRun];  // from[(n + k) stride], shifted with k
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
__global__ void __launch_bounds__(kThreads) photometric_kernel(KernelParams args) {
  const PhotometricParams& p = args.p;
  const unsigned tiles_x = unsigned(p.width + kTile - 1) / kTile, tiles_y = unsigned(p.height + kTile - 1) / kTile;
  const int64_t image = blockIdx.x / (tiles_x * tiles_y);
  const int x0 = int(blockIdx.x % tiles_x) * kTile, y0 = int(blockIdx.x / tiles_x % tiles_y) * kTile;
  const ViewParams& view_params = p.view_params[image];         // not copied: a copy would be in local memory
  float* weights = reinterpret_cast<float*>(dynamic_shared());  // (max_radius + 1,)
  float* tile = weights + args.max_radius + 1;                  // (side, side, 3), including the border
  const int radius = view_params.sigma > 0 ? make_kernel(weights, view_params.sigma, args.max_radius) : 0;
  const int side = kTile + 2 * radius, pitch = 3 * side;

  float mean_term = 0;
  if (view_params.jitter) {
    static_assert(kLumaParts == 32, "one per lane");
    const float total = warp_sum(args.parts[image * kLumaParts + threadIdx.x % 32]);
    mean_term = total / float(int64_t(p.height) * p.width) * (1 - view_params.factors[kContrast]);
  }
  for (int n = int(threadIdx.x); n < side * side; n += kThreads) {
    int x = reflect(x0 - radius + n % side, p.width), y = reflect(y0 - radius + n / side, p.height);
    x = x < 0 ? 0 : x;  // pixels of a tile outside the view, which no output needs
    y = y < 0 ? 0 : y;
    Pixel pixel = read_pixel(p, image, int64_t(y) * p.width + x);
    if (view_params.jitter) pixel = jittered(pixel, view_params, 0, 4, mean_term);
    if (view_params.grayscale) pixel = grayscale(pixel);
    tile[3 * n] = pixel.r;
    tile[3 * n + 1] = pixel.g;
    tile[3 * n + 2] = pixel.b;
  }
  __syncthreads();  // the tile and the weights are written
  if (radius > 0) {
    float* blurred_rows = tile + side * pitch;  // (side, kTile, 3): blurred horizontally
    constexpr int kRuns = 3 * kTile / kRun;
    for (int n = int(threadIdx.x); n < side * kRuns; n += kThreads) {
      const int y = n / kRuns, channel = n % kRuns % 3, x = n % kRuns / 3 * kRun;
      float results[kRun];
      convolve(results, weights, radius, tile + y * pitch + 3 * (radius + x) + channel, 3);
      for (int i = 0; i < kRun; i++) blurred_rows[(y * kTile + x + i) * 3 + channel] = results[i];
    }
    __syncthreads();  // all rows are blurred, and the tile has been read
    for (int n = int(threadIdx.x); n < kTile / kRun * 3 * kTile; n += kThreads) {
      const int y = n / (3 * kTile) * kRun, x = n % (3 * kTile);  // x: pixel and channel
      float results[kRun];
      convolve(results, weights, radius, blurred_rows + (y + radius) * 3 * kTile + x, 3 * kTile);
      for (int i = 0; i < kRun; i++) tile[(y + i) * 3 * kTile + x] = float(int(results[i] + 0.5f));
    }
    __syncthreads();  // the blurred tile is written, (kTile, kTile, 3)
  }
  T* out = static_cast<T*>(p.out) + image * p.height * p.width * 3;
  for (int n = int(threadIdx.x); n < kTile * kTile * 3; n += kThreads) {
    const int y = y0 + n / (3 * kTile), x = x0 + n % (3 * kTile) / 3, channel = n % 3;
    if (y >= p.height || x >= p.width) continue;
    const float value = view_params.solarize ? solarize(tile[n]) : tile[n];
    // Not p.scale[channel]: indexing an array by a variable would use local memory.
    const float scale = channel == 0 ? p.scale[0] : channel == 1 ? p.scale[1] : p.scale[2];
    const float shift = channel == 0 ? p.shift[0] : channel == 1 ? p.shift[1] : p.shift[2];
    out[(int64_t(y) * p.width + x) * 3 + channel] = from_float<T>(value * scale + shift);
  }
}

template <class T>
cudaError_t launch_photometric(const KernelParams& args, size_t shared, cudaStream_t stream) {
  const PhotometricParams& p = args.p;
  const int64_t tiles = int64_t((p.width + kTile - 1) / kTile) * ((p.height + kTile - 1) / kTile);
  return launch(photometric_kernel<T>, dim3(unsigned(p.images * tiles)), kThreads, shared, stream, args);
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
  const int taps = params.blur_taps < 2 * smaller - 1 ? params.blur_taps : 2 * smaller - 1;  // limited by reflection
  const int reach = int(std::ceil(4 * max_sigma));
  const KernelParams args{params, parts, reach < taps / 2 ? reach : taps / 2};
  if (args.max_radius > max_blur_radius()) return cudaErrorInvalidValue;
  const auto shared = size_t(shared_bytes(args.max_radius));
  const cudaError_t error = launch(luma_kernel, dim3(unsigned(params.images * kLumaParts)), kThreads,
                                   kThreads / 32 * sizeof(float), stream, args);
  if (error != cudaSuccess) return error;
  switch (params.dtype) {
    case PixelType::kFloat32:
      return launch_photometric<float>(args, shared, stream);
    case PixelType::kBfloat16:
      return launch_photometric<Bf16>(args, shared, stream);
    case PixelType::kFloat16:
      return launch_photometric<Half>(args, shared, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fastsimclr

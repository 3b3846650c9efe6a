// One image at a time, in planes of floats that stay in a core's L2 cache: read and spread the bytes, change the planes
// in place, and write them interleaved again, normalised. The loops are plain; the compiler vectorises them, once for
// each kind of CPU, and the machine's own is chosen when the library is loaded.
#include "photometric.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define FASTSIMCLR_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTSIMCLR_CLONES
#endif
// Into the clones, so that they are compiled for the clone's CPU; lambdas too: a call in the middle of a loop ends it.
#define FASTSIMCLR_LAMBDA __attribute__((always_inline))
#define FASTSIMCLR_INLINE inline FASTSIMCLR_LAMBDA

namespace fastsimclr {
namespace {

constexpr float kRed = 0.2989f, kGreen = 0.587f, kBlue = 0.114f;  // ITU-R 601-2 luma, with torchvision's digits

// Memory of one thread: three planes, and what a blur needs beside them.
struct Scratch {
  std::vector<float> planes, blurred, row, kernel;
};

FASTSIMCLR_INLINE float level(float x) {  // clamped, and truncated as a cast to uint8 does
  return float(int(std::min(std::max(x, 0.0f), 255.0f)));
}

FASTSIMCLR_INLINE float luma(float r, float g, float b) { return float(int(r * kRed + g * kGreen + b * kBlue)); }

FASTSIMCLR_INLINE void brightness(float* x, int64_t size, float factor) {
  for (int64_t i = 0; i < 3 * size; i++) x[i] = level(x[i] * factor);
}

FASTSIMCLR_INLINE void contrast(float* x, int64_t size, float factor) {
  const float *r = x, *g = x + size, *b = x + 2 * size;
  int64_t total = 0;
  for (int64_t begin = 0; begin < size; begin += 4096) {  // of which the sum fits 32 bits: those add faster
    const int64_t end = std::min(begin + 4096, size);
    int part = 0;
    for (int64_t i = begin; i < end; i++) part += int(r[i] * kRed + g[i] * kGreen + b[i] * kBlue);
    total += part;
  }
  const float centre = float(double(total) / double(size)) * (1 - factor);
  for (int64_t i = 0; i < 3 * size; i++) x[i] = level(centre + x[i] * factor);
}

FASTSIMCLR_INLINE void saturation(float* __restrict__ x, int64_t size, float factor) {
  float* __restrict__ r = x, * __restrict__ g = x + size, * __restrict__ b = x + 2 * size;
  for (int64_t i = 0; i < size; i++) {
    const float grey = luma(r[i], g[i], b[i]) * (1 - factor);
    r[i] = level(grey + r[i] * factor);
    g[i] = level(grey + g[i] * factor);
    b[i] = level(grey + b[i] * factor);
  }
}

FASTSIMCLR_INLINE float channel_of_hue(float k, float value, float spread) {
  k = k >= 6 ? k - 6 : k;  // k is in [0, 12)
  k = k >= 6 ? k - 6 : k;
  const float x = value - spread * std::min(std::max(std::min(k, 4 - k), 0.0f), 1.0f);
  return float(int(x * (255 + 1 - 1e-3f)));  // torchvision's float to uint8
}

// Turns the hue circle of HSV; closed form of HSV to RGB as in photometric.py.
FASTSIMCLR_INLINE void hue(float* __restrict__ x, int64_t size, float turn) {
  float* __restrict__ r = x, * __restrict__ g = x + size, * __restrict__ b = x + 2 * size;
  const float sixths_of_turn = 6 * (turn < 0 ? turn + 1 : turn);
  for (int64_t i = 0; i < size; i++) {
    const float red = r[i] / 255, green = g[i] / 255, blue = b[i] / 255;
    const float value = std::max(red, std::max(green, blue)), low = std::min(red, std::min(green, blue));
    const float spread = value - low, safe = spread == 0 ? 1.0f : spread;
    const float of_red = (green - blue) / safe, of_green = 2 + (blue - red) / safe, of_blue = 4 + (red - green) / safe;
    float at = value == red ? of_red : value == green ? of_green : of_blue;
    at = spread == 0 ? 0.0f : at;
    at += sixths_of_turn;        // [-1, 12)
    at = at < 0 ? at + 6 : at;   // [0, 12)
    at = at >= 6 ? at - 6 : at;  // [0, 6)
    r[i] = channel_of_hue(at + 5, value, spread);
    g[i] = channel_of_hue(at + 3, value, spread);
    b[i] = channel_of_hue(at + 1, value, spread);
  }
}

FASTSIMCLR_INLINE void to_grey(float* __restrict__ x, int64_t size) {
  float* __restrict__ r = x, * __restrict__ g = x + size, * __restrict__ b = x + 2 * size;
  for (int64_t i = 0; i < size; i++) r[i] = g[i] = b[i] = luma(r[i], g[i], b[i]);
}

// The kernel's middle and one side. Weights beyond four standard deviations are left out: together they are 6e-5.
FASTSIMCLR_INLINE int make_kernel(std::vector<float>& kernel, float sigma, int taps, int height, int width) {
  taps = std::min(taps, 2 * std::min(height, width) - 1);  // a mirror shows no more than the image
  const int radius = std::min(taps / 2, int(std::ceil(4 * sigma)));
  kernel.resize(size_t(radius) + 1);
  float sum = 0;
  for (int k = 0; k <= radius; k++) {
    kernel[size_t(k)] = std::exp(-0.5f * (float(k) / sigma) * (float(k) / sigma));
    sum += k == 0 ? kernel[0] : 2 * kernel[size_t(k)];
  }
  for (float& weight : kernel) weight /= sum;
  return radius;
}

FASTSIMCLR_INLINE int mirrored(int i, int size) { return i < 0 ? -i : i >= size ? 2 * size - 2 - i : i; }

// to[i] = sum over k of kernel[|k|] at(k)[i] for `width` numbers, in pieces whose sums stay in the first cache.
template <class At>
FASTSIMCLR_INLINE void weigh_row(float* __restrict__ to, const float* kernel, int radius, int width, At at) {
  constexpr int kPiece = 512;
  for (int begin = 0; begin < width; begin += kPiece) {
    const int count = std::min(kPiece, width - begin);
    const float* centre = at(0) + begin;
    float sums[kPiece];
    for (int i = 0; i < count; i++) sums[i] = kernel[0] * centre[i];
    for (int k = 1; k <= radius; k++) {
      const float *before = at(-k) + begin, *after = at(k) + begin;
      const float weight = kernel[k];
      for (int i = 0; i < count; i++) sums[i] += weight * (before[i] + after[i]);
    }
    for (int i = 0; i < count; i++) to[begin + i] = sums[i];
  }
}

// Gaussian blur, separable, mirrored at the borders.
FASTSIMCLR_INLINE void blur(float* x, Scratch& scratch, int height, int width, float sigma, int taps) {
  const int radius = make_kernel(scratch.kernel, sigma, taps, height, width);
  const float* kernel = scratch.kernel.data();
  scratch.row.resize(size_t(width) + 2 * size_t(radius));
  float *middle = scratch.row.data() + radius, *blurred = scratch.blurred.data();
  for (int channel = 0; channel < 3; channel++) {
    float* plane = x + int64_t(channel) * height * width;
    for (int y = 0; y < height; y++) {
      // Down the columns, into a row with its mirrored ends; then along the row.
      weigh_row(middle, kernel, radius, width,
                [&](int k) FASTSIMCLR_LAMBDA { return plane + int64_t(mirrored(y + k, height)) * width; });
      for (int k = 1; k <= radius; k++) {
        middle[-k] = middle[mirrored(-k, width)];
        middle[width - 1 + k] = middle[mirrored(width - 1 + k, width)];
      }
      weigh_row(blurred + int64_t(y) * width, kernel, radius, width,
                [&](int k) FASTSIMCLR_LAMBDA { return middle + k; });
    }
    for (int64_t i = 0; i < int64_t(height) * width; i++) plane[i] = float(int(blurred[i] + 0.5f));
  }
}

FASTSIMCLR_INLINE uint16_t to_bf16(float x) {  // nearest even; x is finite
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Interleaved, normalised, as T; `cast` makes one of a float.
template <class T, class Cast>
FASTSIMCLR_INLINE void store(const PhotometricParams& p, const float* x, int64_t image, Cast cast) {
  const int64_t size = int64_t(p.height) * p.width;
  const float *r = x, *g = x + size, *b = x + 2 * size;
  T* __restrict__ out = static_cast<T*>(p.out) + image * 3 * size;
  for (int64_t i = 0; i < size; i++) {
    out[3 * i] = cast((r[i] - p.mean[0]) / p.std[0]);
    out[3 * i + 1] = cast((g[i] - p.mean[1]) / p.std[1]);
    out[3 * i + 2] = cast((b[i] - p.mean[2]) / p.std[2]);
  }
}

FASTSIMCLR_CLONES void one_image(const PhotometricParams& p, int64_t image, Scratch& scratch) {
  const int64_t size = int64_t(p.height) * p.width;
  float* x = scratch.planes.data();
  const uint8_t* crop = p.crops + image * 3 * size;
  float* __restrict__ r = x, * __restrict__ g = x + size, * __restrict__ b = x + 2 * size;
  for (int64_t i = 0; i < size; i++) {
    r[i] = crop[3 * i];
    g[i] = crop[3 * i + 1];
    b[i] = crop[3 * i + 2];
  }
  for (int step = 0; step < 4 && p.jitter[image]; step++) {
    const int64_t operation = p.order[4 * image + step];
    const auto factor = float(p.factors[4 * image + operation]);
    if (operation == 0) brightness(x, size, factor);
    if (operation == 1) contrast(x, size, factor);
    if (operation == 2) saturation(x, size, factor);
    if (operation == 3 && factor != 0) hue(x, size, factor);
  }
  if (p.grey[image]) to_grey(x, size);
  if (p.sigma[image] > 0) blur(x, scratch, p.height, p.width, float(p.sigma[image]), p.blur_taps);
  switch (p.dtype) {
    case PixelType::kFloat32:
      store<float>(p, x, image, [](float v) FASTSIMCLR_LAMBDA { return v; });
      break;
    case PixelType::kBfloat16:
      store<uint16_t>(p, x, image, [](float v) FASTSIMCLR_LAMBDA { return to_bf16(v); });
      break;
    case PixelType::kFloat16:
      store<_Float16>(p, x, image, [](float v) FASTSIMCLR_LAMBDA { return _Float16(v); });
      break;
  }
}

}  // namespace

void photometric(const PhotometricParams& params) {
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    const size_t size = size_t(params.height) * size_t(params.width);
    Scratch scratch;
    scratch.planes.resize(3 * size);
    scratch.blurred.resize(size);
    for (int64_t image; (image = next++) < params.images;) one_image(params, image, scratch);
  };
  std::vector<std::thread> helpers;
  const int64_t threads = std::min<int64_t>(params.threads, params.images);
  for (int64_t i = 1; i < threads; i++) helpers.emplace_back(work);
  work();
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace fastsimclr

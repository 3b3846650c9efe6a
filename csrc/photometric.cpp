// One image at a time, in planes of floats that stay in a core's L2 cache, processed in strips that stay in L1: all
// operations are applied to a strip before the next one. The compiler vectorizes the loops for several kinds of CPU,
// and the version for this CPU is selected when the library is loaded.
#include "photometric.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "pixel.h"

namespace fastsimclr {
namespace {

constexpr int64_t kStrip = 2048;  // pixels

// Scratch memory of a thread: the planes, and rows and kernel of a blur.
struct Scratch {
  std::vector<float> planes, rows, kernel;
};

// A range of pixels in the planes.
struct Strip {
  float* first_plane;
  int64_t stride;  // between planes
  int channels;
  int64_t size;

  FASTSIMCLR_INLINE float* plane(int channel) const { return first_plane + channel * stride; }
};

template <class F>
FASTSIMCLR_INLINE void for_each_pixel(Strip strip, F op) {
  float* __restrict__ r = strip.plane(0), * __restrict__ g = strip.plane(1), * __restrict__ b = strip.plane(2);
  for (int64_t i = 0; i < strip.size; i++) {
    const Pixel x = op(Pixel{r[i], g[i], b[i]});
    r[i] = x.r;
    g[i] = x.g;
    b[i] = x.b;
  }
}

// op(value, channel)
template <class F>
FASTSIMCLR_INLINE void for_each_value(Strip strip, F op) {
  for (int channel = 0; channel < strip.channels; channel++) {
    float* __restrict__ plane = strip.plane(channel);
    for (int64_t i = 0; i < strip.size; i++) plane[i] = op(plane[i], channel);
  }
}

// gray_term: only for contrast.
template <class V>
FASTSIMCLR_INLINE void jitter(Strip strip, int op, float factor, float gray_term) {
  if (strip.channels != 3) {
    const float term = op == kContrast ? gray_term : 0;
    if (op == kBrightness || op == kContrast)
      for_each_value(strip, [=](float x, int) FASTSIMCLR_LAMBDA { return level<V>(term + x * factor); });
    return;
  }
  if (op == kBrightness) for_each_pixel(strip, [=](Pixel x) FASTSIMCLR_LAMBDA { return brightness<V>(x, factor); });
  if (op == kContrast) for_each_pixel(strip, [=](Pixel x) FASTSIMCLR_LAMBDA { return blend<V>(x, factor, gray_term); });
  if (op == kSaturation) for_each_pixel(strip, [=](Pixel x) FASTSIMCLR_LAMBDA { return saturation<V>(x, factor); });
  if (op == kHue && factor != 0) {
    const float hue_shift = hue_in_sixths(factor);
    for_each_pixel(strip, [=](Pixel x) FASTSIMCLR_LAMBDA { return hue<V>(x, hue_shift); });
  }
}

// Sums at(i) for i < size in as many floats as a vector has, which the compiler vectorizes.
template <class At>
FASTSIMCLR_INLINE double sum_of(int64_t size, At at) {
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; lane++) lanes[lane] += at(i + lane);
  double sum = 0;
  for (; i < size; i++) sum += double(at(i));
  for (const float lane : lanes) sum += double(lane);
  return sum;
}

// The sum of the gray levels whose mean is the gray of contrast: the luma of RGB, or all channels' mean.
template <class V>
FASTSIMCLR_INLINE double sum_of_gray(Strip strip) {
  if (V::kIsInteger) {
    int sum = 0;  // of at most kStrip pixels, so it does not overflow
    const float *r = strip.plane(0), *g = strip.plane(1), *b = strip.plane(2);
    for (int64_t i = 0; i < strip.size; i++) sum += int(luma({r[i], g[i], b[i]}));
    return sum;
  }
  if (strip.channels == 3) {
    const float *r = strip.plane(0), *g = strip.plane(1), *b = strip.plane(2);
    return sum_of(strip.size, [=](int64_t i) FASTSIMCLR_LAMBDA { return luma<V>({r[i], g[i], b[i]}); });
  }
  double sum = 0;
  for (int channel = 0; channel < strip.channels; channel++) {
    const float* plane = strip.plane(channel);
    sum += sum_of(strip.size, [=](int64_t i) FASTSIMCLR_LAMBDA { return plane[i]; });
  }
  return sum / strip.channels;
}

FASTSIMCLR_INLINE uint16_t to_bf16(float x) {  // rounds to nearest even; x is finite
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Stores the strip normalized and interleaved, from pixel `first` on. cast: converts float to T.
template <class T, class Cast>
FASTSIMCLR_INLINE void store(const PhotometricParams& p, Strip strip, int64_t first, int dropped, Cast cast) {
  T* __restrict__ out = static_cast<T*>(p.out) + strip.channels * first;
  if (strip.channels == 3 && dropped == 0) {
    const float *r = strip.plane(0), *g = strip.plane(1), *b = strip.plane(2);
    for (int64_t i = 0; i < strip.size; i++) {
      out[3 * i] = cast(r[i] * p.scale[0] + p.shift[0]);
      out[3 * i + 1] = cast(g[i] * p.scale[1] + p.shift[1]);
      out[3 * i + 2] = cast(b[i] * p.scale[2] + p.shift[2]);
    }
    return;
  }
  for (int channel = 0; channel < strip.channels; channel++) {
    const float* plane = strip.plane(channel);
    const bool is_dropped = channel + 1 == dropped;
    const float scale = is_dropped ? 0 : p.scale[channel], shift = is_dropped ? 0 : p.shift[channel];
    for (int64_t i = 0; i < strip.size; i++) out[i * strip.channels + channel] = cast(plane[i] * scale + shift);
  }
}

// Solarizes, normalizes and stores a strip. first: its first pixel, counted over all images.
template <class V>
FASTSIMCLR_INLINE void finish(const PhotometricParams& p, const ViewParams& view_params, Strip strip, int64_t first) {
  const int dropped = V::kIsInteger ? 0 : view_params.dropped;
  if (view_params.solarize) for_each_value(strip, [](float x, int) FASTSIMCLR_LAMBDA { return solarize<V>(x); });
  if (p.dtype == PixelType::kFloat32)
    store<float>(p, strip, first, dropped, [](float v) FASTSIMCLR_LAMBDA { return v; });
  if (p.dtype == PixelType::kBfloat16)
    store<uint16_t>(p, strip, first, dropped, [](float v) FASTSIMCLR_LAMBDA { return to_bf16(v); });
  if (p.dtype == PixelType::kFloat16)
    store<_Float16>(p, strip, first, dropped, [](float v) FASTSIMCLR_LAMBDA { return _Float16(v); });
}

// Computes the center and one side of the kernel. Omits weights beyond four standard deviations, 6e-5 in total.
FASTSIMCLR_INLINE int make_kernel(std::vector<float>& kernel, float sigma, int taps, int height, int width) {
  taps = std::min(taps, 2 * std::min(height, width) - 1);  // reflection is limited by the image size
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

// to[i] = sum over k of kernel[|k|] at(k)[i] for `width` elements, kVectors vectors at a time, whose sums stay in
// registers. The last vectors start earlier and recompute some elements.
template <int kVectors, class At>
FASTSIMCLR_INLINE void convolve_vectors(float* to, const float* kernel, int radius, int width, At at) {
  constexpr int kChunk = kVectors * kLanes;
  for (int chunk = 0; chunk < width; chunk += kChunk) {
    const int begin = std::min(chunk, width - kChunk);
    const auto lanes = [=](int k) FASTSIMCLR_LAMBDA { return reinterpret_cast<const LanesInMemory*>(at(k) + begin); };
    Lanes sums[kVectors];
    for (int v = 0; v < kVectors; v++) sums[v] = kernel[0] * lanes(0)[v].lanes;
    for (int k = 1; k <= radius; k++) {
      const LanesInMemory *before = lanes(-k), *after = lanes(k);
      for (int v = 0; v < kVectors; v++) sums[v] += kernel[k] * (before[v].lanes + after[v].lanes);
    }
    for (int v = 0; v < kVectors; v++) reinterpret_cast<LanesInMemory*>(to + begin)[v].lanes = sums[v];
  }
}

template <class At>
FASTSIMCLR_INLINE void convolve_row(float* to, const float* kernel, int radius, int width, At at) {
  if (width >= 4 * kLanes) return convolve_vectors<4>(to, kernel, radius, width, at);
  if (width >= kLanes) return convolve_vectors<1>(to, kernel, radius, width, at);
  for (int i = 0; i < width; i++) {
    to[i] = kernel[0] * at(0)[i];
    for (int k = 1; k <= radius; k++) to[i] += kernel[k] * (at(-k)[i] + at(k)[i]);
  }
}

// Separable Gaussian blur with reflected borders; each row is finished immediately.
template <class V>
FASTSIMCLR_INLINE void blur_and_finish(const PhotometricParams& p, const ViewParams& view_params, int channels,
                                       int64_t image, Scratch& scratch) {
  const int height = p.height, width = p.width;
  const int radius = make_kernel(scratch.kernel, view_params.sigma, p.blur_taps, height, width);
  const float* kernel = scratch.kernel.data();
  scratch.rows.resize(size_t(channels + 1) * size_t(width) + 2 * size_t(radius));
  float* middle = scratch.rows.data() + radius;  // a row with reflected ends
  float* blurred = middle + width + radius;      // a row of each channel
  for (int y = 0; y < height; y++) {
    for (int channel = 0; channel < channels; channel++) {
      const float* plane = scratch.planes.data() + int64_t(channel) * height * width;
      convolve_row(middle, kernel, radius, width,
                   [=](int k) FASTSIMCLR_LAMBDA { return plane + int64_t(reflect(y + k, height)) * width; });
      for (int k = 1; k <= radius; k++) {
        middle[-k] = middle[reflect(-k, width)];
        middle[width - 1 + k] = middle[reflect(width - 1 + k, width)];
      }
      float* row = blurred + channel * width;
      convolve_row(row, kernel, radius, width, [=](int k) FASTSIMCLR_LAMBDA { return middle + k; });
      if (V::kIsInteger)
        for (int x = 0; x < width; x++) row[x] = V::round(row[x]);
    }
    finish<V>(p, view_params, {blurred, width, channels, width}, (image * height + y) * width);
  }
}

template <class V>
FASTSIMCLR_INLINE void load(const PhotometricParams& p, Strip strip, int64_t first) {
  const int channels = strip.channels;
  const auto* __restrict__ crop = static_cast<const typename V::Crop*>(p.crops) + channels * first;
  if (channels == 3) {
    float* __restrict__ r = strip.plane(0), * __restrict__ g = strip.plane(1), * __restrict__ b = strip.plane(2);
    for (int64_t i = 0; i < strip.size; i++) {
      r[i] = crop[3 * i];
      g[i] = crop[3 * i + 1];
      b[i] = crop[3 * i + 2];
    }
    return;
  }
  for (int channel = 0; channel < channels; channel++) {
    float* __restrict__ plane = strip.plane(channel);
    for (int64_t i = 0; i < strip.size; i++) plane[i] = crop[channels * i + channel];
  }
}

template <class V>
FASTSIMCLR_INLINE void apply(const PhotometricParams& p, int64_t image, Scratch& scratch) {
  const ViewParams& view_params = p.view_params[image];
  const int channels = V::kIsInteger ? 3 : p.channels;
  const int64_t size = int64_t(p.height) * p.width;
  float* planes = scratch.planes.data();
  const auto strip_at = [=](int64_t first) FASTSIMCLR_LAMBDA {
    return Strip{planes + first, size, channels, std::min(kStrip, size - first)};
  };
  const int contrast_step =
      int(std::find(view_params.order, view_params.order + 4, uint8_t(kContrast)) - view_params.order);
  const float contrast = view_params.factors[kContrast];

  const bool has_gain = !V::kIsInteger && std::any_of(view_params.gain, view_params.gain + channels,
                                                      [](float gain) FASTSIMCLR_LAMBDA { return gain != 1; });

  double total = 0;
  for (int64_t first = 0; first < size; first += kStrip) {  // until contrast, which needs the mean gray of the view
    const Strip strip = strip_at(first);
    load<V>(p, strip, image * size + first);
    if (!view_params.jitter) continue;
    for (int step = 0; step < contrast_step; step++)
      jitter<V>(strip, view_params.order[step], view_params.factors[view_params.order[step]], 0);
    total += sum_of_gray<V>(strip);
  }
  const float mean_term = float(total / double(size)) * (1 - contrast);
  for (int64_t first = 0; first < size; first += kStrip) {  // contrast and the operations after it
    const Strip strip = strip_at(first);
    for (int step = contrast_step; view_params.jitter && step < 4; step++)
      jitter<V>(strip, view_params.order[step], view_params.factors[view_params.order[step]], mean_term);
    if (has_gain)
      for_each_value(strip, [&](float x, int c) FASTSIMCLR_LAMBDA { return level<V>(x * view_params.gain[c]); });
    if (view_params.grayscale && channels == 3)
      for_each_pixel(strip, [](Pixel x) FASTSIMCLR_LAMBDA { return grayscale<V>(x); });
    if (!(view_params.sigma > 0)) finish<V>(p, view_params, strip, image * size + first);
  }
  if (view_params.sigma > 0) blur_and_finish<V>(p, view_params, channels, image, scratch);
}

FASTSIMCLR_CLONES void apply_to_levels(const PhotometricParams& p, int64_t image, Scratch& scratch) {
  apply<Levels>(p, image, scratch);
}

FASTSIMCLR_CLONES void apply_to_floats(const PhotometricParams& p, int64_t image, Scratch& scratch) {
  apply<Unit>(p, image, scratch);
}

}  // namespace

void photometric_on_cpu(const PhotometricParams& params, bool is_float, int threads) {
  in_threads(threads, params.images, [&](auto next) {
    Scratch scratch;
    scratch.planes.resize(size_t(params.channels) * size_t(params.height) * size_t(params.width));
    for (int64_t image; (image = next()) < params.images;)
      (is_float ? apply_to_floats : apply_to_levels)(params, image, scratch);
  });
}

}  // namespace fastsimclr

// The color operations on a pixel, for CPU and GPU: torchvision's operations on uint8 tensors, with values clamped and
// truncated to integers after each, or on floats from 0 to 1, with values only clamped. fastsimclr/data/photometric.py
// has the same in PyTorch, the reference of the tests.
#pragma once

#if defined(__CUDACC__)
#define FASTSIMCLR_PIXEL __host__ __device__ __forceinline__
#else  // inlined into loops that are vectorized for several kinds of CPU
#define FASTSIMCLR_PIXEL inline __attribute__((always_inline))
#endif

#include <cstdint>

namespace fastsimclr {

enum ColorOp { kBrightness, kContrast, kSaturation, kHue };  // the values in ViewParams::order

struct Pixel {
  float r, g, b;
};

struct Levels {  // values are integers from 0 to 255
  using Crop = uint8_t;
  static constexpr bool kIsInteger = true;
  static constexpr float kMiddle = 128;
  static constexpr float kPeak = 255;
  FASTSIMCLR_PIXEL static float truncate(float x) { return float(int(x)); }
  FASTSIMCLR_PIXEL static float round(float x) { return float(int(x + 0.5f)); }
};

struct Unit {  // values are floats from 0 to 1
  using Crop = float;
  static constexpr bool kIsInteger = false;
  static constexpr float kMiddle = 0.5f;
  static constexpr float kPeak = 1;
  FASTSIMCLR_PIXEL static float truncate(float x) { return x; }
  FASTSIMCLR_PIXEL static float round(float x) { return x; }
};

template <class V = Levels>
FASTSIMCLR_PIXEL float level(float x) {
  x = x > 0 ? x : 0;
  return V::truncate(x < V::kPeak ? x : V::kPeak);
}

template <class V = Levels>
FASTSIMCLR_PIXEL float luma(Pixel x) {  // ITU-R 601-2, with the coefficients of torchvision
  return V::truncate(x.r * 0.2989f + x.g * 0.587f + x.b * 0.114f);
}

template <class V = Levels>
FASTSIMCLR_PIXEL Pixel brightness(Pixel x, float factor) {
  return {level<V>(x.r * factor), level<V>(x.g * factor), level<V>(x.b * factor)};
}

// Blends with a gray: `gray_term` is the gray times (1 - factor). With the view's mean luma as gray this is contrast,
// with the luma of the pixel it is saturation.
template <class V = Levels>
FASTSIMCLR_PIXEL Pixel blend(Pixel x, float factor, float gray_term) {
  return {level<V>(gray_term + x.r * factor), level<V>(gray_term + x.g * factor), level<V>(gray_term + x.b * factor)};
}

template <class V = Levels>
FASTSIMCLR_PIXEL Pixel saturation(Pixel x, float factor) {
  return blend<V>(x, factor, luma<V>(x) * (1 - factor));
}

// HSV to RGB in closed form: value - spread * clamp(min(k, 4 - k), 0, 1), with k = (5, 3 or 1 + sixths) mod 6.
template <class V>
FASTSIMCLR_PIXEL float hsv_channel(float k, float value, float spread) {
  k = k >= 6 ? k - 6 : k;
  k = k < 4 - k ? k : 4 - k;
  k = k > 0 ? k : 0;
  const float x = value - spread * (k < 1 ? k : 1);
  return V::kIsInteger ? float(int(x * ((255 + 1 - 1e-3f) / 255))) : x;  // torchvision's float to uint8
}

// Shifts the hue of HSV by `hue_shift` sixths of the hue circle, in [0, 6].
template <class V = Levels>
FASTSIMCLR_PIXEL Pixel hue(Pixel x, float hue_shift) {
  const float larger = x.g > x.b ? x.g : x.b, smaller = x.g < x.b ? x.g : x.b;
  const float value = x.r > larger ? x.r : larger, low = x.r < smaller ? x.r : smaller;
  const float spread = value - low;
  const bool red = value == x.r, green = value == x.g;
  const float across = red ? x.g - x.b : green ? x.b - x.r : x.r - x.g;  // 0 for gray
  const float from = red ? 0.0f : green ? 2.0f : 4.0f;
  float at = from + across / (spread == 0 ? 1.0f : spread) + hue_shift;  // [-1, 11)
  at = at < 0 ? at + 6 : at;
  at = at >= 6 ? at - 6 : at;
  return {hsv_channel<V>(at + 5, value, spread), hsv_channel<V>(at + 3, value, spread),
          hsv_channel<V>(at + 1, value, spread)};
}

// hue_shift: in [-1, 1], as a fraction of the hue circle.
FASTSIMCLR_PIXEL float hue_in_sixths(float hue_shift) { return 6 * (hue_shift < 0 ? hue_shift + 1 : hue_shift); }

template <class V = Levels>
FASTSIMCLR_PIXEL Pixel grayscale(Pixel x) {
  return {luma<V>(x), luma<V>(x), luma<V>(x)};
}

template <class V = Levels>
FASTSIMCLR_PIXEL float solarize(float x) {
  return x >= V::kMiddle ? V::kPeak - x : x;
}

// The index of pixel i of `size` pixels with reflected borders, for i in (-size, 2 * size - 1).
FASTSIMCLR_PIXEL int reflect(int i, int size) { return i < 0 ? -i : i >= size ? 2 * size - 2 - i : i; }

}  // namespace fastsimclr

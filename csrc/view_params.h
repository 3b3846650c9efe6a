// Samples the random parameters of views with Philox4x32-10 (Salmon et al., SC 2011): the key is seed and epoch, the
// counter view and image. fastsimclr/data/params.py has the same in NumPy, and documents the use of each number.
#pragma once

#include <array>
#include <cstdint>

namespace fastsimclr {

constexpr int kMaxChannels = 16;

// The sampled parameters of one view of one image: VIEW_PARAMS of fastsimclr/data/params.py.
struct ViewParams {
  int32_t top, left, height, width;  // the crop, in pixels of the image
  float factors[4];                  // brightness, contrast, saturation, and hue shift as a fraction of the hue circle
  float sigma;                       // of the blur, in pixels; 0: no blur
  float gain[kMaxChannels];          // factor of each channel; 1: no gain
  uint8_t order[4];                  // order of application: 0 brightness, 1 contrast, 2 saturation, 3 hue
  bool flip, jitter, grayscale, solarize, vertical_flip;
  uint8_t quarter_turns;  // counterclockwise, after the flips
  uint16_t dropped;       // the channel that is dropped, from 1; 0: none
};
static_assert(sizeof(ViewParams) == 112, "the size of the NumPy dtype");

struct SampleParams {
  uint32_t seed = 0, epoch = 0, view = 0;
  int64_t count = 0;
  const int64_t* index = nullptr;  // (count,): indices of the images
  const int64_t* sizes = nullptr;  // (count, 2): heights and widths of the images
  // The augmentation of this view (fastsimclr/data/augmentation.py):
  double center_fraction = 0;  // side of a center crop, as a fraction of the shorter side; 0: random crops, by
  std::array<double, 2> scale, ratio, log_ratio;
  std::array<double, 4> factors_low, factors_high;
  std::array<double, 2> sigma;
  std::array<double, 8> probabilities;  // flip, jitter, grayscale, blur, solarize, vertical flip, rotation, drop
  std::array<double, 2> gain;
  int channels = 3;
  ViewParams* out = nullptr;  // (count,)
};

void sample_params(const SampleParams& params);

}  // namespace fastsimclr

// Every random choice of the data path: Philox4x32-10 (Salmon et al., SC 2011), keyed by seed and epoch, counted by
// view and image. fastsimclr/data/params.py holds the same in numpy, and what each number is used for.
#pragma once

#include <array>
#include <cstdint>

namespace fastsimclr {

// What was drawn for one view of one image. VIEW_PARAMS of fastsimclr/data/params.py.
struct ViewParams {
  int32_t top, left, height, width;  // of the crop in pixels of the image
  float factors[4];  // of brightness, contrast and saturation; the hue shift as a fraction of a full turn
  float sigma;       // of the blur in pixels; 0 for none
  uint8_t order[4];  // in which they are applied: 0 brightness, 1 contrast, 2 saturation, 3 hue
  bool flip, jitter, grayscale, solarize;
};
static_assert(sizeof(ViewParams) == 44, "as numpy lays it out");

struct SampleParams {
  uint32_t seed = 0, epoch = 0, view = 0;
  int64_t count = 0;
  const int64_t* index = nullptr;  // (count,): which images
  const int64_t* sizes = nullptr;  // (count, 2): their heights and widths
  // The view's recipe (fastsimclr/data/augmentation.py):
  double center_fraction = 0;  // side of the central square, as a fraction of the shorter side; 0: random crops, by
  std::array<double, 2> scale, ratio, log_ratio;
  std::array<double, 4> factors_low, factors_high;
  std::array<double, 2> sigma;
  std::array<double, 5> probabilities;  // of flip, jitter, grayscale, blur, solarize
  ViewParams* out = nullptr;            // (count,)
};

void sample_params(const SampleParams& params);

}  // namespace fastsimclr

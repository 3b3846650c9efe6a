// What happens to a view's colours, for CPUs: jitter in the order drawn, grey, blur, normalisation, cast. The
// operations are torchvision's on uint8 tensors, clamped and truncated to whole levels between the steps.
// fastsimclr/data/photometric.py holds the same in PyTorch: it is the oracle of the tests.
#pragma once

#include <cstdint>

namespace fastsimclr {

enum class PixelType { kFloat32, kBfloat16, kFloat16 };

struct PhotometricParams {
  const uint8_t* crops = nullptr;  // (images, height, width, 3)
  int64_t images = 0;
  int height = 0, width = 0;
  // What was drawn, by image:
  const bool* jitter = nullptr;     // (images,)
  const int64_t* order = nullptr;   // (images, 4): 0 brightness, 1 contrast, 2 saturation, 3 hue, as they are applied
  const double* factors = nullptr;  // (images, 4): of the same four; hue's in turns of the circle
  const bool* grey = nullptr;       // (images,)
  const double* sigma = nullptr;    // (images,): of the blur in pixels; 0 for none
  int blur_taps = 3;                // odd: the most that a blur's kernel has
  float mean[3] = {0, 0, 0};        // in levels of 255
  float std[3] = {1, 1, 1};
  PixelType dtype = PixelType::kFloat32;
  void* out = nullptr;  // (images, height, width, 3) of dtype: channels-last
  int threads = 1;
};

void photometric(const PhotometricParams& params);

}  // namespace fastsimclr

// Crop, antialiased resize and flip of decoded images of one size in memory. The filters are torchvision's: a triangle,
// or Keys' cubic with a = -0.5, scaled to the size of an output pixel when downsampling, and renormalized at the border
// of the crop. 8-bit RGB is rounded to uint8 after the horizontal and after the vertical pass; other images become
// floats from 0 to 1.
#pragma once

#ifdef FASTSIMCLR_EMULATION
#include "emulation/cuda_on_cpu.h"
#elif defined(FASTSIMCLR_CUDA) || defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "pixel.h"
#include "view_params.h"

namespace fastsimclr {

struct CropParams {
  const uint8_t* images = nullptr;  // (any number, height, width, 3)
  int height = 0, width = 0;
  const int64_t* index = nullptr;           // (num_views,): the image of each view
  const ViewParams* view_params = nullptr;  // (num_views,)
  int64_t num_views = 0;
  int size = 0;  // side of a view
  bool bicubic = true;
  uint8_t* out = nullptr;  // (num_views, size, size, 3)
};

// One side of a crop: the weights of its pixels [start, start + length) in the pixels of the view.
struct Side {
  int start, length;
  float scale;  // pixels of the image per pixel of the view
  bool bicubic;

  FASTSIMCLR_PIXEL Side(int start_, int length_, int size, bool bicubic_)
      : start(start_), length(length_), scale(float(length_) / float(size)), bicubic(bicubic_) {}

  FASTSIMCLR_PIXEL float filter_scale() const { return scale > 1 ? scale : 1; }
  FASTSIMCLR_PIXEL float support() const { return (bicubic ? 2 : 1) * filter_scale(); }
  // The center of pixel i of the view, relative to start.
  FASTSIMCLR_PIXEL float center(int i) const { return (float(i) + 0.5f) * scale; }
  FASTSIMCLR_PIXEL int first(int i) const {
    const int x = int(center(i) - support());
    return x > 0 ? x : 0;
  }
  FASTSIMCLR_PIXEL int end(int i) const {
    const int x = int(center(i) + support()) + 1;
    return x < length ? x : length;
  }
  // The weight of pixel start + j in pixel i of the view, not normalized.
  FASTSIMCLR_PIXEL float weight(int i, int j) const {
    const float x = (float(j) + 0.5f - center(i)) / filter_scale(), distance = x < 0 ? -x : x;
    if (!bicubic) return distance < 1 ? 1 - distance : 0;
    if (distance < 1) return (1.5f * distance - 2.5f) * distance * distance + 1;
    return distance < 2 ? ((-0.5f * distance + 2.5f) * distance - 4) * distance + 2 : 0;
  }
};

FASTSIMCLR_PIXEL uint8_t rounded_level(float x) {
  x += 0.5f;
  return uint8_t(x < 0 ? 0 : x > 255 ? 255 : x);
}

// On the CPU. All arrays are in host memory.
void crop_on_cpu(const CropParams& params, int threads);

enum class ValueType { kUint8, kUint16, kFloat32 };

// Images that are not 8-bit RGB.
struct FloatCropParams : CropParams {
  const void* values = nullptr;  // (any number, height, width, channels) of `type`; in place of `images`
  ValueType type = ValueType::kFloat32;
  int channels = 1;
  float low = 0, high = 1;     // values that become 0 and 1
  float* float_out = nullptr;  // (num_views, size, size, channels); in place of `out`
};

void crop_to_floats_on_cpu(const FloatCropParams& params, int threads);

#if defined(FASTSIMCLR_CUDA) || defined(FASTSIMCLR_EMULATION) || defined(__CUDACC__)
// On the GPU. Returns cudaErrorInvalidValue if the images are too high for shared memory: 1,000 pixels always fit.
cudaError_t crop(const CropParams& params, cudaStream_t stream);
#endif

}  // namespace fastsimclr

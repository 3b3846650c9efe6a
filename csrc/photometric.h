// The color operations of a view: jitter in the sampled order, gain, grayscale, blur, solarize, normalize, channel
// drop, cast. The operations on a pixel are in pixel.h.
#pragma once

#ifdef FASTSIMCLR_EMULATION
#include "emulation/cuda_on_cpu.h"
#elif defined(FASTSIMCLR_CUDA) || defined(__CUDACC__)
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "view_params.h"

namespace fastsimclr {

enum class PixelType { kFloat32, kBfloat16, kFloat16 };

struct PhotometricParams {
  const void* crops = nullptr;              // (images, height, width, channels) uint8, or float from 0 to 1
  const ViewParams* view_params = nullptr;  // (images,)
  int64_t images = 0;
  int height = 0, width = 0;
  int channels = 3;
  int blur_taps = 3;               // odd: maximum size of the blur's kernel
  float scale[kMaxChannels] = {};  // normalization: out = value * scale + shift
  float shift[kMaxChannels] = {};
  PixelType dtype = PixelType::kFloat32;
  void* out = nullptr;  // (images, height, width, channels) of `dtype`: channels-last
};

// On the CPU. All arrays are in host memory. is_float: the crops are floats; uint8 crops are RGB, without gain and
// drop.
void photometric_on_cpu(const PhotometricParams& params, bool is_float, int threads);

#if defined(FASTSIMCLR_CUDA) || defined(FASTSIMCLR_EMULATION) || defined(__CUDACC__)
constexpr int kLumaParts = 32;  // parts of an image, each summed by a thread block

// Loads one of the view kernels: an error means that none of them can run on the current device.
cudaError_t load_views();

// The maximum radius of a blur on the GPU, in pixels.
int max_blur_radius();

// On the GPU, for uint8 crops. parts: (images, kLumaParts) of scratch memory; max_sigma: the largest sigma of all
// views, 0 without blur. Returns cudaErrorInvalidValue if the radius of a blur may exceed max_blur_radius().
cudaError_t photometric(const PhotometricParams& params, float* parts, float max_sigma, cudaStream_t stream);
#endif

}  // namespace fastsimclr

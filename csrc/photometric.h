// What happens to a view's colors: jitter in the order drawn, grey, blur, solarization, normalization, cast. What each
// change does is in pixel.h.
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
  const uint8_t* crops = nullptr;           // (images, height, width, 3)
  const ViewParams* view_params = nullptr;  // (images,)
  int64_t images = 0;
  int height = 0, width = 0;
  int blur_taps = 3;           // odd: the most that a blur's kernel has
  float scale[3] = {1, 1, 1};  // of a level, before
  float shift[3] = {0, 0, 0};  // this is added
  PixelType dtype = PixelType::kFloat32;
  void* out = nullptr;  // (images, height, width, 3) of dtype: channels-last
};

// On the CPU; everything is in its memory.
void photometric_on_cpu(const PhotometricParams& params, int threads);

#if defined(FASTSIMCLR_CUDA) || defined(FASTSIMCLR_EMULATION) || defined(__CUDACC__)
constexpr int kLumaParts = 32;  // of an image, which are summed by a block each

// Loads one of the kernels: an error means that none of the views' kernels can run on the current device.
cudaError_t load_views();

// How far a blur can reach on the GPU, in pixels to each side.
int max_blur_radius();

// On the GPU. parts: (images, kLumaParts) of its memory to work with; max_sigma: no view's blur is wider; 0: there is
// none. cudaErrorInvalidValue if a blur may reach further than max_blur_radius().
cudaError_t photometric(const PhotometricParams& params, float* parts, float max_sigma, cudaStream_t stream);
#endif

}  // namespace fastsimclr

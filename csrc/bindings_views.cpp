// Bindings of the view operations: view_params.h, crop.h, photometric.h.
#include <algorithm>
#include <array>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "crop.h"
#include "photometric.h"
#include "view_params.h"

namespace py = pybind11;

namespace fastsimclr {
namespace {

void define_pixel_type(py::module_& module) {
  py::enum_<PixelType>(module, "PixelType", py::module_local())  // both _C and _emulated define it
      .value("float32", PixelType::kFloat32)
      .value("bfloat16", PixelType::kBfloat16)
      .value("float16", PixelType::kFloat16);
}

#ifndef FASTSIMCLR_EMULATION

void define_sample_params(py::module_& module) {
  using namespace py::literals;
  using Range = std::array<double, 2>;
  using Factors = std::array<double, 4>;
  module.def(
      "sample_params",
      [](uint32_t seed, uint32_t epoch, uint32_t view, int64_t count, Address index, Address sizes,
         double center_fraction, const Range& scale, const Range& ratio, const Range& log_ratio,
         const Factors& factors_low, const Factors& factors_high, const Range& sigma,
         const std::array<double, 8>& probabilities, const Range& gain, int channels, Address out) {
        SampleParams p;
        p.seed = seed;
        p.epoch = epoch;
        p.view = view;
        p.count = count;
        p.index = pointer<const int64_t>(index);
        p.sizes = pointer<const int64_t>(sizes);
        p.center_fraction = center_fraction;
        p.scale = scale;
        p.ratio = ratio;
        p.log_ratio = log_ratio;
        p.factors_low = factors_low;
        p.factors_high = factors_high;
        p.sigma = sigma;
        p.probabilities = probabilities;
        p.gain = gain;
        p.channels = channels;
        p.out = pointer<ViewParams>(out);
        sample_params(p);
      },
      py::kw_only(), "seed"_a, "epoch"_a, "view"_a, "count"_a, "index"_a, "sizes"_a, "center_fraction"_a, "scale"_a,
      "ratio"_a, "log_ratio"_a, "factors_low"_a, "factors_high"_a, "sigma"_a, "probabilities"_a, "gain"_a, "channels"_a,
      "out"_a, py::call_guard<py::gil_scoped_release>());
}

#endif

// The arguments of crop and photometric that CPU and GPU have in common.
CropParams crop_params(Address images, int height, int width, Address index, Address view_params, int64_t num_views,
                       int size, bool bicubic, Address out) {
  CropParams p;
  p.images = pointer<const uint8_t>(images);
  p.height = height;
  p.width = width;
  p.index = pointer<const int64_t>(index);
  p.view_params = pointer<const ViewParams>(view_params);
  p.num_views = num_views;
  p.size = size;
  p.bicubic = bicubic;
  p.out = pointer<uint8_t>(out);
  return p;
}

using PerChannel = std::vector<float>;

PhotometricParams photometric_params(Address crops, Address view_params, int64_t images, int height, int width,
                                     int blur_taps, const PerChannel& scale, const PerChannel& shift, PixelType dtype,
                                     Address out) {
  PhotometricParams p;
  p.crops = pointer<const void>(crops);
  p.view_params = pointer<const ViewParams>(view_params);
  p.images = images;
  p.height = height;
  p.width = width;
  p.blur_taps = blur_taps;
  if (scale.empty() || scale.size() > kMaxChannels || scale.size() != shift.size())
    throw std::invalid_argument("scale and shift: expected one number per channel, at most 16");
  p.channels = int(scale.size());
  std::copy(scale.begin(), scale.end(), p.scale);
  std::copy(shift.begin(), shift.end(), p.shift);
  p.dtype = dtype;
  p.out = pointer<void>(out);
  return p;
}

#ifndef FASTSIMCLR_EMULATION

void define_views_on_cpu(py::module_& module) {
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> release;
  module.def(
      "crop",
      [](Address images, int height, int width, Address index, Address view_params, int64_t num_views, int size,
         bool bicubic, Address out, int threads) {
        crop_on_cpu(crop_params(images, height, width, index, view_params, num_views, size, bicubic, out), threads);
      },
      py::kw_only(), "images"_a, "height"_a, "width"_a, "index"_a, "view_params"_a, "num_views"_a, "size"_a,
      "bicubic"_a, "out"_a, "threads"_a, release);
  py::enum_<ValueType>(module, "ValueType", py::module_local())
      .value("uint8", ValueType::kUint8)
      .value("uint16", ValueType::kUint16)
      .value("float32", ValueType::kFloat32);
  module.def(
      "crop_to_floats",
      [](Address images, int height, int width, Address index, Address view_params, int64_t num_views, int size,
         bool bicubic, Address out, ValueType type, int channels, const std::array<float, 2>& value_range,
         int threads) {
        FloatCropParams p;
        static_cast<CropParams&>(p) = crop_params(0, height, width, index, view_params, num_views, size, bicubic, 0);
        p.values = pointer<const void>(images);
        p.type = type;
        p.channels = channels;
        p.low = value_range[0];
        p.high = value_range[1];
        p.float_out = pointer<float>(out);
        crop_to_floats_on_cpu(p, threads);
      },
      py::kw_only(), "images"_a, "height"_a, "width"_a, "index"_a, "view_params"_a, "num_views"_a, "size"_a,
      "bicubic"_a, "out"_a, "type"_a, "channels"_a, "value_range"_a, "threads"_a, release);
  module.def(
      "photometric",
      [](Address crops, Address view_params, int64_t images, int height, int width, int blur_taps,
         const PerChannel& scale, const PerChannel& shift, PixelType dtype, Address out, bool is_float, int threads) {
        photometric_on_cpu(
            photometric_params(crops, view_params, images, height, width, blur_taps, scale, shift, dtype, out),
            is_float, threads);
      },
      py::kw_only(), "crops"_a, "view_params"_a, "images"_a, "height"_a, "width"_a, "blur_taps"_a, "scale"_a, "shift"_a,
      "dtype"_a, "out"_a, "is_float"_a, "threads"_a, release);
}

#endif

#ifdef FASTSIMCLR_KERNELS

void define_views_on_gpu(py::module_& module) {
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> release;
  module.attr("LUMA_PARTS") = kLumaParts;
  module.attr("MAX_BLUR_RADIUS") = max_blur_radius();
  module.def(
      "crop_cuda",
      [](Address images, int height, int width, Address index, Address view_params, int64_t num_views, int size,
         bool bicubic, Address out, int device, Address stream) {
        use_device(device);
        check(crop(crop_params(images, height, width, index, view_params, num_views, size, bicubic, out),
                   reinterpret_cast<cudaStream_t>(stream)),
              "crop");
      },
      py::kw_only(), "images"_a, "height"_a, "width"_a, "index"_a, "view_params"_a, "num_views"_a, "size"_a,
      "bicubic"_a, "out"_a, "device"_a, "stream"_a, release);
  module.def(
      "photometric_cuda",
      [](Address crops, Address view_params, int64_t images, int height, int width, int blur_taps,
         const PerChannel& scale, const PerChannel& shift, PixelType dtype, Address out, Address parts, float max_sigma,
         int device, Address stream) {
        use_device(device);
        check(photometric(
                  photometric_params(crops, view_params, images, height, width, blur_taps, scale, shift, dtype, out),
                  pointer<float>(parts), max_sigma, reinterpret_cast<cudaStream_t>(stream)),
              "photometric");
      },
      py::kw_only(), "crops"_a, "view_params"_a, "images"_a, "height"_a, "width"_a, "blur_taps"_a, "scale"_a, "shift"_a,
      "dtype"_a, "out"_a, "parts"_a, "max_sigma"_a, "device"_a, "stream"_a, release);
}

#endif

}  // namespace

void define_views(py::module_& module) {
  define_pixel_type(module);
#ifndef FASTSIMCLR_EMULATION
  define_sample_params(module);
  define_views_on_cpu(module);
#endif
#ifdef FASTSIMCLR_KERNELS
  define_views_on_gpu(module);
#endif
}

}  // namespace fastsimclr

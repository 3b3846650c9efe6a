// One view at a time. 8-bit RGB: the rows of the crop are resized horizontally, and the result vertically. Other
// images: vertically first, which is vectorized for any number of channels.
#include "crop.h"

#include <vector>

#include "cpu.h"

namespace fastsimclr {
namespace {

// The weights of one side: weights[i * taps + k] is the weight of image pixel first[i] + k in pixel i of the view.
struct Filter {
  int taps = 0;
  std::vector<int> first;
  std::vector<float> weights;

  Filter(const Side& side, int size) : first(size_t(size)) {
    for (int i = 0; i < size; i++) taps = std::max(taps, side.end(i) - side.first(i));
    weights.assign(size_t(size) * size_t(taps), 0.0f);
    for (int i = 0; i < size; i++) {
      // All taps are inside the crop; those outside the filter's support have weight 0.
      const int begin = std::min(side.first(i), side.length - taps);
      float* pixel_weights = &weights[size_t(i) * size_t(taps)];
      float sum = 0;
      for (int k = 0; k < taps; k++) sum += pixel_weights[k] = side.weight(i, begin + k);
      for (int k = 0; k < taps; k++) pixel_weights[k] /= sum;
      first[size_t(i)] = side.start + begin;
    }
  }
};

struct Scratch {
  std::vector<float> sums, line;
  std::vector<uint8_t> horizontal;  // (rows of the crop, size, 3)
};

FASTSIMCLR_CLONES void one_view(const CropParams& p, int64_t view, Scratch& scratch) {
  const ViewParams& view_params = p.view_params[view];
  const Filter columns({view_params.left, view_params.width, p.size, p.bicubic}, p.size);
  const Filter rows({view_params.top, view_params.height, p.size, p.bicubic}, p.size);
  const int64_t pitch = 3 * int64_t(p.size);
  scratch.horizontal.resize(size_t(view_params.height) * size_t(pitch));
  scratch.sums.resize(size_t(pitch));
  for (int y = 0; y < view_params.height; y++) {
    const uint8_t* row = p.images + ((p.index[view] * p.height + view_params.top + y) * p.width) * 3;
    uint8_t* to = scratch.horizontal.data() + y * pitch;
    for (int i = 0; i < p.size; i++) {
      const float* weights = &columns.weights[size_t(i) * size_t(columns.taps)];
      const uint8_t* from = row + 3 * int64_t(columns.first[size_t(i)]);
      float r = 0, g = 0, b = 0;
      for (int k = 0; k < columns.taps; k++) {
        r += weights[k] * from[3 * k];
        g += weights[k] * from[3 * k + 1];
        b += weights[k] * from[3 * k + 2];
      }
      uint8_t* pixel = to + 3 * (view_params.flip ? p.size - 1 - i : i);
      pixel[0] = rounded_level(r);
      pixel[1] = rounded_level(g);
      pixel[2] = rounded_level(b);
    }
  }
  float* __restrict__ sums = scratch.sums.data();
  for (int i = 0; i < p.size; i++) {
    std::fill(sums, sums + pitch, 0.0f);
    for (int k = 0; k < rows.taps; k++) {
      const float weight = rows.weights[size_t(i) * size_t(rows.taps) + size_t(k)];
      const uint8_t* __restrict__ from =
          &scratch.horizontal[size_t(rows.first[size_t(i)] - view_params.top + k) * size_t(pitch)];
      for (int64_t x = 0; x < pitch; x++) sums[x] += weight * from[x];
    }
    uint8_t* __restrict__ to = p.out + (view * p.size + i) * pitch;
    for (int64_t x = 0; x < pitch; x++) to[x] = rounded_level(sums[x]);
  }
}

// Eight floats, unaligned. A pixel of up to 16 channels is summed as one or two of them, which stay in registers.
constexpr int kEight = 8;
typedef float Eight __attribute__((vector_size(kEight * sizeof(float)), aligned(alignof(float)), may_alias));

// A row of the view from a row of the crop. Writes whole vectors, so the elements beyond a pixel are overwritten by the
// next one, and both rows are longer by two vectors.
template <int kVectors>
FASTSIMCLR_INLINE void resize_row(const FloatCropParams& p, const Filter& columns, const ViewParams& view_params,
                                  const float* row, float* line) {
  for (int x = 0; x < p.size; x++) {
    const auto i = size_t(view_params.flip ? p.size - 1 - x : x);
    const float* weights = &columns.weights[i * size_t(columns.taps)];
    const float* from = row + int64_t(p.channels) * (columns.first[i] - view_params.left);
    Eight pixel[kVectors] = {};
    for (int k = 0; k < columns.taps; k++)
      for (int v = 0; v < kVectors; v++)
        pixel[v] += weights[k] * reinterpret_cast<const Eight*>(from + int64_t(p.channels) * k)[v];
    for (int v = 0; v < kVectors; v++) reinterpret_cast<Eight*>(line + int64_t(p.channels) * x)[v] = pixel[v];
  }
}

template <class T>
FASTSIMCLR_INLINE void one_float_view(const FloatCropParams& p, int64_t view, Scratch& scratch) {
  const ViewParams& view_params = p.view_params[view];
  const Filter columns({view_params.left, view_params.width, p.size, p.bicubic}, p.size);
  const Filter rows({view_params.top, view_params.height, p.size, p.bicubic}, p.size);
  const int channels = p.channels;
  const int64_t wide = int64_t(channels) * view_params.width, pitch = int64_t(channels) * p.size;
  scratch.sums.resize(size_t(wide) + 2 * kEight);
  scratch.line.resize(size_t(pitch) + 2 * kEight);
  float* __restrict__ sums = scratch.sums.data();
  float* __restrict__ line = scratch.line.data();
  const T* image = static_cast<const T*>(p.values) + p.index[view] * p.height * p.width * channels;
  const float low = p.low, scale = 1 / (p.high - p.low);
  for (int y = 0; y < p.size; y++) {
    std::fill(sums, sums + wide, 0.0f);
    for (int k = 0; k < rows.taps; k++) {
      const float weight = rows.weights[size_t(y) * size_t(rows.taps) + size_t(k)];
      const T* __restrict__ from = image + (int64_t(rows.first[size_t(y)] + k) * p.width + view_params.left) * channels;
      for (int64_t x = 0; x < wide; x++) sums[x] += weight * float(from[x]);
    }
    if (channels <= kEight) {
      resize_row<1>(p, columns, view_params, sums, line);
    } else {
      resize_row<2>(p, columns, view_params, sums, line);
    }
    float* __restrict__ to = p.float_out + (view * p.size + y) * pitch;
    for (int64_t x = 0; x < pitch; x++) {
      const float value = (line[x] - low) * scale;
      to[x] = value < 0 ? 0 : value > 1 ? 1 : value;
    }
  }
}

FASTSIMCLR_CLONES void one_view_of_uint8(const FloatCropParams& p, int64_t view, Scratch& scratch) {
  one_float_view<uint8_t>(p, view, scratch);
}

FASTSIMCLR_CLONES void one_view_of_uint16(const FloatCropParams& p, int64_t view, Scratch& scratch) {
  one_float_view<uint16_t>(p, view, scratch);
}

FASTSIMCLR_CLONES void one_view_of_float32(const FloatCropParams& p, int64_t view, Scratch& scratch) {
  one_float_view<float>(p, view, scratch);
}

}  // namespace

void crop_to_floats_on_cpu(const FloatCropParams& params, int threads) {
  const auto one = params.type == ValueType::kUint8    ? one_view_of_uint8
                   : params.type == ValueType::kUint16 ? one_view_of_uint16
                                                       : one_view_of_float32;
  in_threads(threads, params.num_views, [&](auto next) {
    Scratch scratch;
    for (int64_t view; (view = next()) < params.num_views;) one(params, view, scratch);
  });
}

void crop_on_cpu(const CropParams& params, int threads) {
  in_threads(threads, params.num_views, [&](auto next) {
    Scratch scratch;
    for (int64_t view; (view = next()) < params.num_views;) one_view(params, view, scratch);
  });
}

}  // namespace fastsimclr

// One view at a time: the rows of the crop are resized horizontally, and the result vertically.
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
  std::vector<float> sums;
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

}  // namespace

void crop_on_cpu(const CropParams& params, int threads) {
  in_threads(threads, params.num_views, [&](auto next) {
    Scratch scratch;
    for (int64_t view; (view = next()) < params.num_views;) one_view(params, view, scratch);
  });
}

}  // namespace fastsimclr

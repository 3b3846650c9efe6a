// The same operations as in data/params.py, in double precision and in the same order, so that both sample the same.
#include "view_params.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace fastsimclr {
namespace {

constexpr uint32_t kChoices = 0, kFactors = 1, kOthers = 2, kAttempts = 3;  // counter blocks, four numbers each
constexpr uint32_t kOrientation = 16, kDrop = 17, kGains = 18;              // likewise; four of kGains
constexpr uint32_t kCropAttempts = 10;                                      // as in torchvision's RandomResizedCrop

// Four numbers in [0, 1), multiples of 2^-24.
std::array<double, 4> uniform(const SampleParams& p, int64_t index, uint32_t block) {
  uint32_t c[4] = {block, p.view, uint32_t(index), uint32_t(uint64_t(index) >> 32)};
  uint32_t k0 = p.seed, k1 = p.epoch;
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = uint64_t(0xD2511F53) * c[0], p1 = uint64_t(0xCD9E8D57) * c[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                              uint32_t(p0)};
    std::copy(next, next + 4, c);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  std::array<double, 4> u;
  for (size_t i = 0; i < 4; i++) u[i] = double(c[i] >> 8) * 0x1p-24;
  return u;
}

double between(const std::array<double, 2>& range, double u) { return range[0] + (range[1] - range[0]) * u; }

void set_box(ViewParams& view_params, int64_t top, int64_t left, int64_t height, int64_t width) {
  view_params.top = int32_t(top);
  view_params.left = int32_t(left);
  view_params.height = int32_t(height);
  view_params.width = int32_t(width);
}

// The distribution of torchvision's RandomResizedCrop: the first of ten attempts that fits, else the largest center
// crop with an allowed aspect ratio.
void random_box(const SampleParams& p, int64_t index, int64_t height, int64_t width, ViewParams& view_params) {
  for (uint32_t k = 0; k < kCropAttempts; k++) {
    const auto u = uniform(p, index, kAttempts + k);
    const double area = double(height * width) * between(p.scale, u[0]), aspect = std::exp(between(p.log_ratio, u[1]));
    const auto h = int64_t(std::rint(std::sqrt(area / aspect))), w = int64_t(std::rint(std::sqrt(area * aspect)));
    if (h > 0 && h <= height && w > 0 && w <= width)
      return set_box(view_params, int64_t(u[2] * double(height - h + 1)), int64_t(u[3] * double(width - w + 1)), h, w);
  }
  const double aspect = double(width) / double(height);
  const int64_t h = aspect < p.ratio[0] ? std::max<int64_t>(1, int64_t(std::rint(double(width) / p.ratio[0]))) : height;
  const int64_t w = aspect > p.ratio[1] ? std::max<int64_t>(1, int64_t(std::rint(double(height) * p.ratio[1]))) : width;
  set_box(view_params, (height - h) / 2, (width - w) / 2, h, w);
}

void center_box(const SampleParams& p, int64_t height, int64_t width, ViewParams& view_params) {
  const int64_t side = std::max<int64_t>(1, int64_t(std::rint(double(std::min(height, width)) * p.center_fraction)));
  set_box(view_params, (height - side) / 2, (width - side) / 2, side, side);
}

// Sets what few recipes use: its numbers are drawn only for those.
void set_options(const SampleParams& p, int64_t index, ViewParams& view_params) {
  const double vertical_flip_prob = p.probabilities[5], rotate_prob = p.probabilities[6],
               drop_prob = p.probabilities[7];
  view_params.vertical_flip = false;
  view_params.quarter_turns = 0;
  view_params.dropped = 0;
  std::fill(view_params.gain, view_params.gain + kMaxChannels, 1.0f);
  if (vertical_flip_prob > 0 || rotate_prob > 0) {
    const auto u = uniform(p, index, kOrientation);
    view_params.vertical_flip = u[0] < vertical_flip_prob;
    if (u[1] < rotate_prob) view_params.quarter_turns = uint8_t(1 + int(u[2] * 3));
  }
  if (drop_prob > 0) {
    const auto u = uniform(p, index, kDrop);
    if (u[0] < drop_prob) view_params.dropped = uint16_t(1 + int(u[1] * p.channels));
  }
  if (p.gain[0] < p.gain[1]) {
    for (int channel = 0; channel < kMaxChannels; channel++) {
      const auto u = uniform(p, index, kGains + uint32_t(channel / 4));
      view_params.gain[channel] = float(between(p.gain, u[size_t(channel % 4)]));
    }
  }
}

std::array<uint8_t, 4> permutation(int number) {  // number: 0 … 23, in lexicographic order
  std::array<uint8_t, 4> order;
  std::iota(order.begin(), order.end(), uint8_t(0));
  while (number-- > 0) std::next_permutation(order.begin(), order.end());
  return order;
}

}  // namespace

void sample_params(const SampleParams& p) {
  for (int64_t i = 0; i < p.count; i++) {
    const int64_t index = p.index[i], height = p.sizes[2 * i], width = p.sizes[2 * i + 1];
    ViewParams& view_params = p.out[i];
    if (p.center_fraction > 0) {
      center_box(p, height, width, view_params);
    } else {
      random_box(p, index, height, width, view_params);
    }
    const auto choices = uniform(p, index, kChoices), factors = uniform(p, index, kFactors),
               others = uniform(p, index, kOthers);
    view_params.flip = choices[0] < p.probabilities[0];
    view_params.jitter = choices[1] < p.probabilities[1];
    view_params.grayscale = choices[2] < p.probabilities[2];
    view_params.sigma = choices[3] < p.probabilities[3] ? float(between(p.sigma, others[1])) : 0.0f;
    view_params.solarize = others[2] < p.probabilities[4];
    const auto order = permutation(int(others[0] * 24));
    std::copy(order.begin(), order.end(), view_params.order);
    for (size_t k = 0; k < 4; k++)
      view_params.factors[k] = float(between({p.factors_low[k], p.factors_high[k]}, factors[k]));
    set_options(p, index, view_params);
  }
}

}  // namespace fastsimclr

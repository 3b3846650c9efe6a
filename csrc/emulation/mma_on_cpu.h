// Warp operations: lanes write their operands to the warp's memory, the last lane computes the results of all, then
// each reads its own. Lanes that are already at the next operation overwrite operands, but never the results of other
// lanes.
#pragma once

#include <cstdint>
#include <cstring>

namespace [[gnu::visibility("hidden")]] emulation {

constexpr int kLanes = 32;

inline float float_of_bf16(uint32_t bits) {
  bits <<= 16;
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}

struct WarpMemory {
  using Pair = double __attribute__((vector_size(16)));  // vectorized even at -O1, with a width that every CPU supports
  using Bits = int64_t __attribute__((vector_size(16)));

  // mma: C (16 x 8) += A (16 x 16) B (16 x 8); the elements of C are floats
  Pair c[16][4];
  Pair b[16][4];
  double a[16][16];
  // shuffles: the value that a lane offers, and the lane whose value it receives
  uint32_t offered[kLanes];
  int source[kLanes];
  // ldmatrix: the row address of a lane
  const char* row[kLanes];
  // results of the lanes, except C
  uint32_t result[kLanes][4];

  void put_fragments(int lane, const float (&c_in)[4], const uint32_t (&a_in)[4], uint32_t b0, uint32_t b1) {
    const unsigned g = unsigned(lane) / 4, t = unsigned(lane) % 4;
    for (unsigned i = 0; i < 4; i++) {
      double* pair = &a[g + i % 2 * 8][2 * t + i / 2 * 8];
      pair[0] = float_of_bf16(a_in[i] & 0xffff);
      pair[1] = float_of_bf16(a_in[i] >> 16);
      at(c, g + i / 2 * 8, 2 * t + i % 2) = c_in[i];
    }
    at(b, 2 * t, g) = float_of_bf16(b0 & 0xffff);
    at(b, 2 * t + 1, g) = float_of_bf16(b0 >> 16);
    at(b, 2 * t + 8, g) = float_of_bf16(b1 & 0xffff);
    at(b, 2 * t + 9, g) = float_of_bf16(b1 >> 16);
  }

  // Accumulates like tensor cores: C and the 16 products of an element are added exactly, or nearly so, and the sum is
  // truncated to a float, not rounded (Fasi et al., PeerJ Computer Science 7:e330). Over many steps, errors add up.
  __attribute__((no_sanitize("address", "undefined", "thread"))) void multiply() {
    constexpr int64_t kBitsOfFloat = -1 - ((int64_t(1) << 29) - 1);  // a double's mantissa has 29 bits more
    for (int i = 0; i < 16; i++) {
      Pair sum[4] = {c[i][0], c[i][1], c[i][2], c[i][3]};
      for (int k = 0; k < 16; k++) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) sum[j] += a[i][k] * b[k][j];
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) c[i][j] = Pair(Bits(sum[j]) & kBitsOfFloat);
    }
  }

  void take_fragment(int lane, float (&c_out)[4]) {
    const unsigned g = unsigned(lane) / 4, t = unsigned(lane) % 4;
    for (unsigned i = 0; i < 4; i++) c_out[i] = float(at(c, g + i / 2 * 8, 2 * t + i % 2));
  }

  // Returns one of the four 8x8 matrices whose rows are not in eight different groups of four banks, which the hardware
  // would read sequentially; -1 if there is none.
  int matrix_with_bank_conflict() const {
    for (int m = 0; m < 4; m++) {
      unsigned groups = 0;
      for (int r = 0; r < 8; r++) groups |= 1u << uintptr_t(row[8 * m + r]) / 16 % 8;
      if (groups != 0xff) return m;
    }
    return -1;
  }

  void load_matrices() {
    for (int lane = 0; lane < kLanes; lane++)
      for (int m = 0; m < 4; m++)
        std::memcpy(&result[lane][m], row[8 * m + lane / 4] + 4 * (lane % 4), sizeof(uint32_t));
  }

  void load_matrices_transposed() {
    for (int lane = 0; lane < kLanes; lane++)
      for (int m = 0; m < 4; m++) {
        uint16_t pair[2];
        for (int i = 0; i < 2; i++)
          std::memcpy(&pair[i], row[8 * m + 2 * (lane % 4) + i] + 2 * (lane / 4), sizeof(uint16_t));
        result[lane][m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
      }
  }

  void shuffle() {
    for (int lane = 0; lane < kLanes; lane++) result[lane][0] = offered[source[lane]];
  }

 private:
  static double& at(Pair (&rows)[16][4], unsigned row, unsigned column) {
    return reinterpret_cast<double*>(&rows[row])[column];  // GCC vector types may alias their elements
  }
};

}  // namespace emulation

// Tiles of the similarity matrix, shared by the forward and the backward: a thread block keeps some rows of Ẑ in shared
// memory, streams the rows of all columns through it, and holds each tile of products in registers.
//
//   rows     A: kRows rows, kRowsPerWarp per warp, so that the sums of a row stay within a warp
//   columns  B: kColumns at a time, double-buffered: cp.async fills one buffer while the other is multiplied
//   width    in blocks of kBlockK elements. With one block (the usual case) A is loaded once and stays in shared
//   memory.
//            With several, each step loads a block of A and of B, and a tile is complete after its last block.
//
// planes = 2: products of sums of two bf16 numbers, (a + a')(b + b') without the last term: a b + a b' + a' b.
//
// A row in shared memory is kBlockK bf16 in chunks of 16 bytes. Chunk c is stored at position c ^ (row % 8), so that
// the eight rows of an 8x8 matrix that ldmatrix reads are in eight different groups of four banks.
#pragma once

#include <type_traits>

#include "mma.cuh"
#include "nt_xent.h"

namespace fastsimclr {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kStages = 2;
constexpr int kBlockRows = 128;  // a multiple of every kRows
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Tile shapes. With 32 rows per warp, each fragment of B read from shared memory is used in two products; with 16,
// shared memory bandwidth would be the limit. Up to a width of 128 in one plane, the accumulators for 32 rows fit in
// registers.
template <int kBlockK_, int kPlanes_, bool kWide_ = false, bool kTall_ = (kPlanes_ == 1 && kBlockK_ <= 128)>
struct Shape {
  static constexpr int kBlockK = kBlockK_;
  static constexpr int kPlanes = kPlanes_;
  static constexpr bool kWide = kWide_;  // the width has several blocks
  static constexpr bool kTall = kTall_;
  using Low = Shape<kBlockK, kPlanes, kWide, false>;  // for kernels that need more registers
  static constexpr int kRowTiles = kTall ? 2 : 1;     // tiles of 16 rows per warp
  static constexpr int kRowsPerWarp = 16 * kRowTiles;
  static constexpr int kRows = kWarps * kRowsPerWarp;
  static constexpr int kColumns = kTall ? 64 : 32;
  static constexpr int kColumnTiles = kColumns / 8;
  static constexpr int kElementsA = kPlanes * kRows * kBlockK;
  static constexpr int kElementsB = kPlanes * kColumns * kBlockK;
};

__device__ __forceinline__ float value_of(const Temperature& temperature) {
  return temperature.pointer ? *temperature.pointer : temperature.value;
}

// The elements of a tile to exclude, relative to its corner (row0, column0): those outside the matrix, and three
// diagonals, on which column - row is `self`, `up` (for rows before `half`) or `down` (for the other rows).
template <class S>
struct TileMask {
  int rows, columns;
  int self, up, down, half;

  __device__ TileMask(const Pairs& pairs, int row_count, int column_count, int row0, int column0)
      : rows(row_count - row0), columns(column_count - column0) {
    constexpr int kFar = kMaxRows;  // beyond any tile
    const bool has_partners = pairs.among_columns && pairs.distance > 0;
    self = pairs.among_columns ? pairs.offset + row0 - column0 : kFar;
    up = has_partners ? self + pairs.distance : kFar;
    down = has_partners ? self - pairs.distance : kFar;
    half = pairs.distance - row0;
  }

  // Whether no element is excluded, as in most tiles.
  __device__ bool is_empty() const {
    return rows >= S::kRows && columns >= S::kColumns && misses(self) && misses(up) && misses(down);
  }

  __device__ bool covers(int row, int column) const {
    const int diagonal = column - row;
    return row >= rows || column >= columns || diagonal == self || (diagonal == up && row < half) ||
           (diagonal == down && row >= half);
  }

 private:
  static __device__ bool misses(int diagonal) { return diagonal <= -S::kRows || diagonal >= S::kColumns; }
};

// The pipeline of one row block over the columns [column_begin, column_end), and its shared memory. A tile of columns
// takes k_blocks steps; the blocks of A and B of each step are loaded while the previous step is multiplied.
template <class S>
class TileStream {
 public:
  // first_k: the block of the width to start each tile with; the last one is then the block before it. Starts the first
  // copies, so no thread may still use the shared memory.
  __device__ TileStream(char* shared, const UnitRows& rows, const UnitRows& columns, int width, int row0,
                        int column_begin, int column_end, int first_k)
      : rows_(rows),
        columns_(columns),
        width_(width),
        a_(reinterpret_cast<uint16_t*>(shared)),
        b_(a_ + kSlotsA * S::kElementsA),
        row0_(row0),
        column_end_(column_end),
        fetched_column_(column_begin),
        first_k_(first_k % k_blocks()),
        fetched_k_(first_k_) {
    if (column_begin < column_end) {
      copy<S::kRows>(a_, rows_, row0_, fetched_k_ * S::kBlockK);
      copy<S::kColumns>(b_, columns_, column_begin, fetched_k_ * S::kBlockK);
    }
    cp_async_commit();
  }

  static constexpr int kSlotsA = S::kWide ? kStages : 1;
  static constexpr size_t kSharedBytes = sizeof(uint16_t) * (kSlotsA * S::kElementsA + kStages * S::kElementsB);

  static __host__ __device__ int k_blocks(int width) { return S::kWide ? ceil_div(width, S::kBlockK) : 1; }

  __device__ int k_blocks() const { return k_blocks(width_); }
  __device__ const uint16_t* a() const { return a_ + (S::kWide ? stage_ * S::kElementsA : 0); }
  __device__ const uint16_t* b() const { return b_ + stage_ * S::kElementsB; }

  // Moves a() and b() to the blocks of the next step, and starts to load those of the step after it.
  __device__ void next() {
    cp_async_wait<0>();
    // The copies of all threads have arrived, and all threads are done with the previous step, whose buffers are
    // filled next.
    __syncthreads();
    stage_ ^= 1;
    if (S::kWide && ++fetched_k_ == k_blocks()) fetched_k_ = 0;
    if (!S::kWide || fetched_k_ == first_k_) fetched_column_ += S::kColumns;
    if (fetched_column_ < column_end_) {
      const int other = stage_ ^ 1;
      if (S::kWide) copy<S::kRows>(a_ + other * S::kElementsA, rows_, row0_, fetched_k_ * S::kBlockK);
      copy<S::kColumns>(b_ + other * S::kElementsB, columns_, fetched_column_, fetched_k_ * S::kBlockK);
    }
    cp_async_commit();
  }

 private:
  template <int kCount>
  __device__ void copy(uint16_t* shared, const UnitRows& from, int first, int k0) {
    constexpr int kChunks = S::kBlockK / 8, kRowsAtOnce = kThreads / kChunks;
    static_assert(kCount % kRowsAtOnce == 0, "every thread copies the same number of chunks");
    const int r0 = threadIdx.x / kChunks, chunk = threadIdx.x % kChunks, k = k0 + 8 * chunk;
    const int rows_left = from.count - first;
    const int64_t pitch = int64_t(S::kPlanes) * width_;
    const uint16_t* source = from.data + (first + r0) * pitch + k;
#pragma unroll
    for (int step = 0; step < kCount / kRowsAtOnce; step++) {
      const int r = r0 + step * kRowsAtOnce;
      const int swizzled = chunk ^ (kRowsAtOnce % 8 == 0 ? r0 % 8 : r % 8);
      const bool valid = r < rows_left && k < width_;
#pragma unroll
      for (int plane = 0; plane < S::kPlanes; plane++)
        cp_async_16(shared + (plane * kCount + r) * S::kBlockK + 8 * swizzled, source + plane * width_, valid);
      source += kRowsAtOnce * pitch;
    }
  }

  const UnitRows& rows_;
  const UnitRows& columns_;
  const int width_;
  uint16_t* const a_;
  uint16_t* const b_;
  const int row0_, column_end_;
  int fetched_column_;
  const int first_k_;
  int fetched_k_;
  int stage_ = kStages - 1;
};

// c += a b for fragments of one or two planes; the small terms are added first.
//
// Tensor cores truncate each sum toward zero, so a long sum drifts: for features with a common mean, 4096 columns in
// one accumulator caused an error of 1.5e-5 in dz. The rounding of one plane is coarser than that. With two planes,
// sums are kept short: they start from zero and are added in float32, which rounds to nearest.
template <int kPlanes, int kTiles>
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[kPlanes][kTiles][4], int tile,
                                             const uint32_t (&b)[kPlanes][4], int half) {
  if constexpr (kPlanes == 2) {
    mma_bf16(c, a[1][tile], b[0][2 * half], b[0][2 * half + 1]);
    mma_bf16(c, a[0][tile], b[1][2 * half], b[1][2 * half + 1]);
  }
  mma_bf16(c, a[0][tile], b[0][2 * half], b[0][2 * half + 1]);
}

// A warp's part of a tile, as C fragments of mma.
template <class S>
struct TileProducts {
  float value[S::kRowTiles][S::kColumnTiles][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) value[i][j][e] = 0;
  }

  // += A Bᵀ over the kBlockK elements in shared memory.
  __device__ void add(const uint16_t* a_shared, const uint16_t* b_shared) {
    if constexpr (S::kWide && S::kPlanes == 2) {  // a short sum per block of the width: see multiply_add
      TileProducts block;
      block.clear();
      block.accumulate(a_shared, b_shared);
#pragma unroll
      for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
        for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
          for (int e = 0; e < 4; e++) value[i][j][e] += block.value[i][j][e];
    } else {
      accumulate(a_shared, b_shared);
    }
  }

  // The same, accumulated in the tensor cores only.
  __device__ void accumulate(const uint16_t* a_shared, const uint16_t* b_shared) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int a_row = warp * S::kRowsPerWarp + lane % 16, a_chunk = lane / 16;
    const int b_row = lane / 16 * 8 + lane % 8, b_chunk = lane / 8 % 2;
#pragma unroll
    for (int k16 = 0; k16 < S::kBlockK / 16; k16++) {
      uint32_t a[S::kPlanes][S::kRowTiles][4];
#pragma unroll
      for (int plane = 0; plane < S::kPlanes; plane++)
#pragma unroll
        for (int i = 0; i < S::kRowTiles; i++)
          ldmatrix_x4(a[plane][i], a_shared + (plane * S::kRows + a_row + 16 * i) * S::kBlockK +
                                       8 * ((2 * k16 + a_chunk) ^ (a_row % 8)));
#pragma unroll
      for (int j16 = 0; j16 < S::kColumns / 16; j16++) {
        uint32_t b[S::kPlanes][4];
#pragma unroll
        for (int plane = 0; plane < S::kPlanes; plane++)
          ldmatrix_x4(b[plane], b_shared + (plane * S::kColumns + b_row + 16 * j16) * S::kBlockK +
                                    8 * ((2 * k16 + b_chunk) ^ (b_row % 8)));
#pragma unroll
        for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
          for (int half = 0; half < 2; half++) multiply_add<S::kPlanes>(value[i][2 * j16 + half], a, i, b, half);
      }
    }
  }

  // Sets masked elements to -inf, whose exponential is 0.
  __device__ void exclude(const TileMask<S>& mask) {
    if (mask.is_empty()) return;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          const int row = warp * S::kRowsPerWarp + 16 * i + lane / 4 + 8 * (e / 2);
          const int column = 8 * j + 2 * (lane % 4) + e % 2;
          if (mask.covers(row, column)) value[i][j][e] = -INFINITY;
        }
  }
};

// Returns the number of parts to split a loop of `steps` steps into, which is executed by each of `blocks` thread
// blocks, of which the GPU runs `concurrent_blocks` at a time. Minimizes the number of waves times the steps of a part.
// Parts need memory, so more parts must save at least a tenth of the time. No part is empty.
inline int choose_splits(int64_t blocks, int64_t concurrent_blocks, int steps, int max_splits) {
  const auto cost = [&](int splits) {
    return (blocks * splits + concurrent_blocks - 1) / concurrent_blocks * ceil_div(steps, splits);
  };
  int best = 1;
  for (int splits = 2; splits <= max_splits && splits <= steps; splits++) {
    const bool last_is_empty = int64_t(splits - 1) * ceil_div(steps, splits) >= steps;
    if (!last_is_empty && 10 * cost(splits) <= 9 * cost(best)) best = splits;
  }
  return best;
}

// Calls f(Shape) with the shape for this number of planes and this width.
template <class F>
auto with_shape(int planes, int width, F f) {
  if (planes == 1) {
    if (width <= 64) return f(Shape<64, 1>());
    if (width <= 128) return f(Shape<128, 1>());
    if (width <= 256) return f(Shape<256, 1>());
    return f(Shape<256, 1, true>());
  }
  if (width <= 64) return f(Shape<64, 2>());
  if (width <= 128) return f(Shape<128, 2>());
  return f(Shape<128, 2, true>());
}

// Calls f(std::bool_constant<kExpFits>), which launches that kernel. If only the device knows the temperature, both
// kernels are launched, and the wrong one returns immediately.
template <class F>
cudaError_t for_temperature(const Temperature& temperature, F f) {
  const bool known = temperature.pointer == nullptr, fits = temperature.value >= temperature.smallest;
  if (!known || fits) {
    const cudaError_t error = f(std::true_type());
    if (known || error != cudaSuccess) return error;
  }
  return f(std::false_type());
}

}  // namespace fastsimclr

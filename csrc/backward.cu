// Backward: for each row i of this rank, over the negatives j among all columns,
//   a_i = sum over j of G_ij u_j,   G_ij = g_i p_ij + g_j p_ji,   p_ij = exp(s_ij - lse_i),
// from which project_kernel (normalize.cu) computes the gradient. s is symmetric, so both terms share one exponential:
// G_ij = exp(s_ij) (w_i + w_j) with w_i = g_i exp(-lse_i). The weights of rows and columns are independent arguments.
// G stays in registers: the accumulators of the first product
// are the left operand of the second. Both products use the same tile of Ẑ_j in shared memory.
//
// A thread block owns the sums of its rows and iterates over all columns: no atomics, so the result is bitwise
// reproducible. If there are fewer row blocks than the GPU can run concurrently, the columns are split, too, and
// project_kernel adds the partial sums. If the width is divided into blocks (tile.cuh), each thread block computes one
// block of the width of the sums. It starts the products of each tile with the block after its own, so that the last
// one, which is still in shared memory, is the one that G multiplies.
#include "mma.cuh"
#include "nt_xent.h"
#include "tile.cuh"

namespace fastsimclr {
namespace {

// The factor of a row or column in G: w = g exp(-lse), or g and lse separately if exp(-lse) may not be a normal number.
template <bool kExpFits>
struct Weight {
  float g, lse;
};
template <>
struct Weight<true> {
  float w;
};

template <bool kExpFits>
__device__ Weight<kExpFits> weight_of(const RowLosses& losses, int count, int index) {
  if (index >= count) return {};
  const float g = losses.weights ? losses.weights[index] : 1.0f, lse = losses.lse[index];
  if constexpr (kExpFits) {
    return {g * exp2f(-lse)};
  } else {
    return {g, lse};
  }
}

__device__ __forceinline__ float pair_gradient(float s, const Weight<true>& row, const Weight<true>& column) {
  return exp2_approx(s) * (row.w + column.w);
}

__device__ __forceinline__ float pair_gradient(float s, const Weight<false>& row, const Weight<false>& column) {
  return row.g * exp2_approx(s - row.lse) + column.g * exp2_approx(s - column.lse);
}

// The sums of a warp's rows, kBlockK wide, as C fragments.
template <class S>
struct Accumulators {
  float value[S::kRowTiles][S::kBlockK / 8][4];

  __device__ void clear() {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
      for (int j = 0; j < S::kBlockK / 8; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) value[i][j][e] = 0;
  }

  // += G B over the tile's columns. `gradients` are C fragments, which have the layout of A fragments.
  __device__ void add(const TileProducts<S>& gradients, const uint16_t* b_shared) {
    constexpr int kSteps = S::kColumns / 16;
    uint32_t a[kSteps][S::kPlanes][S::kRowTiles][4];
#pragma unroll
    for (int j16 = 0; j16 < kSteps; j16++)
#pragma unroll
      for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
        for (int r = 0; r < 4; r++) {
          const float* pair = &gradients.value[i][2 * j16 + r / 2][2 * (r % 2)];
          const float low = pair[0], high = pair[1];
          a[j16][0][i][r] = pack_bf16(low, high);
          if constexpr (S::kPlanes == 2) {
            const float rounded_low = __uint_as_float(a[j16][0][i][r] << 16);
            const float rounded_high = __uint_as_float(a[j16][0][i][r] & 0xffff0000u);
            a[j16][1][i][r] = pack_bf16(low - rounded_low, high - rounded_high);
          }
        }
    const int lane = threadIdx.x % 32;
    const int row = lane % 16, chunk = lane / 16;
#pragma unroll
    for (int k16 = 0; k16 < S::kBlockK / 16; k16++) {
      float product[S::kRowTiles][2][4] = {};  // with two planes, a short sum per tile: see multiply_add
#pragma unroll
      for (int j16 = 0; j16 < kSteps; j16++) {
        uint32_t b[S::kPlanes][4];
#pragma unroll
        for (int plane = 0; plane < S::kPlanes; plane++)
          ldmatrix_x4_trans(b[plane], b_shared + (plane * S::kColumns + 16 * j16 + row) * S::kBlockK +
                                          8 * ((2 * k16 + chunk) ^ (row % 8)));
#pragma unroll
        for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
          for (int half = 0; half < 2; half++)
            multiply_add<S::kPlanes>(S::kPlanes == 2 ? product[i][half] : value[i][2 * k16 + half], a[j16], i, b, half);
      }
      if constexpr (S::kPlanes == 2) {
#pragma unroll
        for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
          for (int half = 0; half < 2; half++)
#pragma unroll
            for (int e = 0; e < 4; e++) value[i][2 * k16 + half][e] += product[i][half][e];
      }
    }
  }
};

template <class S, bool kExpFits>
__global__ void __launch_bounds__(kThreads, 2) backward_kernel(BackwardParams p) {
  const float temperature = value_of(p.temperature);
  if ((temperature >= p.temperature.smallest) != kExpFits) return;  // the other kernel computes this
  const float scale_log2 = kLog2E / temperature;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int row0 = int(blockIdx.x) * S::kRows;
  const int k_block = blockIdx.y;
  const int columns_per_split = ceil_div(ceil_div(p.columns.count, S::kColumns), p.splits) * S::kColumns;
  const int column_begin = min(int(blockIdx.z) * columns_per_split, p.columns.count);
  const int column_end = min(column_begin + columns_per_split, p.columns.count);

  char* shared = dynamic_shared();
  TileStream<S> stream(shared, p.rows, p.columns, p.width, row0, column_begin, column_end, k_block + 1);
  auto* column_weights = reinterpret_cast<Weight<kExpFits>*>(shared + TileStream<S>::kSharedBytes);

  Weight<kExpFits> row_weights[S::kRowTiles][2];
#pragma unroll
  for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
    for (int below = 0; below < 2; below++) {
      const int row = row0 + warp * S::kRowsPerWarp + 16 * i + lane / 4 + 8 * below;
      row_weights[i][below] = weight_of<kExpFits>(p.row_losses, p.rows.count, row);
    }
  Accumulators<S> sums;
  sums.clear();

  // The column weights of the next tile are read from global memory while the current tile is multiplied.
  const bool has_column = threadIdx.x < S::kColumns;
  Weight<kExpFits> next{};
  if (has_column) next = weight_of<kExpFits>(p.column_losses, p.columns.count, column_begin + int(threadIdx.x));
  int stage = 0;
  for (int column0 = column_begin; column0 < column_end; column0 += S::kColumns) {
    Weight<kExpFits>* weights = column_weights + stage * S::kColumns;
    stage ^= 1;
    if (has_column) weights[threadIdx.x] = next;  // read after the barrier in stream.next()
    if (has_column)
      next = weight_of<kExpFits>(p.column_losses, p.columns.count, column0 + S::kColumns + int(threadIdx.x));
    TileProducts<S> products;
    products.clear();
    for (int k = 0; k < stream.k_blocks(); k++) {
      stream.next();
      products.add(stream.a(), stream.b());
    }
    products.exclude(TileMask<S>(p.pairs, p.rows.count, p.columns.count, row0, column0));
#pragma unroll
    for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const Weight<kExpFits> column = weights[8 * j + 2 * (lane % 4) + e];
#pragma unroll
        for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
          for (int below = 0; below < 2; below++) {
            float& x = products.value[i][j][e + 2 * below];
            x = pair_gradient(x * scale_log2, row_weights[i][below], column);
          }
      }
    sums.add(products, stream.b());
  }

  float* out = p.sums + int64_t(blockIdx.z) * p.rows.count * p.width + k_block * S::kBlockK;
#pragma unroll
  for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
    for (int j = 0; j < S::kBlockK / 8; j++)
#pragma unroll
      for (int below = 0; below < 2; below++) {
        const int row = row0 + warp * S::kRowsPerWarp + 16 * i + lane / 4 + 8 * below;
        const int k = 8 * j + 2 * (lane % 4);
        if (row >= p.rows.count || k_block * S::kBlockK + k >= p.width) continue;
        *reinterpret_cast<float2*>(out + int64_t(row) * p.width + k) = {sums.value[i][j][2 * below],
                                                                        sums.value[i][j][2 * below + 1]};
      }
}

template <class S>
constexpr size_t kSharedBytes = TileStream<S>::kSharedBytes + sizeof(Weight<false>) * kStages * S::kColumns;

}  // namespace

int backward_splits(int rows, int columns, int planes, int width) {
  return with_shape(planes, width, [&](auto shape) {
    using S = decltype(shape);
    const int64_t concurrent_blocks =
        int64_t(multiprocessors()) * blocks_per_multiprocessor(backward_kernel<S, true>, kThreads, kSharedBytes<S>);
    const int64_t blocks = ceil_div(rows, S::kRows) * TileStream<S>::k_blocks(width);
    constexpr int kMaxSplits = 8;  // each needs (2n, width) of memory
    return choose_splits(blocks, concurrent_blocks, ceil_div(columns, S::kColumns), kMaxSplits);
  });
}

cudaError_t load_nt_xent() { return load(backward_kernel<Shape<64, 1>, true>); }

cudaError_t backward(const BackwardParams& params, cudaStream_t stream) {
  return with_shape(params.planes, params.width, [&](auto shape) {
    return for_temperature(params.temperature, [&](auto fits) {
      using S = std::conditional_t<fits.value, decltype(shape), typename decltype(shape)::Low>;
      const dim3 grid(unsigned(ceil_div(params.rows.count, S::kRows)), unsigned(TileStream<S>::k_blocks(params.width)),
                      unsigned(params.splits));
      return launch(backward_kernel<S, fits.value>, grid, kThreads, kSharedBytes<S>, stream, params);
    });
  });
}

}  // namespace fastsimclr

// Forward: sums of exponentials over the negatives of each row,
//   W_i = sum over j that is neither i nor i's positive of exp(s_ij),   s_ij = u_i·u_j / temperature,
// and from them the losses, log(1 + W_i exp(-s_i,pos)), which avoids the cancellation of lse_i - s_i,pos.
//
// The matrix is divided into units of column_unit x column_unit similarities, one thread block each. If the columns are
// the rows, the matrix is symmetric: only units on and above the diagonal are computed, and each tile above the
// diagonal is added to the sums of its rows and to the sums of its columns. Unit (u, v) writes the sums of rows u into
// slot v and those of rows v into slot u: each slot has one writer, so the result is bitwise reproducible.
//
// Scaling the rows by sqrt(log2(e) / temperature) before rounding would save a multiplication per similarity, one in
// fourteen of the backward's instructions. But values that bf16 represents exactly, in equal rows or rows of one
// element, would then be rounded.
//
// At temperatures at which exp(1/temperature) overflows, the whole matrix is computed, with a running maximum per row,
// and slots hold logarithms. The device decides, because the temperature may be known only there.
#include <cmath>

#include "mma.cuh"
#include "nt_xent.h"
#include "tile.cuh"

namespace fastsimclr {
namespace {

constexpr int kMaxUnits = 32;      // per side: each needs a slot, (2n,) of memory
constexpr float kLowest = -1e30f;  // below any exponent; finite, because -inf - (-inf) is NaN

// A lane's partial sums of its warp's rows; `maximum` is used only where exponentials may overflow.
template <class S>
struct RowSums {
  float sum[S::kRowTiles][2];
  float maximum[S::kRowTiles][2];

  __device__ RowSums() {
    for (int i = 0; i < S::kRowTiles; i++)
      for (int below = 0; below < 2; below++) sum[i][below] = 0, maximum[i][below] = kLowest;
  }

  // Replaces the products by their exponentials and adds these to the sums.
  __device__ void add(TileProducts<S>& products, float scale_log2) {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
      for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          products.value[i][j][e] = exp2_approx(products.value[i][j][e] * scale_log2);
          sum[i][e / 2] += products.value[i][j][e];
        }
  }

  __device__ void add_with_maximum(const TileProducts<S>& products, float scale_log2) {
#pragma unroll
    for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
      for (int below = 0; below < 2; below++) {
        const float before = maximum[i][below];
#pragma unroll
        for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
          for (int e = 2 * below; e < 2 * below + 2; e++)
            maximum[i][below] = fmaxf(maximum[i][below], products.value[i][j][e] * scale_log2);
        sum[i][below] *= exp2_approx(before - maximum[i][below]);
#pragma unroll
        for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
          for (int e = 2 * below; e < 2 * below + 2; e++)
            sum[i][below] += exp2_approx(products.value[i][j][e] * scale_log2 - maximum[i][below]);
      }
  }

  // Adds the sums to `sums`, indexed by row; without kExpFits, writes their logarithms.
  template <bool kExpFits>
  __device__ void store(float* sums, int row0, int row_count) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < S::kRowTiles; i++)
#pragma unroll
      for (int below = 0; below < 2; below++) {
        const int row = row0 + warp * S::kRowsPerWarp + 16 * i + lane / 4 + 8 * below;
        float total = sum[i][below], largest = maximum[i][below];
        if constexpr (!kExpFits) {
          for (int mask = 1; mask < 4; mask *= 2) largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, mask));
          total *= exp2_approx(maximum[i][below] - largest);
        }
        for (int mask = 1; mask < 4; mask *= 2) total += __shfl_xor_sync(kAllLanes, total, mask);
        if (lane % 4 != 0 || row >= row_count) continue;  // four lanes share a row
        if constexpr (kExpFits) {
          atomicAdd(&sums[row], total);  // only this thread block adds here, see column_sums
        } else {
          sums[row] = log2f(total) + largest;
        }
      }
  }
};

// Writes the sums of a warp's columns to sums (kColumns,), in shared memory.
template <class S>
__device__ void sum_columns(const TileProducts<S>& products, float* sums) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int j = 0; j < S::kColumnTiles; j++)
#pragma unroll
    for (int e = 0; e < 2; e++) {
      float sum = 0;
#pragma unroll
      for (int i = 0; i < S::kRowTiles; i++) sum += products.value[i][j][e] + products.value[i][j][e + 2];
      for (int mask = 4; mask < 32; mask *= 2)
        sum += __shfl_xor_sync(kAllLanes, sum, mask);  // eight lanes share a column
      if (lane < 4) sums[8 * j + 2 * lane + e] = sum;
    }
}

template <class S, bool kExpFits>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(ForwardParams p) {
  const float temperature = value_of(p.temperature);
  if ((temperature >= p.temperature.smallest) != kExpFits) return;  // the other kernel computes this
  const bool symmetric = p.symmetric && kExpFits;
  if (symmetric && blockIdx.y < blockIdx.x) return;  // equal to a unit above the diagonal
  const float scale_log2 = kLog2E / temperature;
  const int warp = threadIdx.x / 32;

  const int row_unit = p.symmetric ? p.column_unit : kBlockRows;
  const int row_begin = int(blockIdx.x) * row_unit, row_end = min(row_begin + row_unit, p.rows.count);
  const int column_begin = int(blockIdx.y) * p.column_unit;
  const int column_end = min(column_begin + p.column_unit, p.columns.count);
  float* row_sums = p.sums + int64_t(blockIdx.y) * p.rows.count;     // indexed by row
  float* column_sums = p.sums + int64_t(blockIdx.x) * p.rows.count;  // indexed by column; used if symmetric
  if constexpr (kExpFits) {
    for (int row = row_begin + int(threadIdx.x); row < row_end; row += kThreads) row_sums[row] = 0;
    if (symmetric && blockIdx.x != blockIdx.y)
      for (int column = column_begin + int(threadIdx.x); column < column_end; column += kThreads)
        column_sums[column] = 0;
  }

  char* shared = dynamic_shared();
  auto* warp_column_sums = reinterpret_cast<float*>(shared + TileStream<S>::kSharedBytes);  // (kWarps, kColumns)

  for (int row0 = row_begin; row0 < row_end; row0 += S::kRows) {
    __syncthreads();  // all threads are done with the buffers of the previous row block; the zeros are written
    const int first_column = symmetric && blockIdx.x == blockIdx.y ? row0 : column_begin;
    TileStream<S> stream(shared, p.rows, p.columns, p.width, row0, first_column, column_end, 0);
    RowSums<S> rows;
    for (int column0 = first_column; column0 < column_end; column0 += S::kColumns) {
      TileProducts<S> products;
      products.clear();
      for (int k = 0; k < stream.k_blocks(); k++) {
        stream.next();
        products.add(stream.a(), stream.b());
      }
      products.exclude(TileMask<S>(p.pairs, p.rows.count, p.columns.count, row0, column0));
      if constexpr (!kExpFits) {
        rows.add_with_maximum(products, scale_log2);
        continue;
      }
      rows.add(products, scale_log2);
      // In the square on the diagonal both similarities of a pair are computed, and both are added to row sums.
      if (!symmetric || column0 < row0 + S::kRows) continue;
      sum_columns(products, warp_column_sums + warp * S::kColumns);
      __syncthreads();  // all warps' sums are written; the barrier in stream.next() comes after they are read
      if (threadIdx.x < S::kColumns && column0 + int(threadIdx.x) < p.columns.count) {
        float sum = 0;
        for (int w = 0; w < kWarps; w++) sum += warp_column_sums[w * S::kColumns + threadIdx.x];
        // No other thread adds here concurrently. An atomic is used because it does not wait for the old value.
        atomicAdd(&column_sums[column0 + threadIdx.x], sum);
      }
    }
    rows.template store<kExpFits>(row_sums, row0, p.rows.count);
  }
}

__global__ void __launch_bounds__(kThreads) losses_kernel(LossParams p) {
  const int row = int(blockIdx.x * kThreads + threadIdx.x), rows = 2 * p.n;
  if (row >= rows) return;
  const float temperature = value_of(p.temperature);
  float log_w = 0;  // log2 of the sum over the negatives
  if (temperature >= p.temperature.smallest) {
    float w = 0;
    for (int64_t slot = 0; slot < p.slots; slot++) w += p.sums[slot * rows + row];
    log_w = log2f(w);
  } else {
    float largest = kLowest, w = 0;
    for (int64_t slot = 0; slot < p.slots; slot++) largest = fmaxf(largest, p.sums[slot * rows + row]);
    for (int64_t slot = 0; slot < p.slots; slot++) w += exp2f(p.sums[slot * rows + row] - largest);
    log_w = log2f(w) + largest;
  }
  const float positive = p.positive[row % p.n] * (kLog2E / temperature);
  const float x = (log_w - positive) / kLog2E;
  // log(1 + e^x), without overflow of e^x, and accurate for small e^x.
  const float loss = p.decoupled ? x : x > 0 ? x + log1pf(expf(-x)) : log1pf(expf(x));
  p.losses[row] = loss;
  p.lse[row] = p.decoupled ? log_w : positive + loss * kLog2E;
  p.q[row] = p.decoupled ? 1.0f : 1.0f / (1.0f + expf(-x));
}

template <class S>
constexpr size_t kSharedBytes = TileStream<S>::kSharedBytes + sizeof(float) * kWarps * S::kColumns;

}  // namespace

float smallest_temperature(int columns) {
  constexpr double kLogOfLargestInverse = 87.3;
  return float(1.01 / (kLogOfLargestInverse - std::log(double(columns))));  // 1.01: unit rows are rounded to bf16
}

int forward_column_unit(int rows, int columns, int planes, int width, bool symmetric) {
  return with_shape(planes, width, [&](auto shape) {
    using S = decltype(shape);
    const int64_t concurrent_blocks =
        int64_t(multiprocessors()) * blocks_per_multiprocessor(forward_kernel<S, true>, kThreads, kSharedBytes<S>);
    const int row_blocks = ceil_div(rows, kBlockRows), column_blocks = ceil_div(columns, kBlockRows);
    if (!symmetric)
      return kBlockRows *
             ceil_div(column_blocks, choose_splits(row_blocks, concurrent_blocks, column_blocks, kMaxUnits));
    // As in choose_splits, for a triangle of units * (units + 1) / 2 units of size x size blocks.
    const auto cost = [&](int64_t size) {
      const int64_t units = ceil_div(row_blocks, int(size));
      return (units * (units + 1) / 2 + concurrent_blocks - 1) / concurrent_blocks * size * size;
    };
    int best = row_blocks;
    for (int units = 2; units <= kMaxUnits && units <= row_blocks; units++) {
      const int size = ceil_div(row_blocks, units);
      if (10 * cost(size) <= 9 * cost(best)) best = size;
    }
    return kBlockRows * best;
  });
}

cudaError_t forward(const ForwardParams& params, cudaStream_t stream) {
  return with_shape(params.planes, params.width, [&](auto shape) {
    using S = decltype(shape);
    const int row_unit = params.symmetric ? params.column_unit : kBlockRows;
    const dim3 grid(unsigned(ceil_div(params.rows.count, row_unit)),
                    unsigned(ceil_div(params.columns.count, params.column_unit)));
    return for_temperature(params.temperature, [&](auto fits) {
      return launch(forward_kernel<S, fits.value>, grid, kThreads, kSharedBytes<S>, stream, params);
    });
  });
}

cudaError_t losses(const LossParams& params, cudaStream_t stream) {
  return launch(losses_kernel, dim3(unsigned(ceil_div(2 * params.n, kThreads))), kThreads, 0, stream, params);
}

}  // namespace fastsimclr

// The NT-Xent loss on raw pointers, shared by the kernels and the binding; the equations are in forward.cu and
// backward.cu. All pointers are device pointers, and all arrays except the projections z are contiguous.
//
// The n images of this rank are 2n rows (z1's, then z2's). The M columns are the rows of all ranks; this rank's rows
// are columns [offset, offset + 2n). A launcher only launches kernels: the caller allocates all arrays.
//
// forward and backward also serve other contrastive losses: their rows and columns may be different vectors, with
// losses of their own (fastsimclr/loss/log_sums.py).
#pragma once

#ifdef FASTSIMCLR_EMULATION
#include "emulation/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace fastsimclr {

enum class DataType { kFloat32, kBfloat16, kFloat16 };

constexpr float kNormEps = 1e-12f;  // the eps of torch.nn.functional.normalize
constexpr int kMaxRows = 1 << 30;   // row and column indices are int, element offsets int64_t

// A temperature as a value, or as a device pointer, which the host never waits for.
struct Temperature {
  const float* pointer = nullptr;  // if null, `value` is used
  float value = 0;
  // The result of smallest_temperature, computed only on the host. If the device computed the logarithm, too, and it
  // differed in the last bit, the host could launch, at exactly this temperature, the kernel that returns immediately.
  float smallest = 0;
};

// The lowest temperature at which sums of `columns` exponentials of up to 1/temperature, and the inverses of these
// sums, are finite normal numbers. At lower temperatures the kernels subtract a maximum or an lse in each exponent.
float smallest_temperature(int columns);

// Two batches of projections, (n, d) each; element (i, k) is at i * row_stride + k * column_stride.
struct Projections {
  const void* z1 = nullptr;
  const void* z2 = nullptr;
  DataType dtype = DataType::kFloat32;
  int n = 0;
  int d = 0;
  int64_t row_stride_1 = 0, column_stride_1 = 0;
  int64_t row_stride_2 = 0, column_stride_2 = 0;
};

// Unit rows as input of the tensor cores: (rows, planes, width) bf16. With 2 planes each number is the sum of two bf16
// numbers. width is d rounded up to a multiple of 8, with zeros beyond d.
struct UnitRows {
  const uint16_t* data = nullptr;
  int count = 0;
};

// The similarities that are not among the negatives: of row i with column offset + i, and with the column of its
// partner, which is row i + distance for i < distance, and otherwise row i - distance.
struct Pairs {
  bool among_columns = false;  // false: all columns are negatives of all rows
  int offset = 0;
  int distance = 0;  // 0: no partners
};

struct NormalizeParams {
  Projections z;
  int planes = 1;
  int width = 0;
  uint16_t* unit = nullptr;   // out (2n, planes, width): z / |z|
  float* norm = nullptr;      // out (2n,): max(|z|, kNormEps)
  float* positive = nullptr;  // out (n,): cosine similarity of the two views
};

struct ForwardParams {
  UnitRows rows, columns;
  int planes = 1;
  int width = 0;
  bool symmetric = false;  // the columns are the rows: only half of the similarities are computed
  Pairs pairs;
  Temperature temperature;
  int column_unit = 0;    // the result of forward_column_unit
  float* sums = nullptr;  // out (slots, rows), slots = ceil(columns / column_unit)
};

struct LossParams {
  const float* sums = nullptr;  // (slots, 2n), for all columns
  int slots = 0;
  const float* positive = nullptr;  // (n,)
  int n = 0;
  int all_columns = 0;
  bool decoupled = false;
  Temperature temperature;
  float* losses = nullptr;  // out (2n,)
  float* lse = nullptr;     // out (2n,): log2 of the softmax denominator
  float* q = nullptr;       // out (2n,): fraction of the denominator due to the negatives
};

// The losses of the rows, or of the columns, of a matrix of similarities.
struct RowLosses {
  const float* lse = nullptr;      // log2 of the softmax denominator
  const float* weights = nullptr;  // gradient with respect to the loss, in [-1, 1]; null: all 1
};

struct BackwardParams {
  UnitRows rows, columns;
  int planes = 1;
  int width = 0;
  Pairs pairs;
  Temperature temperature;
  RowLosses row_losses, column_losses;
  int splits = 1;         // the result of backward_splits
  float* sums = nullptr;  // out (splits, rows, width): sums over the negatives, see backward.cu
};

struct ProjectParams {
  Projections z;
  int width = 0;
  Temperature temperature;
  const float* norm = nullptr;     // (2n,)
  const float* q = nullptr;        // (2n,)
  const float* weights = nullptr;  // (2n,) for this rank's rows; null: all 1
  const float* scale = nullptr;    // (1,): all gradients are multiplied by scale * factor
  float factor = 1;
  const float* sums = nullptr;  // (splits, 2n, width)
  int splits = 1;
  void* dz1 = nullptr;     // out (n, d) in the dtype of z
  void* dz2 = nullptr;     // out (n, d)
  float* along = nullptr;  // out (2n,): ẑ·dẑ, for the gradient of the temperature
};

// How the work is split, which determines the size of `sums` in the forward and backward.
int forward_column_unit(int rows, int columns, int planes, int width, bool symmetric);
int backward_splits(int rows, int columns, int planes, int width);

// Loads one of the loss kernels: an error means that none of them can run on the current device.
cudaError_t load_nt_xent();

cudaError_t normalize(const NormalizeParams& params, cudaStream_t stream);
cudaError_t forward(const ForwardParams& params, cudaStream_t stream);
cudaError_t losses(const LossParams& params, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, cudaStream_t stream);
cudaError_t project(const ProjectParams& params, cudaStream_t stream);

}  // namespace fastsimclr

// The NT-Xent loss on raw pointers. Shared by the kernels' files and the binding; the mathematics is in forward.cu and
// backward.cu. All pointers are of the device, all arrays are contiguous but for the projections z.
//
// n images of this rank are 2n rows (z1's, then z2's); all ranks' rows together are the columns, M of them; this rank's
// rows are columns [offset, offset + 2n). A launcher does nothing but launch: every array is the caller's.
#pragma once

#ifdef FASTSIMCLR_EMULATION
#include "emulation/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace fastsimclr {

enum class DataType { kFloat32, kBfloat16, kFloat16 };

constexpr float kNormEps = 1e-12f;  // of torch.nn.functional.normalize
constexpr int kMaxRows = 1 << 30;   // rows and columns are int, offsets of elements int64_t

// A temperature that the host knows, or one that only the device does (then the host never waits for it).
struct Temperature {
  const float* pointer = nullptr;  // null: `value` is it
  float value = 0;
  // Of smallest_temperature. The host computes it and host and device compare with it: a logarithm that differs by its
  // last bit between them would at the bound itself launch a kernel that leaves the work to the other one.
  float smallest = 0;
};

// From this temperature on, sums of `columns` exponentials of up to 1/temperature, and their inverses, are finite and
// normal numbers. Below, the kernels keep a maximum or an lse in every exponent.
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

// Unit rows as the tensor cores take them: (rows, planes, width) bf16, planes 1 or, each number being the sum of two,
// 2; width is d rounded up to a multiple of 8, with zeros beyond d.
struct UnitRows {
  const uint16_t* data = nullptr;
  int count = 0;
};

struct NormalizeParams {
  Projections z;
  int planes = 1;
  int width = 0;
  uint16_t* unit = nullptr;   // out (2n, planes, width): z / |z|
  float* norm = nullptr;      // out (2n,): |z|, at least kNormEps
  float* positive = nullptr;  // out (n,): the two views' cosine
};

struct ForwardParams {
  UnitRows rows, columns;
  int planes = 1;
  int width = 0;
  bool symmetric = false;  // columns are the rows: half of the similarities are enough
  bool has_pairs = false;  // whether rows meet themselves and their positives among these columns, and then
  int offset = 0;          //   the first row's column
  int all_columns = 0;     // M
  Temperature temperature;
  int column_unit = 0;    // of forward_column_unit
  float* sums = nullptr;  // out (slots, 2n), slots = columns / column_unit, rounded up
};

struct LossParams {
  const float* sums = nullptr;  // (slots, 2n), of all columns
  int slots = 0;
  const float* positive = nullptr;  // (n,)
  int n = 0;
  int all_columns = 0;
  bool decoupled = false;
  Temperature temperature;
  float* losses = nullptr;  // out (2n,)
  float* lse = nullptr;     // out (2n,): log2 of the denominator
  float* q = nullptr;       // out (2n,): share of the negatives in the denominator
};

struct BackwardParams {
  UnitRows rows, columns;
  int planes = 1;
  int width = 0;
  int offset = 0;
  Temperature temperature;
  const float* lse = nullptr;      // (M,)
  const float* weights = nullptr;  // (M,) in [-1, 1]: gradient of each row's loss; null: all 1
  int splits = 1;                  // of backward_splits
  float* sums = nullptr;           // out (splits, 2n, width): sums over the negatives, see backward.cu
};

struct ProjectParams {
  Projections z;
  int width = 0;
  Temperature temperature;
  const float* norm = nullptr;     // (2n,)
  const float* q = nullptr;        // (2n,)
  const float* weights = nullptr;  // (2n,) of this rank's rows; null: all 1
  const float* scale = nullptr;    // (1,): what all gradients are multiplied with, and
  float factor = 1;                //   once more
  const float* sums = nullptr;     // (splits, 2n, width)
  int splits = 1;
  void* dz1 = nullptr;     // out (n, d) of z's dtype
  void* dz2 = nullptr;     // out (n, d)
  float* along = nullptr;  // out (2n,): ẑ·dẑ, from which the temperature's gradient is made
};

// How the work is cut: what `sums` of the forward and of the backward are sized by.
int forward_column_unit(int rows, int columns, int planes, int width, bool symmetric);
int backward_splits(int rows, int columns, int planes, int width);

// Loads one of the kernels: an error means that none of them can run on the current device.
cudaError_t load_nt_xent();

cudaError_t normalize(const NormalizeParams& params, cudaStream_t stream);
cudaError_t forward(const ForwardParams& params, cudaStream_t stream);
cudaError_t losses(const LossParams& params, cudaStream_t stream);
cudaError_t backward(const BackwardParams& params, cudaStream_t stream);
cudaError_t project(const ProjectParams& params, cudaStream_t stream);

}  // namespace fastsimclr

// Wrappers of PTX and CUDA: tensor-core products, asynchronous copies, conversions, launches. For tests compiled by
// g++, emulation/cuda_on_cpu.h defines the same names for the CPU.
#pragma once

#ifndef __CUDACC__
#include "emulation/cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

// 16-bit floating-point numbers in memory.
struct Bf16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(Bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float to_float(Half x) { return __half2float(__ushort_as_half(x.bits)); }

template <class T>
__device__ T from_float(float x);  // rounds to nearest even
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Half from_float<Half>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Two bf16 numbers in one register, `low` in the lower half: the operand format of mma.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// 2^x in one instruction of the special function unit, with an error of up to 2 ulp; subnormal results become 0.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ char* dynamic_shared() {
  extern __shared__ __align__(128) char shared[];
  return shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// Loads four 8x8 matrices of 16-bit elements. Lane 8 m + r passes the address of row r of matrix m; register m of lane
// l receives elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// The same, with each 8x8 matrix transposed.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// C (16 x 8, float) += A (16 x 16, bf16) B (16 x 8, bf16). With g = lane / 4 and t = lane % 4, a lane holds
//   a: rows g, g + 8, g, g + 8 of columns 2t, 2t, 2t + 8, 2t + 8 (each with the next column)
//   b: rows 2t, 2t + 8 (each with the next row) of column g
//   c: columns 2t, 2t + 1 of row g, then of row g + 8
__device__ __forceinline__ void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Copies 16 bytes without using registers. If not valid, writes zeros and does not read `global`.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for this thread's copies except the latest kPending groups. Other threads see the data after a barrier.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, size_t shared_bytes, cudaStream_t stream,
                   const Params& params) {
  constexpr size_t kDefaultSharedBytes = 48 << 10;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared_bytes, stream>>>(params);
  return cudaGetLastError();
}

inline int multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

// Loads this kernel; an error means that there is no image of it for the current device.
template <class Params>
cudaError_t load(void (*kernel)(Params)) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

template <class Params>
int blocks_per_multiprocessor(void (*kernel)(Params), int threads, size_t shared_bytes) {
  int blocks = 0;
  cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                       int(shared_bytes));
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, threads, shared_bytes);
  return blocks > 0 ? blocks : 1;
}

#endif

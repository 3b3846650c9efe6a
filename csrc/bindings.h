// Shared by the files of the binding.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(FASTSIMCLR_CUDA) || defined(FASTSIMCLR_EMULATION)
#define FASTSIMCLR_KERNELS
#ifdef FASTSIMCLR_EMULATION
#include "emulation/cuda_on_cpu.h"
#else
#include <cuda_runtime.h>
#endif
#endif

namespace fastsimclr {

// Address of a tensor or array from Python (torch.Tensor.data_ptr(), ndarray.ctypes.data); 0: no array.
using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef FASTSIMCLR_KERNELS

// "cudaSetDevice failed: cudaErrorInvalidDevice, invalid device ordinal", or "" without an error.
inline std::string describe(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // clears the error, so that the next call does not report it again
  return std::string(call) + " failed: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
}

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error("fastsimclr: " + describe(error, call));
}

// Kernels are launched on the thread's current device. The caller sets the device of the pointers in its own CUDA
// runtime and restores the previous one; this library has a separate runtime, whose device must be set as well.
inline void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

#endif

void define_views(pybind11::module_& module);  // in bindings_views.cpp

}  // namespace fastsimclr

// What the files of the binding share.
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

// A tensor's or array's memory as Python has it (torch.Tensor.data_ptr(), ndarray.ctypes.data); 0 is no array.
using Address = uintptr_t;

template <class T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

#ifdef FASTSIMCLR_KERNELS

// "cudaSetDevice failed: cudaErrorInvalidDevice, invalid device ordinal", or "" without an error.
inline std::string describe(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // reported here, so the next call must not report it again
  return std::string(call) + " failed: " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
}

inline void check(cudaError_t error, const char* call) {
  if (error != cudaSuccess) throw std::runtime_error("fastsimclr: " + describe(error, call));
}

// A launch goes to the thread's current device. The caller has made the pointers' device current for its own CUDA
// runtime, and makes the one before current again; this library has a runtime of its own, which has to be told as well.
inline void use_device(int device) { check(cudaSetDevice(device), "cudaSetDevice"); }

#endif

void define_views(pybind11::module_& module);  // of bindings_views.cpp

}  // namespace fastsimclr

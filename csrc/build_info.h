// Build information of a CUDA build. Only build_info.cu, compiled by nvcc, has the macros.
#pragma once

#include <string>
#include <vector>

namespace fastsimclr {

struct CudaBuildInfo {
  std::string toolkit;                     // version of the nvcc that compiled this: "13.0"
  std::string runtime;                     // version of the statically linked CUDA runtime: "13.0"
  std::vector<std::string> architectures;  // {"sm_80", "sm_90"}
};

CudaBuildInfo cuda_build_info();

}  // namespace fastsimclr

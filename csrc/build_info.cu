#include <cuda_runtime.h>

#include "build_info.h"

namespace fastsimclr {
namespace {

constexpr int kArchitectures[] = {__CUDA_ARCH_LIST__};  // 800, 900, ...: ten times the numbers of sm_80, sm_90

std::string dotted(int major, int minor) { return std::to_string(major) + "." + std::to_string(minor); }

}  // namespace

CudaBuildInfo cuda_build_info() {
  CudaBuildInfo info;
  info.toolkit = dotted(__CUDACC_VER_MAJOR__, __CUDACC_VER_MINOR__);

  int runtime = 0;  // 13000 for 13.0; needs no driver, because the runtime is linked statically
  info.runtime =
      cudaRuntimeGetVersion(&runtime) == cudaSuccess ? dotted(runtime / 1000, runtime % 1000 / 10) : "unknown";

  for (int architecture : kArchitectures) info.architectures.push_back("sm_" + std::to_string(architecture / 10));
  return info;
}

}  // namespace fastsimclr

// Python module fastsimclr._C. It takes raw pointers, sizes and a stream handle, never a tensor: no Torch header is
// needed to build it, and one binary serves every Torch version. Functions that do real work release the GIL
// (py::call_guard<py::gil_scoped_release>()); those that make Python objects, like build_info, hold it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>

#include "build_info.h"

namespace py = pybind11;

namespace fastsimclr {
namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang++ " + std::to_string(__clang_major__) + "." + std::to_string(__clang_minor__);
#elif defined(__GNUC__)
  return "g++ " + std::to_string(__GNUC__) + "." + std::to_string(__GNUC_MINOR__);
#else
  return "an unknown compiler";
#endif
}

py::dict build_info() {
  py::dict info;
  info["version"] = FASTSIMCLR_VERSION;
  info["compiler"] = compiler();
#ifdef FASTSIMCLR_CUDA
  const CudaBuildInfo cuda = cuda_build_info();
  info["cuda"] = cuda.toolkit;
  info["cuda_runtime"] = cuda.runtime;
  info["architectures"] = cuda.architectures;
#else
  info["cuda"] = py::none();
  info["cuda_runtime"] = py::none();
  info["architectures"] = py::list();
#endif
  return info;
}

}  // namespace
}  // namespace fastsimclr

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled part of fastsimclr. Used through fastsimclr.loss and fastsimclr.data.";
  module.def("build_info", &fastsimclr::build_info,
             "What this library was built from: version, compiler, cuda, cuda_runtime, architectures.");
}

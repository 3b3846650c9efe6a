// Python module fastsimclr._C. Its functions take raw pointers, sizes and a stream handle instead of tensors: building
// it needs no Torch headers, and one binary works with every Torch version. Functions that compute release the GIL
// (py::call_guard<py::gil_scoped_release>()); those that create Python objects, like build_info, hold it.
//
// With FASTSIMCLR_EMULATION this is fastsimclr._emulated, for tests: the kernels, emulated on the CPU.
#include "bindings.h"

#include <optional>
#include <string>
#include <tuple>

#include "build_info.h"
#ifdef FASTSIMCLR_KERNELS
#include "nt_xent.h"
#include "photometric.h"
#endif

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

#ifdef FASTSIMCLR_KERNELS

// Returns why the kernels cannot run on this device, or "" if they can.
std::string probe(int device) {
  std::string reason = describe(cudaSetDevice(device), "cudaSetDevice");
  if (reason.empty()) reason = describe(load_nt_xent(), "loading the kernels of the loss");
  if (reason.empty()) reason = describe(load_views(), "loading the kernels of the views");
  return reason;
}

Temperature temperature(Address address, float value, int columns) {
  return {pointer<const float>(address), value, smallest_temperature(columns)};
}

// z: (address, row stride, column stride) of each view, strides in elements.
using View = std::tuple<Address, int64_t, int64_t>;

Projections projections(const View& z1, const View& z2, DataType dtype, int n, int d) {
  Projections z;
  Address address_1, address_2;
  std::tie(address_1, z.row_stride_1, z.column_stride_1) = z1;
  std::tie(address_2, z.row_stride_2, z.column_stride_2) = z2;
  z.z1 = pointer<const void>(address_1);
  z.z2 = pointer<const void>(address_2);
  z.dtype = dtype;
  z.n = n;
  z.d = d;
  return z;
}

// (offset, distance) of Pairs; none: all columns are negatives.
using Partners = std::tuple<int, int>;

Pairs as_pairs(const std::optional<Partners>& pairs) {
  if (!pairs) return {};
  return {true, std::get<0>(*pairs), std::get<1>(*pairs)};
}

// The addresses of lse and weights.
using Losses = std::tuple<Address, Address>;

RowLosses as_row_losses(const Losses& losses) {
  return {pointer<const float>(std::get<0>(losses)), pointer<const float>(std::get<1>(losses))};
}

template <class Params>
void run(cudaError_t (*launcher)(const Params&, cudaStream_t), const char* name, const Params& params, int device,
         Address stream) {
  use_device(device);
  check(launcher(params, reinterpret_cast<cudaStream_t>(stream)), name);
}

void define_nt_xent(py::module_& module) {
  using namespace py::literals;
  const py::call_guard<py::gil_scoped_release> release;

  py::enum_<DataType>(module, "DataType", py::module_local())
      .value("float32", DataType::kFloat32)
      .value("bfloat16", DataType::kBfloat16)
      .value("float16", DataType::kFloat16);

  module.def(
      "nt_xent_normalize",
      [](const View& z1, const View& z2, DataType dtype, int n, int d, int planes, int width, Address unit,
         Address norm, Address positive, int device, Address stream) {
        NormalizeParams p;
        p.z = projections(z1, z2, dtype, n, d);
        p.planes = planes;
        p.width = width;
        p.unit = pointer<uint16_t>(unit);
        p.norm = pointer<float>(norm);
        p.positive = pointer<float>(positive);
        run(normalize, "nt_xent_normalize", p, device, stream);
      },
      py::kw_only(), "z1"_a, "z2"_a, "dtype"_a, "n"_a, "d"_a, "planes"_a, "width"_a, "unit"_a, "norm"_a, "positive"_a,
      "device"_a, "stream"_a, release);

  module.def(
      "nt_xent_smallest_temperature",
      [](int columns, int device) {
        use_device(device);
        return smallest_temperature(columns);
      },
      py::kw_only(), "columns"_a, "device"_a, release);

  module.def(
      "nt_xent_forward_column_unit",
      [](int rows, int columns, int planes, int width, bool symmetric, int device) {
        use_device(device);
        return forward_column_unit(rows, columns, planes, width, symmetric);
      },
      py::kw_only(), "rows"_a, "columns"_a, "planes"_a, "width"_a, "symmetric"_a, "device"_a, release);

  module.def(
      "nt_xent_forward",
      [](Address rows, int row_count, Address columns, int column_count, int planes, int width, bool symmetric,
         const std::optional<Partners>& pairs, int all_columns, Address temperature_address, float temperature_value,
         int column_unit, Address sums, int device, Address stream) {
        ForwardParams p;
        p.rows = {pointer<const uint16_t>(rows), row_count};
        p.columns = {pointer<const uint16_t>(columns), column_count};
        p.planes = planes;
        p.width = width;
        p.symmetric = symmetric;
        p.pairs = as_pairs(pairs);
        p.temperature = temperature(temperature_address, temperature_value, all_columns);
        p.column_unit = column_unit;
        p.sums = pointer<float>(sums);
        run(forward, "nt_xent_forward", p, device, stream);
      },
      py::kw_only(), "rows"_a, "row_count"_a, "columns"_a, "column_count"_a, "planes"_a, "width"_a, "symmetric"_a,
      "pairs"_a, "all_columns"_a, "temperature"_a, "temperature_value"_a, "column_unit"_a, "sums"_a, "device"_a,
      "stream"_a, release);

  module.def(
      "nt_xent_losses",
      [](Address sums, int slots, Address positive, int n, int all_columns, bool decoupled, Address temperature_address,
         float temperature_value, Address losses_out, Address lse, Address q, int device, Address stream) {
        LossParams p;
        p.sums = pointer<const float>(sums);
        p.slots = slots;
        p.positive = pointer<const float>(positive);
        p.n = n;
        p.all_columns = all_columns;
        p.decoupled = decoupled;
        p.temperature = temperature(temperature_address, temperature_value, all_columns);
        p.losses = pointer<float>(losses_out);
        p.lse = pointer<float>(lse);
        p.q = pointer<float>(q);
        run(losses, "nt_xent_losses", p, device, stream);
      },
      py::kw_only(), "sums"_a, "slots"_a, "positive"_a, "n"_a, "all_columns"_a, "decoupled"_a, "temperature"_a,
      "temperature_value"_a, "losses"_a, "lse"_a, "q"_a, "device"_a, "stream"_a, release);

  module.def(
      "nt_xent_backward_splits",
      [](int rows, int columns, int planes, int width, int device) {
        use_device(device);
        return backward_splits(rows, columns, planes, width);
      },
      py::kw_only(), "rows"_a, "columns"_a, "planes"_a, "width"_a, "device"_a, release);

  module.def(
      "nt_xent_backward",
      [](Address rows, int row_count, Address columns, int column_count, int planes, int width,
         const std::optional<Partners>& pairs, int all_columns, Address temperature_address, float temperature_value,
         const Losses& row_losses, const Losses& column_losses, int splits, Address sums, int device, Address stream) {
        BackwardParams p;
        p.rows = {pointer<const uint16_t>(rows), row_count};
        p.columns = {pointer<const uint16_t>(columns), column_count};
        p.planes = planes;
        p.width = width;
        p.pairs = as_pairs(pairs);
        p.temperature = temperature(temperature_address, temperature_value, all_columns);
        p.row_losses = as_row_losses(row_losses);
        p.column_losses = as_row_losses(column_losses);
        p.splits = splits;
        p.sums = pointer<float>(sums);
        run(backward, "nt_xent_backward", p, device, stream);
      },
      py::kw_only(), "rows"_a, "row_count"_a, "columns"_a, "column_count"_a, "planes"_a, "width"_a, "pairs"_a,
      "all_columns"_a, "temperature"_a, "temperature_value"_a, "row_losses"_a, "column_losses"_a, "splits"_a, "sums"_a,
      "device"_a, "stream"_a, release);

  module.def(
      "nt_xent_project",
      [](const View& z1, const View& z2, DataType dtype, int n, int d, int width, Address temperature_address,
         float temperature_value, Address norm, Address q, Address weights, Address scale, float factor, Address sums,
         int splits, Address dz1, Address dz2, Address along, int device, Address stream) {
        ProjectParams p;
        p.z = projections(z1, z2, dtype, n, d);
        p.width = width;
        p.temperature = {pointer<const float>(temperature_address), temperature_value};
        p.norm = pointer<const float>(norm);
        p.q = pointer<const float>(q);
        p.weights = pointer<const float>(weights);
        p.scale = pointer<const float>(scale);
        p.factor = factor;
        p.sums = pointer<const float>(sums);
        p.splits = splits;
        p.dz1 = pointer<void>(dz1);
        p.dz2 = pointer<void>(dz2);
        p.along = pointer<float>(along);
        run(project, "nt_xent_project", p, device, stream);
      },
      py::kw_only(), "z1"_a, "z2"_a, "dtype"_a, "n"_a, "d"_a, "width"_a, "temperature"_a, "temperature_value"_a,
      "norm"_a, "q"_a, "weights"_a, "scale"_a, "factor"_a, "sums"_a, "splits"_a, "dz1"_a, "dz2"_a, "along"_a,
      "device"_a, "stream"_a, release);
}

#endif  // FASTSIMCLR_KERNELS

}  // namespace
}  // namespace fastsimclr

PYBIND11_MODULE(FASTSIMCLR_MODULE, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled part of fastsimclr. Used through fastsimclr.loss and fastsimclr.data.";
  module.def("build_info", &fastsimclr::build_info,
             "How this library was built: version, compiler, cuda, cuda_runtime, architectures.");
  fastsimclr::define_views(module);
#ifdef FASTSIMCLR_KERNELS
  module.def(
      "probe", &fastsimclr::probe, pybind11::kw_only(), pybind11::arg("device"),
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Returns why the kernels cannot run on this device (driver too old, no image for it, ...), or \"\" if they "
      "can. Loads a kernel of the loss and one of the views.");
  fastsimclr::define_nt_xent(module);
#endif
}

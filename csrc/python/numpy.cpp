// ddrf_fast._numpy: degrade on NumPy arrays, with neither torch nor the GIL.
//
// ddrf_fast/numpy.py checks the arguments and documents them; this hands the arrays' memory to the
// kernels that torch's operator runs, on the calling thread (data loaders bring their own workers).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/degrade_dispatch.h"

namespace py = pybind11;

namespace ddrf_fast {
namespace {

using FloatArray = py::array_t<float, py::array::c_style | py::array::forcecast>;

Element element_of(const py::dtype& dtype) {
  if (dtype.kind() == 'u' && dtype.itemsize() == 1) return Element::kUInt8;
  if (dtype.kind() == 'u' && dtype.itemsize() == 2) return Element::kUInt16;
  if (dtype.kind() == 'f' && dtype.itemsize() == 4) return Element::kFloat32;
  throw py::type_error("image: expected uint8, uint16 or float32");
}

// The strides of [H, W, C] as those of [1, C, H, W], in elements.
template <class Array>
void set_image_strides(Array& to, const py::array& image) {
  const int64_t size = image.itemsize();
  to.stride[1] = image.strides(2) / size;
  to.stride[2] = image.strides(0) / size;
  to.stride[3] = image.strides(1) / size;
}

// Dense, as [1, M, rows, columns].
Input dense(const FloatArray& array, int64_t rows, int64_t columns) {
  Input input;
  input.data = reinterpret_cast<const char*>(array.data());
  input.stride[1] = rows * columns;
  input.stride[2] = columns;
  input.stride[3] = 1;
  return input;
}

py::array degrade(const py::array& image, const FloatArray& kernels, const FloatArray& weights,
                  const std::optional<FloatArray>& noise_std, int64_t seed, int64_t sample_id,
                  bool gray_noise, float shot_noise, int64_t scale, int64_t offset,
                  int64_t out_height, int64_t out_width, const std::string& padding,
                  bool correlation, const std::string& weights_at) {
  if (image.ndim() != 3 || kernels.ndim() != 3)
    throw std::invalid_argument("image and kernels: expected three dimensions");
  DegradeProblem p{};
  p.batch = 1;
  p.channels = image.shape(2);
  p.height = image.shape(0);
  p.width = image.shape(1);
  p.out_height = out_height;
  p.out_width = out_width;
  p.num_kernels = kernels.shape(0);
  p.kernel_size = kernels.shape(2);
  p.scale = scale;
  p.offset = offset;
  p.padding = padding_from(padding);
  p.weights_at = weights_at_from(weights_at);
  p.correlation = correlation;
  p.image.data = static_cast<const char*>(image.data());
  p.image.element = element_of(image.dtype());
  set_image_strides(p.image, image);
  p.kernels = dense(kernels, p.kernel_size, p.kernel_size);
  if (p.weights_at == WeightsAt::kSample) {
    p.weights = dense(weights, 1, 1);
  } else {
    p.weights = dense(weights, weights.shape(1), weights.shape(2));
    p.grid_height = weights.shape(1);
    p.grid_width = weights.shape(2);
  }
  if (noise_std) {
    p.noise_map = noise_std->ndim() == 2;
    p.noise_std = dense(*noise_std, 1, p.noise_map ? out_width : 1);
    p.seed = seed;
    p.sample_ids = {sample_id};
    p.gray_noise = {gray_noise};
    if (shot_noise > 0) p.shot_noise.data = reinterpret_cast<const char*>(&shot_noise);
  }

  py::array result(image.dtype(), std::vector<py::ssize_t>{out_height, out_width, p.channels});
  Output out;
  out.data = static_cast<char*>(result.mutable_data());
  out.element = p.image.element;
  set_image_strides(out, result);
  {
    py::gil_scoped_release release;
    degrade_forward(p, out, {1, [](int64_t count, const auto& body) { body(0, count); }});
  }
  return result;
}

}  // namespace
}  // namespace ddrf_fast

PYBIND11_MODULE(_numpy, m) {
  m.doc() =
      "Kernels of ddrf_fast on NumPy arrays; use ddrf_fast.numpy, which checks the arguments.";
  m.def("degrade", &ddrf_fast::degrade, py::arg("image").noconvert(), py::arg("kernels"),
        py::arg("weights"), py::arg("noise_std"), py::arg("seed"), py::arg("sample_id"),
        py::arg("gray_noise"), py::arg("shot_noise"), py::arg("scale"), py::arg("offset"),
        py::arg("out_height"), py::arg("out_width"), py::arg("padding"), py::arg("correlation"),
        py::arg("weights_at"));
}

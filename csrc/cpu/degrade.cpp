// ddrf_fast::degrade and ddrf_fast::degrade_backward on the CPU.
//
// Checks what the raw operators are given and hands it to degrade_kernel.h as plain memory. Inputs
// are read with their strides, so nothing is copied beforehand.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/degrade_arguments.h"
#include "common/parallel.h"
#include "cpu/degrade_dispatch.h"

namespace ddrf_fast {
namespace {

using torch::headeronly::ScalarType;

Element element_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Element::kFloat32;
    case ScalarType::Double:
      return Element::kFloat64;
    case ScalarType::BFloat16:
      return Element::kBFloat16;
    case ScalarType::Half:
      return Element::kFloat16;
    case ScalarType::Byte:
      return Element::kUInt8;
    case ScalarType::UInt16:
      return Element::kUInt16;
    default:
      STD_TORCH_CHECK(false, "expected float32, float64, bfloat16, float16, uint8 or uint16, got ",
                      torch::headeronly::toString(tensor.scalar_type()));
  }
}

// Dimension d of `tensor` becomes dimension at[d] of the array's four.
template <class Array>
Array as_array(const Tensor& tensor, const std::vector<int>& at) {
  Array array;
  if constexpr (std::is_same_v<Array, Input>) {
    array.data = static_cast<const char*>(tensor.const_data_ptr());
  } else {
    array.data = static_cast<char*>(tensor.mutable_data_ptr());
  }
  array.element = element_of(tensor);
  for (size_t d = 0; d < at.size(); ++d) array.stride[at[d]] = tensor.stride(d);
  return array;
}

const std::vector<int> kAllDims{0, 1, 2, 3};

DegradeProblem make_problem(const DegradeArguments& in) {
  DegradeProblem p{check_arguments(in), {}, {}, {}, {}, 0, {}, {}, {}};
  p.image = as_array<Input>(in.image, kAllDims);
  p.kernels = as_array<Input>(in.kernels, kernel_dims(p));
  p.weights = as_array<Input>(in.weights, weight_dims(p));
  if (in.noise_std) {
    p.noise_std = as_array<Input>(*in.noise_std, kAllDims);
    p.seed = *in.seed->const_data_ptr<int64_t>();
    const int64_t* ids = in.sample_ids->const_data_ptr<int64_t>();
    for (int64_t b = 0; b < p.batch; ++b) p.sample_ids.push_back(ids[b * in.sample_ids->stride(0)]);
  }
  if (in.gray_noise) {
    const bool* gray = in.gray_noise->const_data_ptr<bool>();
    for (int64_t b = 0; b < p.batch; ++b)
      p.gray_noise.push_back(gray[b * in.gray_noise->stride(0)]);
  }
  if (in.shot_noise) p.shot_noise = as_array<Input>(*in.shot_noise, {0});
  return p;
}

// How the compiled kernels run it, in words.
std::string degrade_plan_cpu(const Tensor& image, const Tensor& kernels, const Tensor& weights,
                             std::optional<Tensor> noise_std, std::optional<Tensor> seed,
                             std::optional<Tensor> sample_ids, std::optional<Tensor> gray_noise,
                             std::optional<Tensor> shot_noise, int64_t scale, int64_t offset,
                             std::vector<int64_t> out_size, StringHandle padding, bool correlation,
                             StringHandle weights_at) {
  STD_TORCH_CHECK(out_size.size() == 2, "out_size: expected two sizes, got ", out_size.size());
  const DegradeProblem p =
      make_problem({image, kernels, weights, noise_std, seed, sample_ids, gray_noise, shot_noise,
                    scale, offset, out_size[0], out_size[1], padding, correlation, weights_at});
  return degrade_plan(p, /*backward=*/false) + "; gradients: " + degrade_plan(p, /*backward=*/true);
}

std::string degrade_backward_plan_cpu(const Tensor& grad, const Tensor& image,
                                      const Tensor& kernels, const Tensor& weights,
                                      std::optional<Tensor> noise_std, std::optional<Tensor> seed,
                                      std::optional<Tensor> sample_ids,
                                      std::optional<Tensor> gray_noise, int64_t scale,
                                      int64_t offset, StringHandle padding, bool correlation,
                                      StringHandle weights_at, int64_t) {
  check_dim("grad", grad, 4);
  return degrade_plan(
      make_problem({image, kernels, weights, noise_std, seed, sample_ids, gray_noise, std::nullopt,
                    scale, offset, grad.size(2), grad.size(3), padding, correlation, weights_at}),
      /*backward=*/true);
}

Threads torch_threads() {
  return {torch::stable::get_num_threads(),
          [](int64_t count, const std::function<void(int64_t, int64_t)>& body) {
            parallel_for(count, 1, body);
          }};
}

Tensor degrade_cpu(const Tensor& image, const Tensor& kernels, const Tensor& weights,
                   std::optional<Tensor> noise_std, std::optional<Tensor> seed,
                   std::optional<Tensor> sample_ids, std::optional<Tensor> gray_noise,
                   std::optional<Tensor> shot_noise, int64_t scale, int64_t offset,
                   std::vector<int64_t> out_size, StringHandle padding, bool correlation,
                   StringHandle weights_at) {
  STD_TORCH_CHECK(out_size.size() == 2, "out_size: expected two sizes, got ", out_size.size());
  const DegradeProblem p =
      make_problem({image, kernels, weights, noise_std, seed, sample_ids, gray_noise, shot_noise,
                    scale, offset, out_size[0], out_size[1], padding, correlation, weights_at});
  Tensor out = empty_tensor(kernels, {p.batch, p.channels, p.out_height, p.out_width},
                            is_channels_last(image));
  degrade_forward(p, as_array<Output>(out, kAllDims), torch_threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> degrade_backward_cpu(
    const Tensor& grad, const Tensor& image, const Tensor& kernels, const Tensor& weights,
    std::optional<Tensor> noise_std, std::optional<Tensor> seed, std::optional<Tensor> sample_ids,
    std::optional<Tensor> gray_noise, int64_t scale, int64_t offset, StringHandle padding,
    bool correlation, StringHandle weights_at, int64_t output_mask) {
  check_dim("grad", grad, 4);
  check_gradients(output_mask, image, noise_std);
  // The gradients of shot noise are composed in Python.
  const DegradeProblem p =
      make_problem({image, kernels, weights, noise_std, seed, sample_ids, gray_noise, std::nullopt,
                    scale, offset, grad.size(2), grad.size(3), padding, correlation, weights_at});
  check_like("grad", grad, {p.batch, p.channels, p.out_height, p.out_width}, kernels);

  // Only weights at the image's pixels have some that no output reads.
  const bool empty = grad.numel() == 0;
  std::tuple<Tensor, Tensor, Tensor, Tensor> grads{
      new_gradient(output_mask, 0, image, is_channels_last(image), empty),
      new_gradient(output_mask, 1, kernels, false, empty),
      new_gradient(output_mask, 2, weights, false, empty || p.weights_at == WeightsAt::kImage),
      new_gradient(output_mask, 3, noise_std ? *noise_std : image, false, empty)};
  DegradeGradients g;
  g.grad = as_array<Input>(grad, kAllDims);
  if (output_mask & 1) g.image = as_array<Output>(std::get<0>(grads), kAllDims);
  if (output_mask & 2) g.kernels = as_array<Output>(std::get<1>(grads), kernel_dims(p));
  if (output_mask & 4) g.weights = as_array<Output>(std::get<2>(grads), weight_dims(p));
  if (output_mask & 8) g.noise_std = as_array<Output>(std::get<3>(grads), kAllDims);
  degrade_backward(p, g, torch_threads());
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast, CPU, m) {
  m.impl("degrade", TORCH_BOX(&degrade_cpu));
  m.impl("degrade_backward", TORCH_BOX(&degrade_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast_native, CPU, m) {
  m.impl("degrade_plan", TORCH_BOX(&degrade_plan_cpu));
  m.impl("degrade_backward_plan", TORCH_BOX(&degrade_backward_plan_cpu));
}

}  // namespace ddrf_fast

// The raw operators ddrf_fast::dynamic_conv, dynamic_conv_mean and dynamic_conv_backward on the
// CPU: checks, outputs, and the choice of dtype and instruction set.
#include "cpu/dynamic_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <limits>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/capability.h"
#include "common/checks.h"
#include "common/dtype.h"

namespace ddrf_fast {
namespace {

using torch::headeronly::ScalarType;

// The operators' tensors as they come; the dense ones become contiguous before use.
struct Arguments {
  Tensor x, weight;
  std::optional<Tensor> attention, bias, code, in_scale, out_scale, tap_scale;
  std::vector<int64_t> stride, padding, dilation;
  int64_t groups;
};

void check_pair(const char* name, const std::vector<int64_t>& pair, int64_t least) {
  // The bound keeps every position within 64 bits.
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  STD_TORCH_CHECK(pair.size() == 2, name, ": expected two numbers, got ", pair.size());
  for (int64_t value : pair) {
    STD_TORCH_CHECK(value >= least && value <= kMost, name, ": expected numbers from ", least,
                    " to ", kMost, ", got ", shape_text(pair));
  }
}

void check_optional(const char* name, const std::optional<Tensor>& tensor,
                    const std::vector<int64_t>& shape, const Tensor& like) {
  if (tensor) check_tensor(name, *tensor, shape, like);
}

// What scales are computed in: float32 for the half precisions, and else x's dtype.
ScalarType scale_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Scales have x's dtype, or that which they are computed in.
void check_scale(const char* name, const std::optional<Tensor>& tensor,
                 const std::vector<int64_t>& shape, const Tensor& x) {
  if (!tensor) return;
  const bool computed = tensor->scalar_type() == scale_type(x);
  check_tensor(name, *tensor, shape, computed ? *tensor : x);
}

DynamicConvShape checked_shape(const Arguments& a) {
  check_dim("x", a.x, 4);
  check_dim("weight", a.weight, 5);
  check_pair("stride", a.stride, 1);
  check_pair("padding", a.padding, 0);
  check_pair("dilation", a.dilation, 1);
  STD_TORCH_CHECK(a.groups >= 1, "groups: expected at least 1, got ", a.groups);

  DynamicConvShape shape{};
  shape.batch = a.x.size(0);
  shape.in_channels = a.x.size(1);
  shape.out_channels = a.weight.size(1);
  shape.groups = a.groups;
  shape.has_attention = a.attention.has_value();
  shape.bank = shape.has_attention ? a.weight.size(0) : 1;
  if (a.code) {
    check_dim("code", *a.code, 2);
    shape.code_channels = a.code->size(1);
    STD_TORCH_CHECK(a.groups == 1, "code: needs groups == 1, got groups ", a.groups);
  }
  STD_TORCH_CHECK(shape.in_channels % a.groups == 0 && shape.out_channels % a.groups == 0,
                  "groups: ", a.groups, " does not divide the channels ", shape.in_channels,
                  " of x and ", shape.out_channels, " of weight");
  for (int axis = 0; axis < 2; ++axis) {
    shape.in_size[axis] = a.x.size(2 + axis);
    shape.kernel[axis] = a.weight.size(3 + axis);
    shape.stride[axis] = a.stride[axis];
    shape.padding[axis] = a.padding[axis];
    shape.dilation[axis] = a.dilation[axis];
    const int64_t padded = shape.in_size[axis] + 2 * shape.padding[axis];
    const int64_t reach = shape.dilation[axis] * (shape.kernel[axis] - 1) + 1;
    STD_TORCH_CHECK(shape.kernel[axis] >= 1 && reach <= padded, "weight: a kernel of ",
                    shape.kernel[axis], " (", reach,
                    " with dilation) does not fit the padded size ", padded, " of x");
    shape.out_size[axis] = (padded - reach) / shape.stride[axis] + 1;
  }

  STD_TORCH_CHECK(shape.row_size() > 0 && shape.out_channels > 0 && shape.bank > 0,
                  "weight: expected a kernel, an output channel, and an input channel or a code, "
                  "got shape ",
                  shape_text(a.weight.sizes()));

  const int64_t batch = shape.batch, out = shape.out_channels;
  const int64_t own = shape.has_attention ? shape.bank : batch;
  check_tensor(
      "weight", a.weight,
      {own, out, shape.in_per_group() + shape.code_channels, shape.kernel[0], shape.kernel[1]},
      a.x);
  check_tensor("x", a.x, {batch, shape.in_channels, shape.in_size[0], shape.in_size[1]}, a.x);
  if (a.attention) {
    shape.attention_per_channel = a.attention->dim() == 3;
    std::vector<int64_t> expected{batch, shape.bank};
    if (shape.attention_per_channel) expected.push_back(out);
    check_tensor("attention", *a.attention, expected, a.x);
  }
  check_optional("bias", a.bias, {own, out}, a.x);
  check_optional("code", a.code, {batch, shape.code_channels}, a.x);
  check_scale("in_scale", a.in_scale, {batch, shape.in_channels}, a.x);
  check_scale("out_scale", a.out_scale, {batch, out}, a.x);
  check_scale("tap_scale", a.tap_scale, {batch, shape.kernel[0], shape.kernel[1]}, a.x);
  return shape;
}

Tensor as_type(const Tensor& tensor, ScalarType type) {
  return tensor.scalar_type() == type ? tensor : torch::stable::to(tensor, type);
}

// As the kernels take them: contiguous, the scales in the type that they are computed in.
void make_ready(Arguments& a) {
  a.weight = as_contiguous(a.weight);
  for (auto* scale : {&a.in_scale, &a.out_scale, &a.tap_scale}) {
    if (*scale) *scale = as_type(**scale, scale_type(a.x));
  }
  for (auto* tensor : {&a.attention, &a.bias, &a.code, &a.in_scale, &a.out_scale, &a.tap_scale}) {
    *tensor = as_contiguous(*tensor);
  }
}

template <class Scalar>
const Scalar* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->const_data_ptr<Scalar>() : nullptr;
}

template <class Scalar>
Image<const Scalar> const_image(const Tensor& tensor) {
  return {tensor.const_data_ptr<Scalar>(),
          {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

template <class Scalar>
Image<Scalar> mutable_image(const Tensor& tensor) {
  return {tensor.mutable_data_ptr<Scalar>(),
          {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)}};
}

template <class Scalar>
DynamicConvOperands<Scalar> operands_of(const Arguments& a) {
  return {const_image<Scalar>(a.x),
          a.weight.const_data_ptr<Scalar>(),
          data_or_null<Scalar>(a.attention),
          data_or_null<Scalar>(a.bias),
          data_or_null<Scalar>(a.code),
          data_or_null<accumulate_t<Scalar>>(a.in_scale),
          data_or_null<accumulate_t<Scalar>>(a.out_scale),
          data_or_null<accumulate_t<Scalar>>(a.tap_scale)};
}

// Calls the function of the instruction set in use.
#if DDRF_X86_CAPABILITIES
#define DDRF_CALL(FUNCTION, ...)                                                                   \
  switch (cpu_capability()) {                                                                      \
    case Capability::kAmxBf16:                                                                     \
      if constexpr (std::is_same_v<Scalar, c10::BFloat16>) return amx_bf16::FUNCTION(__VA_ARGS__); \
      [[fallthrough]];                                                                             \
    case Capability::kAvx512Bf16:                                                                  \
      if constexpr (std::is_same_v<Scalar, c10::BFloat16>)                                         \
        return avx512_bf16::FUNCTION(__VA_ARGS__);                                                 \
      [[fallthrough]];                                                                             \
    case Capability::kAvx512:                                                                      \
      return avx512::FUNCTION(__VA_ARGS__);                                                        \
    case Capability::kAvx2:                                                                        \
      return avx2::FUNCTION(__VA_ARGS__);                                                          \
    default:                                                                                       \
      return baseline::FUNCTION(__VA_ARGS__);                                                      \
  }
#else
#define DDRF_CALL(FUNCTION, ...) return baseline::FUNCTION(__VA_ARGS__);
#endif

template <class Scalar>
void call_forward(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                  Activation activation, const Image<Scalar>& y, Scalar* mean,
                  bool accumulate = false) {
  DDRF_CALL(dynamic_conv<Scalar>, shape, operands, activation, y, mean, accumulate)
}

template <class Scalar>
OneKernel call_one_kernel(const DynamicConvShape& shape,
                          const DynamicConvOperands<Scalar>& operands, Direction direction) {
  DDRF_CALL(one_kernel<Scalar>, shape, operands, direction)
}

template <class Scalar>
void call_mix_one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                         Scalar* kernel, Scalar* bias) {
  DDRF_CALL(mix_one_kernel<Scalar>, shape, operands, kernel, bias)
}

template <class Scalar>
void call_finish_one_kernel(const DynamicConvShape& shape,
                            const DynamicConvOperands<Scalar>& operands, Activation activation,
                            Scalar* y, Scalar* mean) {
  DDRF_CALL(finish_one_kernel<Scalar>, shape, operands, activation, y, mean)
}

template <class Scalar>
std::string call_plan(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands) {
  DDRF_CALL(dynamic_conv_plan<Scalar>, shape, operands)
}

template <class Scalar>
void call_backward(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                   const Image<const Scalar>& grad, const DynamicConvGradients<Scalar>& gradients){
    DDRF_CALL(dynamic_conv_backward<Scalar>, shape, operands, grad, gradients)}
#undef DDRF_CALL

Activation activation_of(const std::string& name) {
  if (name == "relu") return Activation::kRelu;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  STD_TORCH_CHECK(name == "none", "activation: expected none, relu or leaky_relu, got ", name);
  return Activation::kNone;
}

// What torch computes for us is not differentiated, whatever the caller's mode.
class NoGrad {
 public:
  NoGrad() : enabled_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(enabled_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool enabled_;
};

// Whether torch's convolution is to be called with `image`, whose layout it keeps.
template <class Scalar>
OneKernel choose_one_kernel(const DynamicConvShape& shape,
                            const DynamicConvOperands<Scalar>& operands, Direction direction,
                            const Tensor& image) {
  return image.is_contiguous() ? call_one_kernel(shape, operands, direction) : OneKernel::kNone;
}

// torch's own convolution of all samples with one kernel [1, O, I, kh, kw] and bias [O], or the
// transposed one.
Tensor convolution(const Arguments& a, const Tensor& image, const Tensor& kernel,
                   const std::optional<Tensor>& bias, bool transposed) {
  using torch::stable::detail::from;
  std::array<StableIValue, 9> stack{
      from(image),      from(torch::stable::select(kernel, 0, 0)),
      from(bias),       from(a.stride),
      from(a.padding),  from(a.dilation),
      from(transposed), from(std::vector<int64_t>{0, 0}),  // output_padding
      from(a.groups)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::convolution", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// W_b [1, O, I, kh, kw] of the only sample and, where `bias` is not null, its bias.
template <class Scalar>
Tensor mixed_kernel(const Arguments& a, const DynamicConvShape& shape,
                    const DynamicConvOperands<Scalar>& operands, Scalar* bias) {
  const auto sizes = a.weight.sizes();
  const Tensor kernel = empty_tensor(a.x, {1, sizes[1], sizes[2], sizes[3], sizes[4]});
  call_mix_one_kernel(shape, operands, kernel.mutable_data_ptr<Scalar>(), bias);
  return kernel;
}

// The input gradient by torch's transposed convolution.
template <class Scalar>
Tensor input_gradient_of_one(OneKernel one, const Arguments& a, const DynamicConvShape& shape,
                             const DynamicConvOperands<Scalar>& operands, const Tensor& grad) {
  const NoGrad no_grad;
  Tensor image = grad, kernel = a.weight;
  if (one == OneKernel::kMixed) {
    kernel = mixed_kernel<Scalar>(a, shape, operands, nullptr);
  } else {
    using torch::stable::detail::from;
    const Tensor factors = torch::stable::reshape(*a.attention, {shape.batch, 1, 1, 1});
    std::array<StableIValue, 2> stack{from(grad), from(factors)};
    STABLE_TORCH_ERROR_CODE_CHECK(
        torch_call_dispatcher("aten::mul", "Tensor", stack.data(), TORCH_ABI_VERSION));
    image = torch::stable::detail::to<Tensor>(stack[0]);
  }
  return convolution(a, image, kernel, std::nullopt, true);
}

// y and, if asked for, its mean over the pixels.
std::pair<Tensor, Tensor> run_forward(Arguments& a, const std::string& activation, bool with_mean) {
  const DynamicConvShape shape = checked_shape(a);
  const Activation act = activation_of(activation);
  make_ready(a);
  Tensor y, mean;
  if (with_mean) mean = empty_tensor(a.x, {shape.batch, shape.out_channels});
  DDRF_DISPATCH_FLOATING(
      a.x.scalar_type(), "dynamic_conv", ([&] {
        DynamicConvOperands<scalar_t> operands = operands_of<scalar_t>(a);
        scalar_t* mean_data = with_mean ? mean.mutable_data_ptr<scalar_t>() : nullptr;
        const OneKernel one = choose_one_kernel(shape, operands, Direction::kForward, a.x);
        if (one == OneKernel::kNone) {
          y = empty_tensor(a.x,
                           {shape.batch, shape.out_channels, shape.out_size[0], shape.out_size[1]},
                           is_channels_last(a.x));
          call_forward(shape, operands, act, mutable_image<scalar_t>(y), mean_data);
          return;
        }
        const NoGrad no_grad;
        if (one == OneKernel::kOfBank) {
          y = convolution(a, a.x, a.weight, std::nullopt, false);
        } else {
          std::optional<Tensor> bias;
          if (a.bias) bias = empty_tensor(a.x, {shape.out_channels});
          const Tensor kernel = mixed_kernel<scalar_t>(
              a, shape, operands, a.bias ? bias->mutable_data_ptr<scalar_t>() : nullptr);
          y = convolution(a, a.x, kernel, bias, false);
          operands.bias = nullptr;  // it is in y
          if (act == Activation::kNone && !with_mean) return;
        }
        call_finish_one_kernel(shape, operands, act, y.mutable_data_ptr<scalar_t>(), mean_data);
      }));
  return {y, mean};
}

Tensor dynamic_conv_cpu(Tensor x, Tensor weight, std::optional<Tensor> attention,
                        std::optional<Tensor> bias, std::optional<Tensor> code,
                        std::optional<Tensor> in_scale, std::optional<Tensor> out_scale,
                        std::optional<Tensor> tap_scale, std::vector<int64_t> stride,
                        std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups,
                        StringHandle activation) {
  Arguments a{x,         weight,    attention, bias,    code,     in_scale,
              out_scale, tap_scale, stride,    padding, dilation, groups};
  return run_forward(a, take_string(activation), false).first;
}

std::tuple<Tensor, Tensor> dynamic_conv_mean_cpu(
    Tensor x, Tensor weight, std::optional<Tensor> attention, std::optional<Tensor> bias,
    std::optional<Tensor> code, std::optional<Tensor> in_scale, std::optional<Tensor> out_scale,
    std::optional<Tensor> tap_scale, std::vector<int64_t> stride, std::vector<int64_t> padding,
    std::vector<int64_t> dilation, int64_t groups, StringHandle activation) {
  Arguments a{x,         weight,    attention, bias,    code,     in_scale,
              out_scale, tap_scale, stride,    padding, dilation, groups};
  return run_forward(a, take_string(activation), true);
}

// For inference with memory of its own: into y, in which a row's pixels lie side by side and which
// may be part of a larger tensor, or added to it. Returns the convolution's mean over the pixels.
Tensor dynamic_conv_into_cpu(Tensor y, bool accumulate, Tensor x, Tensor weight, Tensor attention,
                             std::optional<Tensor> bias, std::optional<Tensor> code,
                             std::vector<int64_t> stride, std::vector<int64_t> padding,
                             StringHandle activation) {
  Arguments a{x, weight, attention, bias, code, {}, {}, {}, stride, padding, {1, 1}, 1};
  const DynamicConvShape shape = checked_shape(a);
  const std::vector<int64_t> expected{shape.batch, shape.out_channels, shape.out_size[0],
                                      shape.out_size[1]};
  check_tensor("y", y, expected, a.x);
  STD_TORCH_CHECK(y.stride(3) == 1, "y: expected a row's pixels side by side, got strides ",
                  shape_text(y.strides()));
  const Activation act = activation_of(take_string(activation));
  make_ready(a);
  Tensor mean = empty_tensor(a.x, {shape.batch, shape.out_channels});
  DDRF_DISPATCH_FLOATING(a.x.scalar_type(), "dynamic_conv_into", ([&] {
                           call_forward(shape, operands_of<scalar_t>(a), act,
                                        mutable_image<scalar_t>(y),
                                        mean.mutable_data_ptr<scalar_t>(), accumulate);
                         }));
  return mean;
}

std::string dynamic_conv_plan_cpu(Tensor x, Tensor weight, std::optional<Tensor> attention,
                                  std::optional<Tensor> bias, std::optional<Tensor> code,
                                  std::optional<Tensor> in_scale, std::optional<Tensor> out_scale,
                                  std::optional<Tensor> tap_scale, std::vector<int64_t> stride,
                                  std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                  int64_t groups, StringHandle activation) {
  Arguments a{x,         weight,    attention, bias,    code,     in_scale,
              out_scale, tap_scale, stride,    padding, dilation, groups};
  const DynamicConvShape shape = checked_shape(a);
  activation_of(take_string(activation));
  make_ready(a);
  std::string result;
  DDRF_DISPATCH_FLOATING(a.x.scalar_type(), "dynamic_conv_plan", ([&] {
                           const DynamicConvOperands<scalar_t> operands = operands_of<scalar_t>(a);
                           switch (choose_one_kernel(shape, operands, Direction::kForward, a.x)) {
                             case OneKernel::kOfBank:
                               result = "torch's convolution with the bank's only kernel";
                               break;
                             case OneKernel::kMixed:
                               result = "torch's convolution with the only sample's mixed kernel";
                               break;
                             case OneKernel::kNone:
                               result = call_plan(shape, operands);
                           }
                         }));
  const bool bfloat16 = a.x.scalar_type() == ScalarType::BFloat16;
  switch (cpu_capability()) {
    case Capability::kAmxBf16:
      if (bfloat16) return "AMX BF16: " + result;
      [[fallthrough]];
    case Capability::kAvx512Bf16:
      if (bfloat16) return "AVX-512 BF16: " + result;
      [[fallthrough]];
    case Capability::kAvx512:
      return "AVX-512: " + result;
    case Capability::kAvx2:
      return "AVX2: " + result;
    default:
      return "portable code: " + result;
  }
}

using EightTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

EightTensors dynamic_conv_backward_cpu(Tensor grad, Tensor x, Tensor weight,
                                       std::optional<Tensor> attention, std::optional<Tensor> bias,
                                       std::optional<Tensor> code, std::optional<Tensor> in_scale,
                                       std::optional<Tensor> out_scale,
                                       std::optional<Tensor> tap_scale, std::vector<int64_t> stride,
                                       std::vector<int64_t> padding, std::vector<int64_t> dilation,
                                       int64_t groups, int64_t output_mask) {
  Arguments a{x,         weight,    attention, bias,    code,     in_scale,
              out_scale, tap_scale, stride,    padding, dilation, groups};
  const DynamicConvShape shape = checked_shape(a);
  check_tensor("grad", grad,
               {shape.batch, shape.out_channels, shape.out_size[0], shape.out_size[1]}, x);
  make_ready(a);

  const std::array<std::optional<Tensor>, 8> inputs{x,      a.weight,   a.attention, a.bias,
                                                    a.code, a.in_scale, a.out_scale, a.tap_scale};
  std::array<Tensor, 8> grads;
  const auto asked = [&](int i) { return (output_mask >> i & 1) != 0; };
  const auto empty_gradient = [&](int i) {
    if (!asked(i)) return empty_tensor(x, {0});
    STD_TORCH_CHECK(inputs[i].has_value(), "output_mask: bit ", i,
                    " asks for the gradient of an argument that is None");
    const auto sizes = inputs[i]->sizes();
    return empty_tensor(*inputs[i], {sizes.begin(), sizes.end()}, i == 0 && is_channels_last(x));
  };
  for (int i = 1; i < 8; ++i) grads[i] = empty_gradient(i);
  DDRF_DISPATCH_FLOATING(
      x.scalar_type(), "dynamic_conv_backward", ([&] {
        using Acc = accumulate_t<scalar_t>;
        const DynamicConvOperands<scalar_t> operands = operands_of<scalar_t>(a);
        const auto data = [&](int i) {
          return asked(i) ? grads[i].mutable_data_ptr<scalar_t>() : nullptr;
        };
        const auto scale_data = [&](int i) {
          return asked(i) ? grads[i].mutable_data_ptr<Acc>() : nullptr;
        };
        DynamicConvGradients<scalar_t> gradients{};
        const OneKernel one =
            asked(0) ? choose_one_kernel(shape, operands, Direction::kInputGradient, grad)
                     : OneKernel::kNone;
        if (one != OneKernel::kNone) {
          grads[0] = input_gradient_of_one(one, a, shape, operands, grad);
        } else {
          grads[0] = empty_gradient(0);
          if (asked(0)) gradients.x = mutable_image<scalar_t>(grads[0]);
        }
        gradients.weight = data(1);
        gradients.attention = data(2);
        gradients.bias = data(3);
        gradients.code = data(4);
        gradients.in_scale = scale_data(5);
        gradients.out_scale = scale_data(6);
        gradients.tap_scale = scale_data(7);
        call_backward<scalar_t>(shape, operands, const_image<scalar_t>(grad), gradients);
      }));
  const std::array<std::optional<Tensor>, 3> scales{in_scale, out_scale, tap_scale};
  for (int i = 0; i < 3; ++i) {
    if (scales[i]) grads[5 + i] = as_type(grads[5 + i], scales[i]->scalar_type());
  }
  return {grads[0], grads[1], grads[2], grads[3], grads[4], grads[5], grads[6], grads[7]};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast, CPU, m) {
  m.impl("dynamic_conv", TORCH_BOX(&dynamic_conv_cpu));
  m.impl("dynamic_conv_mean", TORCH_BOX(&dynamic_conv_mean_cpu));
  m.impl("dynamic_conv_backward", TORCH_BOX(&dynamic_conv_backward_cpu));
}

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast_native, CPU, m) {
  m.impl("dynamic_conv_plan", TORCH_BOX(&dynamic_conv_plan_cpu));
  m.impl("dynamic_conv_into", TORCH_BOX(&dynamic_conv_into_cpu));
}

}  // namespace ddrf_fast

// dynamic_conv and its gradient: chooses the plans; included once for each instruction set.
// csrc/README.md has a table of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_bank_grad.h"
#include "cpu/dynamic_conv_correlate.h"
#include "cpu/dynamic_conv_depthwise.h"
#include "cpu/dynamic_conv_depthwise_small.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_one_kernel.h"
#include "cpu/dynamic_conv_pixel_rows.h"
#include "cpu/dynamic_conv_weight_grad.h"
#include "cpu/dynamic_conv_winograd.h"
#include "cpu/dynamic_conv_winograd_grad.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// A 1x1 convolution has no rows: where they follow one another in both images, they become one.
template <class A, class B>
DynamicConvShape flattened(const DynamicConvShape& given, const Image<A>& x, const Image<B>& y) {
  DynamicConvShape shape = given;
  const auto follow = [&](const auto& image) {
    return image.stride[2] == shape.in_size[1] * image.stride[3];
  };
  for (int axis = 0; axis < 2; ++axis) {
    if (shape.kernel[axis] != 1 || shape.stride[axis] != 1 || shape.padding[axis] != 0)
      return shape;
  }
  if (!follow(x) || !follow(y)) return shape;
  for (int64_t* size : {shape.in_size, shape.out_size}) {
    size[1] *= size[0];
    size[0] = 1;
  }
  return shape;
}

// Calls body(plan) with the best plan for a direction and, of the strides' residues, one.
template <class Scalar, class Result, class Body>
void with_plan(Direction direction, const TapAxis& y, const TapAxis& x,
               const DynamicConvShape& shape, bool has_ones, const Image<const Scalar>& image,
               const Image<Result>& result, const Body& body) {
  if (PixelRows<Scalar>::fits(shape, image, result)) {
    body(PixelRows<Scalar>(direction, shape));
  } else if (SmallPlanes<Scalar>::fits(y, x, shape, image, result)) {
    body(SmallPlanes<Scalar>(direction, y, x, shape));
  } else if (Depthwise<Scalar>::fits(shape)) {
    body(Depthwise<Scalar>(direction, y, x, shape));
  } else if (fits_winograd<Scalar>(shape)) {
    with_winograd<Scalar>(direction, y, x, shape, has_ones, body);
  } else {
    body(Correlation<Scalar>(direction, y, x, shape, has_ones));
  }
}

// Whether a code is a channel of ones; where no tap leaves the image it is like a bias.
inline bool has_ones(const DynamicConvShape& shape, const TapAxis& y, const TapAxis& x) {
  return shape.code_channels > 0 && (y.reaches_outside() || x.reaches_outside());
}

template <class Scalar>
void dynamic_conv(const DynamicConvShape& given, const DynamicConvOperands<Scalar>& operands,
                  Activation activation, const Image<Scalar>& y, Scalar* mean, bool accumulate) {
  using Acc = accumulate_t<Scalar>;
  const int64_t planes = given.batch * given.out_channels;
  const int64_t pixels = given.out_size[0] * given.out_size[1];
  if (planes * pixels == 0) return;
  const DynamicConvShape shape = flattened(given, operands.x, y);
  const TapAxis axis_y = forward_axis(shape, 0), axis_x = forward_axis(shape, 1);
  const bool ones = has_ones(shape, axis_y, axis_x);
  Mixer<Scalar> mixer(shape, operands);
  mixer.fold(ones);
  const auto run = [&](const auto& plan, auto... options) {
    const Scratch<Acc> sums(mean != nullptr ? planes * plan.parts() : 0);
    plan.run(mixer, operands.x, activation, y, mean != nullptr ? sums.get() : nullptr, options...);
    for (int64_t i = 0; mean != nullptr && i < planes; ++i) {
      mean[i] = static_cast<Scalar>(sum_row(&sums[i * plan.parts()], plan.parts()) /
                                    static_cast<Acc>(pixels));
    }
  };
  if (!accumulate) {
    with_plan<Scalar>(Direction::kForward, axis_y, axis_x, shape, ones, operands.x, y, run);
  } else if (fits_winograd<Scalar>(shape)) {
    with_winograd<Scalar>(Direction::kForward, axis_y, axis_x, shape, ones,
                          [&](const auto& plan) { run(plan, true); });
  } else {
    run(Correlation<Scalar>(Direction::kForward, axis_y, axis_x, shape, ones), true);
  }
}

template <class Scalar>
std::string dynamic_conv_plan(const DynamicConvShape& given,
                              const DynamicConvOperands<Scalar>& operands) {
  const DynamicConvShape shape = flattened(given, operands.x, operands.x);
  const TapAxis y = forward_axis(shape, 0), x = forward_axis(shape, 1);
  Image<const Scalar> output = operands.x;  // in the layout of x
  if (output.stride[2] == shape.in_size[1]) output.stride[2] = shape.out_size[1];
  std::string result;
  with_plan<Scalar>(Direction::kForward, y, x, shape, has_ones(shape, y, x), operands.x, output,
                    [&](const auto& plan) { result = plan.name(); });
  if (shape.code_channels > 0) result += "; the code as a bias, corrected along the border";
  return result;
}

// The input gradient: for each residue of the strides, a sum over those taps that reach it, with
// the roles of the channels exchanged. Depthwise ones with a stride of two take it whole.
template <class Scalar>
void input_gradient(const Mixer<Scalar>& mixer, const Image<const Scalar>& grad,
                    const Image<Scalar>& grad_x) {
  using Acc = accumulate_t<Scalar>;
  const DynamicConvShape& shape = mixer.shape();
  if (shape.batch * shape.in_channels * shape.in_size[0] * shape.in_size[1] == 0) return;
  if (Depthwise<Scalar>::spreads(shape, grad, grad_x)) {
    return Depthwise<Scalar>(Direction::kInputGradient, spread_input_grad_axis(shape, 0),
                             spread_input_grad_axis(shape, 1), shape, true)
        .run(mixer, grad, Activation::kNone, grad_x, nullptr);
  }
  const bool strided = shape.stride[0] * shape.stride[1] > 1 && !Depthwise<Scalar>::fits(shape);
  std::vector<Correlation<Scalar>> residues;
  for (int64_t y = 0; y < std::min(shape.stride[0], shape.in_size[0]); ++y) {
    for (int64_t x = 0; x < std::min(shape.stride[1], shape.in_size[1]); ++x) {
      const TapAxis axis_y = input_grad_axis(shape, 0, y), axis_x = input_grad_axis(shape, 1, x);
      if (strided) {
        residues.emplace_back(Direction::kInputGradient, axis_y, axis_x, shape, false);
        continue;
      }
      with_plan<Scalar>(Direction::kInputGradient, axis_y, axis_x, shape, false, grad, grad_x,
                        [&](const auto& plan) {
                          plan.run(mixer, grad, Activation::kNone, grad_x,
                                   static_cast<Acc*>(nullptr));
                        });
    }
  }
  if (strided) Correlation<Scalar>::run_together(std::move(residues), mixer, grad, grad_x);
}

// The gradient of each sample's bias: result[b][o] = sum over pixels. Float32 sums of thousands of
// numbers lose digits, so that they are sums of parts.
template <class Scalar>
void bias_gradient(const DynamicConvShape& shape, const Image<const Scalar>& grad, int64_t count,
                   accumulate_t<Scalar>* result) {
  using Acc = accumulate_t<Scalar>;
  int64_t height = shape.out_size[0], width = shape.out_size[1];
  if (grad.stride[2] == width * grad.stride[3]) {  // the rows are one
    width *= height;
    height = 1;
  }
  const int64_t channels = shape.out_channels;
  if (grad.stride[1] != 1) {
    constexpr int64_t kPixels = 8192;  // which are summed lane by lane
    const int64_t grain = std::max<int64_t>(1, kMixGrain / (height * width));
    parallel_for(count * channels, grain, [&](int64_t begin, int64_t end) {
      const Scratch<Acc> line(grad.stride[3] == 1 ? 0 : std::min(width, kPixels));
      for (int64_t plane = begin; plane < end; ++plane) {
        const Scalar* source =
            grad.data + plane / channels * grad.stride[0] + plane % channels * grad.stride[1];
        double sum = 0;
        for (int64_t y = 0; y < height; ++y) {
          for (int64_t x = 0; x < width; x += kPixels) {
            const Scalar* first = source + y * grad.stride[2] + x * grad.stride[3];
            const int64_t pixels = std::min(kPixels, width - x);
            if (grad.stride[3] == 1) {
              sum += sum_row(first, pixels);
              continue;
            }
            for (int64_t i = 0; i < pixels; ++i) {
              line[i] = load_as_accumulate(first + i * grad.stride[3]);
            }
            sum += sum_row(line.get(), pixels);
          }
        }
        result[plane] = static_cast<Acc>(sum);
      }
    });
    return;
  }
  constexpr int64_t kPixels = 512;
  const int64_t columns = std::min(width, kPixels), rows = std::max<int64_t>(1, kPixels / width);
  const int64_t across = ceil_div(width, columns), chunks = ceil_div(height, rows) * across;
  const int64_t grain = std::max<int64_t>(1, kMixGrain / (rows * columns * channels));
  const Scratch<Acc> partials(count * chunks * channels);
  parallel_for(count * chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      Acc* sums = &partials[task * channels];
      std::fill_n(sums, channels, Acc(0));
      const int64_t chunk = task % chunks, y0 = chunk / across * rows,
                    x0 = chunk % across * columns;
      for (int64_t y = y0; y < std::min(y0 + rows, height); ++y) {
        const Scalar* row = grad.data + task / chunks * grad.stride[0] + y * grad.stride[2];
        for (int64_t x = x0; x < std::min(x0 + columns, width); ++x) {
          add_scaled_row(sums, Acc(1), row + x * grad.stride[3], channels);
        }
      }
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t o = 0; o < channels; ++o) {
      double sum = 0;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += partials[(i * chunks + chunk) * channels + o];
      }
      result[i * channels + o] = static_cast<Acc>(sum);
    }
  }
}

// The gradients of the bank, the attention and the biases of plain mixtures, where there is a way
// for the shape.
template <class Scalar>
bool plain_gradients(const Mixer<Scalar>& mixer, const Image<const Scalar>& grad,
                     const DynamicConvGradients<Scalar>& gradients) {
  using Acc = accumulate_t<Scalar>;
  const DynamicConvShape& shape = mixer.shape();
  const DynamicConvOperands<Scalar>& operands = mixer.operands();
  if (!is_plain_mixture(shape, operands)) return false;
  const bool needs_attention = gradients.attention != nullptr;
  const Scratch<Acc> attention(shape.batch * shape.bank);
  Acc* asked = needs_attention ? attention.get() : nullptr;
  if (Depthwise<Scalar>::fits(shape)) {
    if constexpr (!kMaskedLoads<Scalar>) {
      return false;
    } else {
      const Depthwise<Scalar> depthwise(Direction::kForward, forward_axis(shape, 0),
                                        forward_axis(shape, 1), shape);
      if (!depthwise.has_kernel_gradient(operands.x, grad)) return false;
      if (gradients.weight != nullptr || needs_attention) {
        const Scratch<Acc> kernels(shape.batch * shape.out_channels * shape.taps());
        depthwise.kernel_gradient(shape.batch, operands.x, grad, kernels.get());
        contract_kernels(mixer, kernels.get(), gradients.weight, asked);
      }
    }
  } else if (!SmallMapGradient<Scalar>::fits(shape)) {
    return false;
  } else if (gradients.weight != nullptr || needs_attention) {
    SmallMapGradient<Scalar>(mixer).run(operands.x, grad, gradients.weight, asked);
  }
  if (operands.bias != nullptr && (gradients.bias != nullptr || needs_attention)) {
    const int64_t outputs = shape.out_channels;
    const Scratch<Acc> beta(shape.batch * outputs), sum(shape.bank * outputs);
    bias_gradient(shape, grad, shape.batch, beta.get());
    std::fill_n(sum.get(), shape.bank * outputs, Acc(0));
    for (int64_t b = 0; b < shape.batch; ++b) {
      const Acc* own = &beta[b * outputs];
      for (int64_t n = 0; n < shape.bank; ++n) {
        if (needs_attention) {
          attention[b * shape.bank + n] +=
              dot_rows(own, operands.bias + mixer.bank_index(b, n, 0), outputs);
        }
        if (shape.has_attention) {
          add_scaled_row(&sum[n * outputs], mixer.attention(b, 0)[n], own, outputs);
        }
      }
    }
    if (gradients.bias != nullptr) {
      store_row(gradients.bias, shape.has_attention ? sum.get() : beta.get(),
                (shape.has_attention ? shape.bank : shape.batch) * outputs);
    }
  }
  if (needs_attention) store_row(gradients.attention, attention.get(), shape.batch * shape.bank);
  return true;
}

template <class Scalar>
void dynamic_conv_backward(const DynamicConvShape& given,
                           const DynamicConvOperands<Scalar>& operands,
                           const Image<const Scalar>& grad,
                           const DynamicConvGradients<Scalar>& gradients) {
  using Acc = accumulate_t<Scalar>;
  const DynamicConvShape shape = flattened(given, operands.x, grad);
  const Mixer<Scalar> mixer(shape, operands);
  if (gradients.x.data != nullptr) input_gradient(mixer, grad, gradients.x);

  const bool needs_kernel = gradients.weight != nullptr || gradients.attention != nullptr ||
                            gradients.code != nullptr || gradients.in_scale != nullptr ||
                            gradients.out_scale != nullptr || gradients.tap_scale != nullptr;
  const bool needs_bias =
      gradients.bias != nullptr || (gradients.attention != nullptr && operands.bias != nullptr);
  if (!needs_kernel && !needs_bias) return;
  if (plain_gradients(mixer, grad, gradients)) return;
  const auto add_all = [&](const auto& kernel_gradient) {
    BankGradient<Scalar> bank_gradient(mixer, gradients);
    const int64_t kernel_size = needs_kernel ? kernel_gradient.size() : 0;
    const int64_t sample_size = kernel_size + bank_gradient.partial_size() +
                                (needs_kernel ? kernel_gradient.scratch_size() : 0);
    const int64_t step = samples_together(sample_size * int64_t{sizeof(Acc)}, shape.batch);
    const Scratch<Acc> grad_kernel(step * kernel_size);
    const Scratch<Acc> grad_bias(step * shape.out_channels);
    for (int64_t first = 0; first < shape.batch; first += step) {
      const int64_t count = std::min(step, shape.batch - first);
      const Image<const Scalar> grad_samples = from_sample(grad, first);
      if (needs_kernel) {
        kernel_gradient.run(count, from_sample(operands.x, first), grad_samples, grad_kernel.get());
      }
      if (needs_bias) bias_gradient(shape, grad_samples, count, grad_bias.get());
      bank_gradient.add(first, count, needs_kernel ? grad_kernel.get() : nullptr,
                        needs_bias ? grad_bias.get() : nullptr);
    }
    bank_gradient.finish();
  };
  const bool has_ones = shape.code_channels > 0;
  if (WinogradGradient<Scalar>::fits(shape)) {
    add_all(WinogradGradient<Scalar>(shape, has_ones));
  } else {
    add_all(WeightGradient<Scalar>(forward_axis(shape, 0), forward_axis(shape, 1), shape.batch,
                                   shape.groups, shape.in_per_group(), has_ones,
                                   shape.out_per_group()));
  }
}

#define DDRF_INSTANTIATE(SCALAR)                                                                   \
  template void dynamic_conv(const DynamicConvShape&, const DynamicConvOperands<SCALAR>&,          \
                             Activation, const Image<SCALAR>&, SCALAR*, bool);                     \
  template OneKernel one_kernel(const DynamicConvShape&, const DynamicConvOperands<SCALAR>&,       \
                                Direction);                                                        \
  template void mix_one_kernel(const DynamicConvShape&, const DynamicConvOperands<SCALAR>&,        \
                               SCALAR*, SCALAR*);                                                  \
  template void finish_one_kernel(const DynamicConvShape&, const DynamicConvOperands<SCALAR>&,     \
                                  Activation, SCALAR*, SCALAR*);                                   \
  template std::string dynamic_conv_plan(const DynamicConvShape&,                                  \
                                         const DynamicConvOperands<SCALAR>&);                      \
  template void dynamic_conv_backward(const DynamicConvShape&, const DynamicConvOperands<SCALAR>&, \
                                      const Image<const SCALAR>&,                                  \
                                      const DynamicConvGradients<SCALAR>&);
DDRF_INSTANTIATE(c10::BFloat16)
#ifndef DDRF_AVX512_BF16
DDRF_INSTANTIATE(float)
DDRF_INSTANTIATE(double)
DDRF_INSTANTIATE(c10::Half)
#endif
#undef DDRF_INSTANTIATE

}  // namespace ddrf_fast::DDRF_CAPABILITY

// dynamic_conv and its gradient, from their parts; included once for each instruction set.
//
// Samples are taken in batches whose mixed kernels fit kKernelBytes, so that large kernels of large
// batches are never all there at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_correlate.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_weight_grad.h"

namespace ddrf_fast::DDRF_CAPABILITY {

inline constexpr int64_t kKernelBytes = 32 << 20;
inline constexpr int64_t kMixGrain = 1 << 15;  // multiplications worth a thread

inline int64_t samples_at_once(const DynamicConvShape& shape, int64_t sample_bytes) {
  return std::max<int64_t>(1, std::min(kKernelBytes / (sample_bytes + 1), shape.batch));
}

template <class Scalar>
Image<Scalar> from_sample(const Image<Scalar>& image, int64_t b) {
  Image<Scalar> result = image;
  result.data += b * image.stride[0];
  return result;
}

// Calls body(i, o, row) for the scaled kernels of samples [first, first + count).
template <class Scalar, class Body>
void for_each_row(const Mixer<Scalar>& mixer, int64_t first, int64_t count, const Body& body) {
  using Acc = accumulate_t<Scalar>;
  const DynamicConvShape& shape = mixer.shape();
  const int64_t grain = kMixGrain / (shape.row_size() * (shape.bank + 2) + 1);
  parallel_for(count * shape.out_channels, std::max<int64_t>(1, grain),
               [&](int64_t begin, int64_t end) {
                 const Scratch<Acc> row(shape.row_size());
                 for (int64_t index = begin; index < end; ++index) {
                   const int64_t i = index / shape.out_channels, o = index % shape.out_channels;
                   mixer.mix(first + i, o, row.get());
                   mixer.apply_scales(first + i, o, row.get());
                   body(i, o, row.get());
                 }
               });
}

template <class Scalar>
void dynamic_conv(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                  Activation activation, const Image<Scalar>& y) {
  using Acc = accumulate_t<Scalar>;
  if (shape.batch * shape.out_channels * shape.out_size[0] * shape.out_size[1] == 0) return;
  const Mixer<Scalar> mixer(shape, operands);
  const TapAxis axis_y = forward_axis(shape, 0), axis_x = forward_axis(shape, 1);
  // Where no tap leaves the image the code adds the same everywhere, like a bias.
  const bool has_ones =
      shape.code_channels > 0 && (axis_y.reaches_outside() || axis_x.reaches_outside());
  const int64_t in_channels = shape.in_per_group(), outputs = shape.out_per_group();
  const int64_t taps = shape.taps();
  const Correlation<Scalar> correlation(axis_y, axis_x, shape.batch, shape.groups, in_channels,
                                        has_ones, outputs);

  const int64_t kernel_size = shape.groups * correlation.packed_size();
  const int64_t step = samples_at_once(shape, kernel_size * int64_t{sizeof(Acc)});
  const Scratch<Acc> packed(step * kernel_size);
  const Scratch<Acc> beta(step * shape.out_channels);
  for (int64_t first = 0; first < shape.batch; first += step) {
    const int64_t count = std::min(step, shape.batch - first);
    for_each_row(mixer, first, count, [&](int64_t i, int64_t o, Acc* row) {
      Acc& bias = beta[i * shape.out_channels + o];
      bias = mixer.mix_bias(first + i, o);
      int64_t channels = in_channels;
      if (shape.code_channels > 0) {
        // The folded code takes the place of the first code channel.
        Acc* ones_row = row + in_channels * taps;
        std::vector<Acc> folded(taps, Acc(0));
        mixer.fold_code(first + i, row, folded.data());
        std::copy(folded.begin(), folded.end(), ones_row);
        if (has_ones) {
          ++channels;
        } else {
          bias += sum_row(ones_row, taps);
        }
      }
      Acc* target = &packed[i * kernel_size + o / outputs * correlation.packed_size()];
      const auto pack = [&](int64_t output) {
        const auto position = correlation.position(output);
        for (int64_t k = 0; k < channels * taps; ++k) {
          target[position.start + k * position.step] = row[k];
        }
      };
      pack(o % outputs);
      if (o % outputs != outputs - 1) return;
      // The last channel also fills its block; what comes out there is dropped.
      for (int64_t pad = outputs; pad < correlation.padded_outputs(); ++pad) pack(pad);
    });
    correlation.run(count, from_sample(operands.x, first), packed.get(), beta.get(), activation,
                    from_sample(y, first));
  }
}

// The input gradient: for each residue of the strides, a sum over those taps that reach it, with
// the roles of the channels exchanged.
template <class Scalar>
void input_gradient(const Mixer<Scalar>& mixer, const Image<const Scalar>& grad,
                    const Image<Scalar>& grad_x) {
  using Acc = accumulate_t<Scalar>;
  const DynamicConvShape& shape = mixer.shape();
  if (shape.batch * shape.in_channels * shape.in_size[0] * shape.in_size[1] == 0) return;
  const int64_t in_channels = shape.out_per_group(), outputs = shape.in_per_group();
  std::vector<Correlation<Scalar>> phases;
  std::vector<int64_t> start;  // of each phase's kernels in those of a sample
  int64_t kernel_size = 0;
  for (int64_t y = 0; y < std::min(shape.stride[0], shape.in_size[0]); ++y) {
    for (int64_t x = 0; x < std::min(shape.stride[1], shape.in_size[1]); ++x) {
      phases.emplace_back(input_grad_axis(shape, 0, y), input_grad_axis(shape, 1, x), shape.batch,
                          shape.groups, in_channels, false, outputs);
      start.push_back(kernel_size);
      kernel_size += shape.groups * phases.back().packed_size();
    }
  }

  const int64_t step = samples_at_once(shape, kernel_size * int64_t{sizeof(Acc)});
  const Scratch<Acc> packed(step * kernel_size);
  for (int64_t first = 0; first < shape.batch; first += step) {
    const int64_t count = std::min(step, shape.batch - first);
    for_each_row(mixer, first, count, [&](int64_t i, int64_t o, const Acc* row) {
      for (size_t phase = 0; phase < phases.size(); ++phase) {
        const Correlation<Scalar>& correlation = phases[phase];
        Acc* target = &packed[start[phase] * step +
                              (i * shape.groups + o / in_channels) * correlation.packed_size()];
        // The last channel also fills its block; what comes out there is dropped.
        for (int64_t c = 0; c < correlation.padded_outputs(); ++c) {
          const auto position = correlation.position(c);
          Acc* weights =
              target + position.start + o % in_channels * correlation.taps() * position.step;
          const Acc* source = row + std::min(c, outputs - 1) * shape.taps();
          for (int64_t u : correlation.y().taps) {
            for (int64_t v : correlation.x().taps) {
              *weights = source[u * shape.kernel[1] + v];
              weights += position.step;
            }
          }
        }
      }
    });
    for (size_t phase = 0; phase < phases.size(); ++phase) {
      phases[phase].run(count, from_sample(grad, first), &packed[start[phase] * step], nullptr,
                        Activation::kNone, from_sample(grad_x, first));
    }
  }
}

// The gradient of each sample's bias: result[b][o] = sum over pixels.
template <class Scalar>
void bias_gradient(const DynamicConvShape& shape, const Image<const Scalar>& grad, int64_t count,
                   accumulate_t<Scalar>* result) {
  using Acc = accumulate_t<Scalar>;
  constexpr int64_t kRows = 16;
  const int64_t height = shape.out_size[0], width = shape.out_size[1];
  const int64_t channels = shape.out_channels, chunks = ceil_div(height, kRows);
  const int64_t grain = kMixGrain / (kRows * width * channels + 1);
  const Scratch<Acc> partials(count * chunks * channels);
  parallel_for(count * chunks, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
    const Scratch<Acc> line(width);
    for (int64_t task = begin; task < end; ++task) {
      Acc* sums = &partials[task * channels];
      std::fill_n(sums, channels, Acc(0));
      const int64_t first_row = task % chunks * kRows;
      for (int64_t y = first_row; y < std::min(first_row + kRows, height); ++y) {
        const Scalar* row = grad.data + task / chunks * grad.stride[0] + y * grad.stride[2];
        if (grad.stride[1] == 1) {
          for (int64_t x = 0; x < width; ++x) {
            add_scaled_row(sums, Acc(1), row + x * grad.stride[3], channels);
          }
          continue;
        }
        for (int64_t o = 0; o < channels; ++o) {
          const Scalar* source = row + o * grad.stride[1];
          if (grad.stride[3] == 1) {
            sums[o] += sum_row(source, width);
            continue;
          }
          for (int64_t x = 0; x < width; ++x) {
            line[x] = load_as_accumulate(source + x * grad.stride[3]);
          }
          sums[o] += sum_row(line.get(), width);
        }
      }
    }
  });
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t o = 0; o < channels; ++o) {
      Acc sum(0);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        sum += partials[(i * chunks + chunk) * channels + o];
      }
      result[i * channels + o] = sum;
    }
  }
}

template <class Scalar>
void dynamic_conv_backward(const DynamicConvShape& shape,
                           const DynamicConvOperands<Scalar>& operands,
                           const Image<const Scalar>& grad,
                           const DynamicConvGradients<Scalar>& gradients) {
  using Acc = accumulate_t<Scalar>;
  const Mixer<Scalar> mixer(shape, operands);
  if (gradients.x.data != nullptr) input_gradient(mixer, grad, gradients.x);

  const bool needs_kernel = gradients.weight != nullptr || gradients.attention != nullptr ||
                            gradients.code != nullptr || gradients.in_scale != nullptr ||
                            gradients.out_scale != nullptr || gradients.tap_scale != nullptr;
  const bool needs_bias =
      gradients.bias != nullptr || (gradients.attention != nullptr && operands.bias != nullptr);
  if (!needs_kernel && !needs_bias) return;
  const WeightGradient<Scalar> kernel_gradient(forward_axis(shape, 0), forward_axis(shape, 1),
                                               shape.batch, shape.groups, shape.in_per_group(),
                                               shape.code_channels > 0, shape.out_per_group());
  BankGradient<Scalar> bank_gradient(mixer, gradients);
  const int64_t kernel_size = needs_kernel ? kernel_gradient.size() : 0;
  const int64_t sample_size = kernel_size + bank_gradient.partial_size();
  const int64_t step = samples_at_once(shape, sample_size * int64_t{sizeof(Acc)});
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
}

#define DDRF_INSTANTIATE(SCALAR)                                                                   \
  template void dynamic_conv(const DynamicConvShape&, const DynamicConvOperands<SCALAR>&,          \
                             Activation, const Image<SCALAR>&);                                    \
  template void dynamic_conv_backward(const DynamicConvShape&, const DynamicConvOperands<SCALAR>&, \
                                      const Image<const SCALAR>&,                                  \
                                      const DynamicConvGradients<SCALAR>&);
DDRF_INSTANTIATE(float)
DDRF_INSTANTIATE(double)
DDRF_INSTANTIATE(c10::BFloat16)
DDRF_INSTANTIATE(c10::Half)
#undef DDRF_INSTANTIATE

}  // namespace ddrf_fast::DDRF_CAPABILITY

// What is left to do where torch's own convolution (oneDNN) is the fastest there is: large dense
// kernels that are one for the whole batch, as its only sample's or a bank's only one.
//
//   y_b = act(scale_b * conv2d(x, K)_b + beta_b)
//
// dynamic_conv.cpp calls the convolution; here are the choice, K, and the rest in one pass.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/parallel.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_scratch.h"
#include "cpu/dynamic_conv_winograd.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Which kernel torch's convolution is to be called with, if it is to be called.
template <class Scalar>
OneKernel one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands) {
  constexpr bool kFloat = std::is_same_v<Scalar, float>;
  const bool shared = shares_kernel(shape, operands);
  if (!(shared && (kFloat || (kPairs<Scalar> && !kPairTiles))) && !(kFloat && shape.batch == 1)) {
    return OneKernel::kNone;
  }
  // Few channels fill no blocks, few pixels do not pay for the call, or for a kernel mixed outside
  // of the cache. Large maps of planes cost it a copy. Winograd needs fewer multiplications, which
  // counts in float32.
  constexpr int64_t kMostPlane = 1024;
  const int64_t least_channels = shared ? 32 : 64, least_pixels = shared ? 128 : 256;
  const int64_t pixels = shape.out_size[0] * shape.out_size[1];
  const bool wins = shape.groups == 1 && shape.code_channels == 0 && shape.taps() > 1 &&
                    std::min(shape.in_channels, shape.out_channels) >= least_channels &&
                    shape.batch * pixels >= least_pixels &&
                    (pixels <= kMostPlane || operands.x.stride[1] == 1) &&
                    !(kFloat && fits_winograd<Scalar>(shape));
  if (!wins) return OneKernel::kNone;
  return shared ? OneKernel::kOfBank : OneKernel::kMixed;
}

// The mixed kernel of the only sample and, where there is one, its bias.
template <class Scalar>
void mix_one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                    Scalar* kernel, Scalar* bias) {
  if constexpr (std::is_same_v<Scalar, accumulate_t<Scalar>>) {
    const Mixer<Scalar> mixer(shape, operands);
    mixer.mix_whole(0, 1, false, kernel);
    for (int64_t o = 0; bias != nullptr && o < shape.out_channels; ++o) {
      bias[o] = mixer.mix_bias(0, o);
    }
  }
}

// Turns torch's convolution in y, which is contiguous or channels_last, into the result; `mean`
// as in dynamic_conv.
template <class Scalar>
void finish_one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                       Activation activation, const Image<Scalar>& y, Scalar* mean) {
  using Acc = accumulate_t<Scalar>;
  constexpr int64_t kRows = 32;  // of a task
  Mixer<Scalar> mixer(shape, operands);
  mixer.fold(false);
  // A row is a channel's pixels or, in channels_last, a pixel's channels.
  const int64_t outputs = shape.out_channels, pixels = shape.out_size[0] * shape.out_size[1];
  const bool by_pixels = y.stride[1] == 1;
  const int64_t rows = by_pixels ? pixels : outputs, columns = by_pixels ? outputs : pixels;
  const int64_t parts = ceil_div(rows, kRows);
  const Scratch<Acc> sums(by_pixels && mean != nullptr ? shape.batch * parts * outputs : 0);
  parallel_for(shape.batch * parts, 1, [&](int64_t begin, int64_t end) {
    const Scratch<Acc> line(columns);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / parts, first = task % parts * kRows;
      const Acc scale = mixer.result_scale(b);
      const Acc* beta = mixer.betas() + b * outputs;
      Acc* sum = sums.get() + task * outputs;
      if (by_pixels && mean != nullptr) std::fill_n(sum, outputs, Acc(0));
      for (int64_t row = first; row < std::min(first + kRows, rows); ++row) {
        Scalar* values = y.data + (b * rows + row) * columns;
        load_row(line.get(), values, columns);
        for (int64_t i = 0; i < columns; ++i) {
          line[i] = line[i] * scale + beta[by_pixels ? i : row];
        }
        activate(activation, columns, line.get());
        store_row(values, line.get(), columns);
        if (mean == nullptr) continue;
        if (by_pixels) {
          add_scaled_row(sum, Acc(1), line.get(), outputs);
        } else {
          mean[b * outputs + row] =
              static_cast<Scalar>(sum_row(line.get(), pixels) / static_cast<Acc>(pixels));
        }
      }
    }
  });
  if (!by_pixels || mean == nullptr) return;
  for (int64_t i = 0; i < shape.batch * outputs; ++i) {
    Acc sum(0);
    for (int64_t part = 0; part < parts; ++part) {
      sum += sums[(i / outputs * parts + part) * outputs + i % outputs];
    }
    mean[i] = static_cast<Scalar>(sum / static_cast<Acc>(pixels));
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

// What is left to do where torch's own convolution (oneDNN) is the fastest there is: large dense
// kernels that are one for the whole batch, as its only sample's or a bank's only one.
//
//   y_b = act(scale_b * conv2d(x, K)_b + beta_b),   dx = conv_transpose2d(scale_b * dy_b, K)
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
OneKernel one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                     Direction direction) {
  constexpr bool kFloat = std::is_same_v<Scalar, float>;
  const bool shared = shares_kernel(shape, operands);
  if (!(shared && (kFloat || (kPairs<Scalar> && !kPairTiles))) && !(kFloat && shape.batch == 1)) {
    return OneKernel::kNone;
  }
  // In these oneDNN sums in the same order with any number of threads; in channels_last, with a
  // stride in a transposed convolution, and with borders wider than a kernel it may not.
  bool keeps_bits = operands.x.stride[1] != 1;
  for (int axis = 0; axis < 2; ++axis) {
    keeps_bits = keeps_bits &&
                 shape.padding[axis] <= shape.dilation[axis] * (shape.kernel[axis] - 1) &&
                 (direction == Direction::kForward || shape.stride[axis] == 1);
  }
  // Few channels fill no blocks, few pixels do not pay for the call, or for a kernel mixed outside
  // of the cache, and large planes cost it a copy. Winograd needs fewer multiplications, which
  // counts in float32, but on Intel's cores not where a map fills few vectors of tiles.
  constexpr int64_t kMostPlane = 1024, kLeastTiledPlane = 256;
  const int64_t least_channels = shared ? 32 : 64, least_pixels = shared ? 128 : 256;
  const int64_t pixels = shape.out_size[0] * shape.out_size[1];
  const bool winograd = kFloat && fits_winograd<Scalar>(shape) &&
                        !(kManyRegisters && is_intel() && pixels < kLeastTiledPlane);
  const bool wins = shape.groups == 1 && shape.code_channels == 0 && shape.taps() > 1 &&
                    std::min(shape.in_channels, shape.out_channels) >= least_channels &&
                    shape.batch * pixels >= least_pixels && pixels <= kMostPlane && keeps_bits &&
                    !winograd;
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

// Turns torch's convolution in y, which is contiguous, into the result; `mean` as in dynamic_conv.
template <class Scalar>
void finish_one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,
                       Activation activation, Scalar* y, Scalar* mean) {
  using Acc = accumulate_t<Scalar>;
  constexpr int64_t kRows = 32;  // of a task
  Mixer<Scalar> mixer(shape, operands);
  mixer.fold(false);
  const int64_t pixels = shape.out_size[0] * shape.out_size[1];
  parallel_for(shape.batch * shape.out_channels, kRows, [&](int64_t begin, int64_t end) {
    const Scratch<Acc> line(pixels);
    for (int64_t row = begin; row < end; ++row) {
      const Acc scale = mixer.result_scale(row / shape.out_channels), beta = mixer.betas()[row];
      load_row(line.get(), y + row * pixels, pixels);
      for (int64_t i = 0; i < pixels; ++i) line[i] = line[i] * scale + beta;
      activate(activation, pixels, line.get());
      store_row(y + row * pixels, line.get(), pixels);
      if (mean != nullptr) {
        mean[row] = static_cast<Scalar>(sum_row(line.get(), pixels) / static_cast<Acc>(pixels));
      }
    }
  });
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

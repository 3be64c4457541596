// dynamic_conv for the CPU: what the kernels of all instruction sets are given. Free of torch, but
// for its element types.
//
//   W_b[o,i,u,v] = out_scale[b,o] in_scale[b,i] tap_scale[b,u,v] sum_k attention[b,k(,o)]
//   weight[k,o,i,u,v] y_b = act(conv2d(cat(x_b, code_b), W_b) + sum_k attention[b,k(,o)] bias[k,o])
#pragma once

#include <cstdint>
#include <string>

#include "common/dtype.h"

namespace ddrf_fast {

enum class Activation { kNone, kRelu, kLeakyRelu };

// Index 0 of a pair is the vertical axis, 1 the horizontal one.
struct DynamicConvShape {
  int64_t batch, in_channels, out_channels, groups;
  int64_t code_channels;  // constant channels after x's; only with one group
  int64_t bank;           // kernels in the bank; 1 where each sample has its own
  bool has_attention;     // false: `weight` and `bias` are indexed by the sample
  bool attention_per_channel;
  int64_t in_size[2], out_size[2], kernel[2], stride[2], padding[2], dilation[2];

  int64_t taps() const { return kernel[0] * kernel[1]; }
  int64_t in_per_group() const { return in_channels / groups; }
  int64_t out_per_group() const { return out_channels / groups; }
  // Elements of one output channel's kernel: x's channels of its group, then the code's.
  int64_t row_size() const { return (in_per_group() + code_channels) * taps(); }
};

// A [B, C, H, W] tensor of any layout; strides in elements.
template <class Scalar>
struct Image {
  Scalar* data;
  int64_t stride[4];
};

// Contiguous but for x; absent ones are null.
template <class Scalar>
struct DynamicConvOperands {
  Image<const Scalar> x;
  const Scalar* weight;                   // [N, O, I', kh, kw], or [B, ...] without attention
  const Scalar* attention;                // [B, N] or [B, N, O]
  const Scalar* bias;                     // [N, O], or [B, O] without attention
  const Scalar* code;                     // [B, D]
  const accumulate_t<Scalar>* in_scale;   // [B, I]
  const accumulate_t<Scalar>* out_scale;  // [B, O]
  const accumulate_t<Scalar>* tap_scale;  // [B, kh, kw]
};

// Of the operands' shapes; null where not asked for.
template <class Scalar>
struct DynamicConvGradients {
  Image<Scalar> x;
  Scalar *weight, *attention, *bias, *code;
  accumulate_t<Scalar>* in_scale;
  accumulate_t<Scalar>* out_scale;
  accumulate_t<Scalar>* tap_scale;
};

// Where a correlation finds its weights in W_b [O][channels][taps]: the convolution sums over
// the channels of one row, the input gradient over the rows.
enum class Direction { kForward, kInputGradient };

// Where torch's own convolution serves all samples at once: with the bank's only kernel, or with
// the mixed kernel of the only sample.
enum class OneKernel { kNone, kOfBank, kMixed };

// The same functions for every instruction set; each is compiled in a file of its own. `mean`
// [B, O] is that of the convolution over the pixels, or null. `accumulate` adds the convolution to
// what y holds; its columns must lie side by side, and there must be one group.
#define DDRF_DECLARE_DYNAMIC_CONV(CAPABILITY)                                                      \
  namespace CAPABILITY {                                                                           \
  template <class Scalar>                                                                          \
  void dynamic_conv(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,    \
                    Activation activation, const Image<Scalar>& y, Scalar* mean, bool accumulate); \
  template <class Scalar>                                                                          \
  OneKernel one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands, \
                       Direction direction);                                                       \
  template <class Scalar>                                                                          \
  void mix_one_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands,  \
                      Scalar* kernel, Scalar* bias);                                               \
  template <class Scalar>                                                                          \
  void finish_one_kernel(const DynamicConvShape& shape,                                            \
                         const DynamicConvOperands<Scalar>& operands, Activation activation,       \
                         Scalar* y, Scalar* mean);                                                 \
  template <class Scalar>                                                                          \
  std::string dynamic_conv_plan(const DynamicConvShape& shape,                                     \
                                const DynamicConvOperands<Scalar>& operands);                      \
  template <class Scalar>                                                                          \
  void dynamic_conv_backward(const DynamicConvShape& shape,                                        \
                             const DynamicConvOperands<Scalar>& operands,                          \
                             const Image<const Scalar>& grad,                                      \
                             const DynamicConvGradients<Scalar>& gradients);                       \
  }
DDRF_DECLARE_DYNAMIC_CONV(baseline)
DDRF_DECLARE_DYNAMIC_CONV(avx2)
DDRF_DECLARE_DYNAMIC_CONV(avx512)
DDRF_DECLARE_DYNAMIC_CONV(avx512_bf16)  // bfloat16 only
DDRF_DECLARE_DYNAMIC_CONV(amx_bf16)     // likewise
#undef DDRF_DECLARE_DYNAMIC_CONV

}  // namespace ddrf_fast

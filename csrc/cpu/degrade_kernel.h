// The loops of degrade, forward and backward. Included once for each instruction set, inside a
// namespace of its own, by degrade_dispatch.h, which defines DDRF_VECTOR_BYTES and includes every
// other header beforehand.
//
// Weights that vary over the image: for a tile of output pixels (one lane a pixel) and a block of
// taps, the kernels are mixed in registers and at once applied to every channel, (M + C) k^2
// multiplications a pixel instead of the M C k^2 of blurring with each kernel. Weights of the whole
// sample: the kernels are mixed once and the image is blurred with the result, two output rows at a
// time because they share what they read.
//
// The backward pass recomputes the mixed taps. With p[tap] = sum_c grad_c P_c[tap]:
//   d image: mixed[tap] grad_c scattered into a padded image, which is folded afterwards;
//   d weights_m = sum_taps K'_m[tap] p[tap];   d K'_m[tap] = sum_pixels weights_m p[tap].

// clang-format off: each needs those above it
#include "cpu/degrade_vectors.h"
#include "cpu/degrade_rows.h"
#include "cpu/degrade_forward.h"
#include "cpu/degrade_backward.h"
// clang-format on

template <class T>
static void forward(const DegradeProblem& p, const Output& out, const Threads& threads) {
  if (p.weights_at == WeightsAt::kSample) {
    forward_uniform<T>(p, out, threads);
  } else {
    forward_mixed<T>(p, out, threads);
  }
}

template <class T>
static void backward(const DegradeProblem& p, const DegradeGradients& g, const Threads& threads) {
  if (g.noise_std.data) backward_noise_std<T>(p, g, threads);
  if (!g.image.data && !g.kernels.data && !g.weights.data) return;
  if (p.weights_at == WeightsAt::kSample) {
    backward_uniform<T>(p, g, threads);
  } else {
    backward_mixed<T>(p, g, threads);
  }
}

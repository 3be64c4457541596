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

// Large kernels go through the Fourier transform instead, where degrade_fourier_plan.h finds that
// this takes less: degrade_fourier.h.

// clang-format off: each needs those above it
#include "cpu/degrade_vectors.h"
#include "cpu/degrade_rows.h"
#include "cpu/degrade_fft.h"
#include "cpu/degrade_forward.h"
#include "cpu/degrade_backward.h"
#include "cpu/degrade_fourier.h"
// clang-format on

template <class T>
static void forward(const DegradeProblem& p, const Output& out, const Threads& threads) {
  const auto tiles = choose_fourier(p, /*backward=*/false);
  if (p.weights_at == WeightsAt::kSample) {
    if (!tiles || !forward_uniform_fourier<T>(p, *tiles, out, threads))
      forward_uniform_direct<T>(p, out, threads);
  } else {
    if (!tiles || !forward_mixed_fourier<T>(p, *tiles, out, threads))
      forward_mixed_direct<T>(p, out, threads);
  }
}

// From the gradient [B][k * k] of each sample's mixed kernel to those of the kernels and weights.
template <class T>
static void unmix_kernels(const DegradeProblem& p, const DegradeGradients& g,
                          const Buffer<T>& kernels, const Buffer<T>& mixed_grad,
                          Buffer<T>& kernel_grad) {
  const int64_t taps = p.num_taps();
  Buffer<T> weights(p.num_kernels);
  for (int64_t b = 0; b < p.batch; ++b) {
    load_row(p.weights, b * p.weights.stride[0], p.weights.stride[1], p.num_kernels, weights.get());
    const T* bank = kernels_of(p, kernels, b);
    const T* grad = mixed_grad.get() + b * taps;
    T* bank_grad = kernel_grad.get() + (bank - kernels.get());
    for (int64_t m = 0; m < p.num_kernels; ++m) {
      T sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t tap = 0; tap < taps; ++tap) {
        sum += bank[m * taps + tap] * grad[tap];
        bank_grad[m * taps + tap] += weights[m] * grad[tap];
      }
      if (g.weights.data) store_row(g.weights, b * g.weights.stride[0] + m, 1, 1, &sum);
    }
  }
}

template <class T>
static void backward(const DegradeProblem& p, const DegradeGradients& g, const Threads& threads) {
  if (g.noise_std.data) backward_noise_std<T>(p, g, threads);
  const bool to_kernels = g.kernels.data || g.weights.data;
  if (!g.image.data && !to_kernels) return;
  const auto tiles = choose_fourier(p, /*backward=*/true);
  const Buffer<T> kernels = load_kernels<T>(p);
  Buffer<T> kernel_grad(to_kernels ? p.num_banks() * p.num_kernels * p.num_taps() : 0);
  if (p.weights_at == WeightsAt::kSample) {
    const Buffer<T> mixed = mix_kernels(p, kernels);
    Buffer<T> mixed_grad(to_kernels ? p.batch * p.num_taps() : 0);
    if (!tiles || !backward_uniform_fourier(p, *tiles, g, mixed, mixed_grad, threads)) {
      if (g.image.data) backward_uniform_image(p, g, mixed, threads);
      if (to_kernels) backward_uniform_kernels(p, g, mixed_grad, threads);
    }
    if (to_kernels) unmix_kernels(p, g, kernels, mixed_grad, kernel_grad);
  } else {
    const WeightRows<T> weight_rows(p);
    const SiteGradients<T> sites(p, g.weights);
    if (!tiles ||
        !backward_mixed_fourier(p, *tiles, g, weight_rows, kernels, kernel_grad, sites, threads)) {
      backward_mixed_direct(p, g, weight_rows, kernels, kernel_grad, sites, threads);
    }
    if (g.weights.data && p.weights_at == WeightsAt::kGrid)
      gather_to_grid(p, g, sites.sites(), threads);
  }
  if (g.kernels.data) store_kernels(p, g, kernel_grad);
}

// route for the CPU: what the kernels of all instruction sets are given. Free of torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "common/dtype.h"

namespace ddrf_fast {

// A [B, C, H, W] tensor of any layout; strides in elements.
template <class Scalar>
struct Pixels {
  const Scalar* data;
  int64_t channels, height, width, stride[4];
};

// How many sums sum_pixels has at once, at most.
inline int64_t scratch_size(int64_t channels) { return std::max<int64_t>(1024, channels); }

// The functions of one instruction set; route_kernels.h says what they do.
template <class Scalar>
struct RouteKernels {
  using Acc = accumulate_t<Scalar>;
  void (*mean_planes)(const Pixels<Scalar>& x, int64_t begin, int64_t end, Acc* pooled,
                      int64_t row);
  void (*sum_pixels)(const Pixels<Scalar>& x, int64_t sample, int64_t begin, int64_t end,
                     double* totals, Acc* scratch);
  void (*dot_products)(const Acc* values, int64_t batch, int64_t count, const Scalar* weights,
                       int64_t outputs, Acc* result, int64_t result_row);
};

// Each is compiled in a file of its own.
#define DDRF_DECLARE_ROUTE(CAPABILITY)  \
  namespace CAPABILITY {                \
  template <class Scalar>               \
  RouteKernels<Scalar> route_kernels(); \
  }
DDRF_DECLARE_ROUTE(baseline)
DDRF_DECLARE_ROUTE(avx2)
DDRF_DECLARE_ROUTE(avx512)
#undef DDRF_DECLARE_ROUTE

}  // namespace ddrf_fast

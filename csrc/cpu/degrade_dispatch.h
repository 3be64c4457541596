// degrade for any processor: compiles degrade_kernel.h for each instruction set and picks one at
// run time. Free of torch: torch's operator and the NumPy module both come through here.
#pragma once

#include <atomic>
#include <cmath>
#include <utility>

#include "common/capability.h"
#include "common/flush_denormals.h"
#include "cpu/degrade_fourier_plan.h"
#include "cpu/degrade_plan.h"

#if DDRF_X86_CAPABILITIES
#include <immintrin.h>
#endif

namespace ddrf_fast {

namespace degrade_default {
#define DDRF_VECTOR_BYTES 16
#include "cpu/degrade_kernel.h"
#undef DDRF_VECTOR_BYTES
}  // namespace degrade_default

#if DDRF_X86_CAPABILITIES
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace degrade_avx2 {
#define DDRF_VECTOR_BYTES 32
#include "cpu/degrade_kernel.h"
#undef DDRF_VECTOR_BYTES
}  // namespace degrade_avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
namespace degrade_avx512 {
#define DDRF_VECTOR_BYTES 64
#include "cpu/degrade_kernel.h"
#undef DDRF_VECTOR_BYTES
}  // namespace degrade_avx512
#pragma GCC pop_options
#endif

// Calls CALL in the namespace of the processor's instruction set.
#if DDRF_X86_CAPABILITIES
#define DDRF_DEGRADE_DISPATCH(CALL) \
  switch (cpu_capability()) {       \
    case Capability::kAmxBf16:      \
    case Capability::kAvx512Bf16:   \
    case Capability::kAvx512:       \
      return degrade_avx512::CALL;  \
    case Capability::kAvx2:         \
      return degrade_avx2::CALL;    \
    default:                        \
      return degrade_default::CALL; \
  }
#else
#define DDRF_DEGRADE_DISPATCH(CALL) return degrade_default::CALL;
#endif

inline void degrade_forward(const DegradeProblem& p, const Output& out, const Threads& threads) {
  if (p.batch * p.channels * p.out_height * p.out_width == 0) return;
  FlushDenormals flush;
  if (p.kernels.element == Element::kFloat64) {
    DDRF_DEGRADE_DISPATCH(forward<double>(p, out, threads))
  }
  DDRF_DEGRADE_DISPATCH(forward<float>(p, out, threads))
}

// The gradient of weights at the image's pixels must hold zeros beforehand.
inline void degrade_backward(const DegradeProblem& p, const DegradeGradients& g,
                             const Threads& threads) {
  if (p.batch * p.channels * p.out_height * p.out_width == 0) return;
  FlushDenormals flush;
  if (p.kernels.element == Element::kFloat64) {
    DDRF_DEGRADE_DISPATCH(backward<double>(p, g, threads))
  }
  DDRF_DEGRADE_DISPATCH(backward<float>(p, g, threads))
}

#undef DDRF_DEGRADE_DISPATCH

}  // namespace ddrf_fast

// The element types of the kernels: what each one is accumulated in, and how it is converted.
#pragma once

#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>

namespace ddrf_fast {

// float for float, bfloat16 and float16; double for double.
template <class Scalar>
using accumulate_t = std::conditional_t<std::is_same_v<Scalar, double>, double, float>;

template <class Scalar>
inline accumulate_t<Scalar> load_as_accumulate(const Scalar* pointer) {
  return static_cast<accumulate_t<Scalar>>(*pointer);
}

}  // namespace ddrf_fast

// Calls BODY (a lambda without arguments; `scalar_t` is the element type inside) for the four
// floating types the operators take, and raises for any other.
#define DDRF_DISPATCH_FLOATING(TYPE, NAME, BODY)                                                  \
  THO_DISPATCH_V2(TYPE, NAME, AT_WRAP(BODY), torch::headeronly::ScalarType::Float,                \
                  torch::headeronly::ScalarType::Double, torch::headeronly::ScalarType::BFloat16, \
                  torch::headeronly::ScalarType::Half)

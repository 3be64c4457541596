// Fetching what later products will read while earlier ones are computed.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/dynamic_conv_plan.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Fetches `count` numbers to the second level of the cache in so many steps, a few lines at each:
// all at once they would hold up what is read now.
class Ahead {
 public:
  Ahead() = default;  // nothing
  template <class Acc>
  Ahead(const Acc* data, int64_t count, int64_t steps)
      : next_(reinterpret_cast<const char*>(data)),
        left_(ceil_div(count * int64_t{sizeof(Acc)}, kLine)),
        lines_(ceil_div(left_, steps)) {}

  // kLocality as that of __builtin_prefetch: 3 is the first level of the cache.
  template <int kLocality = 2>
  void step() {
    for (int64_t i = 0; i < lines_ && left_ > 0; ++i, --left_, next_ += kLine) {
      __builtin_prefetch(next_, 0, kLocality);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_ = nullptr;
  int64_t left_ = 0, lines_ = 0;
};

// For `count` planes of so many rows from one on, if they lie one after the other.
template <class Scalar>
Ahead planes_ahead(const Image<Scalar>& image, const std::remove_const_t<Scalar>* first,
                   int64_t count, int64_t rows, int64_t steps) {
  const bool follow = image.stride[1] == rows * image.stride[2];
  return Ahead(first, follow ? count * image.stride[1] : 0, steps);
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

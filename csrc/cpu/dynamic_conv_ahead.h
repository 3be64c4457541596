// Fetching what later products will read while earlier ones are computed.
#pragma once

#include <cstdint>

#include "cpu/dynamic_conv_plan.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Fetches `count` numbers to the second level of the cache in so many steps, a few lines at each:
// all at once they would hold up what is read now.
class Ahead {
 public:
  template <class Acc>
  Ahead(const Acc* data, int64_t count, int64_t steps)
      : next_(reinterpret_cast<const char*>(data)),
        left_(ceil_div(count * int64_t{sizeof(Acc)}, kLine)),
        lines_(ceil_div(left_, steps)) {}

  void step() {
    for (int64_t i = 0; i < lines_ && left_ > 0; ++i, --left_, next_ += kLine) {
      __builtin_prefetch(next_, 0, 2);
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  const char* next_;
  int64_t left_, lines_;
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

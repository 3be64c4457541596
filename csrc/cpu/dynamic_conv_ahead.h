// Fetching what later products will read while earlier ones are computed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/dynamic_conv_plan.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Rows of numbers that lie `stride` apart.
struct Rows {
  int64_t count = 1, stride = 0;
};

// Fetches `count` numbers, of each of some rows, of each of some `blocks` of rows, to the second
// level of the cache in so many steps, a few lines at each: all at once they would hold up what is
// read now.
class Ahead {
 public:
  Ahead() = default;  // nothing
  template <class Number>
  Ahead(const Number* data, int64_t count, int64_t steps, Rows rows = {}, Rows blocks = {})
      : first_(reinterpret_cast<const char*>(data)),
        next_(first_),
        row_lines_(ceil_div(count * int64_t{sizeof(Number)}, kLine)),
        rows_{rows.count, rows.stride * int64_t{sizeof(Number)}},
        block_stride_(blocks.stride * int64_t{sizeof(Number)}),
        left_(row_lines_ * rows.count * blocks.count),
        lines_(ceil_div(left_, steps)) {}

  // kLocality as that of __builtin_prefetch: 3 is the first level of the cache.
  template <int kLocality = 2>
  void step() {
    for (int64_t lines = std::min(lines_, left_); lines > 0;) {
      const int64_t taken = std::min(lines, row_lines_ - line_);
      for (int64_t i = 0; i < taken; ++i) __builtin_prefetch(next_ + i * kLine, 0, kLocality);
      next_ += taken * kLine;
      line_ += taken;
      left_ -= taken;
      lines -= taken;
      if (line_ == row_lines_) next_row();
    }
  }

 private:
  static constexpr int64_t kLine = 64;

  void next_row() {
    line_ = 0;
    if (++row_ == rows_.count) {
      row_ = 0;
      first_ += block_stride_;
    }
    next_ = first_ + row_ * rows_.stride;
  }

  const char* first_ = nullptr;  // of the block
  const char* next_ = nullptr;
  int64_t row_lines_ = 0;
  Rows rows_;  // in bytes
  int64_t block_stride_ = 0;
  int64_t left_ = 0, lines_ = 0;  // in all, and at a step
  int64_t line_ = 0, row_ = 0;    // done of the row, and of the block
};

// For `count` planes of so many rows from one on, if they lie one after the other.
template <class Scalar>
Ahead planes_ahead(const Image<Scalar>& image, const std::remove_const_t<Scalar>* first,
                   int64_t count, int64_t rows, int64_t steps) {
  const bool follow = image.stride[1] == rows * image.stride[2];
  return Ahead(first, follow ? count * image.stride[1] : 0, steps);
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

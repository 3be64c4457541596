// Products of matrices whose entries are found through tables of offsets: the inner kernel of all
// dense plans.
//
//   C[r][p] (+)= sum over k of A[r * a_row + a_offsets[k]] * B[b_offsets[k] + p]
//
// A holds a sample's mixed kernel as it lies in the bank, so nothing is packed; B holds pixels (k
// is a channel and a tap, p a pixel) in scratch. Sums of kRows x kVectors vectors stay in
// registers while k runs, so that a loaded vector is used kRows times and a weight kVectors times.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dynamic_conv_vector.h"

namespace ddrf_fast::DDRF_CAPABILITY {

struct Offsets {
  int32_t a, b;
};

template <class Acc, bool kAdd, int kRows, int kVectors>
inline void multiply_block(const Acc* a, int64_t a_row, const Acc* b, const Offsets* offsets,
                           int64_t depth, Acc* c, int64_t c_row) {
  constexpr int kLane = kLanes<Acc>;
  // Without every loop over them unrolled the compiler keeps the sums in memory.
  Vector<Acc> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = kAdd ? load_vector(c + r * c_row + v * kLane) : Vector<Acc>{};
    }
  }
  const Acc* rows[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = a + r * a_row;
  for (int64_t k = 0; k < depth; ++k) {
    const int64_t a_offset = offsets[k].a;
    const Acc* pixels = b + offsets[k].b;
    Vector<Acc> pixel[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) pixel[v] = load_vector(pixels + v * kLane);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += pixel[v] * rows[r][a_offset];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store_vector(c + r * c_row + v * kLane, sum[r][v]);
  }
}

// Rows and vectors of the largest block; one or two rows take more vectors to keep the units busy.
inline constexpr int kBlockRows = kManyRegisters ? 8 : 4;
inline constexpr int kBlockVectors = 3, kNarrowVectors = 6;

// The product for all `rows` rows and `vectors` vectors of pixels, added to C or in its place.
template <class Acc, bool kAdd = true>
void multiply(const Acc* a, int64_t a_row, int64_t rows, const Acc* b, const Offsets* offsets,
              int64_t depth, Acc* c, int64_t c_row, int64_t vectors) {
  constexpr int kLane = kLanes<Acc>;
  // The largest block of rows that is left, with a given number of vectors.
  const auto column = [&]<int kVectors>(std::integral_constant<int, kVectors>, int64_t first) {
    const auto block = [&]<int kRows>(std::integral_constant<int, kRows>, int64_t r) {
      multiply_block<Acc, kAdd, kRows, kVectors>(a + r * a_row, a_row, b + first * kLane, offsets,
                                                 depth, c + r * c_row + first * kLane, c_row);
    };
    int64_t r = 0;
    if constexpr (kVectors <= kBlockVectors) {
      for (; r + kBlockRows <= rows; r += kBlockRows) {
        block(std::integral_constant<int, kBlockRows>(), r);
      }
      if (kBlockRows > 4 && r + 4 <= rows) {
        block(std::integral_constant<int, 4>(), r);
        r += 4;
      }
    }
    if (r + 2 <= rows) {
      block(std::integral_constant<int, 2>(), r);
      r += 2;
    }
    if (r < rows) block(std::integral_constant<int, 1>(), r);
  };
  const int64_t widest = rows > 2 ? kBlockVectors : kNarrowVectors;
  for (int64_t first = 0; first < vectors;) {
    const int64_t left = vectors - first;
    // Four are better taken as two and two than as three and one.
    const int64_t most = left < widest ? kBlockVectors : widest;
    const int64_t taken = left == 4 ? 2 : std::min<int64_t>(left, most);
    switch (taken) {
      case 1:
        column(std::integral_constant<int, 1>(), first);
        break;
      case 2:
        column(std::integral_constant<int, 2>(), first);
        break;
      case 3:
        column(std::integral_constant<int, 3>(), first);
        break;
      default:
        column(std::integral_constant<int, kNarrowVectors>(), first);
    }
    first += taken;
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

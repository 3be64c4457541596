// Products of matrices whose entries are found through tables of offsets: the inner kernel of all
// dense plans.
//
//   C[r][p] (+)= sum over k of A[r * a_row + offsets[k].a] * B[offsets[k].b + p]
//
// A holds a sample's mixed kernel as it lies in the bank, so nothing is packed; B holds pixels (k
// is a channel and a tap, p a pixel) in scratch. Sums of kRows x kVectors vectors stay in
// registers while k runs, so that a loaded vector is used kRows times and a weight kVectors times.
//
// Where the processor multiplies pairs of bfloat16 (`kPairs`), the entries of A and B are such
// pairs, and k runs over pairs of channels; with AMX they are multiplied in tiles
// (dynamic_conv_amx.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "common/capability.h"
#include "cpu/dynamic_conv_ahead.h"
#include "cpu/dynamic_conv_amx.h"
#include "cpu/dynamic_conv_scratch.h"
#include "cpu/dynamic_conv_sums.h"
#include "cpu/dynamic_conv_vector.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// The length of a turn of multiply_in_turns: of the whole about the square root gives the smallest
// error, which without registers for two sums would cost too much.
inline int64_t turn_of(int64_t depth) { return !kManyRegisters ? 64 : depth <= 64 ? 8 : 16; }

// With `kPanel` b is a panel, as copy_panel makes it.
template <class Scalar, int kRows, int kVectors, bool kTurns, bool kPanel, class Acc>
inline void multiply_block(const Acc* a, int64_t a_row, const Acc* b, const Offsets* offsets,
                           int64_t depth, [[maybe_unused]] int64_t columns, const Sums<Acc>& c,
                           int64_t first_row, int64_t first_column) {
  constexpr int kLane = kLanes<Acc>;
  constexpr int kLast = kVectors - 1;
#if DDRF_VECTOR_BYTES == 64
  const uint32_t read = lanes_inside<kLane>(first_column + kLast * kLane, columns);
#endif
  // Without every loop over them unrolled the compiler keeps the sums in memory.
  Vector<Acc> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = Vector<Acc>{};
  }
  const Acc* rows[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) rows[r] = a + r * a_row;
  const auto add_products = [&](int64_t begin, int64_t end) __attribute__((always_inline)) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t a_offset = offsets[k].a;
      const Acc* pixels = b + (kPanel ? k * kVectors * kLane : offsets[k].b);
      Vector<Acc> pixel[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kLast; ++v) pixel[v] = load_vector(pixels + v * kLane);
#if DDRF_VECTOR_BYTES == 64
      pixel[kLast] =
          kPanel ? load_vector(pixels + kLast * kLane) : load_masked(pixels + kLast * kLane, read);
#else
      pixel[kLast] = load_vector(pixels + kLast * kLane);
#endif
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (kPairs<Scalar>) {
            sum[r][v] = add_dots(sum[r][v], pixel[v], same_pairs(rows[r] + a_offset));
          } else {
            sum[r][v] += pixel[v] * rows[r][a_offset];
          }
        }
      }
    }
  };
  if constexpr (kTurns) {
    const int64_t turn = turn_of(depth);
    Vector<Acc> total[kRows][kVectors];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) total[r][v] = Vector<Acc>{};
    }
    for (int64_t k = 0; k < depth; k += turn) {
      add_products(k, std::min(k + turn, depth));
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          total[r][v] += sum[r][v];
          sum[r][v] = Vector<Acc>{};
        }
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = total[r][v];
    }
  } else {
    add_products(0, depth);
  }
  finish_block(sum, c, first_row, first_column);
}

// Rows and vectors of the largest block; one or two rows take more vectors to keep the units busy.
inline constexpr int kBlockRows = kManyRegisters ? 8 : 4;
inline constexpr int kBlockVectors = 3, kNarrowVectors = 6;

// A vector that lies on two lines of the cache is read at half the speed. Where many rows of A read
// such pixels, Intel's cores, which multiply two vectors in a cycle, had better read a copy of
// those of a column of blocks, a panel, that stays in the first level.
template <class Scalar>
inline constexpr bool kPanels = DDRF_VECTOR_BYTES == 64 && std::is_same_v<Scalar, float>;
inline constexpr int64_t kPanelBytes = 32 * 1024, kLeastPanelRows = 32;

template <class Acc>
bool copies_panels(const Acc* b, const Offsets* offsets, int64_t rows, int64_t depth,
                   int64_t columns) {
  constexpr int64_t kBlock = kBlockVectors * kLanes<Acc>;
  const bool fits = depth * kBlock * int64_t{sizeof(Acc)} <= kPanelBytes;
  const auto in_lines = [&](int64_t k) {
    return reinterpret_cast<uintptr_t>(b + offsets[k].b) % DDRF_VECTOR_BYTES == 0;
  };
  return is_intel() && rows >= kLeastPanelRows && columns > kBlock && depth > 1 && fits &&
         !(in_lines(0) && in_lines(1));
}

// [depth][kVectors] vectors: the pixels of a column of blocks, zeros beyond the columns.
template <int kVectors, class Acc>
void copy_panel([[maybe_unused]] const Acc* b, [[maybe_unused]] const Offsets* offsets,
                [[maybe_unused]] int64_t depth, [[maybe_unused]] int64_t columns,
                [[maybe_unused]] Acc* panel) {
#if DDRF_VECTOR_BYTES == 64
  constexpr int kLane = kLanes<Acc>, kLast = kVectors - 1;
  const uint32_t read = lanes_inside<kLane>(kLast * kLane, columns);
  for (int64_t k = 0; k < depth; ++k) {
    const Acc* const pixels = b + offsets[k].b;
    for (int v = 0; v < kLast; ++v) {
      store_vector(panel + v * kLane, load_vector(pixels + v * kLane));
    }
    store_vector(panel + kLast * kLane, load_masked(pixels + kLast * kLane, read));
    panel += kVectors * kLane;
  }
#endif
}

template <class Scalar, bool kTurns, class Acc>
void multiply_by_vectors(const Acc* a, int64_t a_row, int64_t rows, const Acc* b,
                         const Offsets* offsets, int64_t depth, int64_t columns, const Sums<Acc>& c,
                         Ahead* ahead = nullptr) {
  constexpr int kLane = kLanes<Acc>;
  const int64_t vectors = (columns + kLane - 1) / kLane;
  const bool panels = kPanels<Scalar> && !kTurns && copies_panels(b, offsets, rows, depth, columns);
  const Scratch<Acc> panel(panels ? depth * kBlockVectors * kLane : 0);
  // The largest block of rows that is left, with a given number of vectors.
  const auto column = [&]<int kVectors>(std::integral_constant<int, kVectors>, int64_t first) {
    const auto block = [&]<int kRows>(std::integral_constant<int, kRows>, int64_t r) {
      if (ahead != nullptr) ahead->step();
      if constexpr (kPanels<Scalar> && !kTurns && kRows == kBlockRows) {
        if (panels) {
          return multiply_block<Scalar, kRows, kVectors, kTurns, true>(
              a + r * a_row, a_row, panel.get(), offsets, depth, columns, c, r, first * kLane);
        }
      }
      multiply_block<Scalar, kRows, kVectors, kTurns, false>(
          a + r * a_row, a_row, b + first * kLane, offsets, depth, columns, c, r, first * kLane);
    };
    if (panels) {
      copy_panel<kVectors>(b + first * kLane, offsets, depth, columns - first * kLane, panel.get());
    }
    // In turns there are two sums for each, which fit the registers for a single vector, for three
    // quarters of the rows of two and for half of those of three; AVX2's few hold twice the rows of
    // a single vector.
    constexpr int kMostRows = kTurns && kVectors == 2            ? 3 * kBlockRows / 4
                              : kTurns && kVectors == 3          ? kBlockRows / 2
                              : !kManyRegisters && kVectors == 1 ? 2 * kBlockRows
                                                                 : kBlockRows;
    int64_t r = 0;
    if constexpr (kVectors <= kBlockVectors) {
      for (; r + kMostRows <= rows; r += kMostRows) {
        block(std::integral_constant<int, kMostRows>(), r);
      }
      if (kMostRows > 4 && r + 4 <= rows) {
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
  const int64_t widest = rows > 2 || kTurns ? kBlockVectors : kNarrowVectors;
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
        if constexpr (!kTurns) column(std::integral_constant<int, kNarrowVectors>(), first);
    }
    first += taken;
  }
}

template <class Acc>
int64_t block_count(int64_t rows, int64_t columns) {
  return ceil_div(rows, kBlockRows) * ceil_div(columns, kBlockVectors * kLanes<Acc>);
}

// The product for all `rows` rows and `columns` pixels, of which the last vector need not be whole.
// With AVX-512 nothing beyond the columns is read; else they must be followed by numbers. `ahead`
// takes a step for each block, of which there are at least block_count().
template <class Scalar, class Acc = accumulate_t<Scalar>>
void multiply(const Acc* a, int64_t a_row, int64_t rows, const Acc* b, const Offsets* offsets,
              int64_t depth, int64_t columns, const Sums<Acc>& c,
              [[maybe_unused]] Ahead* ahead = nullptr) {
#ifdef DDRF_AMX
  if constexpr (kPairs<Scalar>) {
    return multiply_rows_by_tiles(a, a_row, rows, b, offsets, depth, columns, c);
  }
#endif
  multiply_by_vectors<Scalar, false>(a, a_row, rows, b, offsets, depth, columns, c, ahead);
}

// The same for sums whose rounding errors matter: k is taken in turns, whose sums are added up.
template <class Scalar, class Acc = accumulate_t<Scalar>>
void multiply_in_turns(const Acc* a, int64_t a_row, int64_t rows, const Acc* b,
                       const Offsets* offsets, int64_t depth, int64_t columns, Acc* data,
                       int64_t row) {
  if constexpr (kManyRegisters) {
    // Half as many sums at a time are enough to keep the units busy.
    multiply_by_vectors<Scalar, true>(a, a_row, rows, b, offsets, depth, columns, {data, row});
  } else {
    for (int64_t k = 0; k < depth; k += turn_of(depth)) {
      multiply<Scalar>(a, a_row, rows, b, offsets + k, std::min(turn_of(depth), depth - k), columns,
                       {data, row, k == 0 ? nullptr : data, row});
    }
  }
}

// The product with a single column, whose entries and whose rows of A follow one another.
template <class Scalar, class Acc = accumulate_t<Scalar>>
void multiply_column(const Acc* a, int64_t a_row, int64_t rows, const Acc* column, int64_t depth,
                     Acc* sums) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    dot_entries<Scalar, 4>(a + r * a_row, a_row, column, depth, sums + r);
  }
  for (; r < rows; ++r) dot_entries<Scalar, 1>(a + r * a_row, a_row, column, depth, sums + r);
}

// The same where the rows of A lie side by side, entry by entry, in vectors of rows.
template <class Scalar, class Acc = accumulate_t<Scalar>>
void multiply_column_across(const Acc* a, int64_t rows, const Acc* b, const Offsets* offsets,
                            int64_t depth, Acc* sums) {
  constexpr int kLane = kLanes<Acc>, kVectors = 4;
  int64_t r = 0;
  for (; r + kVectors * kLane <= rows; r += kVectors * kLane) {
    Vector<Acc> sum[kVectors] = {};
    for (int64_t k = 0; k < depth; ++k) {
      const Vector<Acc> value = same_entries<Scalar>(b + offsets[k].b);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        const Vector<Acc> weights = load_vector(a + offsets[k].a + r + v * kLane);
        sum[v] = add_product<Scalar>(sum[v], weights, value);
      }
    }
    for (int v = 0; v < kVectors; ++v) store_vector(sums + r + v * kLane, sum[v]);
  }
  for (; r < rows; r += kLane) {
    const int64_t lanes = std::min<int64_t>(kLane, rows - r);
    Vector<Acc> sum{};
    for (int64_t k = 0; k < depth; ++k) {
      const Acc* const at = a + offsets[k].a + r;
      sum = add_product<Scalar>(sum, lanes == kLane ? load_vector(at) : load_partial(at, lanes),
                                same_entries<Scalar>(b + offsets[k].b));
    }
    if (lanes == kLane) {
      store_vector(sums + r, sum);
    } else {
      store_partial(sums + r, sum, lanes);
    }
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

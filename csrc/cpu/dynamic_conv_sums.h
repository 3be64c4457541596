// Operands and results of matrix products (dynamic_conv_gemm.h): where entries are, and what
// becomes of the sums of a block before they are stored.
#pragma once

#include <cstdint>

#include "cpu/dynamic_conv.h"
#include "cpu/dynamic_conv_vector.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Of entry k of a sum, in a row of A and in a column of B.
struct Offsets {
  int32_t a, b;
};

// What becomes of a complete sum: act(scale * sum + bias of its row or of its column).
template <class Acc>
struct Epilogue {
  Acc scale = Acc(1);
  const Acc *row_bias = nullptr, *column_bias = nullptr;
  Activation activation = Activation::kNone;
};

// Columns that are lines of an image: `computed` of each one after the other, of which `kept` are
// stored, from line to line `stride` apart.
struct Lines {
  int64_t computed = int64_t{1} << 40, kept = int64_t{1} << 40, stride = 0;
};

// Where sums go, whole vectors but for what lies beyond `width`; and what they are added to.
template <class Acc>
struct Sums {
  Acc* data;
  int64_t row;
  const Acc* earlier = nullptr;  // sums over other k, whole vectors
  int64_t earlier_row = 0;
  int64_t width = int64_t{1} << 40;         // columns to store
  const Epilogue<Acc>* epilogue = nullptr;  // null: the sums are not complete yet
  c10::BFloat16* rounded = nullptr;         // where they go instead, if not null
  int64_t rounded_row = 0, rounded_column = 1;
  Lines lines = {};  // of the rounded sums, where tiles are multiplied
};

// Adds the earlier sums to a block's, and applies the epilogue where there is one.
template <class Acc, int kRows, int kVectors>
DDRF_INLINE void complete_block(Vector<Acc> (&sum)[kRows][kVectors], const Sums<Acc>& c,
                                int64_t first_row, int64_t first_column) {
  constexpr int kLane = kLanes<Acc>;
  if (c.earlier != nullptr) {
    const Acc* earlier = c.earlier + first_row * c.earlier_row + first_column;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum[r][v] += load_vector(earlier + r * c.earlier_row + v * kLane);
      }
    }
  }
  if (c.epilogue != nullptr) {
    const Epilogue<Acc>& epilogue = *c.epilogue;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Acc bias = epilogue.row_bias == nullptr ? Acc(0) : epilogue.row_bias[first_row + r];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] = sum[r][v] * epilogue.scale + bias;
    }
    if (epilogue.column_bias != nullptr) {
      const Acc* bias = epilogue.column_bias + first_column;
      const int64_t lanes = c.width - first_column - (kVectors - 1) * kLane;  // of the last vector
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Vector<Acc> beta = v + 1 < kVectors || lanes >= kLane
                                     ? load_vector(bias + v * kLane)
                                     : load_partial(bias + v * kLane, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) sum[r][v] += beta;
      }
    }
    if (epilogue.activation != Activation::kNone) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v)
          sum[r][v] = rectified<Acc>(epilogue.activation, sum[r][v]);
      }
    }
  }
}

// The same, and stores them.
template <class Acc, int kRows, int kVectors>
DDRF_INLINE void finish_block(Vector<Acc> (&sum)[kRows][kVectors], const Sums<Acc>& c,
                              int64_t first_row, int64_t first_column) {
  constexpr int kLane = kLanes<Acc>;
  complete_block(sum, c, first_row, first_column);
  const int64_t lanes = c.width - first_column - (kVectors - 1) * kLane;  // of the last vector
  const auto store = [&](auto* target, int64_t row) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        auto* at = target + (first_row + r) * row + first_column + v * kLane;
        if (v + 1 < kVectors || lanes >= kLane) {
          store_vector(at, sum[r][v]);
        } else {
          store_partial(at, sum[r][v], lanes);
        }
      }
    }
  };
#ifdef DDRF_AVX512_BF16
  if (c.rounded != nullptr) return store(c.rounded, c.rounded_row);
#endif
  store(c.data, c.row);
}

// The same for a single column.
template <class Acc>
inline void finish_column(const Sums<Acc>& c, int64_t column, int64_t rows, const Acc* sums) {
  for (int64_t r = 0; r < rows; ++r) {
    Acc sum = sums[r];
    if (c.earlier != nullptr) sum += c.earlier[r * c.earlier_row + column];
    if (c.epilogue != nullptr) {
      const Acc* bias = c.epilogue->row_bias;
      sum = sum * c.epilogue->scale + (bias == nullptr ? Acc(0) : bias[r]);
      activate(c.epilogue->activation, 1, &sum);
    }
    if (c.rounded != nullptr) {
      c.rounded[r * c.rounded_row + column] = c10::BFloat16(static_cast<float>(sum));
    } else {
      c.data[r * c.row + column] = sum;
    }
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

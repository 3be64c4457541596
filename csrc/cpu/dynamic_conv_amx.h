// Matrix products of pairs of bfloat16 (dynamic_conv_gemm.h) by the tile registers of AMX.
//
// A tile has 16 rows of 16 pairs: of A 16 rows and 16 entries of the sums, of B 16 entries and 16
// columns, of C 16 by 16 sums. Four tiles of C stay in registers while k runs. Tiles are read where
// their entries lie if the offsets allow it, so that the rows of a tile are equally far apart;
// else, and along the borders, they are packed into scratch first, with zeros where nothing is.
#pragma once

#ifdef DDRF_AMX

#include <algorithm>
#include <cstdint>

#include "cpu/dynamic_conv_scratch.h"
#include "cpu/dynamic_conv_sums.h"
#include "cpu/dynamic_conv_vector.h"

namespace ddrf_fast::DDRF_CAPABILITY {

inline constexpr int64_t kTileSide = 16, kTileEntries = kTileSide * kTileSide;

// The registers of a thread, all of them whole tiles, for the length of a product. oneDNN keeps
// nothing in them from one call to the next, nor do we.
class TileRegisters {
 public:
  TileRegisters() { _tile_loadconfig(&kWhole); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
  ~TileRegisters() { _tile_release(); }

 private:
  struct Configuration {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  static constexpr Configuration kWhole{
      1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};
};

// The compiler does not know what the instructions read and write.
DDRF_INLINE void finish_memory_accesses() { asm volatile("" ::: "memory"); }

// Where the rows of a tile lie.
struct TileRows {
  const float* data;
  int64_t row_bytes;
};

// Rows [row, row + kTileSide) of A, entries [k, k + kTileSide) of the sums.
inline TileRows tile_of_a(const float* a, int64_t a_row, int64_t row, int64_t rows,
                          const Offsets* offsets, int64_t k, int64_t depth, float* packed) {
  const int64_t taken = std::min(rows - row, kTileSide), entries = std::min(depth - k, kTileSide);
  const Offsets* const first = offsets + k;
  bool follow = true;  // the entries, side by side
  for (int64_t i = 0; i < entries; ++i) follow = follow && first[i].a == first[0].a + i;
  const float* const source = a + row * a_row;
  if (follow && taken == kTileSide && entries == kTileSide) {
    return {source + first[0].a, a_row * int64_t{sizeof(float)}};
  }
  const uint32_t lanes = lanes_inside<kTileSide>(0, entries);
  for (int64_t r = 0; r < kTileSide; ++r) {
    Vector<float> values{};
    if (r < taken && follow) {
      values = load_masked(source + r * a_row + first[0].a, lanes);
    } else if (r < taken) {
      for (int64_t i = 0; i < entries; ++i) values[i] = source[r * a_row + first[i].a];
    }
    store_vector(packed + r * kTileSide, values);
  }
  return {packed, kTileSide * int64_t{sizeof(float)}};
}

// Entries [k, k + kTileSide) of the sums, columns [column, column + kTileSide) of B.
inline TileRows tile_of_b(const float* b, int64_t column, int64_t columns, const Offsets* offsets,
                          int64_t k, int64_t depth, float* packed) {
  const int64_t entries = std::min(depth - k, kTileSide);
  const Offsets* const first = offsets + k;
  const int64_t step = entries > 1 ? first[1].b - first[0].b : 0;
  bool even = entries == kTileSide && column + kTileSide <= columns;
  for (int64_t i = 1; even && i < entries; ++i) even = first[i].b - first[i - 1].b == step;
  if (even) return {b + first[0].b + column, step * int64_t{sizeof(float)}};
  const uint32_t lanes = lanes_inside<kTileSide>(column, columns);
  for (int64_t i = 0; i < kTileSide; ++i) {
    const Vector<float> values =
        i < entries ? load_masked(b + first[i].b + column, lanes) : Vector<float>{};
    store_vector(packed + i * kTileSide, values);
  }
  return {packed, kTileSide * int64_t{sizeof(float)}};
}

// sums [kRows * kTileSide][kColumns * kTileSide] = the product of kRows rows of tiles of A, each
// `tiles` long, and kColumns columns of tiles of B.
template <int kRows, int kColumns>
inline void multiply_tiles(const TileRows* a, const TileRows* b, int64_t tiles, float* sums) {
  _tile_zero(0);
  if constexpr (kColumns == 2) _tile_zero(1);
  if constexpr (kRows == 2) _tile_zero(2);
  if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  for (int64_t k = 0; k < tiles; ++k) {
    _tile_loadd(4, a[k].data, a[k].row_bytes);
    _tile_loadd(6, b[k].data, b[k].row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, b[tiles + k].data, b[tiles + k].row_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      _tile_loadd(5, a[tiles + k].data, a[tiles + k].row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  }
  constexpr int64_t kRow = kColumns * kTileSide, kRowBytes = kRow * int64_t{sizeof(float)};
  _tile_stored(0, sums, kRowBytes);
  if constexpr (kColumns == 2) _tile_stored(1, sums + kTileSide, kRowBytes);
  if constexpr (kRows == 2) {
    float* const below = sums + kTileSide * kRow;
    _tile_stored(2, below, kRowBytes);
    if constexpr (kColumns == 2) _tile_stored(3, below + kTileSide, kRowBytes);
  }
}

// multiply of dynamic_conv_gemm.h.
inline void multiply_by_tiles(const float* a, int64_t a_row, int64_t rows, const float* b,
                              const Offsets* offsets, int64_t depth, int64_t columns,
                              const Sums<float>& c) {
  const int64_t tiles = ceil_div(depth, kTileSide), tile_rows = ceil_div(rows, kTileSide);
  const Scratch<float> packed_a(tile_rows * tiles * kTileEntries);
  const Scratch<float> packed_b(2 * tiles * kTileEntries), sums(4 * kTileEntries);
  const Scratch<TileRows> of_a(tile_rows * tiles), of_b(2 * tiles);
  for (int64_t i = 0; i < tile_rows * tiles; ++i) {
    of_a[i] = tile_of_a(a, a_row, i / tiles * kTileSide, rows, offsets, i % tiles * kTileSide,
                        depth, packed_a.get() + i * kTileEntries);
  }
  const TileRegisters registers;
  for (int64_t column = 0; column < columns; column += 2 * kTileSide) {
    const bool two_columns = column + kTileSide < columns;
    for (int64_t i = 0; i < (two_columns ? 2 : 1) * tiles; ++i) {
      of_b[i] = tile_of_b(b, column + i / tiles * kTileSide, columns, offsets,
                          i % tiles * kTileSide, depth, packed_b.get() + i * kTileEntries);
    }
    finish_memory_accesses();
    const auto block = [&]<int kRows, int kColumns>(std::integral_constant<int, kRows>,
                                                    std::integral_constant<int, kColumns>,
                                                    int64_t row) {
      multiply_tiles<kRows, kColumns>(of_a.get() + row / kTileSide * tiles, of_b.get(), tiles,
                                      sums.get());
      finish_memory_accesses();
      const int64_t taken = std::min(rows - row, kRows * kTileSide);
      for (int64_t r = 0; r < taken; ++r) {
        Vector<float> sum[1][kColumns];
        for (int v = 0; v < kColumns; ++v) {
          sum[0][v] = load_vector(&sums[(r * kColumns + v) * kTileSide]);
        }
        finish_block(sum, c, row + r, column);
      }
    };
    constexpr std::integral_constant<int, 1> kOne;
    constexpr std::integral_constant<int, 2> kTwo;
    for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
      const bool two_rows = row + kTileSide < rows;
      if (two_columns) {
        two_rows ? block(kTwo, kTwo, row) : block(kOne, kTwo, row);
      } else {
        two_rows ? block(kTwo, kOne, row) : block(kOne, kOne, row);
      }
    }
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

#endif

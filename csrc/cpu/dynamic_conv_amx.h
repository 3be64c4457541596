// Matrix products of pairs of bfloat16 (dynamic_conv_gemm.h) by the tile registers of AMX.
//
// A tile has 16 rows of 16 pairs: of A 16 rows and 16 entries of the sums, of B 16 entries and 16
// columns, of C 16 by 16 sums. Four tiles of C stay in registers while k runs.
//
// The rows of a tile must be equally far apart. Those of B are so where they are the pairs of
// channels of one tap, so that sums run tap by tap over blocks of 16 such pairs (`TileOrder`), and
// pixels are read where they lie. What is left over of the pairs is packed into scratch first. The
// kernels are laid out as whole tiles (`lay_row`), one after the other, as they are mixed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "cpu/dynamic_conv_scratch.h"
#include "cpu/dynamic_conv_sums.h"
#include "cpu/dynamic_conv_vector.h"

namespace ddrf_fast::DDRF_CAPABILITY {

inline constexpr int64_t kTileSide = 16, kTileEntries = kTileSide * kTileSide;
inline constexpr int64_t kBlockEntries = 4 * kTileEntries;

// The order of the entries of a sum over pairs of channels and taps: blocks of 16 pairs tap by tap,
// then all taps of each of the pairs that are left.
struct TileOrder {
  int64_t pairs, taps;

  int64_t in_blocks() const { return pairs / kTileSide * kTileSide; }
  int64_t block_tiles() const { return in_blocks() / kTileSide * taps; }
  int64_t rest() const { return (pairs - in_blocks()) * taps; }
  int64_t tiles() const { return block_tiles() + ceil_div(rest(), kTileSide); }
};

#ifdef DDRF_AMX

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

// Lays out some of the weights of row `row` of A, of pairs [first, first + number): tap t of pair
// first + i is source[i * pair_step + taps[t]]. `first` begins a block.
inline void lay_row(const TileOrder& order, const float* source, int64_t pair_step,
                    const int64_t* taps, int64_t first, int64_t number, int64_t row, float* tiles) {
  float* const target =
      tiles + row / kTileSide * order.tiles() * kTileEntries + row % kTileSide * kTileSide;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_mullo_epi32(lanes, _mm512_set1_epi32(static_cast<int>(pair_step)));
  int64_t i = 0;
  for (; i + kTileSide <= number; i += kTileSide) {
    float* const block = target + (first + i) / kTileSide * order.taps * kTileEntries;
    for (int64_t t = 0; t < order.taps; ++t) {
      const float* const from = source + i * pair_step + taps[t];
      store_vector(
          block + t * kTileEntries,
          pair_step == 1 ? load_vector(from) : (Vector<float>)_mm512_i32gather_ps(places, from, 4));
    }
  }
  if (i == number) return;
  float rest[kTileSide];
  float* at = target + order.block_tiles() * kTileEntries;
  int64_t filled = 0;
  const auto flush = [&] {
    std::fill(rest + filled, rest + kTileSide, 0.0f);
    store_vector(at, load_vector(rest));
    at += kTileEntries;
    filled = 0;
  };
  for (; i < number; ++i) {
    for (int64_t t = 0; t < order.taps; ++t) {
      rest[filled++] = source[i * pair_step + taps[t]];
      if (filled == kTileSide) flush();
    }
  }
  if (filled > 0) flush();
}

// Rows [row, row + kTileSide) of A as it lies, pairs [k, k + kTileSide) side by side; packed if
// they are not whole tiles, or would lie across the lines of the cache.
inline TileRows tile_of_a(const float* a, int64_t a_row, int64_t row, int64_t rows, int64_t k,
                          int64_t depth, float* packed) {
  const int64_t taken = std::min(rows - row, kTileSide), pairs = std::min(depth - k, kTileSide);
  const float* const source = a + row * a_row + k;
  if (taken == kTileSide && pairs == kTileSide && a_row % kTileSide == 0 &&
      reinterpret_cast<uintptr_t>(source) % 64 == 0) {
    return {source, a_row * int64_t{sizeof(float)}};
  }
  const uint32_t lanes = lanes_inside<kTileSide>(0, pairs);
  for (int64_t r = 0; r < taken; ++r) {
    store_vector(packed + r * kTileSide, load_masked(source + r * a_row, lanes));
  }
  return {packed, kTileSide * int64_t{sizeof(float)}};
}

// The entries of B that are left over, from offsets on, packed: columns [column, column + 16).
inline void pack_rest(const float* b, int64_t column, const Offsets* offsets, int64_t entries,
                      float* packed) {
  for (int64_t i = 0; i < entries; ++i) {
    store_vector(packed + i * kTileSide, load_vector(b + offsets[i].b + column));
  }
  std::fill(packed + entries * kTileSide, packed + ceil_div(entries, kTileSide) * kTileEntries,
            0.0f);
}

// The tiles of B of one or two columns of tiles: those of blocks at pixels + at[], their rows
// `pair_bytes` apart, then those of the rest, packed.
struct TilesOfB {
  const float *pixels, *rest[2];
  const int64_t* at;
  int64_t pair_bytes, blocks, tiles;
};

// The product of kRows rows of tiles of A, from the first one on, and kColumns columns of tiles of
// B: in registers 0 to 3, of which 2 and 3 are the second row.
template <int kRows, int kColumns, class OfA>
inline void multiply_block_of_tiles(const OfA& of_a, int64_t first, const TilesOfB& b) {
  _tile_zero(0);
  if constexpr (kColumns == 2) _tile_zero(1);
  if constexpr (kRows == 2) _tile_zero(2);
  if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
  const auto add_product = [&](int64_t k, const float* left, [[maybe_unused]] const float* right,
                               int64_t row_bytes) __attribute__((always_inline)) {
    const TileRows a = of_a(first + k);
    _tile_loadd(4, a.data, a.row_bytes);
    _tile_loadd(6, left, row_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kColumns == 2) {
      _tile_loadd(7, right, row_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kRows == 2) {
      const TileRows below = of_a(first + b.tiles + k);
      _tile_loadd(5, below.data, below.row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  };
  for (int64_t k = 0; k < b.blocks; ++k) {
    const float* const pixels = b.pixels + b.at[k];
    add_product(k, pixels, pixels + kTileSide, b.pair_bytes);
  }
  for (int64_t k = b.blocks; k < b.tiles; ++k) {
    const int64_t at = (k - b.blocks) * kTileEntries;
    add_product(k, b.rest[0] + at, b.rest[1] + at, kTileSide * int64_t{sizeof(float)});
  }
}

// sums [kRows * kTileSide][kColumns * kTileSide] = the registers
template <int kRows, int kColumns>
inline void store_block_of_tiles(float* sums) {
  constexpr int64_t kRow = kColumns * kTileSide, kRowBytes = kRow * int64_t{sizeof(float)};
  _tile_stored(0, sums, kRowBytes);
  if constexpr (kColumns == 2) _tile_stored(1, sums + kTileSide, kRowBytes);
  if constexpr (kRows == 2) {
    float* const below = sums + kTileSide * kRow;
    _tile_stored(2, below, kRowBytes);
    if constexpr (kColumns == 2) _tile_stored(3, below + kTileSide, kRowBytes);
  }
}

// The parts of lines among 16 columns: their lanes, and where lane 0 would go.
class LineParts {
 public:
  void find(const Lines& lines, int64_t column, int64_t columns) {
    number_ = 0;
    int64_t line = column / lines.computed, x = column % lines.computed;
    for (int64_t lane = 0; lane < std::min(kTileSide, columns - column); ++line, x = 0) {
      const int64_t kept = std::min(columns - column, lane + lines.kept - x);
      if (kept > lane) {
        parts_[number_++] = {line * lines.stride + x - lane,
                             lanes_inside<kTileSide>(0, kept) & ~lanes_inside<kTileSide>(0, lane)};
      }
      lane += lines.computed - x;
    }
  }

  void store(c10::BFloat16* target, Vector<float> value) const {
    for (int i = 0; i < number_; ++i) store_masked(target + parts_[i].at, value, parts_[i].lanes);
  }

 private:
  struct Part {
    int64_t at;
    uint32_t lanes;
  };
  Part parts_[kTileSide];
  int number_ = 0;
};

// Finishes rows [row, row + rows) of one or two columns of tiles, of [rows][kColumns * kTileSide].
template <int kColumns>
inline void finish_tiles(const float* sums, const Sums<float>& c, int64_t row, int64_t rows,
                         int64_t column, const LineParts* parts) {
  const auto finish = [&]<int kRows>(std::integral_constant<int, kRows>, int64_t first) {
    Vector<float> sum[kRows][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) {
        sum[r][v] = load_vector(&sums[((first + r) * kColumns + v) * kTileSide]);
      }
    }
    if (c.rounded == nullptr || c.lines.stride == 0) {
      return finish_block(sum, c, row + first, column);
    }
    complete_block(sum, c, row + first, column);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      c10::BFloat16* const target = c.rounded + (row + first + r) * c.rounded_row;
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) parts[v].store(target, sum[r][v]);
    }
  };
  int64_t first = 0;
  for (; first + 4 <= rows; first += 4) finish(std::integral_constant<int, 4>(), first);
  for (; first < rows; ++first) finish(std::integral_constant<int, 1>(), first);
}

// C = A B with of_a(i) the tiles of A, [row][order.tiles()], and the entries of B, in the order of
// pairs and their taps, at b + offsets[].b. Behind its columns 15 more must be readable.
template <class OfA>
inline void multiply_by_tiles(const OfA& of_a, int64_t rows, const TileOrder& order, const float* b,
                              const Offsets* offsets, int64_t columns, const Sums<float>& c) {
  const int64_t tiles = order.tiles(), blocks = order.block_tiles(), rest = order.rest();
  const int64_t packed_size = (tiles - blocks) * kTileEntries;
  const Scratch<float> packed(2 * packed_size), sums(2 * kBlockEntries);
  const Scratch<int64_t> at(blocks);
  for (int64_t block = 0, k = 0; k < blocks; ++block) {
    for (int64_t t = 0; t < order.taps; ++t)
      at[k++] = offsets[block * kTileSide * order.taps + t].b;
  }
  TilesOfB of_b{b, {packed.get(), packed.get() + packed_size}, at.get(), 0, blocks, tiles};
  if (blocks > 0) of_b.pair_bytes = (offsets[order.taps].b - at[0]) * int64_t{sizeof(float)};
  // A block's sums are finished while the next one's tiles are multiplied, which pays where the
  // same columns are read again.
  const bool overlaps = rows > 2 * kTileSide;
  struct Block {
    int64_t row, rows, column;
    const LineParts* parts;
    const float* sums;
  };
  Block last{0, 0, 0, nullptr, sums.get() + kBlockEntries};
  const auto finish_last = [&] {
    if (last.column + kTileSide < columns) {
      finish_tiles<2>(last.sums, c, last.row, last.rows, last.column, last.parts);
    } else {
      finish_tiles<1>(last.sums, c, last.row, last.rows, last.column, last.parts);
    }
  };
  std::array<std::array<LineParts, 2>, 2> parts;  // of two columns of tiles, and of those before
  const TileRegisters registers;
  for (int64_t column = 0; column < columns; column += 2 * kTileSide) {
    const bool two_columns = column + kTileSide < columns;
    of_b.pixels = b + column;
    for (int64_t i = 0; rest > 0 && i < 1 + two_columns; ++i) {
      pack_rest(b, column + i * kTileSide, offsets + blocks * kTileSide, rest,
                packed.get() + i * packed_size);
    }
    finish_memory_accesses();
    auto& own_parts = parts[column / (2 * kTileSide) % 2];
    for (int i = 0; c.lines.stride != 0 && i < 1 + two_columns; ++i) {
      own_parts[i].find(c.lines, column + i * kTileSide, columns);
    }
    const auto block = [&]<int kRows, int kColumns>(std::integral_constant<int, kRows>,
                                                    std::integral_constant<int, kColumns>,
                                                    int64_t row) {
      multiply_block_of_tiles<kRows, kColumns>(of_a, row / kTileSide * tiles, of_b);
      finish_last();
      float* const target = sums.get() + (last.sums == sums.get() ? kBlockEntries : 0);
      finish_memory_accesses();
      store_block_of_tiles<kRows, kColumns>(target);
      finish_memory_accesses();
      last = {row, std::min(rows - row, kRows * kTileSide), column, own_parts.data(), target};
      if (!overlaps) {
        finish_last();
        last.rows = 0;
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
  finish_last();
}

// multiply of dynamic_conv_gemm.h for a sum whose entries lie side by side in the rows of A.
inline void multiply_rows_by_tiles(const float* a, int64_t a_row, int64_t rows, const float* b,
                                   const Offsets* offsets, int64_t depth, int64_t columns,
                                   const Sums<float>& c) {
  const TileOrder order{depth, 1};
  const int64_t tiles = order.tiles(), number = ceil_div(rows, kTileSide) * tiles;
  const Scratch<float> packed(number * kTileEntries);
  const Scratch<TileRows> of_a(number);
  for (int64_t i = 0; i < number; ++i) {
    of_a[i] = tile_of_a(a, a_row, i / tiles * kTileSide, rows, i % tiles * kTileSide, depth,
                        packed.get() + i * kTileEntries);
  }
  multiply_by_tiles([&](int64_t i) { return of_a[i]; }, rows, order, b, offsets, columns, c);
}

#endif

}  // namespace ddrf_fast::DDRF_CAPABILITY

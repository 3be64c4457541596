// Matrix products of pairs of bfloat16 (dynamic_conv_gemm.h) by the tile registers of AMX.
//
// A tile has 16 rows of 16 pairs: of A 16 rows and 16 entries of the sums, of B 16 entries and 16
// columns, of C 16 by 16 sums. Four tiles of C stay in registers while k runs.
//
// The rows of a tile must be equally far apart. Those of pixels are so where they are the pairs of
// channels of one tap, so that sums run tap by tap over blocks of 16 such pairs (`TileOrder`), and
// pixels are read where they lie. What is left over of the pairs is packed into scratch first. The
// kernels are laid out as whole tiles, one after the other, as they are mixed.
//
// Either the kernels are A and the pixels B (multiply_by_tiles), whose rows are pairs and may lie
// across lines of the cache for all taps but one; or the pixels are A (multiply_pixel_rows), laid
// out such that the 16 pairs of a pixel are a line.
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
inline constexpr int64_t kTileRowBytes = kTileSide * sizeof(float);

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

// Transposes so many tiles where they are.
inline void transpose_tiles(int64_t tiles, float* data) {
  for (int64_t i = 0; i < tiles; ++i) {
    float* const tile = data + i * kTileEntries;
    Vector<float> square[kTileSide];
    load_square(tile, kTileSide, kTileSide, square);
    transpose_square<float>(square);
#pragma GCC unroll 16
    for (int r = 0; r < kTileSide; ++r) store_vector(tile + r * kTileSide, square[r]);
  }
}

// Lays out the weights of up to 16 rows as transposed tiles: of pairs [first, ...) `count` entries,
// those of a row side by side, pair after pair with all taps. `first` begins a block, and the
// entries are those of one block or of all pairs that are left.
inline void lay_columns(const TileOrder& order, const float* source, int64_t source_row,
                        int64_t rows, int64_t first, int64_t count, float* tiles) {
  const bool rest = first >= order.in_blocks();
  float* const target = tiles + first / kTileSide * order.taps * kTileEntries;
  int64_t pair = 0, tap = 0;
  for (int64_t entry = 0; entry < count; entry += kTileSide) {
    Vector<float> square[kTileSide] = {};
    const int64_t left = std::min(count - entry, kTileSide);
    for (int64_t r = 0; r < rows; ++r) {
      const float* const at = source + r * source_row + entry;
      square[r] = left == kTileSide ? load_vector(at) : load_partial(at, left);
    }
    transpose_square<float>(square);
    for (int64_t i = 0; i < kTileSide; ++i) {
      const int64_t place = rest ? (entry + i) * kTileSide : tap * kTileEntries + pair * kTileSide;
      store_vector(target + place, square[i]);
      if (++tap == order.taps) {
        tap = 0;
        ++pair;
      }
    }
  }
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

// One or two tiles of pixels: those of blocks at pixels + at[], their rows `row_bytes` and the
// second tile `step` from the first, then those of the rest, packed.
struct TilesOfPixels {
  const float *pixels, *rest[2];
  const int64_t* at;
  int64_t row_bytes, step, blocks, tiles;
};

// The product of kRows rows of tiles of weights, from `first` on, and kColumns tiles of pixels,
// which are the columns of the sums or, with kPixelsAreRows, their rows. Adds tiles [begin, end) of
// each to registers 0 to 3, of which 2 and 3 are of the second row of weights.
template <bool kPixelsAreRows, int kRows, int kColumns, class OfWeights, class Meanwhile>
inline void multiply_block_of_tiles(const OfWeights& of_weights, int64_t first,
                                    const TilesOfPixels& b, int64_t begin, int64_t end,
                                    const Meanwhile& meanwhile) {
  const auto add_product = [&](int64_t k, const float* left, [[maybe_unused]] const float* right,
                               int64_t row_bytes) __attribute__((always_inline)) {
    const TileRows weights = of_weights(first + k);
    _tile_loadd(4, weights.data, weights.row_bytes);
    _tile_loadd(6, left, row_bytes);
    if constexpr (kColumns == 2) _tile_loadd(7, right, row_bytes);
    if constexpr (kRows == 2) {
      const TileRows below = of_weights(first + b.tiles + k);
      _tile_loadd(5, below.data, below.row_bytes);
    }
    if constexpr (kPixelsAreRows) {
      _tile_dpbf16ps(0, 6, 4);
      if constexpr (kColumns == 2) _tile_dpbf16ps(1, 7, 4);
      if constexpr (kRows == 2) _tile_dpbf16ps(2, 6, 5);
      if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 7, 5);
    } else {
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kColumns == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kRows == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (kRows == 2 && kColumns == 2) _tile_dpbf16ps(3, 5, 7);
    }
  };
  int64_t k = begin;
  for (; k < std::min(end, b.blocks); ++k) {
    const float* const pixels = b.pixels + b.at[k];
    add_product(k, pixels, pixels + b.step, b.row_bytes);
    meanwhile();
  }
  for (; k < end; ++k) {
    const int64_t at = (k - b.blocks) * kTileEntries;
    add_product(k, b.rest[0] + at, b.rest[1] + at, kTileRowBytes);
    meanwhile();
  }
}

template <int kRows, int kColumns>
inline void clear_block_of_tiles() {
  _tile_zero(0);
  if constexpr (kColumns == 2) _tile_zero(1);
  if constexpr (kRows == 2) _tile_zero(2);
  if constexpr (kRows == 2 && kColumns == 2) _tile_zero(3);
}

// sums [kRows * kTileSide][kColumns * kTileSide] = the registers or, with kPixelsAreRows, one after
// the other.
template <bool kPixelsAreRows, int kRows, int kColumns>
inline void store_block_of_tiles(float* sums) {
  constexpr int64_t kRowBytes = kPixelsAreRows ? kTileRowBytes : kColumns * kTileRowBytes;
  constexpr int64_t kStep = kPixelsAreRows ? kTileEntries : kTileSide;
  _tile_stored(0, sums, kRowBytes);
  if constexpr (kColumns == 2) _tile_stored(1, sums + kStep, kRowBytes);
  if constexpr (kRows == 2) {
    float* const below = sums + kColumns * kTileEntries;
    _tile_stored(2, below, kRowBytes);
    if constexpr (kColumns == 2) _tile_stored(3, below + kStep, kRowBytes);
  }
}

// The registers = what store_block_of_tiles<true> stored.
template <int kRows, int kColumns>
inline void load_block_of_tiles(const float* sums) {
  _tile_loadd(0, sums, kTileRowBytes);
  if constexpr (kColumns == 2) _tile_loadd(1, sums + kTileEntries, kTileRowBytes);
  if constexpr (kRows == 2) {
    const float* const below = sums + kColumns * kTileEntries;
    _tile_loadd(2, below, kTileRowBytes);
    if constexpr (kColumns == 2) _tile_loadd(3, below + kTileEntries, kTileRowBytes);
  }
}

// The parts of lines among kColumns columns: their lanes, and where lane 0 would go.
template <int kColumns>
class LineParts {
 public:
  void find(const Lines& lines, int64_t column, int64_t columns) {
    number_ = 0;
    const int64_t left = columns - column;
    int64_t line = column / lines.computed, x = column % lines.computed;
    for (int64_t lane = 0; lane < std::min<int64_t>(kColumns, left); ++line, x = 0) {
      const int64_t kept = std::min({left, lane + lines.kept - x, int64_t{kColumns}});
      if (kept > lane) {
        parts_[number_++] = {line * lines.stride + x - lane, first_lanes(kept) - first_lanes(lane)};
      }
      lane += lines.computed - x;
    }
  }

  void store(c10::BFloat16* target, Vector<float> value) const {
    for (int i = 0; i < number_; ++i) {
      store_masked(target + parts_[i].at, value, static_cast<uint32_t>(parts_[i].lanes));
    }
  }

  // As many numbers as two vectors of sums have.
  void store(c10::BFloat16* target, __m512i value) const {
    for (int i = 0; i < number_; ++i) {
      _mm512_mask_storeu_epi16(target + parts_[i].at, static_cast<__mmask32>(parts_[i].lanes),
                               value);
    }
  }

 private:
  static uint64_t first_lanes(int64_t count) { return (uint64_t{1} << count) - 1; }

  struct Part {
    int64_t at;
    uint64_t lanes;
  };
  Part parts_[kColumns];
  int number_ = 0;
};
using TileLines = LineParts<kTileSide>;
using TwoTileLines = LineParts<2 * kTileSide>;

// Finishes some rows of one or two columns of tiles.
template <int kRows, int kColumns>
DDRF_INLINE void finish_rows(Vector<float> (&sum)[kRows][kColumns], const Sums<float>& c,
                             int64_t row, int64_t column, const TileLines* parts) {
  if (c.rounded == nullptr || c.lines.stride == 0) return finish_block(sum, c, row, column);
  complete_block(sum, c, row, column);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    c10::BFloat16* const target = c.rounded + (row + r) * c.rounded_row;
#pragma GCC unroll 8
    for (int v = 0; v < kColumns; ++v) parts[v].store(target, sum[r][v]);
  }
}

// Finishes rows [row, row + rows) of one or two columns of tiles, of [rows][kColumns * kTileSide].
template <int kColumns>
inline void finish_tiles(const float* sums, const Sums<float>& c, int64_t row, int64_t rows,
                         int64_t column, const TileLines* parts) {
  const auto finish = [&]<int kRows>(std::integral_constant<int, kRows>, int64_t first) {
    Vector<float> sum[kRows][kColumns];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kColumns; ++v) {
        sum[r][v] = load_vector(&sums[((first + r) * kColumns + v) * kTileSide]);
      }
    }
    finish_rows(sum, c, row + first, column, parts);
  };
  int64_t first = 0;
  for (; first + 4 <= rows; first += 4) finish(std::integral_constant<int, 4>(), first);
  for (; first < rows; ++first) finish(std::integral_constant<int, 1>(), first);
}

// The same for a tile with the pixels as its rows.
inline void finish_transposed_tile(const float* sums, const Sums<float>& c, int64_t row,
                                   int64_t rows, int64_t column, const TileLines& lines) {
  Vector<float> square[kTileSide];
  load_square(sums, kTileSide, kTileSide, square);
  transpose_square<float>(square);
#pragma GCC unroll 16
  for (int r = 0; r < kTileSide; ++r) {
    Vector<float> sum[1][1] = {{square[r]}};
    if (r < rows) finish_rows(sum, c, row + r, column, &lines);
  }
}

// Completes the sums of a pixel: those of outputs [row, row + rows).
class OfOutputs {
 public:
  OfOutputs(const Sums<float>& c, int64_t row, int64_t rows)
      : epilogue_(*c.epilogue),
        bias_(epilogue_.row_bias == nullptr ? Vector<float>{}
                                            : load_partial(epilogue_.row_bias + row, rows)) {}

  DDRF_INLINE Vector<float> operator()(Vector<float> sums) const {
    return rectified<float>(epilogue_.activation, sums * epilogue_.scale + bias_);
  }

 private:
  const Epilogue<float>& epilogue_;
  Vector<float> bias_;
};

// The same for one or two such tiles, one after the other, that are rounded: pairs of pixels are
// transposed, half as much as their sums.
template <int kColumns>
inline void finish_pixel_rows(const float* sums, const Sums<float>& c, int64_t row, int64_t rows,
                              const TwoTileLines& lines) {
  const OfOutputs complete(c, row, rows);
  Vector<float> square[kTileSide] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kColumns * kTileSide / 2; ++i) {
    const float* const first = sums + 2 * i * kTileSide;
    square[i] = paired(complete(load_vector(first)), complete(load_vector(first + kTileSide)));
  }
  transpose_square<float>(square);
#pragma GCC unroll 16
  for (int r = 0; r < kTileSide; ++r) {
    if (r < rows) lines.store(c.rounded + (row + r) * c.rounded_row, (__m512i)square[r]);
  }
}

// The same for an image whose channels lie side by side: of pixels [column, end).
inline void store_pixel_rows(const float* sums, const Sums<float>& c, int64_t row, int64_t rows,
                             int64_t column, int64_t end) {
  const OfOutputs complete(c, row, rows);
  c10::BFloat16* const target = c.rounded + row * c.rounded_row;
  int64_t line = column / c.lines.computed, x = column % c.lines.computed;
  for (; column < end; ++column, sums += kTileSide) {
    if (x < c.lines.kept) {
      store_partial(target + line * c.lines.stride + x * c.rounded_column,
                    complete(load_vector(sums)), rows);
    }
    if (++x == c.lines.computed) {
      x = 0;
      ++line;
    }
  }
}

// Calls body with the numbers of rows of tiles and of tiles of pixels of a block, one or two.
template <class Body>
inline void with_block_size(bool two_rows, bool two_columns, const Body& body) {
  constexpr std::integral_constant<int, 1> kOne;
  constexpr std::integral_constant<int, 2> kTwo;
  if (two_columns) {
    two_rows ? body(kTwo, kTwo) : body(kOne, kTwo);
  } else {
    two_rows ? body(kTwo, kOne) : body(kOne, kOne);
  }
}

// C = A B with of_a(i) the tiles of the weights A, [row][order.tiles()], and the entries of the
// pixels B, in the order of pairs and their taps, at b + offsets[].b. Behind its columns 15 more
// must be readable.
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
  TilesOfPixels of_b{
      b, {packed.get(), packed.get() + packed_size}, at.get(), 0, kTileSide, blocks, tiles};
  if (blocks > 0) of_b.row_bytes = (offsets[order.taps].b - at[0]) * int64_t{sizeof(float)};
  // A block's sums are finished while the next one's tiles are multiplied, which pays where the
  // same columns are read again.
  const bool overlaps = rows > 2 * kTileSide;
  struct {
    int64_t row = 0, rows = 0, column = 0;
    const TileLines* parts = nullptr;
    const float* sums = nullptr;
  } last;
  const auto finish_last = [&] {
    if (last.column + kTileSide < columns) {
      finish_tiles<2>(last.sums, c, last.row, last.rows, last.column, last.parts);
    } else {
      finish_tiles<1>(last.sums, c, last.row, last.rows, last.column, last.parts);
    }
  };
  std::array<std::array<TileLines, 2>, 2> parts;  // of two columns of tiles, and of those before
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
    for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
      with_block_size(
          row + kTileSide < rows, two_columns,
          [&]<int kRows, int kColumns>(std::integral_constant<int, kRows>,
                                       std::integral_constant<int, kColumns>) {
            clear_block_of_tiles<kRows, kColumns>();
            multiply_block_of_tiles<false, kRows, kColumns>(of_a, row / kTileSide * tiles, of_b, 0,
                                                            tiles, [] {});
            finish_last();
            float* const target = sums.get() + (last.sums == sums.get() ? kBlockEntries : 0);
            finish_memory_accesses();
            store_block_of_tiles<false, kRows, kColumns>(target);
            finish_memory_accesses();
            last = {row, std::min(rows - row, kRows * kTileSide), column, own_parts.data(), target};
            if (!overlaps) {
              finish_last();
              last.rows = 0;
            }
          });
    }
  }
  finish_last();
}

// The same with the pixels as rows of the tiles: `taps` are the offsets in pixels of an entry's
// tap, the pairs of blocks lie at [block][pixel][pair], and `weights` in tiles that are transposed.
// Weights are taken in turns that stay in the first level of the cache: the second one delivers
// less than a line in a cycle, which is enough for the pixels alone.
inline void multiply_pixel_rows(const float* weights, int64_t rows, const TileOrder& order,
                                const float* b, const Offsets* offsets, const int64_t* taps,
                                int64_t columns, const Sums<float>& c) {
  constexpr int64_t kMostTiles = 20;  // of each of two rows of weights in a turn
  const int64_t tiles = order.tiles(), blocks = order.block_tiles(), rest = order.rest();
  const int64_t turns = ceil_div(tiles, kMostTiles), turn = ceil_div(tiles, turns);
  const int64_t packed_size = (tiles - blocks) * kTileEntries;
  const Scratch<float> packed(2 * packed_size), sums(2 * kBlockEntries);
  const Scratch<float> earlier(turns > 1 ? ceil_div(columns, 2 * kTileSide) * kBlockEntries : 0);
  const Scratch<int64_t> at(blocks);
  for (int64_t block = 0, k = 0; k < blocks; ++block) {
    const int64_t first = offsets[block * kTileSide * order.taps].b - taps[0];
    for (int64_t t = 0; t < order.taps; ++t) at[k++] = first + kTileSide * taps[t];
  }
  TilesOfPixels of_b{b,
                     {packed.get(), packed.get() + packed_size},
                     at.get(),
                     kTileRowBytes,
                     kTileEntries,
                     blocks,
                     tiles};
  const auto of_weights = [=](int64_t i) {
    return TileRows{weights + i * kTileEntries, kTileRowBytes};
  };
  // The sums of a block are finished, a row of tiles after each product of the next one's.
  struct {
    int64_t row = 0, rows = 0, column = 0, columns = 0;
    const float* sums = nullptr;
    TwoTileLines lines;
  } last;
  const auto finish_some = [&] {
    if (last.rows <= 0) return;
    const int64_t taken = std::min(last.rows, kTileSide);
    if (c.rounded == nullptr || c.earlier != nullptr) {
      for (int64_t i = 0; i < last.columns; ++i) {
        const int64_t column = last.column + i * kTileSide;
        TileLines lines;
        lines.find(c.lines, column, columns);
        finish_transposed_tile(last.sums + i * kTileEntries, c, last.row, taken, column, lines);
      }
    } else if (c.rounded_column != 1) {
      store_pixel_rows(last.sums, c, last.row, taken, last.column,
                       std::min(columns, last.column + last.columns * kTileSide));
    } else if (last.columns == 2) {
      finish_pixel_rows<2>(last.sums, c, last.row, taken, last.lines);
    } else {
      finish_pixel_rows<1>(last.sums, c, last.row, taken, last.lines);
    }
    last.row += kTileSide;
    last.rows -= kTileSide;
    last.sums += last.columns * kTileEntries;
  };
  float* target = sums.get();
  const TileRegisters registers;
  for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
    for (int64_t k = 0; k < tiles; k += turn) {
      const int64_t end = std::min(k + turn, tiles);
      for (int64_t column = 0; column < columns; column += 2 * kTileSide) {
        const bool two_columns = column + kTileSide < columns;
        of_b.pixels = b + column * kTileSide;
        if (end > blocks) {
          for (int64_t i = 0; i < 1 + two_columns; ++i) {
            float* const entries = packed.get() + i * packed_size;
            pack_rest(b, column + i * kTileSide, offsets + blocks * kTileSide, rest, entries);
            transpose_tiles(tiles - blocks, entries);
          }
          finish_memory_accesses();
        }
        with_block_size(row + kTileSide < rows, two_columns,
                        [&]<int kRows, int kColumns>(std::integral_constant<int, kRows>,
                                                     std::integral_constant<int, kColumns>) {
                          float* const own =
                              earlier.get() + column / (2 * kTileSide) * kBlockEntries;
                          if (k == 0) {
                            clear_block_of_tiles<kRows, kColumns>();
                          } else {
                            load_block_of_tiles<kRows, kColumns>(own);
                          }
                          multiply_block_of_tiles<true, kRows, kColumns>(
                              of_weights, row / kTileSide * tiles, of_b, k, end, finish_some);
                          while (last.rows > 0) finish_some();
                          if (end < tiles) return store_block_of_tiles<true, kRows, kColumns>(own);
                          finish_memory_accesses();
                          store_block_of_tiles<true, kRows, kColumns>(target);
                          finish_memory_accesses();
                          last.row = row;
                          last.rows = std::min(rows - row, kRows * kTileSide);
                          last.column = column;
                          last.columns = kColumns;
                          last.sums = std::exchange(
                              target, sums.get() + (target == sums.get() ? kBlockEntries : 0));
                          last.lines.find(c.lines, column, columns);
                        });
      }
    }
  }
  while (last.rows > 0) finish_some();
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

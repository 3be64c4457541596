// Geometry of a convolution as a sum over taps, and of the tiles it is computed in.
//
// Along each axis, output q reads input q * in_step + shift[t] for tap t, and is stored at
// out_offset + q * out_step. That covers the convolution itself and, one residue of the stride at a
// time, its transpose.
//
// A tile of the input is copied to scratch such that the outputs of the tile and what each tap
// reads for them lie at a constant distance: output (y, x) of the tile is pixel p = y * row_stride
// + x, and tap t reads scratch[p + tap_offset[t]], whatever stride, dilation and padding. The
// columns between one row's outputs and the next row's are computed too and dropped; they are few.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/dynamic_conv.h"

namespace ddrf_fast {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t floor_mod(int64_t a, int64_t b) { return ((a % b) + b) % b; }

struct TapAxis {
  int64_t in_size, count;  // input positions; outputs
  int64_t in_step, out_offset, out_step;
  std::vector<int64_t> taps;  // which of the kernel's positions
  std::vector<int64_t> shift;

  // Whether some tap of some output falls outside the input.
  bool reaches_outside() const {
    if (taps.empty() || count == 0) return false;
    const auto [low, high] = std::minmax_element(shift.begin(), shift.end());
    return *low < 0 || (count - 1) * in_step + *high >= in_size;
  }
};

inline TapAxis forward_axis(const DynamicConvShape& shape, int axis) {
  TapAxis result{shape.in_size[axis], shape.out_size[axis], shape.stride[axis], 0, 1, {}, {}};
  for (int64_t tap = 0; tap < shape.kernel[axis]; ++tap) {
    result.taps.push_back(tap);
    result.shift.push_back(tap * shape.dilation[axis] - shape.padding[axis]);
  }
  return result;
}

// The input gradient at positions phase, phase + stride, ...: its input is the output's gradient.
inline TapAxis input_grad_axis(const DynamicConvShape& shape, int axis, int64_t phase) {
  const int64_t stride = shape.stride[axis];
  const int64_t count = std::max<int64_t>(0, ceil_div(shape.in_size[axis] - phase, stride));
  TapAxis result{shape.out_size[axis], count, 1, phase, stride, {}, {}};
  for (int64_t tap = 0; tap < shape.kernel[axis]; ++tap) {
    const int64_t position = phase + shape.padding[axis] - tap * shape.dilation[axis];
    if (floor_mod(position, stride) != 0) continue;
    result.taps.push_back(tap);
    result.shift.push_back(position / stride);
  }
  return result;
}

// The same at all positions: zeros are put between the positions of its input.
inline TapAxis spread_input_grad_axis(DynamicConvShape shape, int axis) {
  shape.out_size[axis] = std::max<int64_t>(0, (shape.out_size[axis] - 1) * shape.stride[axis] + 1);
  shape.stride[axis] = 1;
  return input_grad_axis(shape, axis, 0);
}

// The taps that two axes keep, among the kernel's.
inline std::vector<int64_t> kept_taps(const DynamicConvShape& shape, const TapAxis& y,
                                      const TapAxis& x) {
  std::vector<int64_t> result;
  for (int64_t u : y.taps) {
    for (int64_t v : x.taps) result.push_back(u * shape.kernel[1] + v);
  }
  return result;
}

// The tiles of one axis. A run is a row of scratch positions that lie in_step apart in the input:
// position i of a run holds input q0 * in_step + origin + i * in_step, q0 the tile's first output.
struct AxisTiles {
  int64_t count = 0;              // outputs
  int64_t extent = 1, tiles = 0;  // outputs of one tile (the last may have fewer); tiles
  int64_t length = 1;             // positions of a run
  std::vector<int64_t> run_origin;
  std::vector<int64_t> tap_run, tap_offset;

  AxisTiles() = default;

  // With `compact` every tap that reads elsewhere has a run of its own, so that runs hold `extent`
  // positions, and no columns between two rows are computed for nothing.
  AxisTiles(const TapAxis& axis, int64_t wanted_tiles, bool compact = false) : count(axis.count) {
    extent = std::max<int64_t>(1, ceil_div(axis.count, wanted_tiles));
    tiles = ceil_div(axis.count, extent);
    const size_t taps = axis.taps.size();
    tap_run.resize(taps);
    tap_offset.resize(taps);
    std::vector<size_t> order(taps);
    for (size_t i = 0; i < taps; ++i) order[i] = i;
    std::sort(order.begin(), order.end(), [&](size_t a, size_t b) {
      const int64_t residue_a = floor_mod(axis.shift[a], axis.in_step);
      const int64_t residue_b = floor_mod(axis.shift[b], axis.in_step);
      return residue_a != residue_b ? residue_a < residue_b : axis.shift[a] < axis.shift[b];
    });
    int64_t previous = 0, span = 0;
    for (size_t tap : order) {
      const int64_t shift = axis.shift[tap];
      // Taps far apart (large dilation) get runs of their own rather than one long run.
      if (run_origin.empty() || floor_mod(shift - previous, axis.in_step) != 0 ||
          (shift - previous) / axis.in_step > (compact ? 0 : extent)) {
        run_origin.push_back(shift);
      }
      tap_run[tap] = static_cast<int64_t>(run_origin.size()) - 1;
      tap_offset[tap] = (shift - run_origin.back()) / axis.in_step;
      span = std::max(span, tap_offset[tap]);
      previous = shift;
    }
    length = extent + span;
  }

  int64_t runs() const { return static_cast<int64_t>(run_origin.size()); }
};

struct Tiles {
  AxisTiles y, x;
  int64_t slack = 0;  // elements a block of pixels may be read beyond the tile

  int64_t row_stride() const { return x.length; }
  // Elements of a channel, and from one channel to the next: channels begin with a cache line, and
  // do not all fall on the same few places of the cache.
  int64_t channel_size() const { return y.runs() * x.runs() * y.length * x.length; }
  int64_t channel_stride() const {
    constexpr int64_t kLine = 16;
    const int64_t lines = ceil_div(channel_size() + slack, kLine);
    return (lines % 8 == 0 ? lines + 1 : lines) * kLine;
  }
  int64_t count() const { return y.tiles * x.tiles; }
  int64_t pixels() const { return (y.extent - 1) * row_stride() + x.extent; }

  // Tile number `tile`, the last of a row or column being smaller: its first output, its outputs,
  // and its pixels.
  struct Place {
    int64_t tile_y, tile_x, y, x, rows, columns, pixels;
  };
  Place place(int64_t tile) const {
    const int64_t tile_y = tile / x.tiles, tile_x = tile % x.tiles;
    const int64_t first_y = tile_y * y.extent, first_x = tile_x * x.extent;
    const int64_t rows = std::min(y.extent, y.count - first_y);
    const int64_t columns = std::min(x.extent, x.count - first_x);
    return {tile_y, tile_x, first_y, first_x, rows, columns, (rows - 1) * row_stride() + columns};
  }

  // Vectors of pixels of the tiles in a column of tiles.
  int64_t vectors(int64_t lanes) const {
    const int64_t last_rows = y.count - (y.tiles - 1) * y.extent;
    const auto of_rows = [&](int64_t rows) {
      return ceil_div((rows - 1) * row_stride() + x.extent, lanes);
    };
    return (y.tiles - 1) * of_rows(y.extent) + of_rows(last_rows);
  }

  // Distance between an output pixel and what each tap [kept rows x kept columns] reads for it.
  std::vector<int64_t> tap_offsets() const {
    std::vector<int64_t> offsets;
    for (size_t u = 0; u < y.tap_run.size(); ++u) {
      for (size_t v = 0; v < x.tap_run.size(); ++v) {
        const int64_t plane = y.tap_run[u] * x.runs() + x.tap_run[v];
        offsets.push_back((plane * y.length + y.tap_offset[u]) * row_stride() + x.tap_offset[v]);
      }
    }
    return offsets;
  }
};

// Cuts the outputs into tiles of at most `max_pixels` outputs for which `channels` input channels
// and `sums` numbers for each pixel fit `budget` elements, and into at least `min_tiles` where
// there are enough rows. Depends on shapes alone, never on the number of threads.
inline Tiles choose_tiles(const TapAxis& y, const TapAxis& x, int64_t channels, int64_t sums,
                          int64_t slack, int64_t budget, int64_t max_pixels, int64_t min_tiles,
                          bool compact) {
  constexpr int64_t kMaxColumns = 256;
  Tiles tiles;
  tiles.slack = slack;
  tiles.x = AxisTiles(x, std::max<int64_t>(1, ceil_div(x.count, kMaxColumns)), compact);
  for (int64_t wanted = 1;; wanted += 1 + wanted / 4) {
    tiles.y = AxisTiles(y, wanted);
    const bool fits = channels * tiles.channel_stride() + sums * tiles.pixels() <= budget &&
                      tiles.pixels() <= max_pixels && tiles.count() >= min_tiles;
    if (fits || tiles.y.extent == 1) return tiles;
  }
}

// The tiles, or ones of fewer rows, at least half as many, whose pixels fill vectors better.
inline Tiles fill_vectors(const Tiles& tiles, const TapAxis& y, int64_t lanes) {
  Tiles best = tiles, flatter = tiles;
  for (int64_t extent = tiles.y.extent - 1; 2 * extent >= tiles.y.extent; --extent) {
    flatter.y = AxisTiles(y, ceil_div(y.count, extent));
    if (flatter.vectors(lanes) < best.vectors(lanes)) best = flatter;
  }
  return best;
}

}  // namespace ddrf_fast

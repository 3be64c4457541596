// The Winograd plan: 3x3 taps one pixel apart, as F(4x4, 3x3) or F(4x2, 3x3) of Winograd's minimal
// filtering (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).
//
// A tile of 4x4 outputs needs 6x6 inputs. With U = G W G^T and V = B^T X B (6x6 each)
//
//   Y = A^T (sum over channels of U * V, entry by entry) A
//
// takes 36 multiplications where the sum over taps takes 144; a tile of 4x2 outputs, 6x4 inputs, 24
// where it takes 72. The points of the transform of four outputs are 0, +-11/16, +-23/16 and
// infinity, and products are summed in turns (dynamic_conv_gemm.h): so the error of float32 stays
// within about twice that of torch's direct sum for 4x4 outputs of up to kMostDepth channels and
// for 4x2 outputs of any number, which it does neither with the usual points 0, +-1, +-2 nor with
// long sums.
//
// The products of an entry are matrix products over channels with the tiles of some rows as pixels,
// numbered row after row. Two schedules, as in dynamic_conv_correlate.h: "once" transforms the
// kernels of some samples first and then takes the tiles of a sample in chunks; "blocks" takes all
// tiles of all samples first, and then some output channels' kernels at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/capability.h"
#include "common/parallel.h"
#include "cpu/dynamic_conv_gemm.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// The transforms of one axis, for four outputs (six entries) and for two (four). kNear and kFar are
// the points; what is computed from them is exact in float32 where it multiplies pixels.
inline constexpr double kNear = 11.0 / 16, kFar = 23.0 / 16;
inline constexpr double kNear2 = kNear * kNear, kFar2 = kFar * kFar;
// The rows of G at the points.
inline constexpr double kNearTap = 0.5 / (kNear2 * (kNear2 - kFar2));
inline constexpr double kFarTap = 0.5 / (kFar2 * (kFar2 - kNear2));

// G: from three taps.
template <class Value>
DDRF_INLINE void transform_taps(const Value (&g)[3], Value (&u)[6]) {
  const Value even_near = g[0] * float(kNearTap) + g[2] * float(kNearTap * kNear2);
  const Value odd_near = g[1] * float(kNearTap * kNear);
  const Value even_far = g[0] * float(kFarTap) + g[2] * float(kFarTap * kFar2);
  const Value odd_far = g[1] * float(kFarTap * kFar);
  u[0] = g[0] * float(1 / (kNear2 * kFar2));
  u[1] = even_near + odd_near;
  u[2] = even_near - odd_near;
  u[3] = even_far + odd_far;
  u[4] = even_far - odd_far;
  u[5] = g[2];
}

template <class Value>
DDRF_INLINE void transform_taps(const Value (&g)[3], Value (&u)[4]) {
  const Value even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
  u[0] = g[0];
  u[1] = even + odd;
  u[2] = even - odd;
  u[3] = g[2];
}

// B^T, of inputs.
template <class Value>
DDRF_INLINE void transform_input(const Value (&d)[6], Value (&v)[6]) {
  const Value even_near = d[4] - d[2] * float(kFar2), even_far = d[4] - d[2] * float(kNear2);
  const Value odd_near = d[3] * float(kNear) - d[1] * float(kNear * kFar2);
  const Value odd_far = d[3] * float(kFar) - d[1] * float(kFar * kNear2);
  v[0] = d[4] - d[2] * float(kNear2 + kFar2) + d[0] * float(kNear2 * kFar2);
  v[1] = even_near + odd_near;
  v[2] = even_near - odd_near;
  v[3] = even_far + odd_far;
  v[4] = even_far - odd_far;
  v[5] = d[5] - d[3] * float(kNear2 + kFar2) + d[1] * float(kNear2 * kFar2);
}

template <class Value>
DDRF_INLINE void transform_input(const Value (&d)[4], Value (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// A^T, to outputs.
template <class Value>
DDRF_INLINE void transform_output(const Value (&m)[6], Value (&y)[4]) {
  const Value even_near = m[1] + m[2], odd_near = m[1] - m[2];
  const Value even_far = m[3] + m[4], odd_far = m[3] - m[4];
  y[0] = m[0] + even_near + even_far;
  y[1] = odd_near * float(kNear) + odd_far * float(kFar);
  y[2] = even_near * float(kNear2) + even_far * float(kFar2);
  y[3] = m[5] + odd_near * float(kNear * kNear2) + odd_far * float(kFar * kFar2);
}

template <class Value>
DDRF_INLINE void transform_output(const Value (&m)[4], Value (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

// Whether the transforms pay: for enough channels, which those of the other side share, and enough
// tiles to fill vectors.
template <class Scalar>
bool transforms_pay(const DynamicConvShape& shape, int64_t least_channels, int64_t least_tiles) {
  constexpr int64_t kEnoughChannels = 8, kManyChannels = 16;
  if (!std::is_same_v<accumulate_t<Scalar>, float> || shape.batch == 0) return false;
  for (int axis = 0; axis < 2; ++axis) {
    if (shape.kernel[axis] != 3 || shape.stride[axis] != 1 || shape.dilation[axis] != 1) {
      return false;
    }
  }
  const auto [fewer, more] = std::minmax({shape.in_per_group(), shape.out_per_group()});
  const auto tiles = [](const int64_t (&size)[2]) {
    return ceil_div(size[0], 4) * ceil_div(size[1], 2);
  };
  return fewer >= (more >= kManyChannels ? least_channels : kEnoughChannels) &&
         std::min(tiles(shape.out_size), tiles(shape.in_size)) >= least_tiles;
}

// Whether the plan wins. Products of pairs take half as long as those here, so that the transforms
// pay later; those by tiles of pairs take a sixteenth, so that they never do.
template <class Scalar>
bool fits_winograd(const DynamicConvShape& shape) {
  if constexpr (kPairs<Scalar>) return !kPairTiles && transforms_pay<Scalar>(shape, 16, 160);
  return transforms_pay<Scalar>(shape, 4, 24);
}

// Whether it wins for the gradient of kernels, whose products are in float32.
template <class Scalar>
bool fits_winograd_gradient(const DynamicConvShape& shape) {
  return transforms_pay<Scalar>(shape, 4, 24);
}

// Whether tiles of four columns win over such of two, for a sum over so many channels: a row fills
// about as many vectors of tiles, of which the last is computed whole. Without registers for sums
// in short turns the error would be too large.
inline bool fits_wide_tiles(int64_t channels, int64_t height, int64_t width) {
  constexpr int64_t kLeastDepth = 16, kMostDepth = 40, kLeastTiles = 16, kLane = kLanes<float>;
  const int64_t wide = 2 * ceil_div(width, 4 * kLane), narrow = ceil_div(width, 2 * kLane);
  return kManyRegisters && channels >= kLeastDepth && channels <= kMostDepth &&
         4 * wide <= 5 * narrow && ceil_div(height, 4) * ceil_div(width, 4) >= kLeastTiles;
}

// With tiles of 4 x kTileColumns outputs.
template <class Scalar, int kTileColumns>
class Winograd {
 public:
  using Acc = accumulate_t<Scalar>;

  Winograd(Direction direction, const TapAxis& y, const TapAxis& x, const DynamicConvShape& shape,
           bool has_ones)
      : direction_(direction), y_(y), x_(x), groups_(shape.groups), has_ones_(has_ones) {
    const bool forward = direction == Direction::kForward;
    channels_ = (forward ? shape.in_per_group() : shape.out_per_group()) + has_ones;
    outputs_ = forward ? shape.out_per_group() : shape.in_per_group();
    tile_columns_ = ceil_div(x_.count, kTileColumns);
    tiles_ = tile_columns_ * ceil_div(y_.count, kTileRows);
    const int64_t fitting = kSecondLevelBytes / (kEntries * channels_ * int64_t{sizeof(Acc)});
    int64_t most = std::clamp<int64_t>(fitting / kLane * kLane, kLane, kMostVectors * kLane);
    // Few samples are cut into smaller chunks, so that there are enough to share out, and small
    // maps of few samples into blocks.
    const int64_t planes = shape.batch * groups_;
    most = std::min(
        most, std::max<int64_t>(tiles_ * planes / kEnoughTasks / kLane, kBlockVectors) * kLane);
    const bool few = planes * ceil_div(tiles_, most) < kEnoughTasks;
    in_blocks_ = tiles_ <= (few ? 2 * kMapTiles : kMapTiles);
    chunk_ = in_blocks_ ? ceil_div(tiles_, kLane) * kLane : most;
    // Or somewhat smaller ones that two or four threads can share out more evenly.
    const auto longest_share = [&](int64_t tiles) {
      return ceil_div(planes * ceil_div(tiles_, tiles), 4) * tiles;
    };
    for (int64_t less = most - kLane; !in_blocks_ && 2 * less >= most; less -= kLane) {
      if (longest_share(less) < longest_share(chunk_)) chunk_ = less;
    }
    chunks_ = ceil_div(tiles_, chunk_);
  }

  std::string name() const {
    return "Winograd F(4x" + std::to_string(kTileColumns) + ", 3x3), " +
           (in_blocks_ ? "kernels mixed a block at a time" : "kernels mixed once");
  }
  int64_t parts() const { return chunks_; }

  // As Correlation::run.
  void run(const Mixer<Scalar>& mixer, const Image<const Scalar>& image, Activation activation,
           const Image<Scalar>& result, Acc* sums, bool accumulate = false) const {
    if constexpr (std::is_same_v<Acc, float>) {
      const Job job{mixer, image, activation, result, sums, accumulate};
      in_blocks_ ? run_in_blocks(job) : run_once(job);
    }
  }

 private:
  static constexpr int kLane = kLanes<Acc>;
  static constexpr int kTileRows = 4, kWide = kTileColumns + 2, kEntries = 6 * kWide;
  static constexpr int64_t kMapTiles = 128 / kTileColumns, kEnoughTasks = 8;
  static constexpr int64_t kMostVectors = 6;  // of tiles in a chunk
  static constexpr int64_t kSecondLevelBytes = 600 * 1024;
  static constexpr int64_t kAhead = 2;  // channels between fetching and reading
  // Output channels between two inverse transforms: inputs are read once for each block, whose
  // kernels Intel's larger second level has room for.
  static constexpr int64_t kMostOutputs = 24;
  static int64_t block() { return kManyRegisters && is_intel() ? kMostOutputs : 16; }
  static constexpr int64_t kRow = kTileColumns * kLane;  // pixels of a row of a vector of tiles
  static constexpr int64_t kPlane = kTileRows * kRow, kWindowRow = kRow + kLane;
  // Between two entries' planes, so that they do not fall on the same cache sets.
  static constexpr int64_t kStagger = 64 / sizeof(Acc);

  using Job = PlanJob<Scalar>;

  int64_t kernel_rows() const { return direction_ == Direction::kForward ? outputs_ : channels_; }
  int64_t kernel_columns() const {
    return direction_ == Direction::kForward ? channels_ : outputs_;
  }

  // ---- kernels: U[entry][row of W_b][channel of W_b] ----

  // Transforms rows [0, rows) of kernels [rows][columns][9].
  void transform_kernels(const Acc* kernels, int64_t rows, int64_t columns, Acc* u,
                         int64_t u_entry) const {
    const bool flip = direction_ == Direction::kInputGradient;
    const Scratch<Acc> taps(9 * kLane);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < columns; c += kLane) {
        const int64_t count = std::min<int64_t>(kLane, columns - c);
        const Acc* source = kernels + (r * columns + c) * 9;
        gather_taps(source, count, taps.get());
        Vector<Acc> column[kWide][3];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          Vector<Acc> row[3];
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) {
            const int tap = i * 3 + j;
            row[j] = load_vector(&taps[(flip ? 8 - tap : tap) * kLane]);
          }
          Vector<Acc> wide[kWide];
          transform_taps(row, wide);
#pragma GCC unroll 6
          for (int j = 0; j < kWide; ++j) column[j][i] = wide[j];
        }
#pragma GCC unroll 6
        for (int j = 0; j < kWide; ++j) {
          Vector<Acc> tall[6];
          transform_taps(column[j], tall);
#pragma GCC unroll 6
          for (int i = 0; i < 6; ++i) {
            Acc* target = u + (i * kWide + j) * u_entry + r * columns + c;
            if (count == kLane) {
              store_vector(target, tall[i]);
            } else {
              store_partial(target, tall[i], count);
            }
          }
        }
      }
    }
  }

  // taps[t][lane] = source[lane * 9 + t] for `count` lanes.
  static void gather_taps(const Acc* source, int64_t count, Acc* taps) {
    if (count < kLane) std::fill_n(taps, 9 * kLane, Acc(0));
    if constexpr (kLane == 16) {
      if (count == kLane) {
        Vector<Acc> square[kLane];
        // Nine numbers of each row are wanted; the last row must not be read beyond them.
#pragma GCC unroll 16
        for (int i = 0; i < kLane; ++i) square[i] = load_partial(source + i * 9, 9);
        transpose_square<Acc>(square);
#pragma GCC unroll 9
        for (int t = 0; t < 9; ++t) store_vector(taps + t * kLane, square[t]);
        return;
      }
    }
    for (int64_t i = 0; i < count; ++i) {
      for (int t = 0; t < 9; ++t) taps[t * kLane + i] = source[i * 9 + t];
    }
  }

  // ---- inputs: V[entry][channel][tile] ----

  // Transforms channels [begin, end) of tiles [first, first + count), a multiple of a vector apart.
  void transform_inputs(const Planes<Scalar>& planes, int64_t begin, int64_t end, int64_t first,
                        int64_t count, Acc* v, int64_t v_entry, int64_t v_row, Acc* window) const {
    const int64_t y0 = std::min(y_.shift.front(), y_.shift.back());
    const int64_t x0 = std::min(x_.shift.front(), x_.shift.back());
    const std::vector<Segment> segments = segments_of(first, count);
    int64_t c = begin;
    // A channel's segments one after the other: they lie side by side.
    if constexpr (kMaskedLoads<Scalar>) {
      for (; planes.column_step == 1 && c < std::min(end, planes.channels); ++c) {
        for (const Segment& at : segments) {
          const int64_t top = y0 + at.row * kTileRows, left = x0 + at.column * kTileColumns;
          const Scalar* source = planes.data + c * planes.channel_step + left;
          Acc* target = v + (c - begin) * v_row + at.done;
          // The same rows of a later channel: too short for the hardware to see them coming.
          const int64_t ahead = std::clamp<int64_t>(top, 0, planes.height - 6);
          for (int64_t i = 0; i < 6 * (planes.height >= 6); ++i) {
            const Scalar* row =
                source + kAhead * planes.channel_step + (ahead + i) * planes.row_step;
            for (int64_t x = 0; x < kRow; x += 64 / int64_t{sizeof(Scalar)}) {
              __builtin_prefetch(row + x);
            }
          }
          if (top >= 0 && top + 6 <= planes.height && left >= 0 &&
              left + kRow + 2 <= planes.width) {
            transform_tiles(
                [&](int i) __attribute__((always_inline)) {
                  const Scalar* row = source + (top + i) * planes.row_step;
                  PixelRow pixels;
                  for_each_constant<kTileColumns>([&](auto p) __attribute__((always_inline)) {
                    pixels.part[p()] = load_vector(row + p() * kLane);
                  });
                  pixels.part[kTileColumns] = load_partial(row + kRow, 2);
                  return pixels;
                },
                target, v_entry, at.taken);
            continue;
          }
          LaneMask masks[kTileColumns + 1];
          for (int p = 0; p <= kTileColumns; ++p) {
            masks[p] = lane_mask(lanes_inside<kLane>(left + p * kLane, planes.width));
          }
          transform_tiles(
              [&](int i) __attribute__((always_inline)) {
                const int64_t y = top + i;
                if (y < 0 || y >= planes.height) return PixelRow{};
                const Scalar* row = source + y * planes.row_step;
                PixelRow pixels;
                for_each_constant<kTileColumns + 1>([&](auto p) __attribute__((always_inline)) {
                  pixels.part[p()] = load_masked(row + p() * kLane, masks[p()]);
                });
                return pixels;
              },
              target, v_entry, at.taken);
        }
      }
    }
    for (; c < end; c += kLane) {
      const int64_t channels = std::min<int64_t>(kLane, end - c);
      for (const Segment& at : segments) {
        const Window pixels{y0 + at.row * kTileRows,       1, 6,
                            x0 + at.column * kTileColumns, 1, kRow + 2};
        copy_window(planes, c, c + channels, pixels, window, 6 * kWindowRow, kWindowRow);
        for (int64_t i = 0; i < channels; ++i) {
          const Acc* source = window + i * 6 * kWindowRow;
          transform_tiles(
              [&](int y) __attribute__((always_inline)) {
                const Acc* row = source + y * kWindowRow;
                PixelRow pixels;
                for_each_constant<kTileColumns + 1>([&](auto p) __attribute__((always_inline)) {
                  pixels.part[p()] = load_vector(row + p() * kLane);
                });
                return pixels;
              },
              v + (c + i - begin) * v_row + at.done, v_entry, at.taken);
        }
      }
    }
  }

  // Tiles that lie side by side, at most a vector of them: `taken` of them from (row, column) on,
  // `done` tiles before them.
  struct Segment {
    int64_t done, taken, row, column;
  };
  std::vector<Segment> segments_of(int64_t first, int64_t count) const {
    std::vector<Segment> result;
    for (int64_t done = 0; done < count; done += result.back().taken) {
      const int64_t column = (first + done) % tile_columns_;
      const int64_t taken = std::min({count - done, tile_columns_ - column, int64_t{kLane}});
      result.push_back({done, taken, (first + done) / tile_columns_, column});
    }
    return result;
  }

  static constexpr int64_t window_size() { return kLane * 6 * kWindowRow; }

  // The pixels of a row that a vector of tiles needs: of the last part the first two.
  struct PixelRow {
    Vector<Acc> part[kTileColumns + 1];
  };

  // One vector of tiles of the rows load(0) to load(5).
  template <class Load>
  DDRF_INLINE static void transform_tiles(const Load& load, Acc* target, int64_t v_entry,
                                          int64_t count) {
    constexpr auto kIndices = std::make_index_sequence<kLane>();
    Vector<Acc> rows[kTileColumns + 1][6];
    for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
      const PixelRow pixels = load(i());
      for_each_constant<kTileColumns + 1>(
          [&](auto p) __attribute__((always_inline)) { rows[p()][i()] = pixels.part[p()]; });
    });
    for_each_constant<kTileColumns + 1>([&](auto p) __attribute__((always_inline)) {
      Vector<Acc> tall[6];
      transform_input(rows[p()], tall);
      for_each_constant<6>([&](auto i)
                               __attribute__((always_inline)) { rows[p()][i()] = tall[i()]; });
    });
    for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
      Vector<Acc> parts[kTileColumns], columns[kTileColumns], taps[kWide], wide[kWide];
      for_each_constant<kTileColumns>(
          [&](auto p) __attribute__((always_inline)) { parts[p()] = rows[p()][i()]; });
      deinterleave<Acc>(parts, columns);
      for_each_constant<kTileColumns>(
          [&](auto j) __attribute__((always_inline)) { taps[j()] = columns[j()]; });
      const Vector<Acc> rest = rows[kTileColumns][i()];
      taps[kTileColumns] = followed_by<Acc, 0>(columns[0], rest, kIndices);
      taps[kTileColumns + 1] = followed_by<Acc, 1>(columns[1], rest, kIndices);
      transform_input(taps, wide);
      // Lanes beyond the row's last tile belong to the next row, which comes later.
      for_each_constant<kWide>([&](auto j) __attribute__((always_inline)) {
        if (count == kLane) {
          store_vector(target + (i() * kWide + j()) * v_entry, wide[j()]);
        } else {
          store_partial(target + (i() * kWide + j()) * v_entry, wide[j()], count);
        }
      });
    });
  }

  // ---- outputs ----

  // From M[entry][channel][tile] to the image: output channels [output, output + channels) of the
  // group, tiles [first, first + count).
  void transform_outputs(const Job& job, int64_t sample, int64_t channel, int64_t channels,
                         int64_t first, int64_t count, const Acc* m, int64_t m_entry, int64_t m_row,
                         Acc* lines, int64_t part) const {
    const Image<Scalar>& result = job.result;
    const bool forward = direction_ == Direction::kForward;
    const int64_t step = result.stride[3];
    Vector<Acc> sums[kMostOutputs] = {};
    const std::vector<Segment> segments = segments_of(first, count);
    const auto place = [&](const Segment& at) {
      return result.data + sample * result.stride[0] + channel * result.stride[1] +
             at.row * kTileRows * result.stride[2] + at.column * kTileColumns * step;
    };
    const auto bias = [&](int64_t o) {
      return forward ? job.mixer.beta(sample, channel + o) : Acc(0);
    };
    const auto invert = [&](const Segment& at, int64_t o, Acc* line) {
      inverse_tiles(m + o * m_row + at.done, m_entry, bias(o), job.activation, kRow,
                    [&](int64_t x, Vector<Acc> pixels)
                        __attribute__((always_inline)) { store_vector(line + x, pixels); });
      if (job.sums == nullptr) return;
      for (int64_t y = 0; y < rows_of(at); ++y) {
        sums[o] += folded_row(line + y * kRow, columns_of(at));
      }
    };
    // Whole tiles go from registers to where they belong.
    const auto invert_whole = [&](const Segment& at, int64_t o, Scalar* target) {
      Vector<Acc> sum = sums[o];
      inverse_tiles(m + o * m_row + at.done, m_entry, bias(o), job.activation, result.stride[2],
                    [&](int64_t x, Vector<Acc> pixels) __attribute__((always_inline)) {
                      sum += pixels;
                      if (job.accumulate) pixels += load_vector(target + x);
                      store_vector(target + x, pixels);
                    });
      sums[o] = sum;
    };
    const auto finish_sums = [&] {
      for (int64_t o = 0; job.sums != nullptr && o < channels; ++o) {
        job.sums[(sample * groups_ * outputs_ + channel + o) * chunks_ + part] =
            sum_lanes<Acc>(sums[o]);
      }
    };
    for (int64_t o = 0; step == 1 && o < channels; ++o) {
      for (const Segment& at : segments) {
        Scalar* target = place(at) + o * result.stride[1];
        // The same rows of a later channel, as for the inputs.
        for (int64_t y = 0; o + kAhead < channels && y < rows_of(at); ++y) {
          const Scalar* row = target + kAhead * result.stride[1] + y * result.stride[2];
          for (int64_t x = 0; x < kRow; x += 64 / int64_t{sizeof(Scalar)}) {
            __builtin_prefetch(row + x, 1);
          }
        }
        if (rows_of(at) == kTileRows && columns_of(at) == kRow) {
          invert_whole(at, o, target);
          continue;
        }
        invert(at, o, lines);
        for (int64_t y = 0; y < rows_of(at); ++y) {
          Scalar* row = target + y * result.stride[2];
          if (job.accumulate) {
            add_row(row, lines + y * kRow, columns_of(at));
          } else {
            store_row(row, lines + y * kRow, columns_of(at));
          }
        }
      }
    }
    if (step == 1) return finish_sums();
    for (const Segment& at : segments) {
      for (int64_t o = 0; o < channels; ++o) invert(at, o, lines + o * kPlane);
      for (int64_t y = 0; y < rows_of(at); ++y) {
        store_lines(place(at) + y * result.stride[2], result.stride[1], step, lines + y * kRow,
                    kPlane, channels, columns_of(at));
      }
    }
    finish_sums();
  }

  // Pixels of a segment of output tiles.
  int64_t rows_of(const Segment& at) const {
    return std::min<int64_t>(kTileRows, y_.count - at.row * kTileRows);
  }
  int64_t columns_of(const Segment& at) const {
    return std::min<int64_t>(kTileColumns * at.taken, x_.count - at.column * kTileColumns);
  }

  static void store_lines(Scalar* target, int64_t channel_step, int64_t step, const Acc* lines,
                          int64_t plane, int64_t channels, int64_t columns) {
    if (channel_step == 1) {
      transpose(target, step, lines, plane, channels, columns);
      return;
    }
    for (int64_t o = 0; o < channels; ++o) {
      for (int64_t x = 0; x < columns; ++x) {
        target[o * channel_step + x * step] = static_cast<Scalar>(lines[o * plane + x]);
      }
    }
  }

  // One vector of tiles to four rows of pixels, `row` apart: store(place, a vector of them).
  template <class Store>
  DDRF_INLINE static void inverse_tiles(const Acc* m, int64_t m_entry, Acc bias,
                                        Activation activation, int64_t row, const Store& store) {
    Vector<Acc> rows[4][kWide];
    for_each_constant<kWide>([&](auto j) __attribute__((always_inline)) {
      Vector<Acc> tall[6], pixels[4];
      for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
        tall[i()] = load_vector(m + (i() * kWide + j()) * m_entry);
      });
      transform_output(tall, pixels);
      for_each_constant<4>([&](auto i)
                               __attribute__((always_inline)) { rows[i()][j()] = pixels[i()]; });
    });
    for_each_constant<4>([&](auto i) __attribute__((always_inline)) {
      Vector<Acc> columns[kTileColumns], parts[kTileColumns];
      transform_output(rows[i()], columns);
      for_each_constant<kTileColumns>([&](auto j) __attribute__((always_inline)) {
        columns[j()] = rectified<Acc>(activation, columns[j()] + bias);
      });
      interleave<Acc>(columns, parts);
      for_each_constant<kTileColumns>([&](auto p) __attribute__((always_inline)) {
        store(i() * row + p() * kLane, parts[p()]);
      });
    });
  }

  // ---- schedules ----

  // The products of all entries of some output channels, and their inverse transform.
  void multiply_entries(const Job& job, int64_t sample, int64_t group, int64_t output,
                        int64_t outputs, const Acc* u, int64_t u_entry, int64_t a_row, const Acc* v,
                        int64_t v_entry, const Offsets* table, int64_t first, int64_t count, Acc* m,
                        Acc* lines, int64_t part) const {
    const int64_t m_entry = block() * chunk_ + kStagger;
    for (int entry = 0; entry < kEntries; ++entry) {
      multiply_in_turns<Acc>(u + entry * u_entry, a_row, outputs, v + entry * v_entry, table,
                             channels_, count, m + entry * m_entry, chunk_);
    }
    transform_outputs(job, sample, group * outputs_ + output, outputs, first, count, m, m_entry,
                      chunk_, lines, part);
  }

  std::vector<Offsets> offsets(int64_t a_channel) const {
    std::vector<Offsets> table;
    for (int64_t c = 0; c < channels_; ++c) {
      table.push_back({static_cast<int32_t>(c * a_channel), static_cast<int32_t>(c * chunk_)});
    }
    return table;
  }

  Planes<Scalar> planes(const Image<const Scalar>& image, int64_t sample, int64_t group) const {
    return planes_of_group(image, sample, group, channels_ - has_ones_, y_.in_size, x_.in_size,
                           has_ones_);
  }

  void run_once(const Job& job) const {
    const bool forward = direction_ == Direction::kForward;
    const int64_t batch = job.mixer.shape().batch;
    const int64_t rows = kernel_rows(), columns = kernel_columns();
    const int64_t u_entry = rows * columns + kStagger, u_size = kEntries * u_entry;
    const int64_t step = samples_together(groups_ * u_size * int64_t{sizeof(Acc)}, batch);
    const Scratch<Acc> u(step * groups_ * u_size);
    const int64_t v_entry = channels_ * chunk_ + kStagger;
    const std::vector<Offsets> table = offsets(forward ? 1 : columns);
    for (int64_t first = 0; first < batch; first += step) {
      const int64_t samples = std::min(step, batch - first);
      // A row of a mixed kernel at a time, for all samples, while it is in the cache.
      parallel_for(groups_ * rows, 1, [&](int64_t begin, int64_t end) {
        const Scratch<Acc> mixed(samples * columns * 9);
        for (int64_t row = begin; row < end; ++row) {
          job.mixer.mix_piece(first, samples, row, 1, 0, columns, mixed.get(), columns * 9);
          for (int64_t i = 0; i < samples; ++i) {
            transform_kernels(&mixed[i * columns * 9], 1, columns,
                              &u[(i * groups_ + row / rows) * u_size + row % rows * columns],
                              u_entry);
          }
        }
      });
      parallel_for(samples * groups_ * chunks_, 1, [&](int64_t begin, int64_t end) {
        const Scratch<Acc> v(kEntries * v_entry), m(kEntries * (block() * chunk_ + kStagger));
        const Scratch<Acc> window(window_size()), lines(block() * kPlane);
        std::fill_n(v.get(), kEntries * v_entry, Acc(0));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t chunk = task % chunks_, sample_group = task / chunks_;
          const int64_t sample = first + sample_group / groups_, group = sample_group % groups_;
          const int64_t tile = chunk * chunk_, count = std::min(chunk_, tiles_ - tile);
          transform_inputs(planes(job.image, sample, group), 0, channels_, tile, count, v.get(),
                           v_entry, chunk_, window.get());
          for (int64_t output = 0; output < outputs_; output += block()) {
            multiply_entries(job, sample, group, output, std::min(block(), outputs_ - output),
                             &u[sample_group * u_size + output * (forward ? columns : 1)], u_entry,
                             forward ? columns : 1, v.get(), v_entry, table.data(), tile, count,
                             m.get(), lines.get(), chunk);
          }
        }
      });
    }
  }

  void run_in_blocks(const Job& job) const {
    const bool forward = direction_ == Direction::kForward;
    const Mixer<Scalar>& mixer = job.mixer;
    const int64_t batch = mixer.shape().batch;
    const int64_t v_entry = channels_ * chunk_ + kStagger, v_size = kEntries * v_entry;
    const int64_t step = samples_mixed_for(groups_ * v_size * int64_t{sizeof(Acc)}, batch);
    const Scratch<Acc> v(step * groups_ * v_size);
    const int64_t parts = ceil_div(channels_, kLane);
    const int64_t blocks = ceil_div(outputs_, block());
    const int64_t out_per_group = mixer.shape().out_per_group();
    for (int64_t first = 0; first < batch; first += step) {
      const int64_t samples = std::min(step, batch - first);
      parallel_for(samples * groups_ * parts, 1, [&](int64_t begin, int64_t end) {
        const Scratch<Acc> window(window_size());
        for (int64_t task = begin; task < end; ++task) {
          const int64_t sample_group = task / parts, channel = task % parts * kLane;
          const int64_t channel_end = std::min(channel + kLane, channels_);
          Acc* target = &v[sample_group * v_size + channel * chunk_];
          for (int entry = 0; tiles_ < chunk_ && entry < kEntries; ++entry) {
            for (int64_t c = 0; c < channel_end - channel; ++c) {
              std::fill_n(target + entry * v_entry + c * chunk_ + tiles_, chunk_ - tiles_, Acc(0));
            }
          }
          transform_inputs(
              planes(job.image, first + sample_group / groups_, sample_group % groups_), channel,
              channel_end, 0, tiles_, target, v_entry, chunk_, window.get());
        }
      });
      // Samples follow one another, so that a block's kernels of the bank stay in the cache.
      parallel_for(groups_ * blocks * samples, 1, [&](int64_t begin, int64_t end) {
        const Scratch<Acc> mixed(block() * channels_ * 9);
        const int64_t u_entry = block() * channels_ + kStagger;
        const Scratch<Acc> u(kEntries * u_entry), m(kEntries * (block() * chunk_ + kStagger));
        const Scratch<Acc> lines(block() * kPlane);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task % samples, group = task / samples / blocks;
          const int64_t output = task / samples % blocks * block();
          const int64_t taken = std::min(block(), outputs_ - output);
          const int64_t rows = forward ? taken : channels_, columns = forward ? channels_ : taken;
          mixer.mix_piece(first + i, 1, group * out_per_group + (forward ? output : 0), rows,
                          forward ? 0 : output, columns, mixed.get(), 0);
          transform_kernels(mixed.get(), rows, columns, u.get(), u_entry);
          const std::vector<Offsets> table = offsets(forward ? 1 : columns);
          multiply_entries(job, first + i, group, output, taken, u.get(), u_entry,
                           forward ? columns : 1, &v[(i * groups_ + group) * v_size], v_entry,
                           table.data(), 0, tiles_, m.get(), lines.get(), 0);
        }
      });
    }
  }

  Direction direction_;
  TapAxis y_, x_;
  int64_t groups_;
  bool has_ones_;
  int64_t channels_, outputs_;
  int64_t tile_columns_, tiles_;
  bool in_blocks_;
  int64_t chunk_, chunks_;  // tiles in a chunk, rounded up to vectors; chunks of a sample
};

// Calls body(plan) with the plan for such a shape.
template <class Scalar, class Body>
void with_winograd(Direction direction, const TapAxis& y, const TapAxis& x,
                   const DynamicConvShape& shape, bool has_ones, const Body& body) {
  const bool forward = direction == Direction::kForward;
  const int64_t channels = forward ? shape.in_per_group() : shape.out_per_group();
  if (fits_wide_tiles(channels + has_ones, y.count, x.count)) {
    body(Winograd<Scalar, 4>(direction, y, x, shape, has_ones));
  } else {
    body(Winograd<Scalar, 2>(direction, y, x, shape, has_ones));
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

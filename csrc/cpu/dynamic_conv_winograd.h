// The Winograd plan: 3x3 taps one pixel apart, as F(4x2, 3x3) of Winograd's minimal filtering
// (Lavin & Gray, "Fast Algorithms for Convolutional Neural Networks", 2016).
//
// A tile of 4x2 outputs needs 6x4 inputs. With U = G4 W G2^T and V = B4^T X B2 (6x4 each)
//
//   Y = A4^T (sum over channels of U * V, entry by entry) A2
//
// takes 24 multiplications where the sum over taps takes 72. The points of the vertical transform
// are 0, +-3/4, +-3/2 and infinity: with float32 the error stays within the bound that the direct
// sum is held to, which neither the usual points 0, +-1, +-2 nor F(4x4) do.
//
// The 24 products are matrix products over channels with the tiles of some rows as pixels, numbered
// row after row. Two schedules, as in dynamic_conv_correlate.h: "once" transforms the kernels of
// some samples first and then takes the tiles of a sample in chunks; "blocks" takes all tiles of
// all samples first, and then some output channels' kernels at a time.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_gemm.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// G4 and G2: from three taps to six and to four.
template <class Value>
DDRF_INLINE void transform_taps_6(const Value (&g)[3], Value (&u)[6]) {
  const Value even_near = g[0] * float(-128.0 / 243) + g[2] * float(-8.0 / 27);
  const Value odd_near = g[1] * float(-32.0 / 81);
  const Value even_far = g[0] * float(32.0 / 243) + g[2] * float(8.0 / 27);
  const Value odd_far = g[1] * float(16.0 / 81);
  u[0] = g[0] * float(64.0 / 81);
  u[1] = even_near + odd_near;
  u[2] = even_near - odd_near;
  u[3] = even_far + odd_far;
  u[4] = even_far - odd_far;
  u[5] = g[2];
}

template <class Value>
DDRF_INLINE void transform_taps_4(const Value (&g)[3], Value (&u)[4]) {
  const Value even = (g[0] + g[2]) * 0.5f, odd = g[1] * 0.5f;
  u[0] = g[0];
  u[1] = even + odd;
  u[2] = even - odd;
  u[3] = g[2];
}

// B4^T and B2^T, of inputs.
template <class Value>
DDRF_INLINE void transform_input_6(const Value (&d)[6], Value (&v)[6]) {
  const Value even_near = d[4] - d[2] * 2.25f, odd_near = d[3] * 0.75f - d[1] * 1.6875f;
  const Value even_far = d[4] - d[2] * 0.5625f, odd_far = d[3] * 1.5f - d[1] * 0.84375f;
  v[0] = d[4] - d[2] * 2.8125f + d[0] * 1.265625f;
  v[1] = even_near + odd_near;
  v[2] = even_near - odd_near;
  v[3] = even_far + odd_far;
  v[4] = even_far - odd_far;
  v[5] = d[5] - d[3] * 2.8125f + d[1] * 1.265625f;
}

template <class Value>
DDRF_INLINE void transform_input_4(const Value (&d)[4], Value (&v)[4]) {
  v[0] = d[0] - d[2];
  v[1] = d[1] + d[2];
  v[2] = d[2] - d[1];
  v[3] = d[1] - d[3];
}

// A4^T and A2^T, to outputs.
template <class Value>
DDRF_INLINE void transform_output_6(const Value (&m)[6], Value (&y)[4]) {
  const Value even_near = m[1] + m[2], odd_near = m[1] - m[2];
  const Value even_far = m[3] + m[4], odd_far = m[3] - m[4];
  y[0] = m[0] + even_near + even_far;
  y[1] = odd_near * 0.75f + odd_far * 1.5f;
  y[2] = even_near * 0.5625f + even_far * 2.25f;
  y[3] = m[5] + odd_near * 0.421875f + odd_far * 3.375f;
}

template <class Value>
DDRF_INLINE void transform_output_4(const Value (&m)[4], Value (&y)[2]) {
  y[0] = m[0] + m[1] + m[2];
  y[1] = m[1] - m[2] - m[3];
}

template <class Scalar>
class Winograd {
 public:
  using Acc = accumulate_t<Scalar>;

  static constexpr int kTileRows = 4, kTileColumns = 2, kEntries = 24;

  // Where it wins: enough channels to pay for the transforms, enough tiles to fill vectors.
  static bool fits(const DynamicConvShape& shape) {
    if (!std::is_same_v<Acc, float> || shape.batch == 0) return false;
    for (int axis = 0; axis < 2; ++axis) {
      if (shape.kernel[axis] != 3 || shape.stride[axis] != 1 || shape.dilation[axis] != 1) {
        return false;
      }
    }
    return shape.in_per_group() >= kLeastChannels && shape.out_per_group() >= kLeastChannels &&
           tiles_of(shape.out_size[0], shape.out_size[1]) >= kLeastTiles &&
           tiles_of(shape.in_size[0], shape.in_size[1]) >= kLeastTiles;
  }

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
    if (in_blocks_) most = tiles_;
    chunk_ = ceil_div(most, kLane) * kLane;
    chunks_ = ceil_div(tiles_, most);
  }

  std::string name() const {
    return std::string("Winograd F(4x2, 3x3), ") +
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
  static constexpr int64_t kLeastChannels = 8, kLeastTiles = 24, kMapTiles = 64, kEnoughTasks = 8;
  static constexpr int64_t kMostVectors = 6;  // of tiles in a chunk
  static constexpr int64_t kSecondLevelBytes = 600 * 1024, kKernelBytes = 24 << 20;
  static constexpr int64_t kAhead = 2;   // channels between fetching and reading
  static constexpr int64_t kBlock = 16;  // output channels between two inverse transforms
  // Between two entries' planes, so that the 24 of them do not fall on the same cache sets.
  static constexpr int64_t kStagger = 64 / sizeof(Acc);

  using Job = PlanJob<Scalar>;

  static int64_t tiles_of(int64_t height, int64_t width) {
    return ceil_div(height, kTileRows) * ceil_div(width, kTileColumns);
  }

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
        Vector<Acc> column[4][3];
#pragma GCC unroll 3
        for (int i = 0; i < 3; ++i) {
          Vector<Acc> row[3];
#pragma GCC unroll 3
          for (int j = 0; j < 3; ++j) {
            const int tap = i * 3 + j;
            row[j] = load_vector(&taps[(flip ? 8 - tap : tap) * kLane]);
          }
          Vector<Acc> wide[4];
          transform_taps_4(row, wide);
#pragma GCC unroll 4
          for (int j = 0; j < 4; ++j) column[j][i] = wide[j];
        }
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          Vector<Acc> tall[6];
          transform_taps_6(column[j], tall);
#pragma GCC unroll 6
          for (int i = 0; i < 6; ++i) {
            Acc* target = u + (i * 4 + j) * u_entry + r * columns + c;
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
#if DDRF_VECTOR_BYTES == 64
    // A channel's segments one after the other: they lie side by side.
    for (; planes.column_step == 1 && c < std::min(end, planes.channels); ++c) {
      for (const Segment& at : segments) {
        const int64_t top = y0 + at.row * kTileRows, left = x0 + at.column * kTileColumns;
        const Scalar* source = planes.data + c * planes.channel_step + left;
        Acc* target = v + (c - begin) * v_row + at.done;
        // The same rows of a later channel: too short for the hardware to see them coming.
        const int64_t ahead = std::clamp<int64_t>(top, 0, planes.height - 6);
        for (int64_t i = 0; i < 6 * (planes.height >= 6); ++i) {
          const Scalar* row = source + kAhead * planes.channel_step + (ahead + i) * planes.row_step;
          for (int64_t x = 0; x < 2 * kLane; x += 64 / int64_t{sizeof(Scalar)}) {
            __builtin_prefetch(row + x);
          }
        }
        if (top >= 0 && top + 6 <= planes.height && left >= 0 &&
            left + 2 * kLane + 2 <= planes.width) {
          transform_tiles(
              [&](int i) __attribute__((always_inline)) {
                const Scalar* row = source + (top + i) * planes.row_step;
                return PixelRow{load_vector(row), load_vector(row + kLane),
                                load_partial(row + 2 * kLane, 2)};
              },
              target, v_entry, at.taken);
          continue;
        }
        uint32_t masks[3];
        for (int i = 0; i < 3; ++i) masks[i] = lanes_inside<kLane>(left + i * kLane, planes.width);
        transform_tiles(
            [&](int i) __attribute__((always_inline)) {
              const int64_t y = top + i;
              if (y < 0 || y >= planes.height) return PixelRow{};
              const Scalar* row = source + y * planes.row_step;
              return PixelRow{load_masked(row, masks[0]), load_masked(row + kLane, masks[1]),
                              load_masked(row + 2 * kLane, masks[2])};
            },
            target, v_entry, at.taken);
      }
    }
#endif
    constexpr int64_t kRow = 3 * kLane, kPlane = 6 * kRow;
    for (; c < end; c += kLane) {
      const int64_t channels = std::min<int64_t>(kLane, end - c);
      for (const Segment& at : segments) {
        const Window pixels{y0 + at.row * kTileRows,       1, 6,
                            x0 + at.column * kTileColumns, 1, 2 * kLane + 2};
        copy_window(planes, c, c + channels, pixels, window, kPlane, kRow);
        for (int64_t i = 0; i < channels; ++i) {
          const Acc* source = window + i * kPlane;
          transform_tiles(
              [&](int y) __attribute__((always_inline)) {
                const Acc* row = source + y * kRow;
                return PixelRow{load_vector(row), load_vector(row + kLane),
                                load_vector(row + 2 * kLane)};
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

  static constexpr int64_t window_size() { return kLane * 6 * 3 * kLane; }

  // 2 * kLane + 2 pixels side by side: two in `rest`, whose other lanes do not count.
  struct PixelRow {
    Vector<Acc> low, high, rest;
  };

  // One vector of tiles of the rows load(0) to load(5).
  template <class Load>
  DDRF_INLINE static void transform_tiles(const Load& load, Acc* target, int64_t v_entry,
                                          int64_t count) {
    constexpr auto kIndices = std::make_index_sequence<kLane>();
    Vector<Acc> columns[4][6];
    for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
      const PixelRow pixels = load(i());
      const auto even = every_second<Acc, 0>(pixels.low, pixels.high, kIndices);
      const auto odd = every_second<Acc, 1>(pixels.low, pixels.high, kIndices);
      const Vector<Acc> taps[4] = {even, odd, followed_by<Acc, 0>(even, pixels.rest, kIndices),
                                   followed_by<Acc, 1>(odd, pixels.rest, kIndices)};
      Vector<Acc> wide[4];
      transform_input_4(taps, wide);
      for_each_constant<4>([&](auto j)
                               __attribute__((always_inline)) { columns[j()][i()] = wide[j()]; });
    });
    for_each_constant<4>([&](auto j) __attribute__((always_inline)) {
      Vector<Acc> tall[6];
      transform_input_6(columns[j()], tall);
      // Lanes beyond the row's last tile belong to the next row, which comes later.
      for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
        if (count == kLane) {
          store_vector(target + (i() * 4 + j()) * v_entry, tall[i()]);
        } else {
          store_partial(target + (i() * 4 + j()) * v_entry, tall[i()], count);
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
    Vector<Acc> sums[kBlock] = {};
    constexpr int64_t kRow = 2 * kLane, kPlane = kTileRows * kRow;
    const std::vector<Segment> segments = segments_of(first, count);
    const auto place = [&](const Segment& at) {
      return result.data + sample * result.stride[0] + channel * result.stride[1] +
             at.row * kTileRows * result.stride[2] + at.column * kTileColumns * step;
    };
    const auto bias = [&](int64_t o) {
      return forward ? job.mixer.beta(sample, channel + o) : Acc(0);
    };
    const auto invert = [&](const Segment& at, int64_t o, Acc* line) {
      inverse_tiles(m + o * m_row + at.done, m_entry, bias(o), job.activation,
                    [&](int64_t y, Vector<Acc> low, Vector<Acc> high)
                        __attribute__((always_inline)) {
                          store_vector(line + y * kRow, low);
                          store_vector(line + y * kRow + kLane, high);
                        });
      if (job.sums == nullptr) return;
      for (int64_t y = 0; y < rows_of(at); ++y) {
        sums[o] += folded_row(line + y * kRow, columns_of(at));
      }
    };
    // Whole tiles go from registers to where they belong.
    const auto invert_whole = [&](const Segment& at, int64_t o, Scalar* target) {
      Vector<Acc> sum = sums[o];
      inverse_tiles(m + o * m_row + at.done, m_entry, bias(o), job.activation,
                    [&](int64_t y, Vector<Acc> low, Vector<Acc> high)
                        __attribute__((always_inline)) {
                          Scalar* row = target + y * result.stride[2];
                          sum += low + high;
                          if (job.accumulate) {
                            low += load_vector(row);
                            high += load_vector(row + kLane);
                          }
                          store_vector(row, low);
                          store_vector(row + kLane, high);
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
          for (int64_t x = 0; x < 2 * kLane; x += 64 / int64_t{sizeof(Scalar)}) {
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

  // One vector of tiles to four lines of pixels: store(line, first half, second half).
  template <class Store>
  DDRF_INLINE static void inverse_tiles(const Acc* m, int64_t m_entry, Acc bias,
                                        Activation activation, const Store& store) {
    constexpr auto kIndices = std::make_index_sequence<kLane>();
    Vector<Acc> rows[4][4];
    for_each_constant<4>([&](auto j) __attribute__((always_inline)) {
      Vector<Acc> tall[6], pixels[4];
      for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
        tall[i()] = load_vector(m + (i() * 4 + j()) * m_entry);
      });
      transform_output_6(tall, pixels);
      for_each_constant<4>([&](auto i)
                               __attribute__((always_inline)) { rows[i()][j()] = pixels[i()]; });
    });
    for_each_constant<4>([&](auto i) __attribute__((always_inline)) {
      Vector<Acc> pair[2];
      transform_output_4(rows[i()], pair);
      pair[0] = rectified<Acc>(activation, pair[0] + bias);
      pair[1] = rectified<Acc>(activation, pair[1] + bias);
      store(i(), interleave<Acc, 0>(pair[0], pair[1], kIndices),
            interleave<Acc, kLane / 2>(pair[0], pair[1], kIndices));
    });
  }

  // ---- schedules ----

  // The 24 products of some output channels, and their inverse transform.
  void multiply_entries(const Job& job, int64_t sample, int64_t group, int64_t output,
                        int64_t outputs, const Acc* u, int64_t u_entry, int64_t a_row, const Acc* v,
                        int64_t v_entry, const Offsets* table, int64_t first, int64_t count, Acc* m,
                        Acc* lines, int64_t part) const {
    const int64_t m_entry = kBlock * chunk_ + kStagger;
    for (int entry = 0; entry < kEntries; ++entry) {
      multiply<Acc>(u + entry * u_entry, a_row, outputs, v + entry * v_entry, table, channels_,
                    count, {m + entry * m_entry, chunk_});
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
    const int64_t step =
        std::clamp<int64_t>(kKernelBytes / (groups_ * u_size * int64_t{sizeof(Acc)}), 1, batch);
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
        const Scratch<Acc> v(kEntries * v_entry), m(kEntries * (kBlock * chunk_ + kStagger));
        const Scratch<Acc> window(window_size()), lines(kBlock * kTileRows * 2 * kLane);
        std::fill_n(v.get(), kEntries * v_entry, Acc(0));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t chunk = task % chunks_, sample_group = task / chunks_;
          const int64_t sample = first + sample_group / groups_, group = sample_group % groups_;
          const int64_t tile = chunk * chunk_, count = std::min(chunk_, tiles_ - tile);
          transform_inputs(planes(job.image, sample, group), 0, channels_, tile, count, v.get(),
                           v_entry, chunk_, window.get());
          for (int64_t output = 0; output < outputs_; output += kBlock) {
            multiply_entries(job, sample, group, output, std::min(kBlock, outputs_ - output),
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
    const int64_t step =
        std::clamp<int64_t>(kKernelBytes / (groups_ * v_size * int64_t{sizeof(Acc)}), 1, batch);
    const Scratch<Acc> v(step * groups_ * v_size);
    const int64_t parts = ceil_div(channels_, kLane);
    const int64_t blocks = ceil_div(outputs_, kBlock);
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
        const Scratch<Acc> mixed(kBlock * channels_ * 9);
        const int64_t u_entry = kBlock * channels_ + kStagger;
        const Scratch<Acc> u(kEntries * u_entry), m(kEntries * (kBlock * chunk_ + kStagger));
        const Scratch<Acc> lines(kBlock * kTileRows * 2 * kLane);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t i = task % samples, group = task / samples / blocks;
          const int64_t output = task / samples % blocks * kBlock;
          const int64_t taken = std::min(kBlock, outputs_ - output);
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

}  // namespace ddrf_fast::DDRF_CAPABILITY

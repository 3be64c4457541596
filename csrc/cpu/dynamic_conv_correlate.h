// Sum over taps with a kernel for each sample: the convolution, and its input gradient.
//
// For a tile of outputs, each block of pixels is computed for all output channels at once:
// kOutputs x kVectors sums stay in registers while the block runs over channels and taps, so that
// each loaded vector of pixels is used kOutputs times and each weight kVectors times.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// sums[o][kVectors vectors] += sum over channels and taps of weights * pixels.
template <class Acc, int kOutputs, int kVectors>
inline void accumulate_block(const Acc* input, int64_t channel_stride, int64_t channels,
                             const int64_t* tap_offsets, int64_t taps, const Acc* weights,
                             Acc* sums) {
  constexpr int kLane = kLanes<Acc>, kPixels = kVectors * kLane;
  // Without every loop over them unrolled the compiler keeps the sums in memory.
  Vector<Acc> sum[kOutputs][kVectors];
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[o][v] = load_vector(sums + o * kPixels + v * kLane);
  }
  for (int64_t c = 0; c < channels; ++c, input += channel_stride) {
    for (int64_t tap = 0; tap < taps; ++tap, weights += kOutputs) {
      const Acc* pixels = input + tap_offsets[tap];
      Vector<Acc> pixel[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) pixel[v] = load_vector(pixels + v * kLane);
#pragma GCC unroll 8
      for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[o][v] += pixel[v] * weights[o];
      }
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kOutputs; ++o) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store_vector(sums + o * kPixels + v * kLane, sum[o][v]);
  }
}

// The shape of one sum over taps, how it is blocked, and where its weights lie.
template <class Scalar>
class Correlation {
 public:
  using Acc = accumulate_t<Scalar>;

  // `in_channels` and `out_channels` are those of one group; `has_ones` adds a channel of ones.
  Correlation(TapAxis y, TapAxis x, int64_t batch, int64_t groups, int64_t in_channels,
              bool has_ones, int64_t out_channels)
      : y_(std::move(y)),
        x_(std::move(x)),
        groups_(groups),
        channels_(in_channels + has_ones),
        has_ones_(has_ones),
        outputs_(out_channels),
        narrow_(out_channels <= 2) {
    // Channels are taken in turns whose pixels stay in the first-level cache from one block of
    // outputs to the next; a turn and the sums of a tile stay in the second-level cache.
    const int64_t tap_rows = static_cast<int64_t>(y_.taps.size());
    const int64_t tap_columns = static_cast<int64_t>(x_.taps.size());
    const int64_t line = std::max<int64_t>(1, tap_rows) * (block_pixels() + tap_columns);
    const int64_t most =
        std::clamp<int64_t>(kFirstLevelBytes / (line * int64_t{sizeof(Acc)}), 8, 512);
    turns_ = std::max<int64_t>(1, ceil_div(channels_, most));
    turn_channels_ = ceil_div(channels_, turns_);
    const int64_t sum_channels = turns_ > 1 ? padded_outputs() : 0;
    tiles_ = choose_tiles(y_, x_, turn_channels_ + sum_channels, block_pixels(),
                          kSecondLevelBytes / int64_t{sizeof(Acc)}, kMaxPixels,
                          ceil_div(kMinTasks, std::max<int64_t>(1, batch * groups)));
    tap_offsets_ = tiles_.tap_offsets();
  }

  const TapAxis& y() const { return y_; }
  const TapAxis& x() const { return x_; }
  int64_t taps() const { return static_cast<int64_t>(tap_offsets_.size()); }
  int64_t packed_size() const { return padded_outputs() * channels_ * taps(); }

  // A group's weights are packed in blocks of output channels, in each of which those of one
  // channel and tap lie side by side: that of (output, channel, tap) at start + (channel * taps +
  // tap) * step.
  struct Position {
    int64_t start, step;
  };
  Position position(int64_t output) const {
    const int64_t block = output / kMaxOutputs;
    return {block * kMaxOutputs * channels_ * taps() + output % kMaxOutputs, block_outputs(block)};
  }

  // Output channels with those that only fill the last block; their weights must be numbers.
  int64_t padded_outputs() const {
    const int64_t blocks = ceil_div(outputs_, kMaxOutputs);
    return blocks == 0 ? 0 : (blocks - 1) * kMaxOutputs + block_outputs(blocks - 1);
  }

  // result[b] = act(sum + bias[b]) for `batch` samples: packed [batch][groups][packed_size()],
  // bias [batch][groups * out_channels] or null. Strides: batch, channel, row, column.
  void run(int64_t batch, const Image<const Scalar>& image, const Acc* packed, const Acc* bias,
           Activation activation, const Image<Scalar>& result) const {
    const int64_t tasks = batch * groups_ * tiles_.count();
    const int64_t work = channels_ * taps() * outputs_ * tiles_.pixels();
    parallel_for(
        tasks, std::max<int64_t>(1, kMinWork / (work + 1)), [&](int64_t begin, int64_t end) {
          const int64_t blocks = ceil_div(tiles_.pixels(), block_pixels());
          const int64_t block_size = padded_outputs() * block_pixels();
          const Scratch<Acc> input(turn_channels_ * tiles_.channel_stride());
          const Scratch<Acc> sums(turns_ > 1 ? blocks * block_size : block_size);
          clear_slack(tiles_, turn_channels_, input.get());
          for (int64_t task = begin; task < end; ++task) {
            const int64_t tile = task % tiles_.count(), sample_group = task / tiles_.count();
            const int64_t sample = sample_group / groups_, group = sample_group % groups_;
            const int64_t in_channels = channels_ - has_ones_;
            const Planes<Scalar> planes{
                image.data + sample * image.stride[0] + group * in_channels * image.stride[1],
                image.stride[1],
                image.stride[2],
                image.stride[3],
                in_channels,
                y_.in_size,
                x_.in_size,
                has_ones_};
            const Image<Scalar> group_result{
                result.data + sample * result.stride[0] + group * outputs_ * result.stride[1],
                {result.stride[0], result.stride[1], result.stride[2], result.stride[3]}};
            run_tile(planes, packed + sample_group * packed_size(),
                     bias == nullptr ? nullptr : bias + sample_group * outputs_, activation, tile,
                     group_result, input.get(), sums.get());
          }
        });
  }

 private:
  static constexpr int kMaxOutputs = kManyRegisters ? 8 : 4;
  static constexpr int kVectors = 3, kNarrowVectors = 6;
  static constexpr int64_t kFirstLevelBytes = 26 * 1024, kSecondLevelBytes = 384 * 1024;
  static constexpr int64_t kMaxPixels = 4096, kMinTasks = 16, kMinWork = 1 << 16;

  // One or two output channels alone need more vectors of pixels to keep the units busy.
  int64_t block_pixels() const { return (narrow_ ? kNarrowVectors : kVectors) * kLanes<Acc>; }

  int64_t block_outputs(int64_t block) const {
    const int64_t left = outputs_ - block * kMaxOutputs;
    if (left > 4) return kMaxOutputs;
    return left == 3 ? 4 : left;
  }

  void run_tile(const Planes<Scalar>& planes, const Acc* packed, const Acc* bias,
                Activation activation, int64_t tile, const Image<Scalar>& result, Acc* input,
                Acc* sums) const {
    const int64_t tile_y = tile / tiles_.x.tiles, tile_x = tile % tiles_.x.tiles;
    const int64_t rows = std::min(tiles_.y.extent, y_.count - tile_y * tiles_.y.extent);
    const int64_t columns = std::min(tiles_.x.extent, x_.count - tile_x * tiles_.x.extent);
    const int64_t pixels = (rows - 1) * tiles_.row_stride() + columns;
    const int64_t block_size = padded_outputs() * block_pixels();
    for (int64_t turn = 0; turn < turns_; ++turn) {
      const int64_t channel = std::min(turn * turn_channels_, channels_);
      const int64_t channel_end = std::min(channel + turn_channels_, channels_);
      copy_tile(planes, channel, channel_end, y_, x_, tiles_, tile_y, tile_x, input);
      for (int64_t pixel = 0; pixel < pixels; pixel += block_pixels()) {
        Acc* block_sums = turns_ > 1 ? sums + pixel / block_pixels() * block_size : sums;
        if (turn == 0) start_sums(bias, block_sums);
        add_channels(input + pixel, channel, channel_end, packed, block_sums);
        if (turn == turns_ - 1) {
          activate(activation, block_size, block_sums);
          store_block(block_sums, pixel, rows, columns, tile_y, tile_x, result);
        }
      }
    }
  }

  void start_sums(const Acc* bias, Acc* sums) const {
    const int64_t padded = padded_outputs();
    for (int64_t o = 0; o < padded; ++o) {
      const Acc value = bias != nullptr && o < outputs_ ? bias[o] : Acc(0);
      std::fill_n(sums + o * block_pixels(), block_pixels(), value);
    }
  }

  void add_channels(const Acc* input, int64_t begin, int64_t end, const Acc* packed,
                    Acc* sums) const {
    const int64_t blocks = ceil_div(outputs_, kMaxOutputs);
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t width = block_outputs(block);
      const Acc* weights = packed + position(block * kMaxOutputs).start + begin * taps() * width;
      Acc* block_sums = sums + block * kMaxOutputs * block_pixels();
      const auto add = [&](auto kernel) {
        kernel(input, tiles_.channel_stride(), end - begin, tap_offsets_.data(), taps(), weights,
               block_sums);
      };
      if (narrow_) {
        add(width == 1 ? accumulate_block<Acc, 1, kNarrowVectors>
                       : accumulate_block<Acc, 2, kNarrowVectors>);
      } else if (width == kMaxOutputs) {
        add(accumulate_block<Acc, kMaxOutputs, kVectors>);
      } else {
        add(width == 1   ? accumulate_block<Acc, 1, kVectors>
            : width == 2 ? accumulate_block<Acc, 2, kVectors>
                         : accumulate_block<Acc, 4, kVectors>);
      }
    }
  }

  static void activate(Activation activation, int64_t count, Acc* sums) {
    constexpr Acc kLeakySlope = Acc(0.01);
    if (activation == Activation::kRelu) {
      for (int64_t i = 0; i < count; ++i) sums[i] = sums[i] < 0 ? Acc(0) : sums[i];
    } else if (activation == Activation::kLeakyRelu) {
      for (int64_t i = 0; i < count; ++i) sums[i] = sums[i] < 0 ? sums[i] * kLeakySlope : sums[i];
    }
  }

  // Stores the pixels of a block that are outputs, row by row.
  void store_block(const Acc* sums, int64_t pixel, int64_t rows, int64_t columns, int64_t tile_y,
                   int64_t tile_x, const Image<Scalar>& result) const {
    const int64_t row_stride = tiles_.row_stride();
    const int64_t channel_step = result.stride[1];
    const int64_t step = result.stride[3] * x_.out_step;
    int64_t row = pixel / row_stride, column = pixel % row_stride;
    for (int64_t done = 0; done < block_pixels() && row < rows; ++row, column = 0) {
      const int64_t count = std::min(columns - column, block_pixels() - done);
      const Acc* source = sums + done;
      done += row_stride - column;
      if (count <= 0) continue;
      const int64_t out_y = y_.out_offset + (tile_y * tiles_.y.extent + row) * y_.out_step;
      const int64_t out_x = x_.out_offset + (tile_x * tiles_.x.extent + column) * x_.out_step;
      Scalar* target = result.data + out_y * result.stride[2] + out_x * result.stride[3];
      if (channel_step == 1 && step != 1) {
        transpose(target, step, source, block_pixels(), outputs_, count);
        continue;
      }
      for (int64_t o = 0; o < outputs_; ++o) {
        const Acc* line = source + o * block_pixels();
        Scalar* out = target + o * channel_step;
        if (step == 1) {
          store_row(out, line, count);
        } else {
          for (int64_t i = 0; i < count; ++i) out[i * step] = static_cast<Scalar>(line[i]);
        }
      }
    }
  }

  TapAxis y_, x_;
  int64_t groups_, channels_;
  bool has_ones_;
  int64_t outputs_;
  bool narrow_;  // see block_pixels()
  int64_t turns_ = 1, turn_channels_ = 1;
  Tiles tiles_;
  std::vector<int64_t> tap_offsets_;
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

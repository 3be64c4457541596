// Gradient of each sample's own kernel: dW_b[o,c,t] = sum over pixels of grad[o,p] * x[c, p + tap
// t].
//
// Tiles as in the convolution, with the gradient zero in the columns that are no outputs. Sums stay
// in registers, one vector of partial sums for each of kGradOutputs x kGradTaps weights, while the
// pixels of a tile run past. A task owns its weights, so that no two threads add to the same sum.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// sums[o][j] = <grad row o, pixels at inputs[j]>; `count` is a multiple of a vector.
template <class Acc, int kGradOutputs, int kGradTaps>
inline void accumulate_products(const Acc* grad, int64_t grad_stride, const Acc* const* inputs,
                                int64_t count, Acc (&sums)[kGradOutputs][kGradTaps]) {
  Vector<Acc> sum[kGradOutputs][kGradTaps] = {};
  for (int64_t p = 0; p < count; p += kLanes<Acc>) {
    Vector<Acc> rows[kGradOutputs];
#pragma GCC unroll 8
    for (int o = 0; o < kGradOutputs; ++o) rows[o] = load_vector(grad + o * grad_stride + p);
#pragma GCC unroll 16
    for (int j = 0; j < kGradTaps; ++j) {
      const Vector<Acc> pixels = load_vector(inputs[j] + p);
#pragma GCC unroll 8
      for (int o = 0; o < kGradOutputs; ++o) sum[o][j] += rows[o] * pixels;
    }
  }
#pragma GCC unroll 8
  for (int o = 0; o < kGradOutputs; ++o) {
#pragma GCC unroll 16
    for (int j = 0; j < kGradTaps; ++j) sums[o][j] = sum_lanes<Acc>(sum[o][j]);
  }
}

template <class Scalar>
class WeightGradient {
 public:
  using Acc = accumulate_t<Scalar>;

  // `in_channels` and `out_channels` are those of one group; `has_ones` adds a channel of ones.
  WeightGradient(TapAxis y, TapAxis x, int64_t batch, int64_t groups, int64_t in_channels,
                 bool has_ones, int64_t out_channels)
      : y_(std::move(y)),
        x_(std::move(x)),
        groups_(groups),
        channels_(in_channels + has_ones),
        has_ones_(has_ones),
        outputs_(out_channels) {
    const auto chunks = [](int64_t count, int64_t most) {
      return std::max<int64_t>(1, ceil_div(count, most));
    };
    // Large chunks copy less; small ones give a small batch enough tasks.
    const bool enough = batch * groups * chunks(channels_, 32) * chunks(outputs_, 32) >= kMinTasks;
    in_chunks_ = chunks(channels_, enough ? 32 : 16);
    out_chunks_ = chunks(outputs_, enough ? 32 : 16);
    in_chunk_ = std::max<int64_t>(1, ceil_div(channels_, in_chunks_));
    out_chunk_ = std::max<int64_t>(1, ceil_div(outputs_, out_chunks_));
    tiles_ = choose_tiles(y_, x_, in_chunk_ + out_chunk_, 0, kLanes<Acc>,
                          kSecondLevelBytes / int64_t{sizeof(Acc)}, kMaxPixels, 1, false);
    tap_offsets_ = tiles_.tap_offsets();
  }

  int64_t size() const { return groups_ * outputs_ * channels_ * taps(); }

  // Elements of scratch for each sample of run().
  int64_t scratch_size() const { return 0; }

  // result [batch][groups * out_channels][channels with ones][taps] is overwritten.
  void run(int64_t batch, const Image<const Scalar>& image, const Image<const Scalar>& grad,
           Acc* result) const {
    const int64_t chunks = in_chunks_ * out_chunks_;
    const int64_t work = in_chunk_ * out_chunk_ * taps() * y_.count * x_.count;
    parallel_for(batch * groups_ * chunks, std::max<int64_t>(1, kMinWork / (work + 1)),
                 [&](int64_t begin, int64_t end) {
                   const int64_t padded_rows = ceil_div(out_chunk_, kOutputs) * kOutputs;
                   const Scratch<Acc> input(in_chunk_ * tiles_.channel_stride());
                   const Scratch<Acc> rows(padded_rows * grad_stride());
                   clear_slack(tiles_, in_chunk_, input.get());
                   std::fill_n(rows.get(), padded_rows * grad_stride(), Acc(0));
                   std::vector<const Acc*> pointers(in_chunk_ * taps() + kManyTaps);
                   for (int64_t task = begin; task < end; ++task) {
                     run_task(task, image, grad, result, input.get(), rows.get(), pointers.data());
                   }
                 });
  }

 private:
  static constexpr int kOutputs = kManyRegisters ? 4 : 3, kTaps = kManyRegisters ? 6 : 4;
  static constexpr int kManyTaps = 9;  // beside a single output channel
  static constexpr int64_t kSecondLevelBytes = 512 * 1024, kMaxPixels = 1536;
  static constexpr int64_t kMinTasks = 16, kMinWork = 1 << 16;

  int64_t taps() const { return static_cast<int64_t>(tap_offsets_.size()); }
  int64_t grad_stride() const { return tiles_.y.extent * tiles_.row_stride() + kLanes<Acc>; }

  void run_task(int64_t task, const Image<const Scalar>& image, const Image<const Scalar>& grad,
                Acc* result, Acc* input, Acc* rows, const Acc** pointers) const {
    const int64_t in_chunk = task % in_chunks_, out_chunk = task / in_chunks_ % out_chunks_;
    const int64_t sample_group = task / (in_chunks_ * out_chunks_);
    const int64_t sample = sample_group / groups_, group = sample_group % groups_;
    const Planes<Scalar> planes = planes_of_group(image, sample, group, channels_ - has_ones_,
                                                  y_.in_size, x_.in_size, has_ones_);
    const Planes<Scalar> grad_planes =
        planes_of_group(grad, sample, group, outputs_, y_.count, x_.count);
    const int64_t channel = std::min(in_chunk * in_chunk_, channels_);
    const int64_t channel_end = std::min(channel + in_chunk_, channels_);
    const int64_t output = std::min(out_chunk * out_chunk_, outputs_);
    const int64_t output_end = std::min(output + out_chunk_, outputs_);
    const int64_t row_size = channels_ * taps();
    Acc* target = result + (sample_group * outputs_ + output) * row_size + channel * taps();
    for (int64_t o = output; o < output_end; ++o) {
      std::fill_n(target + (o - output) * row_size, (channel_end - channel) * taps(), Acc(0));
    }

    // The weights of these channels in order, the last one repeated to fill a block.
    const int64_t products = (channel_end - channel) * taps();
    for (int64_t j = 0; j < products; ++j) {
      pointers[j] = input + j / taps() * tiles_.channel_stride() + tap_offsets_[j % taps()];
    }
    if (products == 0) return;
    std::fill_n(pointers + products, kManyTaps, pointers[products - 1]);

    for (int64_t tile_y = 0; tile_y < tiles_.y.tiles; ++tile_y) {
      for (int64_t tile_x = 0; tile_x < tiles_.x.tiles; ++tile_x) {
        copy_tile(planes, channel, channel_end, y_, x_, tiles_, tile_y, tile_x, input);
        const int64_t count = copy_gradient(grad_planes, output, output_end, tile_y, tile_x, rows);
        if (output_end - output == 1) {
          add_products<1, kManyTaps>(rows, 1, pointers, products, count, row_size, target);
        } else {
          add_products<kOutputs, kTaps>(rows, output_end - output, pointers, products, count,
                                        row_size, target);
        }
      }
    }
  }

  // The gradient's tile in the layout of the input's: returns its pixels, up to whole vectors.
  int64_t copy_gradient(const Planes<Scalar>& planes, int64_t begin, int64_t end, int64_t tile_y,
                        int64_t tile_x, Acc* rows) const {
    const int64_t y0 = tile_y * tiles_.y.extent, x0 = tile_x * tiles_.x.extent;
    const int64_t height = std::min(tiles_.y.extent, y_.count - y0);
    const int64_t width = std::min(tiles_.x.extent, x_.count - x0);
    const int64_t row_stride = tiles_.row_stride();
    const int64_t pixels = (height - 1) * row_stride + width;
    const int64_t count = ceil_div(pixels, kLanes<Acc>) * kLanes<Acc>;
    copy_window(planes, begin, end, Window{y0, 1, height, x0, 1, width}, rows, grad_stride(),
                row_stride);
    for (int64_t o = 0; o < end - begin; ++o) {
      Acc* row = rows + o * grad_stride();
      if (count > height * row_stride) std::fill(row + height * row_stride, row + count, Acc(0));
    }
    return count;
  }

  template <int kGradOutputs, int kGradTaps>
  void add_products(const Acc* rows, int64_t outputs, const Acc* const* pointers, int64_t products,
                    int64_t count, int64_t row_size, Acc* target) const {
    for (int64_t o = 0; o < outputs; o += kGradOutputs) {
      for (int64_t j = 0; j < products; j += kGradTaps) {
        Acc sums[kGradOutputs][kGradTaps];
        accumulate_products<Acc, kGradOutputs, kGradTaps>(rows + o * grad_stride(), grad_stride(),
                                                          pointers + j, count, sums);
        for (int64_t i = 0; i < std::min<int64_t>(kGradOutputs, outputs - o); ++i) {
          for (int64_t k = 0; k < std::min<int64_t>(kGradTaps, products - j); ++k) {
            target[(o + i) * row_size + j + k] += sums[i][k];
          }
        }
      }
    }
  }

  TapAxis y_, x_;
  int64_t groups_, channels_;
  bool has_ones_;
  int64_t outputs_;
  int64_t in_chunks_, out_chunks_, in_chunk_, out_chunk_;
  Tiles tiles_;
  std::vector<int64_t> tap_offsets_;
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

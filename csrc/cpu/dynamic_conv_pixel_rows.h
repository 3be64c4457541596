// The plan of 1x1 convolutions in channels_last: Y_b = X_b W_b^T with the pixels as rows, which are
// read and written as they lie, and the output channels in vectors.
//
// A task owns a block of output channels of some samples: it mixes that block of their kernels for
// a turn of input channels, which stays in the cache, and multiplies it with all pixels. The input
// gradient is the same with W_b in the place of its transpose.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_ahead.h"
#include "cpu/dynamic_conv_gemm.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

template <class Scalar>
class PixelRows {
 public:
  using Acc = accumulate_t<Scalar>;

  // `shape` is flattened: a map is one row.
  template <class A, class B>
  static bool fits(const DynamicConvShape& shape, const Image<A>& image, const Image<B>& result) {
    bool plain = (std::is_same_v<Scalar, Acc> || kPairs<Scalar>) && shape.groups == 1 &&
                 shape.code_channels == 0;
    // The channels of a pair lie side by side.
    for (int64_t number :
         {shape.in_channels, shape.out_channels, image.stride[0], image.stride[3]}) {
      plain = plain && number % kTogether == 0;
    }
    for (int axis = 0; axis < 2; ++axis) {
      plain =
          plain && shape.kernel[axis] == 1 && shape.stride[axis] == 1 && shape.padding[axis] == 0;
    }
    return plain && shape.in_size[0] == 1 && shape.in_channels > 1 && shape.out_channels > 1 &&
           image.stride[1] == 1 && result.stride[1] == 1;
  }

  PixelRows(Direction direction, const DynamicConvShape& shape)
      : forward_(direction == Direction::kForward) {
    inputs_ = forward_ ? shape.in_channels : shape.out_channels;
    outputs_ = forward_ ? shape.out_channels : shape.in_channels;
    entries_ = inputs_ / kTogether;
    pixels_ = shape.in_size[1];
    const int64_t blocks =
        ceil_div(outputs_, inputs_ / kTogether > kManyInputs ? 2 * kLane : 3 * kLane);
    block_ = ceil_div(ceil_div(outputs_, blocks + (blocks > 1 && blocks % 2)), kLane) * kLane;
    blocks_ = ceil_div(outputs_, block_);
    const int64_t sample_size = (kDepth + std::min(kChunk, pixels_)) * block_;
    samples_ = std::clamp<int64_t>(kTaskBytes / (sample_size * int64_t{sizeof(Acc)}), 1,
                                   std::max<int64_t>(1, shape.batch));
    samples_ = ceil_div(shape.batch, std::max<int64_t>(1, ceil_div(shape.batch, samples_)));
    // A last block of fewer outputs is less work, so that threads had better share the samples.
    if (outputs_ % block_ != 0 && shape.batch > 0 && shape.batch % 2 == 0) {
      samples_ = std::min(samples_, shape.batch / 2);
    }
    if (blocks_ < 4) samples_ = std::min(samples_, std::max<int64_t>(1, shape.batch / 4));
  }

  std::string name() const {
    return "matrix products, pixels as rows, kernels mixed a block at a time";
  }
  int64_t parts() const { return ceil_div(pixels_, kChunk); }

  // As Correlation::run.
  void run(const Mixer<Scalar>& mixer, const Image<const Scalar>& image, Activation activation,
           const Image<Scalar>& result, Acc* sums) const {
    if constexpr (std::is_same_v<Scalar, Acc> || kPairs<Scalar>) {
      const int64_t batch = mixer.shape().batch;
      const int64_t sample_blocks = ceil_div(batch, samples_);
      std::vector<Offsets> table;
      for (int64_t k = 0; k < kDepth; ++k) {
        table.push_back({static_cast<int32_t>(k), static_cast<int32_t>(k * block_)});
      }
      const int64_t chunks = parts();
      const bool shared = mixer.is_shared();
      parallel_for(sample_blocks * chunks * blocks_, 1, [&](int64_t begin, int64_t end) {
        // A vector that begins in the last row may end behind it.
        const Scratch<Acc> kernels((shared ? 1 : samples_) * kDepth * block_ + kLane);
        const Scratch<Acc> mixed((shared ? 1 : samples_) * piece_size());
        const int64_t c_size = std::min(kChunk, pixels_) * block_;
        const Scratch<Acc> c(samples_ * c_size);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t output = task % blocks_ * block_;
          const int64_t outputs = std::min(block_, outputs_ - output);
          const int64_t part = task / blocks_ % chunks, pixel = part * kChunk;
          const int64_t pixels = std::min(kChunk, pixels_ - pixel);
          const int64_t first = task / blocks_ / chunks * samples_;
          const int64_t count = std::min(samples_, batch - first);
          for (int64_t k = 0; k < entries_; k += kDepth) {
            const int64_t depth = std::min(kDepth, entries_ - k);
            const bool last = k + depth == entries_;
            mix(mixer, shared ? mixer.kAnySample : first, shared ? 1 : count, output, outputs, k,
                depth, mixed.get(), kernels.get());
            // What is mixed next is fetched meanwhile.
            const int64_t next = last ? task + 1 : task;
            Ahead ahead = next < end ? ahead_of(mixer, next, last ? 0 : k + kDepth, count,
                                                count * block_count<Acc>(pixels, outputs))
                                     : Ahead();
            for (int64_t i = 0; i < count; ++i) {
              const int64_t sample = first + i;
              const Acc* a = reinterpret_cast<const Acc*>(image.data + sample * image.stride[0] +
                                                          pixel * image.stride[3]);
              const int64_t plane = sample * outputs_ + output;
              const Epilogue<Acc> epilogue{mixer.result_scale(sample), nullptr,
                                           forward_ ? mixer.betas() + plane : nullptr, activation};
              Scalar* const y =
                  result.data + sample * result.stride[0] + pixel * result.stride[3] + output;
              Acc* const sum = &c[i * c_size];
              Sums<Acc> target{sum, block_, k == 0 ? nullptr : sum, block_};
              if (last) {
                target.epilogue = &epilogue;
                target.width = outputs;
                if constexpr (std::is_same_v<Scalar, Acc>) {
                  target.data = y;
                  target.row = result.stride[3];
                }
              }
              multiply<Scalar>(a + k, image.stride[3] / kTogether, pixels,
                               &kernels[(shared ? 0 : i) * kDepth * block_], table.data(), depth,
                               outputs, target, &ahead);
              if (!last) continue;
              for (int64_t p = 0; !std::is_same_v<Scalar, Acc> && p < pixels; ++p) {
                store_row(y + p * result.stride[3], target.data + p * target.row, outputs);
              }
              if (sums != nullptr) {
                sum_pixels(target.data, target.row, pixels, outputs, sums + plane * chunks + part,
                           chunks);
              }
            }
          }
        }
      });
    }
  }

 private:
  static constexpr int kLane = kLanes<Acc>;
  static constexpr int64_t kTogether = kPairs<Scalar> ? 2 : 1;  // channels in an entry
  static constexpr int64_t kDepth = 128, kChunk = 256, kManyInputs = 512;
  static constexpr int64_t kTransposed = 64;         // channels of the bank at a time
  static constexpr int64_t kTaskBytes = 512 * 1024;  // of the kernels and the sums of a task

  // For the part of the bank of which entries of a task's kernels are mixed from `entry` on. Where
  // many samples share it and it is read in order, the processor itself is soon enough.
  Ahead ahead_of(const Mixer<Scalar>& mixer, int64_t task, int64_t entry, int64_t samples,
                 int64_t steps) const {
    const DynamicConvShape& shape = mixer.shape();
    if (!shape.has_attention || (shape.bank <= samples && !transposes_bank(mixer, samples))) {
      return Ahead();
    }
    const int64_t output = task % blocks_ * block_;
    const int64_t outputs = std::min(block_, outputs_ - output);
    const int64_t channel = entry * kTogether;
    const int64_t channels = std::min(kDepth, entries_ - entry) * kTogether;
    const int64_t row = forward_ ? output : channel, first = forward_ ? channel : output;
    const int64_t rows = forward_ ? outputs : channels, count = forward_ ? channels : outputs;
    return Ahead(mixer.bank_row(0, row) + first, count, steps, {rows, shape.row_size()},
                 {shape.bank, shape.out_channels * shape.row_size()});
  }

  // kernels[sample][entry of kDepth][output of the block] for entries [entry, entry + depth)
  void mix(const Mixer<Scalar>& mixer, int64_t first, int64_t count, int64_t output,
           int64_t outputs, int64_t entry, int64_t depth, Acc* mixed, Acc* kernels) const {
    const int64_t kernel_size = kDepth * block_;
    const int64_t channel = entry * kTogether, channels = depth * kTogether;
    if (transposes_bank(mixer, count)) {
      mix_transposed(mixer, first, count, output, outputs, channel, channels, mixed, kernels);
    } else if (forward_) {
      for (int64_t r = 0; r < outputs; r += kLane) {
        const int64_t rows = std::min<int64_t>(kLane, outputs - r);
        mixer.mix_piece(first, count, output + r, rows, channel, channels, mixed, piece_size());
        for (int64_t i = 0; i < count; ++i) {
          Acc* const piece = mixed + i * piece_size();
          if constexpr (kPairs<Scalar>) {
            store_row(reinterpret_cast<Scalar*>(piece), piece, rows * channels);
          }
          transpose(kernels + i * kernel_size + r, block_, static_cast<const Acc*>(piece), depth,
                    rows, depth);
        }
      }
    } else if (kTogether == 1 && outputs == block_) {
      mixer.mix_piece(first, count, channel, channels, output, outputs, kernels, kernel_size);
    } else {
      for (int64_t k = 0; k < channels; k += kLane) {
        const int64_t rows = std::min<int64_t>(kLane, channels - k);
        mixer.mix_piece(first, count, channel + k, rows, output, outputs, mixed, piece_size());
        for (int64_t i = 0; i < count; ++i) {
          const Acc* piece = mixed + i * piece_size();
          Acc* target = kernels + i * kernel_size + k / kTogether * block_;
          for (int64_t row = 0; row < rows; row += kTogether, target += block_) {
            const Acc* const from = piece + row * outputs;
            if constexpr (kPairs<Scalar>) {
              pair_rows(target, from, from + outputs, outputs, outputs);
            } else {
              std::copy_n(from, outputs, target);
            }
          }
        }
      }
    }
    // Lanes beyond the last output are multiplied too.
    for (int64_t i = 0; outputs < block_ && i < count; ++i) {
      for (int64_t k = 0; k < depth; ++k) {
        Acc* const row = kernels + i * kernel_size + k * block_;
        std::fill(row + outputs, row + block_, Acc(0));
      }
    }
  }

  // Whether the kernels of the bank are transposed before they are mixed: they are not more, and
  // rows so long are not read in order anyhow.
  bool transposes_bank(const Mixer<Scalar>& mixer, int64_t samples) const {
    const DynamicConvShape& shape = mixer.shape();
    return forward_ && !kPairs<Scalar> && entries_ > kManyInputs && shape.has_attention &&
           !shape.attention_per_channel && !mixer.has_scales() && 1 < shape.bank &&
           shape.bank <= samples;
  }

  void mix_transposed(const Mixer<Scalar>& mixer, int64_t first, int64_t count, int64_t output,
                      int64_t outputs, int64_t channel, int64_t channels, Acc* bank,
                      Acc* kernels) const {
    const DynamicConvShape& shape = mixer.shape();
    const int64_t kernel = shape.out_channels * shape.row_size(), piece = kTransposed * block_;
    for (int64_t k = 0; k < channels; k += kTransposed) {
      const int64_t taken = std::min(kTransposed, channels - k);
      for (int64_t n = 0; n < shape.bank; ++n) {
        transpose(bank + n * piece, block_,
                  mixer.bank_row(first, output) + n * kernel + channel + k, shape.row_size(),
                  outputs, taken);
      }
      in_groups(count, 8, [&]<int kSamples>(std::integral_constant<int, kSamples>, int64_t i) {
        combine_rows<kSamples>(kernels + i * kDepth * block_ + k * block_, kDepth * block_,
                               mixer.attention(first + i, 0), shape.bank, shape.bank,
                               static_cast<const Acc*>(bank), piece, 0, taken * block_);
      });
    }
  }

  // Of a sample's piece on its way: some rows of outputs and channels, or of channels and outputs.
  int64_t piece_size() const { return kLane * std::max(kDepth * kTogether, block_); }

  // sums[output * step] = sum over pixels of y[pixel * row + output]
  static void sum_pixels(const Acc* y, int64_t row, int64_t pixels, int64_t outputs, Acc* sums,
                         int64_t step) {
    for (int64_t o = 0; o < outputs; o += kLane) {
      const int64_t lanes = std::min<int64_t>(kLane, outputs - o);
      Vector<Acc> total{};
      for (int64_t p = 0; p < pixels; ++p) {
        const Acc* at = y + p * row + o;
        total += lanes == kLane ? load_vector(at) : load_partial(at, lanes);
      }
      for (int64_t i = 0; i < lanes; ++i) sums[(o + i) * step] = total[i];
    }
  }

  bool forward_;
  int64_t inputs_, outputs_, pixels_;
  int64_t entries_;         // channels, or pairs of them, that a product sums over
  int64_t block_, blocks_;  // output channels of a task, whole vectors
  int64_t samples_;         // of a task
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

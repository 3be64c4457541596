// Gradients of the bank and of the attention where W_b is the plain mixture.
//
//   dW_b[o][k] = sum over pixels of grad_b[o][p] * patch_b[k][p]        k: a channel and a tap
//   dweight[n] = sum_b attention[b][n] dW_b,   dattention[b][n] = <dW_b, weight[n]>
//
// On small maps dW_b is never stored. Sums over 49 or 196 pixels are too short for vectors of
// pixels: the patches of some samples are laid out with k side by side; a task owns a block of
// [o][k], computes it for all these samples as matrix products, and contracts it with the bank
// while it is in the cache. Threads never share a sum, and partial sums are added in the order of
// the blocks.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_gemm.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Kernels that are scaled, mixed per channel or joined by a code take the general way.
template <class Scalar>
inline bool is_plain_mixture(const DynamicConvShape& shape,
                             const DynamicConvOperands<Scalar>& operands) {
  return shape.batch > 0 && !shape.attention_per_channel && shape.code_channels == 0 &&
         operands.in_scale == nullptr && operands.out_scale == nullptr &&
         operands.tap_scale == nullptr;
}

// The contractions of kernels that are there as a whole, [batch][O][row].
template <class Scalar>
void contract_kernels(const Mixer<Scalar>& mixer, const accumulate_t<Scalar>* kernels,
                      Scalar* weight, accumulate_t<Scalar>* attention) {
  using Acc = accumulate_t<Scalar>;
  constexpr int64_t kPart = 512;
  const DynamicConvShape& shape = mixer.shape();
  const int64_t size = shape.out_channels * shape.row_size(), batch = shape.batch;
  if (!shape.has_attention) {
    if (weight != nullptr) store_row(weight, kernels, batch * size);
    return;
  }
  const int64_t parts = ceil_div(size, kPart), bank = shape.bank;
  const Scratch<Acc> partials(attention != nullptr ? parts * batch * bank : 0);
  parallel_for(parts, 4, [&](int64_t begin, int64_t end) {
    const Scratch<Acc> line(kPart), factors(batch);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * kPart, count = std::min(kPart, size - first);
      for (int64_t n = 0; n < bank; ++n) {
        if (weight != nullptr) {
          for (int64_t b = 0; b < batch; ++b) factors[b] = mixer.attention(b, 0)[n];
          combine_rows(line.get(), factors.get(), batch, kernels + first, size, count);
          store_row(weight + n * size + first, line.get(), count);
        }
        for (int64_t b = 0; attention != nullptr && b < batch; ++b) {
          partials[(part * batch + b) * bank + n] = dot_rows(
              kernels + b * size + first, mixer.operands().weight + n * size + first, count);
        }
      }
    }
  });
  for (int64_t i = 0; attention != nullptr && i < batch * bank; ++i) {
    attention[i] = Acc(0);
    for (int64_t part = 0; part < parts; ++part) attention[i] += partials[part * batch * bank + i];
  }
}

template <class Scalar>
class SmallMapGradient {
 public:
  using Acc = accumulate_t<Scalar>;

  static bool fits(const DynamicConvShape& shape) {
    // Patches that hardly overlap and serve many outputs pay on larger maps, too.
    constexpr int64_t kManyOutputs = 64;
    const bool strided = shape.stride[0] * shape.stride[1] > 1 && shape.out_size[1] <= kMapPixels &&
                         shape.out_per_group() >= std::max(kManyOutputs, 2 * shape.in_per_group());
    const bool small =
        shape.out_size[0] * shape.out_size[1] <= (strided ? kStridedPixels : kMapPixels);
    return small && shape.out_per_group() >= 8 &&
           shape.in_per_group() * shape.taps() >= kLanes<Acc>;
  }

  explicit SmallMapGradient(const Mixer<Scalar>& mixer)
      : mixer_(mixer),
        shape_(mixer.shape()),
        y_(forward_axis(shape_, 0)),
        x_(forward_axis(shape_, 1)),
        tiles_(choose_tiles(y_, x_, 0, 0, 0, 0, kStridedPixels * 2, 1, true)),
        tap_offsets_(tiles_.tap_offsets()),
        pixels_(shape_.out_size[0] * shape_.out_size[1]),
        columns_(shape_.row_size()),
        turn_(ceil_div(pixels_, ceil_div(pixels_, kTurn))) {
    constexpr int64_t kLane = kLanes<Acc>, kBytes = sizeof(Acc);
    // Of a block the patches of a sample stay in the cache while rows go by, and its gradients of
    // all samples until they are contracted. Few blocks are shared out badly.
    const int64_t groups = shape_.groups, rows = shape_.out_per_group();
    const int64_t most_columns =
        std::clamp<int64_t>(kBlockBytes / (pixels_ * kBytes), kLeastColumns, kMostColumns);
    const int64_t wanted = ceil_div(columns_, most_columns);
    block_columns_ = ceil_div(ceil_div(columns_, wanted), kLane) * kLane;
    column_blocks_ = ceil_div(columns_, block_columns_);
    samples_ = std::min<int64_t>(shape_.batch, kMostSamples);
    const int64_t most_rows = std::clamp<int64_t>(
        kBlockBytes / (samples_ * block_columns_ * kBytes), kLeastRows, kMostRows);
    int64_t row_blocks = ceil_div(rows, most_rows);
    while (groups * column_blocks_ * row_blocks < kFewTasks && rows > row_blocks * kLeastRows) {
      ++row_blocks;
    }
    block_rows_ = ceil_div(ceil_div(rows, row_blocks), kBlockRows) * kBlockRows;
    row_blocks_ = ceil_div(rows, block_rows_);
    const int64_t sample = groups * column_blocks_ * block_columns_ * pixels_;
    samples_ = std::clamp<int64_t>(kPatchBytes / (sample * kBytes), 1, samples_);
    for (int64_t vectors = 1; vectors <= kBlockVectors; ++vectors) {
      for (int64_t p = 0; p < kTurn; ++p) {
        offsets_.push_back({static_cast<int32_t>(p), static_cast<int32_t>(p * vectors * kLane)});
      }
    }
  }

  // `weight` as the operand, or null; `attention` [batch][bank] is overwritten, or null.
  void run(const Image<const Scalar>& image, const Image<const Scalar>& grad, Scalar* weight,
           Acc* attention) const {
    const int64_t batch = shape_.batch, bank = shape_.bank;
    // Sums over all samples: of the result's own type they are taken where they belong.
    constexpr bool kApart = !std::is_same_v<Scalar, Acc>;
    const bool several = weight != nullptr && shape_.has_attention && samples_ < batch;
    const Scratch<Acc> apart(kApart && several ? bank * shape_.out_channels * columns_ : 0);
    Acc* sums = apart.get();
    if constexpr (!kApart) sums = several ? weight : nullptr;
    const Scratch<Acc> patches(samples_ * shape_.groups * column_blocks_ * block_columns_ *
                               pixels_);
    const bool direct = reads_directly(grad);
    const Scratch<Acc> copied(direct ? 0 : samples_ * shape_.out_channels * pixels_);
    const int64_t tasks = shape_.groups * row_blocks_ * column_blocks_;
    const Scratch<Acc> partials(attention != nullptr ? tasks * samples_ * bank : 0);
    for (int64_t first = 0; first < batch; first += samples_) {
      const int64_t count = std::min(samples_, batch - first);
      lay_out_patches(image, first, count, patches.get());
      if (!direct) lay_out_grads(grad, first, count, copied.get());
      const auto grads = [&](int64_t i, int64_t row) -> const Acc* {
        if constexpr (std::is_same_v<Scalar, Acc>) {
          if (direct) return grad.data + (first + i) * grad.stride[0] + row * grad.stride[1];
        }
        return &copied[(i * shape_.out_channels + row) * pixels_];
      };
      parallel_for(tasks, 1, [&](int64_t begin, int64_t end) {
        const Scratch<Acc> block(count * block_rows_ * block_columns_);
        for (int64_t task = begin; task < end; ++task) {
          const Block at = block_of(task);
          for (int64_t i = 0; i < count; ++i) {
            multiply_sample(grads(i, at.row), direct ? grad.stride[1] : pixels_, at,
                            &patches[patch_index(i, at.group, at.column_block)],
                            &block[i * block_rows_ * block_columns_]);
          }
          Acc* partial = attention != nullptr ? &partials[task * samples_ * bank] : nullptr;
          contract(at, first, count, block.get(), weight, sums, partial);
        }
      });
      for (int64_t i = 0; attention != nullptr && i < count; ++i) {
        for (int64_t n = 0; n < bank; ++n) {
          Acc total(0);
          for (int64_t task = 0; task < tasks; ++task) {
            total += partials[(task * samples_ + i) * bank + n];
          }
          attention[(first + i) * bank + n] = total;
        }
      }
    }
    if (kApart && several) {
      parallel_for(bank * shape_.out_channels, 16, [&](int64_t begin, int64_t end) {
        store_row(weight + begin * columns_, &sums[begin * columns_], (end - begin) * columns_);
      });
    }
  }

 private:
  static constexpr int64_t kMapPixels = 256, kStridedPixels = 1024;
  static constexpr int64_t kTurn = 128;  // pixels of a panel that stay in the first level
  static constexpr int64_t kBlockBytes = 400 * 1024, kLeastColumns = 48, kMostColumns = 192;
  static constexpr int64_t kLeastRows = 32, kMostRows = 256, kFewTasks = 4;
  static constexpr int64_t kMostSamples = 8, kPatchBytes = 16 << 20;

  struct Block {
    int64_t group, row, rows, column_block, column, columns;
  };

  Block block_of(int64_t task) const {
    const int64_t column_block = task % column_blocks_;
    const int64_t row_block = task / column_blocks_ % row_blocks_;
    const int64_t group = task / column_blocks_ / row_blocks_;
    const int64_t row = row_block * block_rows_, column = column_block * block_columns_;
    return {group,
            group * shape_.out_per_group() + row,
            std::min(block_rows_, shape_.out_per_group() - row),
            column_block,
            column,
            std::min(block_columns_, columns_ - column)};
  }

  int64_t patch_index(int64_t sample, int64_t group, int64_t column_block) const {
    return ((sample * shape_.groups + group) * column_blocks_ + column_block) * pixels_ *
           block_columns_;
  }

  // dW_b of a block [row][column], of one sample.
  void multiply_sample(const Acc* grads, int64_t grad_row, const Block& at, const Acc* patches,
                       Acc* block) const {
    for (int64_t k = 0; k < at.columns;) {
      const int64_t width = panel_of(at.columns - k), columns = std::min(width, at.columns - k);
      const Offsets* table = &offsets_[(width / kLanes<Acc> - 1) * kTurn];
      for (int64_t p = 0; p < pixels_; p += turn_) {
        multiply<Acc>(grads + p, grad_row, at.rows, patches + k * pixels_ + p * width, table,
                      std::min(turn_, pixels_ - p), columns,
                      {block + k, block_columns_, p == 0 ? nullptr : block + k, block_columns_});
      }
      k += width;
    }
  }

  // The columns that are multiplied at a time, whose patches lie side by side: whole vectors, of
  // which four are better taken as two and two than as three and one.
  static int64_t panel_of(int64_t left) {
    const int64_t vectors = ceil_div(left, kLanes<Acc>);
    return (vectors == 4 ? 2 : std::min<int64_t>(vectors, kBlockVectors)) * kLanes<Acc>;
  }

  // patches[sample][group][block of columns][panel][pixel][column]
  void lay_out_patches(const Image<const Scalar>& image, int64_t first, int64_t count,
                       Acc* patches) const {
    const int64_t taps = shape_.taps(), channels = shape_.in_per_group();
    const bool direct = has_patches(image);
    parallel_for(count * shape_.groups * column_blocks_, 1, [&](int64_t begin, int64_t end) {
      const int64_t most = direct ? 0 : block_columns_ / taps + 2;
      const Scratch<Acc> tile(most * tiles_.channel_stride());
      std::vector<const Acc*> rows(block_columns_);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t column = task % column_blocks_ * block_columns_;
        const int64_t column_end = std::min(column + block_columns_, columns_);
        const int64_t sample = first + task / column_blocks_ / shape_.groups;
        const int64_t group = task / column_blocks_ % shape_.groups;
        const Planes<Scalar> planes =
            planes_of_group(image, sample, group, channels, shape_.in_size[0], shape_.in_size[1]);
        const int64_t channel = column / taps;
        if (!direct) {
          copy_tile(planes, channel, ceil_div(column_end, taps), y_, x_, tiles_, 0, 0, tile.get());
        }
        // Columns that only fill the block hold numbers too: those of the last one.
        for (int64_t k = 0; k < block_columns_; ++k) {
          const int64_t real = std::min(column + k, column_end - 1);
          if constexpr (std::is_same_v<Scalar, Acc>) {
            if (direct) {
              rows[k] = planes.data + real * planes.channel_step;
              continue;
            }
          }
          rows[k] = tile.get() + (real / taps - channel) * tiles_.channel_stride() +
                    tap_offsets_[real % taps];
        }
        Acc* const target = patches + patch_index(sample - first, group, task % column_blocks_);
        for (int64_t k = 0; k < column_end - column;) {
          const int64_t width = panel_of(column_end - column - k);
          transpose_rows(&rows[k], width, pixels_, target + k * pixels_);
          k += width;
        }
      }
    });
  }

  // Whether the image's channels are the columns of patches already.
  bool has_patches(const Image<const Scalar>& image) const {
    return std::is_same_v<Scalar, Acc> && shape_.taps() == 1 && image.stride[3] == 1 &&
           shape_.in_size[0] == 1 && pixels_ == shape_.in_size[1] && shape_.padding[1] == 0;
  }

  // Whether the pixels of each channel follow one another already.
  bool reads_directly(const Image<const Scalar>& grad) const {
    return std::is_same_v<Scalar, Acc> && grad.stride[3] == 1 &&
           (grad.stride[2] == shape_.out_size[1] || shape_.out_size[0] == 1);
  }

  // grads[sample][channel][pixel]
  void lay_out_grads(const Image<const Scalar>& grad, int64_t first, int64_t count,
                     Acc* grads) const {
    constexpr int64_t kChannels = 16;
    const int64_t height = shape_.out_size[0], width = shape_.out_size[1];
    const int64_t chunks = ceil_div(shape_.out_channels, kChannels);
    parallel_for(count * chunks, 4, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t i = task / chunks, channel = task % chunks * kChannels;
        const int64_t channel_end = std::min(channel + kChannels, shape_.out_channels);
        const Planes<Scalar> planes =
            planes_of_group(grad, first + i, 0, shape_.out_channels, height, width);
        copy_window(planes, channel, channel_end, Window{0, 1, height, 0, 1, width},
                    grads + (i * shape_.out_channels + channel) * pixels_, pixels_, width);
      }
    });
  }

  // target[p][k] = rows[k][p] for `count` pixels; `columns` is a multiple of a vector.
  static void transpose_rows(const Acc* const* rows, int64_t columns, int64_t count, Acc* target) {
    constexpr int kLane = kLanes<Acc>;
    for (int64_t k = 0; k < columns; k += kLane) {
      for (int64_t p = 0; p < count; p += kLane) {
        Vector<Acc> square[kLane];
        const int64_t last = std::min<int64_t>(kLane, count - p);
#pragma GCC unroll 16
        for (int i = 0; i < kLane; ++i) {
          const Acc* const at = rows[k + i] + p;
          square[i] = last == kLane ? load_vector(at) : load_partial(at, last);
        }
        transpose_square<Acc>(square);
#pragma GCC unroll 16
        for (int i = 0; i < kLane; ++i) {
          if (i < last) store_vector(target + (p + i) * columns + k, square[i]);
        }
      }
    }
  }

  // Contracts dW_b of some samples, block[sample][row][column].
  void contract(const Block& at, int64_t first, int64_t count, const Acc* block, Scalar* weight,
                Acc* sums, Acc* partial) const {
    const int64_t sample_size = block_rows_ * block_columns_, bank = shape_.bank;
    if (weight != nullptr && shape_.has_attention) {
      const Scratch<Acc> factors(bank * count), lines(bank * at.columns);
      for (int64_t n = 0; n < bank; ++n) {
        for (int64_t i = 0; i < count; ++i) {
          factors[n * count + i] = mixer_.attention(first + i, 0)[n];
        }
      }
      // Row by row, which stays in the nearest cache for all kernels of the bank.
      for (int64_t r = 0; r < at.rows; ++r) {
        const Acc* const row = block + r * block_columns_;
        in_groups(bank, 8, [&]<int kKernels>(std::integral_constant<int, kKernels>, int64_t n) {
          combine_rows<kKernels>(&lines[n * at.columns], at.columns, &factors[n * count], count,
                                 count, row, sample_size, 0, at.columns);
        });
        for (int64_t n = 0; n < bank; ++n) {
          const Acc* const line = &lines[n * at.columns];
          const int64_t index = (n * shape_.out_channels + at.row + r) * columns_ + at.column;
          if (sums == nullptr) {
            store_row(weight + index, line, at.columns);
          } else if (first == 0) {
            std::copy_n(line, at.columns, &sums[index]);
          } else {
            add_scaled_row(&sums[index], Acc(1), line, at.columns);
          }
        }
      }
    }
    for (int64_t i = 0; weight != nullptr && !shape_.has_attention && i < count; ++i) {
      for (int64_t r = 0; r < at.rows; ++r) {
        store_row(weight + ((first + i) * shape_.out_channels + at.row + r) * columns_ + at.column,
                  block + i * sample_size + r * block_columns_, at.columns);
      }
    }
    for (int64_t i = 0; partial != nullptr && i < count; ++i) {
      in_groups(bank, 4, [&]<int kKernels>(std::integral_constant<int, kKernels>, int64_t n) {
        contract_block<kKernels>(at, block + i * sample_size, n, partial + i * bank + n);
      });
    }
  }

  // products[j] = <dW_b, weight[n + j]> over the block.
  template <int kKernels>
  void contract_block(const Block& at, const Acc* block, int64_t n, Acc* products) const {
    constexpr int kLane = kLanes<Acc>;
    const int64_t stride = shape_.out_channels * columns_;
    const Scalar* kernel = mixer_.operands().weight + n * stride + at.row * columns_ + at.column;
    Vector<Acc> sums[kKernels][2] = {};
    for (int64_t r = 0; r < at.rows; ++r, kernel += columns_, block += block_columns_) {
      int64_t k = 0;
      for (; k + 2 * kLane <= at.columns; k += 2 * kLane) {
        const Vector<Acc> first = load_vector(block + k), second = load_vector(block + k + kLane);
#pragma GCC unroll 4
        for (int j = 0; j < kKernels; ++j) {
          sums[j][0] += load_vector(kernel + j * stride + k) * first;
          sums[j][1] += load_vector(kernel + j * stride + k + kLane) * second;
        }
      }
      for (; k < at.columns; k += kLane) {
        const int64_t left = at.columns - k;
        const Vector<Acc> value =
            left >= kLane ? load_vector(block + k) : load_partial(block + k, left);
#pragma GCC unroll 4
        for (int j = 0; j < kKernels; ++j) {
          const Scalar* const from = kernel + j * stride + k;
          sums[j][0] += (left >= kLane ? load_vector(from) : load_partial(from, left)) * value;
        }
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kKernels; ++j) products[j] = sum_lanes<Acc>(sums[j][0] + sums[j][1]);
  }

  const Mixer<Scalar>& mixer_;
  const DynamicConvShape& shape_;
  TapAxis y_, x_;
  Tiles tiles_;
  std::vector<int64_t> tap_offsets_;
  int64_t pixels_, columns_;  // of a map; of a row of W_b
  int64_t turn_;              // pixels that are summed at a time
  std::vector<Offsets>
      offsets_;  // of the pixels of a turn, for panels of one vector, two, and so on
  int64_t block_rows_, row_blocks_, block_columns_, column_blocks_;
  int64_t samples_;  // laid out at a time
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

// Mixing each sample's kernel from the bank, and taking its gradient back to the bank, the
// attention, the scales and the code.
//
// A row is the kernel of one output channel of one sample: [I / groups + D][taps].
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

inline constexpr int64_t kMixGrain = 1 << 15;  // multiplications worth a thread

// Whether W_b is the same for all samples but for a factor, which may as well be that of the
// result.
template <class Scalar>
bool shares_kernel(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands) {
  return shape.has_attention && shape.bank == 1 && !shape.attention_per_channel &&
         shape.code_channels == 0 && operands.in_scale == nullptr &&
         operands.out_scale == nullptr && operands.tap_scale == nullptr;
}

template <class Scalar>
class Mixer {
 public:
  using Acc = accumulate_t<Scalar>;

  Mixer(const DynamicConvShape& shape, const DynamicConvOperands<Scalar>& operands)
      : shape_(shape),
        operands_(operands),
        factors_(factor_rows() * shape.bank),
        factor_pairs_(kPairs<Scalar> ? factor_rows() * pairs() : 0) {
    for (int64_t row = 0; row < factor_rows(); ++row) {
      const int64_t outputs = sample_rows();
      Acc* const factors = &factors_[row * shape.bank];
      for (int64_t k = 0; k < shape.bank; ++k) {
        factors[k] = load_as_accumulate(operands.attention +
                                        attention_index(row / outputs, k, row % outputs));
      }
      if constexpr (kPairs<Scalar>) {
        Acc* const pairs_of_row = &factor_pairs_[row * pairs()];
        for (int64_t k = 0; k < shape.bank; k += 2) {
          pairs_of_row[k / 2] = pair_of(factors[k], k + 1 < shape.bank ? factors[k + 1] : 0);
        }
      }
    }
  }

  // A kernel that is shared is mixed for `kAnySample`, whose attention is one.
  bool is_shared() const { return shares_kernel(shape_, operands_); }
  static constexpr int64_t kAnySample = -1;

  // By which the result must be multiplied if a shared kernel was mixed for any sample.
  Acc result_scale(int64_t b) const { return is_shared() ? attention(b, 0)[0] : Acc(1); }

  // The attention of all kernels of the bank for a sample and an output channel; as pairs.
  const Acc* attention(int64_t b, int64_t o) const {
    static constexpr Acc kOne = Acc(1);
    return is_one(b) ? &kOne : &factors_[factor_row(b, o) * shape_.bank];
  }
  const Acc* attention_pairs(int64_t b, int64_t o) const {
    static const Acc kOne = pair_of(1, 0);
    return is_one(b) ? &kOne : &factor_pairs_[factor_row(b, o) * pairs()];
  }

  int64_t attention_index(int64_t b, int64_t k, int64_t o) const {
    const int64_t entry = b * shape_.bank + k;
    return shape_.attention_per_channel ? entry * shape_.out_channels + o : entry;
  }

  // Where kernel k of output channel o lies in [N][O] (without attention: [B][O]).
  int64_t bank_index(int64_t b, int64_t k, int64_t o) const {
    return (shape_.has_attention ? k : b) * shape_.out_channels + o;
  }

  // sum_k attention[b,k(,o)] weight[k,o] before the scales, entries [first, first + count) of the
  // row.
  void mix(int64_t b, int64_t o, int64_t first, int64_t count, Acc* row) const {
    combine_rows(row, attention(b, o), shape_.bank, bank_row(b, o) + first, bank_stride(), count);
  }

  Acc mix_bias(int64_t b, int64_t o) const {
    if (operands_.bias == nullptr) return Acc(0);
    Acc sum(0);
    for (int64_t k = 0; k < shape_.bank; ++k) {
      sum += attention(b, o)[k] * load_as_accumulate(operands_.bias + bank_index(b, k, o));
    }
    return sum;
  }

  Acc out_scale(int64_t b, int64_t o) const {
    return scale(operands_.out_scale, b * shape_.out_channels + o);
  }

  // Of channel c in the row of output channel o; one for code channels.
  Acc in_scale(int64_t b, int64_t o, int64_t c) const {
    if (c >= shape_.in_per_group()) return Acc(1);
    const int64_t group = o / shape_.out_per_group();
    return scale(operands_.in_scale, b * shape_.in_channels + group * shape_.in_per_group() + c);
  }

  Acc tap_scale(int64_t b, int64_t tap) const {
    return scale(operands_.tap_scale, b * shape_.taps() + tap);
  }

  Acc code(int64_t b, int64_t d) const {
    return load_as_accumulate(operands_.code + b * shape_.code_channels + d);
  }

  bool has_scales() const {
    return operands_.in_scale != nullptr || operands_.out_scale != nullptr ||
           operands_.tap_scale != nullptr;
  }

  // Multiplies channels [first, first + count) of a row by their three scales.
  void apply_scales(int64_t b, int64_t o, int64_t first, int64_t count, Acc* row) const {
    if (!has_scales()) return;
    for (int64_t c = 0; c < count; ++c) {
      const Acc factor = out_scale(b, o) * in_scale(b, o, first + c);
      for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
        row[c * shape_.taps() + tap] *= factor * tap_scale(b, tap);
      }
    }
  }

  // Mixes all biases and, where there is a code, folds it: with S_b = sum_d code[b,d] W_b[:, I+d]
  // the code channels are one channel of ones with the kernel S_b. Where no tap leaves the image
  // (`has_ones` false) that adds the same everywhere, like a bias.
  void fold(bool has_ones) {
    const int64_t taps = shape_.taps(), outputs = shape_.out_channels;
    beta_ = Scratch<Acc>(shape_.batch * outputs);
    if (has_ones) ones_ = Scratch<Acc>(shape_.batch * outputs * taps);
    const int64_t size = shape_.code_channels * taps;
    const int64_t grain = kMixGrain / (size * (shape_.bank + 2) + shape_.bank + 1);
    parallel_for(shape_.batch * outputs, std::max<int64_t>(1, grain),
                 [&](int64_t begin, int64_t end) {
                   const Scratch<Acc> row(size), folded(taps);
                   for (int64_t index = begin; index < end; ++index) {
                     const int64_t b = index / outputs, o = index % outputs;
                     beta_[index] = mix_bias(b, o);
                     if (size == 0) continue;
                     mix(b, o, shape_.in_per_group() * taps, size, row.get());
                     apply_scales(b, o, shape_.in_per_group(), shape_.code_channels, row.get());
                     Acc* target = has_ones ? &ones_[index * taps] : folded.get();
                     std::fill_n(target, taps, Acc(0));
                     for (int64_t d = 0; d < shape_.code_channels; ++d) {
                       for (int64_t t = 0; t < taps; ++t)
                         target[t] += code(b, d) * row[d * taps + t];
                     }
                     if (!has_ones) beta_[index] += sum_row(folded.get(), taps);
                   }
                 });
  }

  Acc beta(int64_t b, int64_t o) const { return beta_[b * shape_.out_channels + o]; }

  const Acc* betas() const { return beta_.get(); }

  // Elements of a mixed row: x's channels and, after fold(true), the channel of ones.
  int64_t row_size(bool has_ones) const {
    return (shape_.in_per_group() + has_ones) * shape_.taps();
  }

  // Rows [row, row + rows), channels [channel, channel + channels) of the scaled kernels of
  // samples [first, first + samples): target[sample * stride + ...], [rows][channels][taps]. The
  // channel after x's is that of ones.
  void mix_piece(int64_t first, int64_t samples, int64_t row, int64_t rows, int64_t channel,
                 int64_t channels, Acc* target, int64_t stride) const {
    const int64_t taps = shape_.taps();
    const int64_t real = std::min(channels, shape_.in_per_group() - channel);
    // Whole rows of one sample lie side by side, in the bank too.
    const bool merged =
        real == channels && channels * taps == shape_.row_size() && !shape_.attention_per_channel;
    const int64_t merged_rows = merged ? std::max<int64_t>(1, kMergedSize / (channels * taps)) : 1;
    for (int64_t r = 0; r < rows; r += merged_rows) {
      const int64_t taken = std::min(merged_rows, rows - r);
      const int64_t ahead = r + merged_rows < rows ? merged_rows * shape_.row_size() : 0;
      Acc* const pieces = target + r * channels * taps;
      in_groups(samples, most_sharing(),
                [&]<int kSamples>(std::integral_constant<int, kSamples>, int64_t i) {
                  combine_rows<kSamples>(pieces + i * stride, stride, attention(first + i, row + r),
                                         sample_rows() * shape_.bank, shape_.bank,
                                         bank_row(first + i, row + r) + channel * taps,
                                         bank_stride(), i == 0 ? ahead : 0, taken * real * taps);
                });
      for (int64_t i = 0; i < samples; ++i) {
        Acc* piece = pieces + i * stride;
        for (int64_t j = 0; j < taken; ++j) {
          apply_scales(first + i, row + r + j, channel, real, piece + j * channels * taps);
        }
        if (real < channels) {
          std::copy_n(&ones_[((first + i) * shape_.out_channels + row + r) * taps], taps,
                      piece + real * taps);
        }
      }
    }
  }

  // Pairs of the mixed kernels of samples [first, first + samples), before the scales: of `count`
  // entries of the bank from `a`, and `partners` from `b`, entries of [O][row_size].
  void mix_pairs(int64_t first, int64_t samples, int64_t a, int64_t b, int64_t count,
                 int64_t partners, Acc* target, int64_t stride) const {
    const int64_t output = a / shape_.row_size();
    in_groups(samples, most_sharing(),
              [&]<int kSamples>(std::integral_constant<int, kSamples>, int64_t i) {
                const Scalar* bank = bank_row(first + i, 0);
                combine_pairs<kSamples>(target + i * stride, stride,
                                        attention_pairs(first + i, output), sample_rows() * pairs(),
                                        shape_.bank, bank + a, bank + b, bank_stride(),
                                        shape_.row_size(), count, partners);
              });
  }

  // The whole scaled kernels of samples [first, first + samples): [sample][O][channels][taps].
  void mix_whole(int64_t first, int64_t samples, bool has_ones, Acc* target) const {
    const int64_t outputs = shape_.out_channels, size = row_size(has_ones);
    const int64_t grain = kMixGrain / (size * shape_.bank * samples + 1);
    parallel_for(outputs, std::max<int64_t>(1, grain), [&](int64_t begin, int64_t end) {
      mix_piece(first, samples, begin, end - begin, 0, shape_.in_per_group() + has_ones,
                target + begin * size, outputs * size);
    });
  }

  // Output channel o in the first kernel of the bank.
  const Scalar* bank_row(int64_t b, int64_t o) const {
    return operands_.weight + bank_index(b, 0, o) * shape_.row_size();
  }

  const DynamicConvShape& shape() const { return shape_; }
  const DynamicConvOperands<Scalar>& operands() const { return operands_; }

 private:
  static constexpr int64_t kMergedSize = 512;  // entries of rows that are mixed in one go

  // The samples that share the rows of the bank at a time: without attention each has its own.
  int64_t most_sharing() const { return shape_.has_attention ? 8 : 1; }

  // From one kernel of the bank to the next.
  int64_t bank_stride() const { return shape_.out_channels * shape_.row_size(); }

  static Acc scale(const Acc* scales, int64_t index) {
    return scales == nullptr ? Acc(1) : scales[index];
  }

  // Rows of the attention, each with a factor for every kernel of the bank: of a sample, of all;
  // the one of an output channel; and the pairs of kernels in a row.
  int64_t sample_rows() const { return shape_.attention_per_channel ? shape_.out_channels : 1; }
  int64_t factor_rows() const { return shape_.has_attention ? shape_.batch * sample_rows() : 0; }
  int64_t factor_row(int64_t b, int64_t o) const {
    return shape_.attention_per_channel ? b * shape_.out_channels + o : b;
  }
  int64_t pairs() const { return ceil_div(shape_.bank, 2); }

  // Whether the attention is one: there is none, or a kernel that is shared is wanted.
  bool is_one(int64_t b) const { return !shape_.has_attention || b == kAnySample; }

  const DynamicConvShape& shape_;
  const DynamicConvOperands<Scalar>& operands_;
  Scratch<Acc> factors_;            // the attention, [B][N] or [B][O][N]
  Scratch<Acc> factor_pairs_;       // the same in pairs, where kernels are mixed in pairs
  Scratch<Acc> beta_{0}, ones_{0};  // of fold(): [B][O], [B][O][taps]
};

// What a plan is run with.
template <class Scalar>
struct PlanJob {
  const Mixer<Scalar>& mixer;
  const Image<const Scalar>& image;
  Activation activation;
  const Image<Scalar>& result;
  accumulate_t<Scalar>* sums;
  bool accumulate;  // add to the result, whose columns then lie side by side
};

// Contracts dW_b, sample after sample in batches, to the gradients of everything W_b is made of.
template <class Scalar>
class BankGradient {
 public:
  using Acc = accumulate_t<Scalar>;

  BankGradient(const Mixer<Scalar>& mixer, const DynamicConvGradients<Scalar>& gradients)
      : mixer_(mixer),
        shape_(mixer.shape()),
        gradients_(gradients),
        weight_sum_(needs_sums() && gradients.weight != nullptr
                        ? shape_.bank * shape_.out_channels * shape_.row_size()
                        : 0),
        bias_sum_(needs_sums() && gradients.bias != nullptr ? shape_.bank * shape_.out_channels
                                                            : 0) {}

  // Elements of scratch for each sample of add().
  int64_t partial_size() const { return shape_.out_channels * partial_row_size(); }

  // Adds samples [first, first + count), in order. `grad_kernel` [count][O][channels][taps] has
  // x's channels of each group and then, with code, the channel of ones; `grad_bias` [count][O]
  // is null when not needed.
  void add(int64_t first, int64_t count, const Acc* grad_kernel, const Acc* grad_bias) {
    const Scratch<Acc> partials(count * partial_size());
    parallel_for(shape_.out_channels, 1, [&](int64_t begin, int64_t end) {
      const Scratch<Acc> rows(3 * shape_.row_size());
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t i = 0; i < count; ++i) {
          const int64_t row = i * shape_.out_channels + o;
          Acc* partial = &partials[row * partial_row_size()];
          std::fill_n(partial, partial_row_size(), Acc(0));
          if (grad_bias != nullptr) add_bias(first + i, o, grad_bias[row], partial);
          if (grad_kernel != nullptr) {
            add_kernel(first + i, o, grad_kernel + row * grad_row_size(), partial, rows.get());
          }
        }
      }
    });
    parallel_for(count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) reduce(first + i, &partials[i * partial_size()]);
    });
  }

  // Stores what was summed over the samples.
  void finish() const {
    if (!needs_sums()) return;
    const auto store = [](Scalar* target, const std::vector<Acc>& sums) {
      if (target != nullptr) store_row(target, sums.data(), static_cast<int64_t>(sums.size()));
    };
    store(gradients_.weight, weight_sum_);
    store(gradients_.bias, bias_sum_);
  }

 private:
  // Without attention each sample has its own kernels, and nothing is summed over samples.
  bool needs_sums() const { return shape_.has_attention; }

  int64_t grad_row_size() const {
    return (shape_.in_per_group() + (shape_.code_channels > 0)) * shape_.taps();
  }

  // The partial gradients of one output channel: attention [N], in_scale [I / groups],
  // tap_scale [taps], code [D].
  int64_t in_scale_at() const { return shape_.bank; }
  int64_t tap_scale_at() const { return in_scale_at() + shape_.in_per_group(); }
  int64_t code_at() const { return tap_scale_at() + shape_.taps(); }
  int64_t partial_row_size() const { return code_at() + shape_.code_channels; }

  void add_bias(int64_t b, int64_t o, Acc grad_bias, Acc* partial) {
    for (int64_t k = 0; k < shape_.bank; ++k) {
      const int64_t index = mixer_.bank_index(b, k, o);
      if (gradients_.bias != nullptr) {
        if (needs_sums()) {
          bias_sum_[index] += mixer_.attention(b, o)[k] * grad_bias;
        } else {
          gradients_.bias[index] = static_cast<Scalar>(grad_bias);
        }
      }
      if (mixer_.operands().bias != nullptr) {
        partial[k] += grad_bias * load_as_accumulate(mixer_.operands().bias + index);
      }
    }
  }

  void add_kernel(int64_t b, int64_t o, const Acc* grad_row, Acc* partial, Acc* rows) {
    const int64_t size = shape_.row_size(), taps = shape_.taps();
    Acc* grad = rows;  // of W_b's row, then of the mixed row before its scales
    Acc* mixed = rows + size;
    Acc* scaled = rows + 2 * size;
    const Acc* ones_row = grad_row + shape_.in_per_group() * taps;
    std::copy_n(grad_row, shape_.in_per_group() * taps, grad);
    for (int64_t d = 0; d < shape_.code_channels; ++d) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        grad[(shape_.in_per_group() + d) * taps + tap] = mixer_.code(b, d) * ones_row[tap];
      }
    }
    if (gradients_.code != nullptr || gradients_.in_scale != nullptr ||
        gradients_.out_scale != nullptr || gradients_.tap_scale != nullptr) {
      mixer_.mix(b, o, 0, size, mixed);
    }
    if (gradients_.code != nullptr) {
      std::copy_n(mixed, size, scaled);
      mixer_.apply_scales(b, o, 0, shape_.in_per_group() + shape_.code_channels, scaled);
      for (int64_t d = 0; d < shape_.code_channels; ++d) {
        partial[code_at() + d] =
            dot_rows(scaled + (shape_.in_per_group() + d) * taps, ones_row, taps);
      }
    }
    if (gradients_.in_scale != nullptr || gradients_.out_scale != nullptr ||
        gradients_.tap_scale != nullptr) {
      add_scales(b, o, grad, mixed, partial);
    }
    if (gradients_.weight == nullptr && gradients_.attention == nullptr) return;
    mixer_.apply_scales(b, o, 0, shape_.in_per_group() + shape_.code_channels, grad);
    for (int64_t k = 0; k < shape_.bank; ++k) {
      const int64_t index = mixer_.bank_index(b, k, o) * size;
      if (gradients_.attention != nullptr) {
        partial[k] += dot_rows(grad, mixer_.operands().weight + index, size);
      }
      if (gradients_.weight == nullptr) continue;
      if (needs_sums()) {
        add_scaled_row(&weight_sum_[index], mixer_.attention(b, o)[k], grad, size);
      } else {
        store_row(gradients_.weight + index, grad, size);
      }
    }
  }

  // W = out . in . tap . M: the gradient of one scale is <dW, M> with the two others.
  void add_scales(int64_t b, int64_t o, const Acc* grad, const Acc* mixed, Acc* partial) {
    const int64_t taps = shape_.taps();
    const Acc out_scale = mixer_.out_scale(b, o);
    Acc out_sum(0);
    for (int64_t c = 0; c < shape_.in_per_group() + shape_.code_channels; ++c) {
      const Acc in_scale = mixer_.in_scale(b, o, c);
      Acc in_sum(0);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const Acc product = grad[c * taps + tap] * mixed[c * taps + tap];
        in_sum += product * mixer_.tap_scale(b, tap);
        partial[tap_scale_at() + tap] += product * out_scale * in_scale;
      }
      out_sum += in_sum * in_scale;
      if (c < shape_.in_per_group()) partial[in_scale_at() + c] = in_sum * out_scale;
    }
    if (gradients_.out_scale != nullptr) {
      gradients_.out_scale[b * shape_.out_channels + o] = out_sum;
    }
  }

  // Sums one sample's partial gradients [O][partial_row_size()] over the output channels.
  void reduce(int64_t b, const Acc* partials) const {
    const int64_t stride = partial_row_size();
    const auto sum = [&](int64_t at, int64_t begin, int64_t end) {
      Acc total(0);
      for (int64_t o = begin; o < end; ++o) total += partials[o * stride + at];
      return total;
    };
    if (gradients_.attention != nullptr) {
      for (int64_t k = 0; k < shape_.bank; ++k) {
        if (!shape_.attention_per_channel) {
          gradients_.attention[mixer_.attention_index(b, k, 0)] =
              static_cast<Scalar>(sum(k, 0, shape_.out_channels));
          continue;
        }
        for (int64_t o = 0; o < shape_.out_channels; ++o) {
          gradients_.attention[mixer_.attention_index(b, k, o)] =
              static_cast<Scalar>(sum(k, o, o + 1));
        }
      }
    }
    if (gradients_.in_scale != nullptr) {
      for (int64_t i = 0; i < shape_.in_channels; ++i) {
        const int64_t group = i / shape_.in_per_group();
        gradients_.in_scale[b * shape_.in_channels + i] =
            sum(in_scale_at() + i % shape_.in_per_group(), group * shape_.out_per_group(),
                (group + 1) * shape_.out_per_group());
      }
    }
    if (gradients_.tap_scale != nullptr) {
      for (int64_t tap = 0; tap < shape_.taps(); ++tap) {
        gradients_.tap_scale[b * shape_.taps() + tap] =
            sum(tap_scale_at() + tap, 0, shape_.out_channels);
      }
    }
    if (gradients_.code != nullptr) {
      for (int64_t d = 0; d < shape_.code_channels; ++d) {
        gradients_.code[b * shape_.code_channels + d] =
            static_cast<Scalar>(sum(code_at() + d, 0, shape_.out_channels));
      }
    }
  }

  const Mixer<Scalar>& mixer_;
  const DynamicConvShape& shape_;
  const DynamicConvGradients<Scalar>& gradients_;
  std::vector<Acc> weight_sum_, bias_sum_;  // [N][O][row], [N][O]
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

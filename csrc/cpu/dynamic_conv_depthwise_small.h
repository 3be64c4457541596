// Depthwise convolution of small planes: a vector of channels at a time.
//
// A row of 7 fills less than half a vector of AVX-512, and every plane has weights of its own. So
// the planes of as many channels as a vector has lanes are transposed into vectors of channels,
// which they are in channels_last anyway: then all lanes are full, and a weight is a vector. Zeros
// stand for the columns of the padding; its rows are left out. A block of channels mixes its
// kernels for several samples at once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_ahead.h"
#include "cpu/dynamic_conv_depthwise.h"
#include "cpu/dynamic_conv_mix.h"

namespace ddrf_fast::DDRF_CAPABILITY {

template <class Scalar>
class SmallPlanes {
 public:
  using Acc = accumulate_t<Scalar>;

  // In NCHW planes whose rows follow one another and are not worth a vector each, with kernels that
  // are worth the shuffles.
  template <class A, class B>
  static bool fits(const TapAxis& y, const TapAxis& x, const DynamicConvShape& shape,
                   const Image<A>& image, const Image<B>& result) {
    // The input gradient with a stride steps by one.
    const int64_t size = shape.kernel[0], step = x.in_step;
    const bool small = Depthwise<Scalar>::fits(shape) && Depthwise<Scalar>::is_square(shape) &&
                       shape.groups % kLane == 0 && step == shape.stride[0] && step <= 2 &&
                       x.count >= kColumns && y.in_size <= kMostRows && x.in_size <= kMostRows;
    if (image.stride[1] == 1 && result.stride[1] == 1) return small;
    return small && step == 1 && size >= (kManyRegisters ? 5 : 7) && x.count <= kMany &&
           image.stride[3] == 1 && image.stride[2] == x.in_size && result.stride[3] == 1 &&
           result.stride[2] == x.count;
  }

  SmallPlanes(Direction direction, const TapAxis& y, const TapAxis& x,
              const DynamicConvShape& shape)
      : y_(y),
        x_(x),
        size_(shape.kernel[0]),
        first_y_(std::min(y.shift.front(), y.shift.back())),
        columns_((x.count - 1) * x.in_step + size_),
        flipped_(direction == Direction::kInputGradient) {
    // Columns that no tap reads go to a pixel after the last.
    const int64_t first_x = std::min(x.shift.front(), x.shift.back());
    for (int64_t row = 0; row < y.in_size; ++row) {
      for (int64_t column = -first_x; column < x.in_size - first_x; ++column) {
        const bool read = column >= 0 && column < columns_;
        places_.push_back((read ? row * columns_ + column : y.in_size * columns_) * kLane);
      }
    }
  }

  std::string name() const { return "depthwise, a vector of channels at a time"; }
  int64_t parts() const { return 1; }

  // As Correlation::run.
  void run(const Mixer<Scalar>& mixer, const Image<const Scalar>& image, Activation activation,
           const Image<Scalar>& result, Acc* sums) const {
    const Task task{mixer, image, activation, result, sums};
    size_ == 3 ? run_sized<3>(task) : size_ == 5 ? run_sized<5>(task) : run_sized<7>(task);
  }

 private:
  static constexpr int kLane = kLanes<Acc>;
  static constexpr int kColumns = 4, kMany = 7;  // outputs that share each loaded weight
  static constexpr int64_t kMostRows = 16, kSamples = 8;
  static constexpr int64_t kMinWork = 1 << 16;

  struct Task {
    const Mixer<Scalar>& mixer;
    const Image<const Scalar>& image;
    Activation activation;
    const Image<Scalar>& result;
    Acc* sums;
  };

  template <class Value>
  static Value* planes_of(const Image<Value>& image, int64_t sample, int64_t channel) {
    return image.data + sample * image.stride[0] + channel * image.stride[1];
  }

  template <int kSize>
  void run_sized(const Task& task) const {
    x_.in_step == 1 ? run_strided<kSize, 1>(task) : run_strided<kSize, 2>(task);
  }

  template <int kSize, int kStride>
  void run_strided(const Task& task) const {
    if (kManyRegisters && x_.count % kMany == 0) return run_blocks<kSize, kStride, kMany>(task);
    run_blocks<kSize, kStride, kColumns>(task);
  }

  template <int kSize, int kStride, int kTaken>
  void run_blocks(const Task& task) const {
    constexpr int64_t kTaps = kSize * kSize;
    const int64_t batch = task.mixer.shape().batch, channels = task.mixer.shape().out_channels;
    const int64_t blocks = channels / kLane, samples = std::min(kSamples, batch);
    const int64_t outputs = y_.count * x_.count, work = kTaps * outputs * kLane * samples + 1;
    const auto run = [&](int64_t begin, int64_t end) {
      const Scratch<Acc> kernels(samples * kLane * kTaps), weights(kLane * kTaps);
      const Scratch<Acc> input((y_.in_size * columns_ + 1) * kLane), output(outputs * kLane);
      std::fill_n(input.get(), y_.in_size * columns_ * kLane, Acc(0));
      for (int64_t index = begin; index < end; ++index) {
        const int64_t channel = index % blocks * kLane, first = index / blocks * samples;
        const int64_t count = std::min(samples, batch - first);
        task.mixer.mix_piece(first, count, channel, kLane, 0, 1, kernels.get(), kLane * kTaps);
        for (int64_t i = 0; i < count; ++i) {
          lay_out<kTaps>(&kernels[i * kLane * kTaps], weights.get());
          take(task.image, planes_of(task.image, first + i, channel), input.get());
          const bool last = i + 1 == count;
          const Scalar* next = last ? planes_of(task.image, first, channel + kLane)
                                    : planes_of(task.image, first + i + 1, channel);
          if (last && channel + kLane == channels) next = nullptr;
          convolve<kSize, kStride, kTaken>(task, first + i, channel, input.get(), weights.get(),
                                           output.get(), next);
        }
      }
    };
    parallel_for(blocks * ceil_div(batch, samples), std::max<int64_t>(1, kMinWork / work), run);
  }

  // The kernels of a block as vectors of channels.
  template <int kTaps>
  void lay_out(const Acc* kernels, Acc* weights) const {
    transpose(weights, kLane, kernels, kTaps, kLane, kTaps);
    for (int tap = 0; flipped_ && tap < kTaps / 2; ++tap) {
      std::swap_ranges(weights + tap * kLane, weights + (tap + 1) * kLane,
                       weights + (kTaps - 1 - tap) * kLane);
    }
  }

  // The planes of a block as vectors of channels.
  void take(const Image<const Scalar>& image, const Scalar* planes, Acc* input) const {
    if (image.stride[1] == 1) {
      const int64_t* place = places_.data();
      for (int64_t y = 0; y < y_.in_size; ++y) {
        for (int64_t x = 0; x < x_.in_size; ++x) {
          store_vector(input + *place++,
                       load_vector(planes + y * image.stride[2] + x * image.stride[3]));
        }
      }
      return;
    }
    const int64_t stride = image.stride[1], pixels = y_.in_size * x_.in_size;
    int64_t i = 0;
    for (; pixels - i > kFew<Acc>; i += kLane) {
      const int64_t count = std::min<int64_t>(kLane, pixels - i);
      Vector<Acc> square[kLane];
      load_square(planes + i, stride, count, square);
      transpose_square<Acc>(square);
#pragma GCC unroll 16
      for (int j = 0; j < kLane; ++j) {
        if (j < count) store_vector(input + places_[i + j], square[j]);
      }
    }
    for (; i < pixels; ++i) {
      for (int c = 0; c < kLane; ++c) {
        input[places_[i] + c] = load_as_accumulate(planes + c * stride + i);
      }
    }
  }

  void give(const Image<Scalar>& image, Scalar* planes, const Acc* output) const {
    if (image.stride[1] == 1) {
      for (int64_t y = 0; y < y_.count; ++y) {
        for (int64_t x = 0; x < x_.count; ++x, output += kLane) {
          store_vector(planes + y * image.stride[2] + x * image.stride[3], load_vector(output));
        }
      }
      return;
    }
    transpose(planes, image.stride[1], output, kLane, y_.count * x_.count, kLane);
  }

  // In channels_last, where planes are not lines that follow one another: a row of a block.
  template <class Value>
  static void fetch_row(const Image<Value>& image, const Value* planes, int64_t y, int64_t width) {
    for (int64_t x = 0; x < width; ++x) {
      __builtin_prefetch(planes + y * image.stride[2] + x * image.stride[3], 0, 2);
    }
  }

  // One block of a sample, while the one at `next` (if any) and the place of the result are
  // fetched.
  template <int kSize, int kStride, int kTaken>
  void convolve(const Task& task, int64_t sample, int64_t channel, const Acc* input,
                const Acc* weights, Acc* output, const Scalar* next) const {
    const int64_t plane = sample * task.mixer.shape().out_channels + channel;
    const Vector<Acc> beta = flipped_ ? Vector<Acc>{} : load_vector(task.mixer.betas() + plane);
    const int64_t outputs = y_.count * x_.count;
    Scalar* const target = planes_of(task.result, sample, channel);
    Ahead ahead, results;
    const bool lines = task.image.stride[1] != 1;
    if (lines && next != nullptr) {
      ahead = planes_ahead(task.image, next, kLane, y_.in_size, y_.count);
    }
    if (lines) results = planes_ahead(task.result, target, kLane, y_.count, y_.count);
    for (int64_t y = 0; y < y_.count; ++y) {
      ahead.step();
      results.step();
      if (!lines) fetch_row<Scalar>(task.result, target, y, x_.count);
      for (int64_t row = y * kStride; row < std::min((y + 1) * kStride, y_.in_size); ++row) {
        if (!lines && next != nullptr) fetch_row<const Scalar>(task.image, next, row, x_.in_size);
      }
      const auto sum = [&](int64_t x) {
        sum_columns<kSize, kStride, kTaken>(input, weights, beta, y, x, task.activation,
                                            output + (y * x_.count + x) * kLane);
      };
      for (int64_t x = 0; x + kTaken < x_.count; x += kTaken) sum(x);
      // The last columns; some of them may have been summed already.
      sum(x_.count - kTaken);
    }
    if (task.sums != nullptr) {
      Vector<Acc> total{};
      for (int64_t i = 0; i < outputs; ++i) total += load_vector(output + i * kLane);
      store_vector(task.sums + plane, total);
    }
    give(task.result, target, output);
  }

  // Outputs x, x + 1, ... of row y.
  template <int kSize, int kStride, int kTaken>
  DDRF_INLINE void sum_columns(const Acc* input, const Acc* weights, Vector<Acc> beta, int64_t y,
                               int64_t x, Activation activation, Acc* output) const {
    Vector<Acc> sum[kTaken];
    for_each_constant<kTaken>([&](auto i) { sum[i()] = beta; });
    const int64_t top = first_y_ + y * kStride;
    const int64_t end = std::min<int64_t>(kSize, y_.in_size - top);
    for (int64_t u = std::max<int64_t>(0, -top); u < end; ++u) {
      const Acc* pixels = input + ((top + u) * columns_ + x * kStride) * kLane;
      const Acc* row = weights + u * kSize * kLane;
      for_each_constant<kSize>([&](auto v) {
        const Vector<Acc> weight = load_vector(row + v() * kLane);
        for_each_constant<kTaken>([&](auto i) {
          sum[i()] += load_vector(pixels + (i() * kStride + v()) * kLane) * weight;
        });
      });
    }
    for_each_constant<kTaken>(
        [&](auto i) { store_vector(output + i() * kLane, rectified<Acc>(activation, sum[i()])); });
  }

  const TapAxis &y_, &x_;
  int64_t size_, first_y_, columns_;  // of the kernel; of the first tap; of the input
  bool flipped_;                      // whether the kernels are turned round
  std::vector<int64_t> places_;       // of a plane's pixels in the input
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

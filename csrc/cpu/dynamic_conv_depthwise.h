// The depthwise plan: one input and one output channel in a group, a plane at a time.
//
// Square kernels of 3, 5 or 7 with stride 1 or 2 run down columns of vectors: each row of the input
// is loaded once for each horizontal tap and added to all the rows of the output that it reaches,
// which wait in registers. For the input gradient with a stride of two zeros are put between the
// columns of its input. Everything else (dilation, other sizes and strides) sums over the taps of
// one output vector after the other. In channels_last a vector holds channels instead.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_ahead.h"
#include "cpu/dynamic_conv_mix.h"
#include "cpu/dynamic_conv_scratch.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// One vector of columns of kPlanes planes, from the top to the bottom: sink(plane, row, sums).
// Several planes at a time keep the units busy while each waits for its own last sum.
// `first` is the row of the plane that the first output row's first tap reads (negative: padding).
// A weight is one number, or a vector where the lanes are not of one plane.
// Of the rows only every kEvery-th is there, the others are zero.
template <int kSize, int kStride, int kPlanes, int kEvery, class Acc, class Weight, class Load,
          class Sink>
DDRF_INLINE void run_down(const Load& load, int64_t height, int64_t first, int64_t out_rows,
                          const Weight* const* weights, const Vector<Acc>* bias, const Sink& sink) {
  // waiting[i] is the output row that still needs i * kStride more rows above the newest.
  constexpr int kWaiting = (kSize - 1) / kStride + 1;
  Vector<Acc> waiting[kPlanes][kWaiting];
  for_each_constant<kPlanes>([&](auto p) __attribute__((always_inline)) {
    for_each_constant<kWaiting>(
        [&](auto i) __attribute__((always_inline)) { waiting[p()][i()] = bias[p()]; });
  });
  // The products of how many planes alternate: of all, but for stride 1 with many registers.
  constexpr int kTogether = kManyRegisters && kStride == 1 ? 1 : kPlanes;
  const auto add_to =
      [&]<int kOdd, int kFirst>(std::integer_sequence<int, kOdd, kFirst>, const auto&... pixels)
          __attribute__((always_inline)) {
            for_each_constant<kSize>([&](auto v) __attribute__((always_inline)) {
              const Vector<Acc> shifted[kTogether] = {pixels(v)...};
              for_each_constant<(kSize - kOdd + kStride - 1) / kStride>(
                  [&](auto i) __attribute__((always_inline)) {
                    constexpr int kTap = (kOdd + i() * kStride) * kSize + v();
                    for_each_constant<kTogether>([&](auto p) __attribute__((always_inline)) {
                      constexpr int kPlane = kFirst + p();
                      waiting[kPlane][i() + (kOdd != 0)] += shifted[p()] * weights[kPlane][kTap];
                    });
                  });
            });
          };
  const auto add = [&]<int kOdd>(std::integral_constant<int, kOdd>,
                                 int64_t row) __attribute__((always_inline)) {
    for_each_constant<kPlanes / kTogether>([&](auto group) __attribute__((always_inline)) {
      constexpr int kFirst = group() * kTogether;
      [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
        add_to(std::integer_sequence<int, kOdd, kFirst>(), load(kFirst + kIndex, row)...);
      }(std::make_integer_sequence<int, kTogether>());
    });
  };
  // Output row y is complete after input row first + y * kStride + kSize - 1.
  for (int64_t y = 1 - kWaiting; y < out_rows; ++y) {
    const int64_t newest = first + (y + kWaiting - 1) * kStride;
    if (newest >= 0 && newest < height && newest % kEvery == 0) {
      add(std::integral_constant<int, 0>(), newest);
    }
    for_each_constant<kPlanes>([&](auto p) __attribute__((always_inline)) {
      if (y >= 0) sink(p(), y, waiting[p()][kWaiting - 1]);
      for_each_constant<kWaiting - 1>([&](auto i) __attribute__((always_inline)) {
        waiting[p()][kWaiting - 1 - i()] = waiting[p()][kWaiting - 2 - i()];
      });
      waiting[p()][0] = bias[p()];
    });
    if constexpr (kStride == 2) {
      if (newest + 1 >= 0 && newest + 1 < height) {
        add(std::integral_constant<int, 1>(), newest + 1);
      }
    }
  }
}

template <class Scalar>
class Depthwise {
 public:
  using Acc = accumulate_t<Scalar>;

  static bool fits(const DynamicConvShape& shape) {
    return shape.groups == shape.in_channels && shape.groups == shape.out_channels &&
           shape.groups > 1 && shape.code_channels == 0;
  }

  static bool is_square(const DynamicConvShape& shape) {
    const int64_t size = shape.kernel[0];
    return size == shape.kernel[1] && size % 2 == 1 && size >= 3 && size <= 7 &&
           shape.dilation[0] == 1 && shape.dilation[1] == 1 && shape.stride[0] == shape.stride[1];
  }

  // Whether the whole input gradient with a stride is best taken with axes that are spread.
  static bool spreads(const DynamicConvShape& shape, const Image<const Scalar>& grad,
                      const Image<Scalar>& grad_x) {
    return fits(shape) && is_square(shape) && shape.stride[0] == 2 &&
           !(grad.stride[1] == 1 && grad_x.stride[1] == 1);
  }

  Depthwise(Direction direction, TapAxis y, TapAxis x, const DynamicConvShape& shape,
            bool spread = false)
      : y_(std::move(y)),
        x_(std::move(x)),
        channels_(shape.out_channels),
        taps_(shape.taps()),
        size_(shape.kernel[0]),
        spread_(spread) {
    kept_taps_ = kept_taps(shape, y_, x_);
    const int64_t stride = shape.stride[0];
    runs_down_ = is_square(shape) &&
                 (stride == 1 || (stride == 2 && (spread || direction == Direction::kForward)));
    flipped_ = direction == Direction::kInputGradient;
    tiles_ = choose_tiles(y_, x_, 1, 0, kLanes<Acc>, kTileBytes / int64_t{sizeof(Acc)}, kTileBytes,
                          1, false);
    tap_offsets_ = tiles_.tap_offsets();
  }

  std::string name() const {
    return runs_down_ ? "depthwise, rows waiting in registers" : "depthwise, tap by tap";
  }
  int64_t parts() const { return 1; }

  // As Correlation::run.
  void run(const Mixer<Scalar>& mixer, const Image<const Scalar>& image, Activation activation,
           const Image<Scalar>& result, Acc* sums) const {
    const int64_t batch = mixer.shape().batch;
    if (y_.count * x_.count == 0) return;
    const int64_t step = std::clamp<int64_t>(
        kKernelBytes / (channels_ * taps_ * int64_t{sizeof(Acc)}), 1, std::max<int64_t>(1, batch));
    const Scratch<Acc> kernels(step * channels_ * taps_);
    const int64_t work = taps_ * y_.count * x_.count + 1;
    for (int64_t first = 0; first < batch; first += step) {
      const int64_t count = std::min(step, batch - first);
      mixer.mix_whole(first, count, false, kernels.get());
      const Task task{kernels.get(),
                      flipped_ ? nullptr : mixer.betas() + first * channels_,
                      from_sample(image, first),
                      activation,
                      from_sample(result, first),
                      sums == nullptr ? nullptr : sums + first * channels_};
      if (image.stride[1] == 1 && result.stride[1] == 1 && strip_fits()) {
        parallel_for(count * ceil_div(channels_, kLanes<Acc>),
                     std::max<int64_t>(1, kMinWork / (work * kLanes<Acc>)),
                     [&](int64_t begin, int64_t end) { across(task, begin, end); });
        continue;
      }
      if (flipped_ && runs_down_) {
        for (int64_t plane = 0; plane < count * channels_; ++plane) {
          std::reverse(&kernels[plane * taps_], &kernels[plane * taps_] + taps_);
        }
      }
      parallel_for(count * channels_, std::max<int64_t>(1, kMinWork / work),
                   [&](int64_t begin, int64_t end) {
                     runs_down_ ? down(task, begin, end) : by_taps(task, begin, end);
                   });
    }
  }

#if DDRF_VECTOR_BYTES >= 32
  // Whether kernel_gradient() can take these images.
  bool has_kernel_gradient(const Image<const Scalar>& image,
                           const Image<const Scalar>& grad) const {
    return runs_down_ && size_ <= 5 && image.stride[3] == 1 && grad.stride[3] == 1;
  }

  // The gradient of each sample's kernels [batch][channels][taps] for the gradient of the output.
  void kernel_gradient(int64_t batch, const Image<const Scalar>& image,
                       const Image<const Scalar>& grad, Acc* kernels) const {
    const int64_t work = taps_ * y_.count * x_.count + 1;
    const auto run = [&]<int kSize, int kStride>(std::integer_sequence<int, kSize, kStride>) {
      parallel_for(batch * channels_, std::max<int64_t>(1, kMinWork / work),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t plane = begin; plane < end; ++plane) {
                       plane_gradient<kSize, kStride>(image, grad, plane, kernels + plane * taps_);
                     }
                   });
    };
    if (size_ == 3) {
      x_.in_step == 1 ? run(std::integer_sequence<int, 3, 1>())
                      : run(std::integer_sequence<int, 3, 2>());
    } else {
      x_.in_step == 1 ? run(std::integer_sequence<int, 5, 1>())
                      : run(std::integer_sequence<int, 5, 2>());
    }
  }
#endif

 private:
  static constexpr int64_t kMinWork = 1 << 16, kTileBytes = 128 * 1024;
  static constexpr int64_t kKernelBytes = 16 << 20;
  static constexpr int64_t kStripBytes = 192 * 1024;
  static constexpr double kMostStripBytes = 16 << 20;

  struct Task {
    const Acc *kernels, *bias;
    Image<const Scalar> image;
    Activation activation;
    Image<Scalar> result;
    Acc* sums;
  };

  Planes<Scalar> planes(const Task& task, int64_t sample) const {
    return planes_of_group(task.image, sample, 0, channels_, y_.in_size, x_.in_size);
  }

  template <class Value>
  Value* plane_of(const Image<Value>& image, int64_t plane) const {
    return image.data + plane / channels_ * image.stride[0] + plane % channels_ * image.stride[1];
  }

  Acc bias(const Task& task, int64_t plane) const {
    return task.bias == nullptr ? Acc(0) : task.bias[plane];
  }

  // ---- rows in registers ----

  void down(const Task& task, int64_t begin, int64_t end) const {
    if (size_ == 3) {
      down_sized<3>(task, begin, end);
    } else if (size_ == 5) {
      down_sized<5>(task, begin, end);
    } else {
      down_sized<7>(task, begin, end);
    }
  }

  template <int kSize>
  void down_sized(const Task& task, int64_t begin, int64_t end) const {
    if (spread_) return spread<kSize>(task, begin, end);
    const auto run = [&]<int kStride>(std::integral_constant<int, kStride>) {
      if constexpr (kMaskedLoads<Scalar>) {
        if (task.image.stride[3] == 1 && task.result.stride[3] == 1) {
          return straight<kSize, kStride>(task, begin, end);
        }
      }
      copied<kSize, kStride>(task, begin, end);
    };
    if (x_.in_step == 1) {
      run(std::integral_constant<int, 1>());
    } else {
      run(std::integral_constant<int, 2>());
    }
  }

  int64_t first_shift(const TapAxis& axis) const {
    return flipped_ ? axis.shift.back() : axis.shift.front();
  }

#if DDRF_VECTOR_BYTES >= 32
  // Rows that are padded as "same" and fit a vector are loaded once and then shifted; where they
  // fit half of one, those of two planes at once. All others are loaded with a mask for each tap:
  // of two planes or, where weights must be loaded for themselves, two vectors that share them.
  template <int kSize, int kStride>
  void straight(const Task& task, int64_t begin, int64_t end) const {
    const auto by = [&]<int kPlanes>(std::integral_constant<int, kPlanes>, auto many, auto one) {
      int64_t plane = begin;
      for (; plane + kPlanes <= end; plane += kPlanes) many(plane);
      for (; plane < end; ++plane) one(plane);
    };
#if DDRF_VECTOR_BYTES == 64
    const bool same = first_shift(x_) == -(kSize / 2);
    const auto fits = [&](int64_t lanes) {
      return same && x_.in_size <= kStride * lanes && x_.count <= lanes;
    };
    const auto shifted = [&](int64_t plane) { shifted_down<kSize, kStride, 1, 1>(task, plane); };
    if (fits(kLanes<Acc> / 2)) {
      const auto four = [&](int64_t plane) { shifted_down<kSize, kStride, 2, 2>(task, plane); };
      return by(std::integral_constant<int, 4>(), four, shifted);
    }
    if (fits(kLanes<Acc>)) {
      const auto two = [&](int64_t plane) { shifted_down<kSize, kStride, 2, 1>(task, plane); };
      return by(std::integral_constant<int, 2>(), two, shifted);
    }
#else
    if (x_.count > kLanes<Acc>) {
      const auto one = [&](int64_t plane) { masked_down<kSize, kStride, 1, 2>(task, plane); };
      return by(std::integral_constant<int, 1>(), one, one);
    }
#endif
    by(
        std::integral_constant<int, 2>(),
        [&](int64_t plane) { masked_down<kSize, kStride, 2, 1>(task, plane); },
        [&](int64_t plane) { masked_down<kSize, kStride, 1, 1>(task, plane); });
  }

  // What the taps of a row read for one vector of outputs, masked to what is inside the image if
  // that is not all. With stride 2 a pair of taps shares two vectors.
  template <int kSize, int kStride, bool kWhole = false>
  struct MaskedTaps {
    static constexpr int kLane = kLanes<Acc>, kMasks = kStride == 1 ? kSize : kSize + 1;
    LaneMask masks[kWhole ? 1 : kMasks];

    MaskedTaps(int64_t start, int64_t width) {
      for (int i = 0; !kWhole && i < kMasks; ++i) {
        masks[i] = lane_mask(
            lanes_inside<kLane>(start + (kStride == 1 ? i : i / 2 * 2 + i % 2 * kLane), width));
      }
    }
    DDRF_INLINE Vector<Acc> load(const Scalar* source, int i) const {
      if constexpr (kWhole) {
        return load_vector(source);
      } else {
        return load_masked(source, masks[i]);
      }
    }
    // `first` is where the first lane reads tap 0.
    template <int kTap>
    DDRF_INLINE Vector<Acc> load(const Scalar* first, std::integral_constant<int, kTap>) const {
      if constexpr (kStride == 1) {
        return load(first + kTap, kTap);
      } else {
        constexpr int kPair = kTap / 2 * 2;
        return every_second<Acc, kTap % 2>(load(first + kPair, kPair),
                                           load(first + kPair + kLane, kPair + 1),
                                           std::make_index_sequence<kLane>());
      }
    }
  };

  // With every row of the image, the rows of the gradient that it takes part in; for as many rows
  // of taps at a time as there are registers.
  template <int kSize, int kStride>
  void plane_gradient(const Image<const Scalar>& image, const Image<const Scalar>& grad,
                      int64_t plane, Acc* kernel) const {
    constexpr int kLane = kLanes<Acc>, kTaps = kSize * kSize;
    constexpr int kMost = kManyRegisters ? kSize : kSize == 3 ? 3 : 2;
    const Scalar* pixels = plane_of(image, plane);
    const Scalar* grads = plane_of(grad, plane);
    Vector<Acc> sums[kTaps];
    for_each_constant<(kSize + kMost - 1) / kMost>([&](auto part) __attribute__((always_inline)) {
      constexpr int kFirst = part() * kMost;
      constexpr int kRows = kSize - kFirst < kMost ? kSize - kFirst : kMost;
      Vector<Acc> sum[kRows * kSize];
      for_each_constant<kRows * kSize>(
          [&](auto t) __attribute__((always_inline)) { sum[t()] = Vector<Acc>{}; });
      for (int64_t x = 0; x < x_.count; x += kLane) {
        const int64_t start = x * kStride + first_shift(x_);
        const MaskedTaps<kSize, kStride> taps(start, x_.in_size);
        const LaneMask inside = lane_mask((1u << std::min<int64_t>(kLane, x_.count - x)) - 1);
        for (int64_t row = 0; row < y_.in_size; ++row) {
          const Scalar* first = pixels + row * image.stride[2] + start;
          if (!kManyRegisters) {
            __builtin_prefetch(first + image.stride[1]);
            __builtin_prefetch(grads + std::min(row, y_.count - 1) * grad.stride[2] + x +
                               grad.stride[1]);
          }
          Vector<Acc> shifted[kSize];
          for_each_constant<kSize>(
              [&](auto v) __attribute__((always_inline)) { shifted[v()] = taps.load(first, v); });
          for_each_constant<kRows>([&](auto u) __attribute__((always_inline)) {
            const int64_t distance = row - first_shift(y_) - kFirst - u();
            const int64_t y = distance / kStride;
            if (distance < 0 || distance % kStride != 0 || y >= y_.count) return;
            const Vector<Acc> value = load_masked(grads + y * grad.stride[2] + x, inside);
            for_each_constant<kSize>([&](auto v) __attribute__((always_inline)) {
              sum[u() * kSize + v()] += value * shifted[v()];
            });
          });
        }
      }
      for_each_constant<kRows * kSize>(
          [&](auto t) __attribute__((always_inline)) { sums[kFirst * kSize + t()] = sum[t()]; });
    });
    // As many sums at a time as a square of lanes holds.
    for_each_constant<(kTaps + kLane - 1) / kLane>([&](auto part) __attribute__((always_inline)) {
      constexpr int kFirst = part() * kLane;
      constexpr int kCount = kTaps - kFirst < kLane ? kTaps - kFirst : kLane;
      Vector<Acc> square[kLane] = {};
      for_each_constant<kCount>(
          [&](auto i) __attribute__((always_inline)) { square[i()] = sums[kFirst + i()]; });
      transpose_square<Acc>(square);
      Vector<Acc> total{};
      for_each_constant<kLane>([&](auto i)
                                   __attribute__((always_inline)) { total += square[i()]; });
      store_partial(kernel + kFirst, total, kCount);
    });
  }

  // kPlanes planes, kAbreast vectors of each at a time.
  template <int kSize, int kStride, int kPlanes, int kAbreast>
  void masked_down(const Task& task, int64_t plane) const {
    constexpr int kLane = kLanes<Acc>, kVectors = kPlanes * kAbreast;
    const int64_t line = task.image.stride[2], out_line = task.result.stride[2];
    const Activation activation = task.activation;
    Acc* const sums = task.sums;
    const Acc* weights[kVectors];
    Vector<Acc> biases[kVectors], total[kVectors] = {};
    const Scalar* source[kPlanes];
    Scalar* target[kPlanes];
    for (int p = 0; p < kPlanes; ++p) {
      source[p] = plane_of(task.image, plane + p);
      target[p] = plane_of(task.result, plane + p);
      for (int i = p * kAbreast; i < (p + 1) * kAbreast; ++i) {
        weights[i] = task.kernels + (plane + p) * taps_;
        biases[i] = Vector<Acc>{} + bias(task, plane + p);
      }
    }
    Ahead ahead = planes_ahead(task.image, source[0] + kPlanes * task.image.stride[1], kPlanes,
                               y_.in_size, y_.in_size);
    const auto strip_down = [&]<bool kWhole>(std::bool_constant<kWhole>,
                                             int64_t x) __attribute__((always_inline)) {
      using Taps = MaskedTaps<kSize, kStride, kWhole>;
      const auto start = [&](int a) { return (x + a * kLane) * kStride + first_shift(x_); };
      const auto taps = [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
        return std::array<Taps, kAbreast>{Taps(start(kIndex), x_.in_size)...};
      }(std::make_integer_sequence<int, kAbreast>());
      const auto lanes = [&](int i) __attribute__((always_inline)) {
        return kWhole ? kLane : std::min<int64_t>(kLane, x_.count - x - i % kAbreast * kLane);
      };
      Vector<Acc> strip[kVectors] = {};  // its sums: of all strips, single ones would lose digits
      run_down<kSize, kStride, kVectors, 1, Acc>(
          [&](int i, int64_t y) __attribute__((always_inline)) {
            const Scalar* row = source[i / kAbreast] + y * line + start(i % kAbreast);
            if (kManyRegisters && i == 0) ahead.step();
            if (!kManyRegisters) __builtin_prefetch(row + kPlanes * task.image.stride[1]);
            return [&, row, i](auto v)
                       __attribute__((always_inline)) { return taps[i % kAbreast].load(row, v); };
          },
          y_.in_size, first_shift(y_), y_.count, weights, biases,
          [&](int i, int64_t y, Vector<Acc> value) __attribute__((always_inline)) {
            if (i > 0 && lanes(i) <= 0) return;
            value = rectified<Acc>(activation, value);
            if (sums != nullptr) strip[i] += first_lanes<Acc>(value, lanes(i));
            Scalar* const to = target[i / kAbreast] + y * out_line + x + i % kAbreast * kLane;
            store_partial(to, value, lanes(i));
          });
      for (int i = 0; i < kVectors; ++i) total[i] += strip[i];
    };
    constexpr int64_t kColumns = kAbreast * kLane;
    for (int64_t x = 0; x < x_.count; x += kColumns) {
      if constexpr (kAbreast > 1) {
        const int64_t first = x * kStride + first_shift(x_);
        if (first >= 0 && first + kColumns * kStride + kSize <= x_.in_size &&
            x + kColumns <= x_.count) {
          strip_down(std::true_type(), x);
          continue;
        }
      }
      strip_down(std::false_type(), x);
    }
    for (int p = 0; p < kPlanes && sums != nullptr; ++p) {
      Vector<Acc> sum = total[p * kAbreast];
      if constexpr (kAbreast == 2) sum += total[p * kAbreast + 1];
      sums[plane + p] = sum_lanes<Acc>(sum);
    }
  }
#endif

#if DDRF_VECTOR_BYTES == 64
  // kVectors vectors of a row, each with those of kSide planes side by side.
  template <int kSize, int kStride, int kVectors, int kSide>
  void shifted_down(const Task& task, int64_t plane) const {
    constexpr int kLane = kLanes<Acc>;
    constexpr auto kIndices = std::make_index_sequence<kLane>();
    constexpr int kPart = kLane / kSide;  // lanes of a plane
    constexpr int kPlanes = kVectors * kSide, kTaps = kSize * kSize;
    const int64_t count = x_.count, line = task.image.stride[2];
    const int64_t out_line = task.result.stride[2];
    const Activation activation = task.activation;
    Acc* const sums = task.sums;

    using Weight = std::conditional_t<kSide == 1, Acc, Vector<Acc>>;
    Vector<Acc> side_by_side[kSide == 1 ? 1 : kVectors][kTaps];
    const Weight* weights[kVectors];
    Vector<Acc> biases[kVectors], total[kVectors] = {};
    const Scalar* source[kPlanes];
    Scalar* target[kPlanes];
    for (int p = 0; p < kPlanes; ++p) {
      source[p] = plane_of(task.image, plane + p);
      target[p] = plane_of(task.result, plane + p);
    }
    Ahead ahead = planes_ahead(task.image, source[0] + kPlanes * task.image.stride[1], kPlanes,
                               y_.in_size, y_.in_size);
    for (int i = 0; i < kVectors; ++i) {
      const Acc* own = task.kernels + (plane + i * kSide) * taps_;
      biases[i] = Vector<Acc>{} + bias(task, plane + i * kSide);
      if constexpr (kSide == 1) {
        weights[i] = own;
      } else {
        biases[i] = lower_halves<Acc>(biases[i], Vector<Acc>{} + bias(task, plane + i * kSide + 1),
                                      kIndices);
        for (int t = 0; t < kTaps; ++t) {
          side_by_side[i][t] =
              lower_halves<Acc>(Vector<Acc>{} + own[t], Vector<Acc>{} + own[taps_ + t], kIndices);
        }
        weights[i] = side_by_side[i];
      }
    }

    const uint32_t low_mask = lanes_inside<kLane>(0, x_.in_size);
    const uint32_t high_mask = lanes_inside<kLane>(kLane, x_.in_size);
    const auto load = [&](int i, int64_t y) __attribute__((always_inline)) {
      if (i == 0) ahead.step<3>();
      const Scalar* row = source[i * kSide] + y * line;
      const Vector<Acc> low = load_masked(row, low_mask);
      Vector<Acc> high{};
      if constexpr (kSide == 2) {
        high = load_masked(source[i * kSide + 1] + y * line, low_mask);
      } else if constexpr (kStride == 2) {
        high = load_masked(row + kLane, high_mask);
      }
      if constexpr (kStride == 1) {
        const Vector<Acc> whole = kSide == 1 ? low : lower_halves<Acc>(low, high, kIndices);
        return [=](auto v) __attribute__((always_inline)) {
          return shift_lanes<Acc, v() - kSize / 2, kPart>(whole, kIndices);
        };
      } else {
        const Vector<Acc> even = every_second<Acc, 0>(low, high, kIndices);
        const Vector<Acc> odd = every_second<Acc, 1>(low, high, kIndices);
        return [=](auto v) __attribute__((always_inline)) {
          constexpr int kPosition = v() - kSize / 2, kOdd = (kPosition % 2 + 2) % 2;
          return shift_lanes<Acc, (kPosition - kOdd) / 2, kPart>(kOdd ? odd : even, kIndices);
        };
      }
    };
    const uint32_t inside = (1u << count) - 1;
    run_down<kSize, kStride, kVectors, 1, Acc>(
        load, y_.in_size, first_shift(y_), y_.count, weights, biases,
        [&](int i, int64_t y, Vector<Acc> value) __attribute__((always_inline)) {
          value = rectified<Acc>(activation, value);
          if (sums != nullptr) total[i] += masked<Acc>(value, inside | inside << (kLane - kPart));
          const int64_t at = y * out_line;
          store_masked(target[i * kSide] + at, value, inside);
          if constexpr (kSide == 2) {
            store_masked(target[i * kSide + 1] + at - kPart, value, inside << kPart);
          }
        });
    for (int p = 0; p < kPlanes && sums != nullptr; ++p) {
      const uint32_t part = ((1u << kPart) - 1) << (p % kSide * kPart);
      sums[plane + p] = sum_lanes<Acc>(masked<Acc>(total[p / kSide], part));
    }
  }
#endif

  // Columns are copied with their padding, those of each residue of the stride apart; rows outside
  // the plane are skipped.
  template <int kSize, int kStride>
  void copied(const Task& task, int64_t begin, int64_t end) const {
    constexpr int kLane = kLanes<Acc>;
    const int64_t first_x = first_shift(x_), height = y_.in_size;
    const int64_t columns = x_.count + (kSize - 1) / kStride;
    const int64_t row = ceil_div(columns, kLane) * kLane + kLane;
    const int64_t run = height * row, plane_size = kStride * run;
    const Scratch<Acc> input(plane_size);
    std::fill_n(input.get(), plane_size, Acc(0));
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t sample = plane / channels_, channel = plane % channels_;
      const Planes<Scalar> source = planes(task, sample);
      for (int r = 0; r < kStride; ++r) {
        const Window window{0, 1, height, first_x + r, kStride, columns};
        copy_window(source, channel, channel + 1, window, input.get() + r * run, plane_size, row);
      }
      copied_down<kSize, kStride, 1>(task, plane, input.get(), row, run);
    }
  }

  // The input gradient with a stride of two: zeros are put between the columns; the rows between
  // are left out.
  template <int kSize>
  void spread(const Task& task, int64_t begin, int64_t end) const {
    constexpr int kLane = kLanes<Acc>;
    const int64_t height = (y_.in_size + 1) / 2, width = (x_.in_size + 1) / 2;
    const int64_t columns = x_.count + kSize - 1, left = -first_shift(x_);
    const int64_t row = ceil_div(columns, kLane) * kLane + kLane;
    const int64_t first = left < 0 ? ceil_div(-left, 2) : 0;
    const int64_t last = std::min(width, ceil_div(columns - left, 2));
    const Scratch<Acc> input(height * row);
    std::fill_n(input.get(), height * row, Acc(0));
    for (int64_t plane = begin; plane < end; ++plane) {
      const Scalar* source = plane_of(task.image, plane);
      for (int64_t y = 0; y < height; ++y) {
        const Scalar* from = source + y * task.image.stride[2];
        for (int64_t x = first; x < last; ++x) {
          input[y * row + left + 2 * x] = load_as_accumulate(from + x * task.image.stride[3]);
        }
      }
      copied_down<kSize, 1, 2>(task, plane, input.get(), row, 0);
    }
  }

  // One plane whose columns were copied, those of each residue of the stride `run` apart.
  template <int kSize, int kStride, int kEvery>
  void copied_down(const Task& task, int64_t plane, const Acc* input, int64_t row,
                   int64_t run) const {
    constexpr int kLane = kLanes<Acc>;
    const int64_t count = x_.count;
    const Acc* const weights = task.kernels + plane * taps_;
    const Vector<Acc> beta = Vector<Acc>{} + bias(task, plane);
    Scalar* target = plane_of(task.result, plane);
    Vector<Acc> total{};
    const auto columns_down = [&]<int kAbreast>(std::integral_constant<int, kAbreast>,
                                                int64_t x) __attribute__((always_inline)) {
      const Acc* const weights_of[2] = {weights, weights};
      const Vector<Acc> betas[2] = {beta, beta};
      Vector<Acc> strip{};
      run_down<kSize, kStride, kAbreast, kEvery, Acc>(
          [&](int i, int64_t y) __attribute__((always_inline)) {
            const Acc* base = input + y / kEvery * row + x + i * kLane;
            return [=](auto v) { return load_vector(base + v() % kStride * run + v() / kStride); };
          },
          y_.in_size, first_shift(y_), y_.count, weights_of, betas,
          [&](int i, int64_t y, Vector<Acc> value) __attribute__((always_inline)) {
            const int64_t column = x + i * kLane;
            const int64_t lanes = std::min<int64_t>(kLane, count - column);
            value = rectified<Acc>(task.activation, value);
            if (task.sums != nullptr) strip += first_lanes<Acc>(value, lanes);
            store_line(target + y * task.result.stride[2] + column * task.result.stride[3],
                       task.result.stride[3], value, lanes);
          });
      total += strip;
    };
    int64_t x = 0;
    if constexpr (kStride == 1) {
      for (; x + kLane < count; x += 2 * kLane) columns_down(std::integral_constant<int, 2>(), x);
    }
    for (; x < count; x += kLane) columns_down(std::integral_constant<int, 1>(), x);
    if (task.sums != nullptr) task.sums[plane] = sum_lanes<Acc>(total);
  }

  static void store_line(Scalar* target, int64_t step, Vector<Acc> value, int64_t lanes) {
    if (step == 1 && lanes == kLanes<Acc>) {
      store_vector(target, value);
    } else if (step == 1) {
      store_partial(target, value, lanes);
    } else {
      for (int64_t i = 0; i < lanes; ++i) target[i * step] = static_cast<Scalar>(value[i]);
    }
  }

  // ---- tap by tap ----

  void by_taps(const Task& task, int64_t begin, int64_t end) const {
    constexpr int kLane = kLanes<Acc>, kRows = 4;
    const Scratch<Acc> input(tiles_.channel_stride());
    clear_slack(tiles_, 1, input.get());
    const int64_t row_stride = tiles_.row_stride();
    const Image<Scalar>& result = task.result;
    for (int64_t plane = begin; plane < end; ++plane) {
      const int64_t sample = plane / channels_, channel = plane % channels_;
      const Planes<Scalar> source = planes(task, sample);
      const Acc* weights = task.kernels + plane * taps_;
      SumOfParts<Acc> total;
      for (int64_t tile = 0; tile < tiles_.count(); ++tile) {
        const auto [tile_y, tile_x, y0, x0, rows, columns, pixels] = tiles_.place(tile);
        copy_tile(source, channel, channel + 1, y_, x_, tiles_, tile_y, tile_x, input.get());
        const int64_t out_y = y_.out_offset + y0 * y_.out_step;
        const int64_t out_x = x_.out_offset + x0 * x_.out_step;
        Scalar* target = result.data + sample * result.stride[0] + channel * result.stride[1] +
                         out_y * result.stride[2] + out_x * result.stride[3];
        const int64_t line = y_.out_step * result.stride[2], step = x_.out_step * result.stride[3];
        for (int64_t x = 0; x < columns; x += kLane) {
          const int64_t lanes = std::min<int64_t>(kLane, columns - x);
          SumOfParts<Acc> strip;
          for (int64_t y = 0; y < rows; y += kRows) {
            Vector<Acc> sum[kRows];
            // The last block reads its last row again.
            int64_t start[kRows];
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              sum[r] = Vector<Acc>{} + bias(task, plane);
              start[r] = std::min(y + r, rows - 1) * row_stride + x;
            }
            for (size_t t = 0; t < tap_offsets_.size(); ++t) {
              const Acc weight = weights[kept_taps_[t]];
#pragma GCC unroll 4
              for (int r = 0; r < kRows; ++r) {
                sum[r] += load_vector(input.get() + start[r] + tap_offsets_[t]) * weight;
              }
            }
            for (int64_t r = 0; r < std::min<int64_t>(kRows, rows - y); ++r) {
              const Vector<Acc> value = rectified<Acc>(task.activation, sum[r]);
              strip.add(first_lanes<Acc>(value, lanes), y + r);
              store_line(target + (y + r) * line + x * step, step, value, lanes);
            }
          }
          total.add(strip.get(), x / kLane);
        }
      }
      if (task.sums != nullptr) task.sums[plane] = sum_lanes<Acc>(total.get());
    }
  }

  // ---- channels_last: a vector of channels at a time ----

  // Positions of an axis that the taps of an output lie apart, and where the first one lies.
  static std::pair<int64_t, int64_t> range(const TapAxis& axis) {
    if (axis.shift.empty()) return {0, 0};
    const auto [low, high] = std::minmax_element(axis.shift.begin(), axis.shift.end());
    return {*low, *high - *low};
  }

  // Whether the rows under a kernel are worth a copy; taps that lie far apart are not.
  bool strip_fits() const {
    const double columns = static_cast<double>((x_.count - 1) * x_.in_step + range(x_).second + 1);
    const double rows = static_cast<double>(range(y_).second + 1);
    return rows * columns * kLanes<Acc> * sizeof(Acc) <= kMostStripBytes;
  }

  // The channels of some rows are copied with their padding, then summed over taps for some
  // columns at once, which share each loaded weight.
  void across(const Task& task, int64_t begin, int64_t end) const {
    constexpr int kLane = kLanes<Acc>;
    const auto [top, reach_y] = range(y_);
    const auto [left, reach_x] = range(x_);
    const int64_t columns = (x_.count - 1) * x_.in_step + reach_x + 1;
    const int64_t fitting = kStripBytes / (columns * kLane * int64_t{sizeof(Acc)});
    const int64_t strip =
        std::clamp<int64_t>((fitting - reach_y - 1) / y_.in_step + 1, 1, y_.count);
    const Scratch<Acc> input(((strip - 1) * y_.in_step + reach_y + 1) * columns * kLane);
    const int64_t taps = static_cast<int64_t>(kept_taps_.size());
    const Scratch<Acc> weights(taps * kLane);
    std::vector<int64_t> offsets;
    for (int64_t u : y_.shift) {
      for (int64_t v : x_.shift) offsets.push_back(((u - top) * columns + v - left) * kLane);
    }
    const int64_t blocks = ceil_div(channels_, kLane);
    for (int64_t index = begin; index < end; ++index) {
      const int64_t sample = index / blocks, channel = index % blocks * kLane;
      const int64_t channels = std::min<int64_t>(kLane, channels_ - channel);
      const Image<const Scalar>& image = task.image;
      const Image<Scalar>& result = task.result;
      const Scalar* source = image.data + sample * image.stride[0] + channel;
      Scalar* target = result.data + sample * result.stride[0] + channel;
      const int64_t plane = sample * channels_ + channel;
      std::fill_n(weights.get(), taps * kLane, Acc(0));
      for (int64_t c = 0; c < channels; ++c) {
        const Acc* own = task.kernels + (plane + c) * taps_;
        for (int64_t t = 0; t < taps; ++t) weights[t * kLane + c] = own[kept_taps_[t]];
      }
      const auto load = [&](const auto* pointer) {
        return channels == kLane ? load_vector(pointer) : load_partial(pointer, channels);
      };
      const Vector<Acc> beta = task.bias == nullptr ? Vector<Acc>{} : load(task.bias + plane);
      SumOfParts<Acc> total;
      for (int64_t y0 = 0; y0 < y_.count; y0 += strip) {
        const int64_t rows = std::min(strip, y_.count - y0);
        for (int64_t i = 0; i < (rows - 1) * y_.in_step + reach_y + 1; ++i) {
          const int64_t y = y0 * y_.in_step + top + i;
          const bool inside = y >= 0 && y < y_.in_size;
          for (int64_t j = 0; j < columns; ++j) {
            const int64_t x = left + j;
            const bool there = inside && x >= 0 && x < x_.in_size;
            store_vector(
                &input[(i * columns + j) * kLane],
                there ? load(source + y * image.stride[2] + x * image.stride[3]) : Vector<Acc>{});
          }
        }
        for (int64_t y = 0; y < rows; ++y) {
          Scalar* line = target + (y_.out_offset + (y0 + y) * y_.out_step) * result.stride[2] +
                         x_.out_offset * result.stride[3];
          const int64_t step = x_.out_step * result.stride[3];
          const Acc* pixels = &input[y * y_.in_step * columns * kLane];
          int64_t x = 0;
          Vector<Acc> row{};
          const auto sum_columns = [&]<int kColumns>(std::integral_constant<int, kColumns>) {
            for (; x + kColumns <= x_.count; x += kColumns) {
              Vector<Acc> sum[kColumns];
              for_each_constant<kColumns>([&](auto i) { sum[i()] = beta; });
              for (int64_t t = 0; t < taps; ++t) {
                const Vector<Acc> weight = load_vector(&weights[t * kLane]);
                const Acc* first = pixels + x * x_.in_step * kLane + offsets[t];
                for_each_constant<kColumns>([&](auto i) {
                  sum[i()] += load_vector(first + i() * x_.in_step * kLane) * weight;
                });
              }
              Vector<Acc> block{};
              for_each_constant<kColumns>([&](auto i) {
                const Vector<Acc> value = rectified<Acc>(task.activation, sum[i()]);
                block += value;
                Scalar* out = line + (x + i()) * step;
                channels == kLane ? store_vector(out, value) : store_partial(out, value, channels);
              });
              row += block;
            }
          };
          sum_columns(std::integral_constant<int, 7>());
          sum_columns(std::integral_constant<int, 4>());
          sum_columns(std::integral_constant<int, 1>());
          total.add(row, y0 + y);
        }
      }
      if (task.sums != nullptr) {
        channels == kLane ? store_vector(task.sums + plane, total.get())
                          : store_partial(task.sums + plane, total.get(), channels);
      }
    }
  }

  TapAxis y_, x_;
  int64_t channels_, taps_, size_;
  bool spread_, runs_down_, flipped_;
  std::vector<int64_t> kept_taps_;
  Tiles tiles_;
  std::vector<int64_t> tap_offsets_;
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

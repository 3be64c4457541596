// The sums of route for one instruction set (common/capability.h).
//
// How a sum is cut depends on shapes and strides only. Sums over pixels are float within a block
// and double across blocks, so that an image of any size loses no more than a block does.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>

#include "cpu/dynamic_conv_vector.h"
#include "cpu/route.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// How many numbers each lane adds up in float; sum_pixels takes twice as many.
inline constexpr int64_t kSummands = 32;

// A vector of a long row, of which a later part is asked for as well.
template <class Scalar>
DDRF_INLINE Vector<accumulate_t<Scalar>> load_ahead(const Scalar* source) {
  __builtin_prefetch(reinterpret_cast<const char*>(source) + 8192);
  return load_vector(source);
}

// The last `rest` numbers of a row (fewer than a vector) from source on, with zeros; `before` says
// whether the row has a vector's worth in all. Which lanes they are in depends on the two alone.
template <class Scalar>
DDRF_INLINE Vector<accumulate_t<Scalar>> load_rest(const Scalar* source, int64_t rest,
                                                   bool before) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> result = {};
  if (before) {
    Vector<Acc> lane;
    for (int i = 0; i < kStep; ++i) lane[i] = static_cast<Acc>(i);
    const Vector<Acc> last = load_vector(source + rest - kStep);
    return lane >= static_cast<Acc>(kStep - rest) ? last : result;
  }
  Acc values[kStep] = {};
  for (int64_t i = 0; i < rest; ++i) values[i] = load_as_accumulate(source + i);
  return load_vector(values);
}

template <class Acc, int kHalf, int kCount>
DDRF_INLINE Vector<Acc> fold_lanes(Vector<Acc> value) {
  if constexpr (kHalf >= kCount) {
    value = add_rotated<Acc, kHalf>(value, std::make_index_sequence<kLanes<Acc>>());
    return fold_lanes<Acc, kHalf / 2, kCount>(value);
  } else {
    return value;
  }
}

// Lane i of the result is the sum of the lanes of vector i; kCount is a power of two, at most
// kLanes. Each is added up in the same order, whatever the count.
template <class Acc, int kCount>
DDRF_INLINE Vector<Acc> sum_each(Vector<Acc> (&values)[kCount]) {
  constexpr int kSize = kLanes<Acc>;
  constexpr auto kIndices = std::make_index_sequence<kSize>();
#pragma GCC unroll 4
  for (int half = kCount / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      values[i] = interleave<Acc, 0>(values[i], values[i + half], kIndices) +
                  interleave<Acc, kSize / 2>(values[i], values[i + half], kIndices);
    }
  }
  return fold_lanes<Acc, kSize / 2, kCount>(values[0]);
}

inline constexpr int kStreams = 4;  // sums that do not wait for each other

template <class Acc>
inline constexpr int64_t kBlock = kSummands * kStreams * kLanes<Acc>;

// The sum of at most kBlock numbers, still spread over the lanes.
template <class Scalar>
DDRF_INLINE Vector<accumulate_t<Scalar>> sum_block(const Scalar* row, int64_t count) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> sums[kStreams] = {};
  int64_t i = 0;
  for (; i + kStreams * kStep <= count; i += kStreams * kStep) {
#pragma GCC unroll 4
    for (int j = 0; j < kStreams; ++j) sums[j] += load_ahead(row + i + j * kStep);
  }
  for (; i + kStep <= count; i += kStep) sums[0] += load_vector(row + i);
  if (i < count) sums[1] += load_rest(row + i, count - i, count >= kStep);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <class Scalar>
inline double sum_contiguous(const Scalar* row, int64_t count) {
  using Acc = accumulate_t<Scalar>;
  double total = 0;
  for (int64_t i = 0; i < count; i += kBlock<Acc>) {
    total += sum_lanes<Acc>(sum_block(row + i, std::min(count - i, kBlock<Acc>)));
  }
  return total;
}

template <class Scalar>
inline double sum_strided(const Scalar* row, int64_t count, int64_t stride) {
  using Acc = accumulate_t<Scalar>;
  Acc buffer[kBlock<Acc>];
  double total = 0;
  for (int64_t start = 0; start < count; start += kBlock<Acc>) {
    const int64_t size = std::min(count - start, kBlock<Acc>);
    for (int64_t i = 0; i < size; ++i) buffer[i] = load_as_accumulate(row + (start + i) * stride);
    total += sum_contiguous(buffer, size);
  }
  return total;
}

// The means of planes [begin, end) of all samples' channels; that of channel c of sample b is at
// pooled[b * row + c].
template <class Scalar>
void mean_planes(const Pixels<Scalar>& x, int64_t begin, int64_t end, accumulate_t<Scalar>* pooled,
                 int64_t row) {
  using Acc = accumulate_t<Scalar>;
  constexpr int64_t kTogether = kLanes<Acc>;  // small planes, whose lanes are added up at once
  const int64_t pixels = x.height * x.width;
  const bool flat = x.stride[2] == x.width * x.stride[3];
  const bool small = flat && x.stride[3] == 1 && pixels <= kBlock<Acc>;
  const int64_t rows = flat ? 1 : x.height, columns = flat ? pixels : x.width;
  const double share = 1.0 / static_cast<double>(pixels);
  for (int64_t i = begin; i < end;) {
    const int64_t sample = i / x.channels, channel = i % x.channels;
    const int64_t count = small ? std::min(std::min(kTogether, end - i), x.channels - channel) : 1;
    const Scalar* plane = x.data + sample * x.stride[0] + channel * x.stride[1];
    Acc* means = pooled + sample * row + channel;
    if (small) {
      Vector<Acc> sums[kTogether] = {};
      for (int64_t p = 0; p < count; ++p) sums[p] = sum_block(plane + p * x.stride[1], pixels);
      Acc totals[kTogether];
      store_vector(totals, sum_each<Acc, kTogether>(sums));
      for (int64_t p = 0; p < count; ++p) means[p] = static_cast<Acc>(totals[p] * share);
    } else {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) {
        total += x.stride[3] == 1 ? sum_contiguous(plane + r * x.stride[2], columns)
                                  : sum_strided(plane + r * x.stride[2], columns, x.stride[3]);
      }
      *means = static_cast<Acc>(total * share);
    }
    i += count;
  }
}

// sums[i] = rows[0][i] + ... + rows[count - 1][i] for i < kVectors * kLanes
template <int kVectors, class Scalar>
DDRF_INLINE void sum_columns(const Scalar* const* rows, int64_t count, int64_t column,
                             accumulate_t<Scalar>* sums) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> total[kVectors] = {};
  for (int64_t k = 0; k < count; ++k) {
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) total[j] += load_ahead(rows[k] + column + j * kStep);
  }
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) store_vector(sums + column + j * kStep, total[j]);
}

// totals[channel] = the sum over pixels [begin, end), row by row, of one sample whose channels are
// next to each other in memory. scratch holds scratch_size numbers.
template <class Scalar>
void sum_pixels(const Pixels<Scalar>& x, int64_t sample, int64_t begin, int64_t end, double* totals,
                accumulate_t<Scalar>* scratch) {
  constexpr int64_t kStep = kLanes<accumulate_t<Scalar>>, kRows = 2 * kSummands;
  const int64_t channels = x.channels;
  const bool dense = x.stride[3] == channels && x.stride[2] == x.width * channels;
  // Pixels are taken side by side where that makes whole vectors, eight of them if they are small.
  int64_t together = kStep / std::gcd(channels, kStep);
  together *= std::max<int64_t>(1, 8 * kStep / (together * channels));
  if (!dense || together * channels > scratch_size(channels)) together = 1;
  const Scalar* image = x.data + sample * x.stride[0];
  for (int64_t i = 0; i < channels; ++i) totals[i] = 0;
  for (int64_t pixel = begin; pixel < end;) {
    if (together > end - pixel) together = 1;
    const int64_t size = together * channels;
    const Scalar* rows[kRows];
    int64_t count = 0;
    for (; count < kRows && pixel + together <= end; pixel += together) {
      rows[count++] =
          image + (dense ? pixel * channels
                         : pixel / x.width * x.stride[2] + pixel % x.width * x.stride[3]);
    }
    int64_t i = 0;
    for (; i + 8 * kStep <= size; i += 8 * kStep) sum_columns<8>(rows, count, i, scratch);
    for (; i + 2 * kStep <= size; i += 2 * kStep) sum_columns<2>(rows, count, i, scratch);
    for (; i + kStep <= size; i += kStep) sum_columns<1>(rows, count, i, scratch);
    for (; i < size; ++i) {
      scratch[i] = 0;
      for (int64_t k = 0; k < count; ++k) scratch[i] += load_as_accumulate(rows[k] + i);
    }
    for (int64_t t = 1; t < together; ++t) {
      for (int64_t c = 0; c < channels; ++c) scratch[c] += scratch[t * channels + c];
    }
    for (int64_t c = 0; c < channels; ++c) totals[c] += scratch[c];
  }
}

// result[b * result_row + j] = values[b, :] . weights[j, :] for b < kSamples, j < outputs.
template <int kSamples, int kOutputs, class Scalar>
DDRF_INLINE void dot_tile(const accumulate_t<Scalar>* values, int64_t count, const Scalar* weights,
                          int64_t outputs, accumulate_t<Scalar>* result, int64_t result_row) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> sums[kSamples * kOutputs] = {};
  const Scalar* rows[kOutputs];
  for (int j = 0; j < kOutputs; ++j) {  // a missing row repeats the last
    rows[j] = weights + (j < outputs ? j : outputs - 1) * count;
  }
  const auto add = [&](auto load) {
    Vector<Acc> w[kOutputs];
#pragma GCC unroll 4
    for (int j = 0; j < kOutputs; ++j) w[j] = load(rows[j]);
#pragma GCC unroll 4
    for (int b = 0; b < kSamples; ++b) {
      const Vector<Acc> v = load(values + b * count);
#pragma GCC unroll 4
      for (int j = 0; j < kOutputs; ++j) sums[b * kOutputs + j] += v * w[j];
    }
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    add([i](const auto* row) { return load_vector(row + i); });
  }
  if (i < count) {
    add([i, count](const auto* row) { return load_rest(row + i, count - i, count >= kStep); });
  }
  Acc flat[kStep];
  store_vector(flat, sum_each<Acc, kSamples * kOutputs>(sums));
  for (int b = 0; b < kSamples; ++b) {
    for (int j = 0; j < kOutputs && j < outputs; ++j) {
      result[b * result_row + j] = flat[b * kOutputs + j];
    }
  }
}

// result[b * result_row + j] = values[b, :] . weights[j, :]; rows of both have `count` numbers.
template <class Scalar>
void dot_products(const accumulate_t<Scalar>* values, int64_t batch, int64_t count,
                  const Scalar* weights, int64_t outputs, accumulate_t<Scalar>* result,
                  int64_t result_row) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kOutputs = std::min(4, kLanes<Acc>), kSamples = kLanes<Acc> / kOutputs;
  for (int64_t j = 0; j < outputs; j += kOutputs) {
    int64_t b = 0;
    for (; b + kSamples <= batch; b += kSamples) {
      dot_tile<kSamples, kOutputs>(values + b * count, count, weights + j * count, outputs - j,
                                   result + b * result_row + j, result_row);
    }
    for (; b < batch; ++b) {
      dot_tile<1, kOutputs>(values + b * count, count, weights + j * count, outputs - j,
                            result + b * result_row + j, result_row);
    }
  }
}

template <class Scalar>
RouteKernels<Scalar> route_kernels() {
  return {mean_planes<Scalar>, sum_pixels<Scalar>, dot_products<Scalar>};
}

template RouteKernels<float> route_kernels();
template RouteKernels<double> route_kernels();
template RouteKernels<c10::BFloat16> route_kernels();
template RouteKernels<c10::Half> route_kernels();

}  // namespace ddrf_fast::DDRF_CAPABILITY

// Scratch memory of the dynamic_conv kernels, and copying tiles of images into it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>

#include "cpu/dynamic_conv_plan.h"
#include "cpu/dynamic_conv_vector.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Uninitialised, aligned to cache lines.
template <class Acc>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<Acc*>(
            ::operator new(sizeof(Acc) * static_cast<size_t>(count), kAlignment))) {}

  Acc* get() const { return data_.get(); }
  Acc& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(Acc* pointer) const { ::operator delete(pointer, kAlignment); }
  };
  std::unique_ptr<Acc, Free> data_;
};

// The channels of one group of one sample, followed, where `has_ones` says so, by a channel that is
// one inside the image: all that the constant code channels come down to.
template <class Scalar>
struct Planes {
  const Scalar* data;
  int64_t channel_step, row_step, column_step;
  int64_t channels, height, width;
  bool has_ones;
};

template <class Scalar>
inline Image<Scalar> from_sample(const Image<Scalar>& image, int64_t b) {
  Image<Scalar> result = image;
  result.data += b * image.stride[0];
  return result;
}

template <class Scalar>
inline Planes<Scalar> planes_of_group(const Image<const Scalar>& image, int64_t sample,
                                      int64_t group, int64_t channels, int64_t height,
                                      int64_t width, bool has_ones = false) {
  return {image.data + sample * image.stride[0] + group * channels * image.stride[1],
          image.stride[1],
          image.stride[2],
          image.stride[3],
          channels,
          height,
          width,
          has_ones};
}

// Input positions y0 + i * y_step of `rows` rows and x0 + j * x_step of `columns` columns.
struct Window {
  int64_t y0, y_step, rows, x0, x_step, columns;
};

#if DDRF_VECTOR_BYTES == 64
// copy_window for channels of the image whose columns lie side by side, kStep from one to the next:
// vector by vector, where the masks of the loads leave zeros outside the image. Masks cost time,
// above all where a vector lies on two cache lines, and most vectors need none.
template <int kStep, class Scalar>
inline void copy_vectors(const Planes<Scalar>& planes, int64_t begin, int64_t end,
                         const Window& window, accumulate_t<Scalar>* target, int64_t channel_stride,
                         int64_t row_stride) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kLane = kLanes<Acc>;
  const int64_t x0 = window.x0, rows = window.rows;
  const int64_t width = std::min(planes.width, x0 + (window.columns - 1) * kStep + 1);
  const auto copy = [&](Acc* to, const Scalar* from, int64_t i) {
    const int64_t x = x0 + i * kStep;
    Vector<Acc> value = load_masked(from + i * kStep, lanes_inside<kLane>(x, width));
    if constexpr (kStep == 2) {
      const uint32_t high = lanes_inside<kLane>(x + kLane, width);
      value = every_second<Acc, 0>(value, load_masked(from + i * kStep + kLane, high),
                                   std::make_index_sequence<kLane>());
    }
    store_masked(to + i, value, lanes_inside<kLane>(i, row_stride));
  };
  // Vectors [first, last) lie inside the image and inside the row.
  const int64_t first =
      std::min(ceil_div(std::max<int64_t>(0, ceil_div(-x0, kStep)), kLane) * kLane, row_stride);
  const int64_t inside = std::min(row_stride, (width - x0) / kStep);
  const int64_t last = first + std::max<int64_t>(0, inside - first) / kLane * kLane;
  for (int64_t c = begin; c < end; ++c) {
    const Scalar* const plane = planes.data + c * planes.channel_step + x0;
    Acc* to = target + (c - begin) * channel_stride;
    for (int64_t row = 0; row < rows; ++row, to += row_stride) {
      const int64_t y = window.y0 + row * window.y_step;
      if (y < 0 || y >= planes.height) {
        std::fill_n(to, row_stride, Acc(0));
        continue;
      }
      const Scalar* const from = plane + y * planes.row_step;
      for (int64_t i = 0; i < first; i += kLane) copy(to, from, i);
      for (int64_t i = first; i < last; i += kLane) {
        Vector<Acc> value = load_vector(from + i * kStep);
        if constexpr (kStep == 2) {
          value = every_second<Acc, 0>(value, load_vector(from + i * kStep + kLane),
                                       std::make_index_sequence<kLane>());
        }
        store_vector(to + i, value);
      }
      for (int64_t i = last; i < row_stride; i += kLane) copy(to, from, i);
    }
  }
}
#endif

// Copies a window of channels [begin, end) to target[channel][row][row_stride], converting; zero
// outside the image and from `columns` to `row_stride`.
template <class Scalar>
inline void copy_window(const Planes<Scalar>& planes, int64_t begin, int64_t end,
                        const Window& window, accumulate_t<Scalar>* target, int64_t channel_stride,
                        int64_t row_stride) {
  using Acc = accumulate_t<Scalar>;
  // The columns [first, last) are inside the image.
  const int64_t first = std::clamp<int64_t>(
      ceil_div(std::max<int64_t>(0, -window.x0), window.x_step), 0, window.columns);
  const int64_t last = std::clamp<int64_t>(
      window.x0 < planes.width ? ceil_div(planes.width - window.x0, window.x_step) : 0, first,
      window.columns);
  const int64_t copied_end = std::min(end, planes.channels);
  const int64_t step = planes.column_step * window.x_step;
#if DDRF_VECTOR_BYTES == 64
  if (planes.column_step == 1 && step <= 2 && copied_end == end) {
    const auto copy = step == 1 ? copy_vectors<1, Scalar> : copy_vectors<2, Scalar>;
    copy(planes, begin, end, window, target, channel_stride, row_stride);
    return;
  }
#endif
  for (int64_t row = 0; row < window.rows; ++row) {
    const int64_t y = window.y0 + row * window.y_step;
    const bool inside = y >= 0 && y < planes.height && first < last;
    Acc* lines = target + row * row_stride;
    for (int64_t c = begin; c < end; ++c) {
      Acc* line = lines + (c - begin) * channel_stride;
      if (!inside) {
        std::fill(line, line + row_stride, Acc(0));
        continue;
      }
      std::fill(line, line + first, Acc(0));
      std::fill(line + last, line + row_stride, Acc(0));
      if (c == planes.channels) std::fill(line + first, line + last, Acc(1));
    }
    if (!inside || begin >= copied_end) continue;
    const Scalar* source = planes.data + begin * planes.channel_step + y * planes.row_step +
                           (window.x0 + first * window.x_step) * planes.column_step;
    if (planes.channel_step == 1 && step != 1) {
      transpose(lines + first, channel_stride, source, step, last - first, copied_end - begin);
      continue;
    }
    for (int64_t c = begin; c < copied_end; ++c, source += planes.channel_step) {
      Acc* line = lines + (c - begin) * channel_stride + first;
      if (step == 1) {
        load_row(line, source, last - first);
      } else if (step == 2) {
        load_every_second(line, source, last - first);
      } else {
        for (int64_t i = 0; i < last - first; ++i) line[i] = load_as_accumulate(source + i * step);
      }
    }
  }
}

template <class Acc>
inline void activate(Activation activation, int64_t count, Acc* values) {
  constexpr Acc kLeakySlope = Acc(0.01);
  if (activation == Activation::kRelu) {
    for (int64_t i = 0; i < count; ++i) values[i] = values[i] < 0 ? Acc(0) : values[i];
  } else if (activation == Activation::kLeakyRelu) {
    for (int64_t i = 0; i < count; ++i) {
      values[i] = values[i] < 0 ? values[i] * kLeakySlope : values[i];
    }
  }
}

// Copies what tile (tile_y, tile_x) reads of channels [begin, end), in the layout of `tiles`.
template <class Scalar>
inline void copy_tile(const Planes<Scalar>& planes, int64_t begin, int64_t end, const TapAxis& y,
                      const TapAxis& x, const Tiles& tiles, int64_t tile_y, int64_t tile_x,
                      accumulate_t<Scalar>* target) {
  const int64_t plane_size = tiles.y.length * tiles.row_stride();
  // What one run has read the next one shall find in the cache.
  constexpr int64_t kTogether = 8;
  if (end - begin > kTogether && planes.channel_step != 1) {
    for (int64_t c = begin; c < end; c += kTogether) {
      copy_tile(planes, c, std::min(c + kTogether, end), y, x, tiles, tile_y, tile_x,
                target + (c - begin) * tiles.channel_stride());
    }
    return;
  }
  for (int64_t run_y = 0; run_y < tiles.y.runs(); ++run_y) {
    for (int64_t run_x = 0; run_x < tiles.x.runs(); ++run_x) {
      const Window window{tile_y * tiles.y.extent * y.in_step + tiles.y.run_origin[run_y],
                          y.in_step,
                          tiles.y.length,
                          tile_x * tiles.x.extent * x.in_step + tiles.x.run_origin[run_x],
                          x.in_step,
                          tiles.x.length};
      copy_window(planes, begin, end, window,
                  target + (run_y * tiles.x.runs() + run_x) * plane_size, tiles.channel_stride(),
                  tiles.row_stride());
    }
  }
}

// What lies between the channels of a tile is read into columns that are dropped, or multiplied by
// zero: it must hold numbers.
template <class Acc>
inline void clear_slack(const Tiles& tiles, int64_t channels, Acc* scratch) {
  for (int64_t c = 0; c < channels; ++c) {
    Acc* next = scratch + (c + 1) * tiles.channel_stride();
    std::fill(next - tiles.slack, next, Acc(0));
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

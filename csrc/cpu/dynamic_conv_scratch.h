// Scratch memory of the dynamic_conv kernels, and copying tiles of images into it.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <utility>
#include <vector>

#include "cpu/dynamic_conv_plan.h"
#include "cpu/dynamic_conv_vector.h"
#include "cpu/scratch_memory.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// Of so many samples as many as share what is read of the bank best: eights, or 4, 2 or 1.
inline int64_t most_mixed(int64_t samples) {
  return samples < 8 ? int64_t{std::bit_floor(static_cast<uint32_t>(samples))} : samples / 8 * 8;
}

// Samples that go together, with so many bytes of scratch memory each: as many as stay in the
// third-level cache and find the thread's memory of the last call (scratch_memory.h), as every 4
// KiB of new memory are a page fault.
inline int64_t samples_together(int64_t bytes, int64_t batch, int64_t most_bytes = 8 << 20) {
  const int64_t fitting = std::max<int64_t>(1, most_bytes / (bytes + 1));
  return std::min(most_mixed(fitting), std::max<int64_t>(1, batch));
}

// The same of samples for which kernels are mixed block by block: eight may take twice as much.
inline int64_t samples_mixed_for(int64_t bytes, int64_t batch) {
  return std::max(samples_together(bytes, batch),
                  samples_together(bytes, std::min<int64_t>(batch, 8), 16 << 20));
}

// Uninitialised numbers, from the thread's memory (scratch_memory.h).
template <class Acc>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : bytes_(sizeof(Acc) * static_cast<size_t>(count)),
        data_(count == 0 ? nullptr : static_cast<Acc*>(take_scratch(bytes_))) {}
  Scratch(Scratch&& other) noexcept
      : bytes_(other.bytes_), data_(std::exchange(other.data_, nullptr)) {}
  Scratch& operator=(Scratch&& other) noexcept {
    std::swap(bytes_, other.bytes_);
    std::swap(data_, other.data_);
    return *this;
  }
  ~Scratch() {
    if (data_ != nullptr) give_scratch(data_, bytes_);
  }

  Acc* get() const { return data_; }
  Acc& operator[](int64_t i) const { return data_[i]; }

 private:
  size_t bytes_;
  Acc* data_;
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
// The pixels of a row of an image, as sums take them.
template <class Scalar>
struct Pixels {
  const Scalar* data;

  Vector<accumulate_t<Scalar>> operator()(int64_t i) const { return load_vector(data + i); }
  Vector<accumulate_t<Scalar>> operator()(int64_t i, uint32_t lanes) const {
    return load_masked(data + i, lanes);
  }
};

#ifdef DDRF_AVX512_BF16
// Those of two channels, as pairs.
struct PixelPairs {
  const c10::BFloat16 *first, *second;

  Vector<float> operator()(int64_t i) const { return load_pairs(first + i, second + i); }
  Vector<float> operator()(int64_t i, uint32_t lanes) const {
    return load_pairs(first + i, second + i, lanes, lanes);
  }
};
#endif

// Calls body with the distance between columns, one or two, as a constant.
template <class Body>
inline void with_column_step(int64_t step, const Body& body) {
  if (step == 1) {
    body(std::integral_constant<int, 1>());
  } else {
    body(std::integral_constant<int, 2>());
  }
}

// Copies a window of an image, whose channel c is row_of(c, y) at row y, to target[c][row]: vector
// by vector, where the masks of the loads leave zeros outside the image. Masks cost time, above all
// where a vector lies on two cache lines, and most vectors need none.
template <int kStep, class RowOf, class Acc>
inline void copy_vectors(int64_t channels, const RowOf& row_of, int64_t image_height,
                         int64_t image_width, const Window& window, Acc* target,
                         int64_t channel_stride, int64_t row_stride) {
  constexpr int kLane = kLanes<Acc>;
  constexpr auto kIndices = std::make_index_sequence<kLane>();
  const int64_t x0 = window.x0, rows = window.rows;
  const int64_t width = std::min(image_width, x0 + (window.columns - 1) * kStep + 1);
  // Vectors [first, last) lie inside the image and inside the row.
  const int64_t first =
      std::min(ceil_div(std::max<int64_t>(0, ceil_div(-x0, kStep)), kLane) * kLane, row_stride);
  const int64_t inside = std::min(row_stride, (width - x0) / kStep);
  const int64_t last = first + std::max<int64_t>(0, inside - first) / kLane * kLane;
  // The others, of which all rows have the same.
  struct Masked {
    int64_t i;
    uint32_t read, read_next, stored;
  };
  std::vector<Masked> masked;
  const auto mask = [&](int64_t i, int64_t end) {
    for (; i < end; i += kLane) {
      const int64_t x = x0 + i * kStep;
      masked.push_back({i, lanes_inside<kLane>(x, width), lanes_inside<kLane>(x + kLane, width),
                        lanes_inside<kLane>(i, row_stride)});
    }
  };
  mask(0, first);
  mask(last, row_stride);
  for (int64_t c = 0; c < channels; ++c) {
    Acc* to = target + c * channel_stride;
    for (int64_t row = 0; row < rows; ++row, to += row_stride) {
      const int64_t y = window.y0 + row * window.y_step;
      if (y < 0 || y >= image_height) {
        std::fill_n(to, row_stride, Acc(0));
        continue;
      }
      const auto pixels = row_of(c, y);
      for (int64_t i = first; i < last; i += kLane) {
        const int64_t x = x0 + i * kStep;
        Vector<Acc> value = pixels(x);
        if constexpr (kStep == 2) value = every_second<Acc, 0>(value, pixels(x + kLane), kIndices);
        store_vector(to + i, value);
      }
      for (const Masked& at : masked) {
        const int64_t x = x0 + at.i * kStep;
        Vector<Acc> value = pixels(x, at.read);
        if constexpr (kStep == 2) {
          value = every_second<Acc, 0>(value, pixels(x + kLane, at.read_next), kIndices);
        }
        store_masked(to + at.i, value, at.stored);
      }
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
    const auto row_of = [&](int64_t c, int64_t y) {
      return Pixels<Scalar>{planes.data + (begin + c) * planes.channel_step + y * planes.row_step};
    };
    with_column_step(step, [&]<int kStep>(std::integral_constant<int, kStep>) {
      copy_vectors<kStep>(end - begin, row_of, planes.height, planes.width, window, target,
                          channel_stride, row_stride);
    });
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

// Calls body(window, at) for each run of a tile: its window of the image, and where it lies in a
// channel of the tile.
template <class Body>
inline void for_each_run(const TapAxis& y, const TapAxis& x, const Tiles& tiles, int64_t tile_y,
                         int64_t tile_x, const Body& body) {
  const int64_t plane_size = tiles.y.length * tiles.row_stride();
  for (int64_t run_y = 0; run_y < tiles.y.runs(); ++run_y) {
    for (int64_t run_x = 0; run_x < tiles.x.runs(); ++run_x) {
      const Window window{tile_y * tiles.y.extent * y.in_step + tiles.y.run_origin[run_y],
                          y.in_step,
                          tiles.y.length,
                          tile_x * tiles.x.extent * x.in_step + tiles.x.run_origin[run_x],
                          x.in_step,
                          tiles.x.length};
      body(window, (run_y * tiles.x.runs() + run_x) * plane_size);
    }
  }
}

// Copies what tile (tile_y, tile_x) reads of channels [begin, end), in the layout of `tiles`.
template <class Scalar>
inline void copy_tile(const Planes<Scalar>& planes, int64_t begin, int64_t end, const TapAxis& y,
                      const TapAxis& x, const Tiles& tiles, int64_t tile_y, int64_t tile_x,
                      accumulate_t<Scalar>* target) {
  // What one run has read the next one shall find in the cache.
  constexpr int64_t kTogether = 8;
  if (end - begin > kTogether && planes.channel_step != 1) {
    for (int64_t c = begin; c < end; c += kTogether) {
      copy_tile(planes, c, std::min(c + kTogether, end), y, x, tiles, tile_y, tile_x,
                target + (c - begin) * tiles.channel_stride());
    }
    return;
  }
  for_each_run(y, x, tiles, tile_y, tile_x, [&](const Window& window, int64_t at) {
    copy_window(planes, begin, end, window, target + at, tiles.channel_stride(),
                tiles.row_stride());
  });
}

#ifdef DDRF_AVX512_BF16
// The same for pairs of the channels from `first` and from `second` on, of an image whose columns
// lie side by side and are read one by one or every second one.
inline void copy_pairs(const Planes<c10::BFloat16>& planes, int64_t first, int64_t second,
                       int64_t pairs, const TapAxis& y, const TapAxis& x, const Tiles& tiles,
                       int64_t tile_y, int64_t tile_x, float* target) {
  constexpr int64_t kTogether = 8;  // as in copy_tile
  for (int64_t begin = 0; begin < pairs; begin += kTogether) {
    const auto row_of = [&](int64_t c, int64_t row) {
      const c10::BFloat16* at =
          planes.data + (begin + c) * planes.channel_step + row * planes.row_step;
      return PixelPairs{at + first * planes.channel_step, at + second * planes.channel_step};
    };
    for_each_run(y, x, tiles, tile_y, tile_x, [&](const Window& window, int64_t at) {
      with_column_step(x.in_step, [&]<int kStep>(std::integral_constant<int, kStep>) {
        copy_vectors<kStep>(std::min(kTogether, pairs - begin), row_of, planes.height, planes.width,
                            window, target + begin * tiles.channel_stride() + at,
                            tiles.channel_stride(), tiles.row_stride());
      });
    });
  }
}

// Copies what a tile reads of as many channels as a vector has lanes from `first`, and their
// partners from `second` on, to target[position][pair]. `second_end` ends the image's channels and,
// where it has them, those of ones.
class PixelCopy {
 public:
  PixelCopy(const Planes<c10::BFloat16>& planes, int64_t first, int64_t second, int64_t second_end)
      : planes_(planes), constant_(planes.width * 2) {
    std::fill_n(constant_.get(), planes.width, c10::BFloat16(1));
    std::fill_n(constant_.get() + planes.width, planes.width, c10::BFloat16(0));
    for (int64_t i = 0; i < kLane; ++i) {
      sources_[i] = {source(first + i, second_end), source(second + i, second_end)};
    }
  }

  void run(const TapAxis& y, const TapAxis& x, const Tiles& tiles, int64_t tile_y, int64_t tile_x,
           float* target) const {
    for_each_run(y, x, tiles, tile_y, tile_x, [&](const Window& window, int64_t at) {
      with_column_step(x.in_step, [&]<int kStep>(std::integral_constant<int, kStep>) {
        copy<kStep>(window, target + at * kLane, tiles.row_stride());
      });
    });
  }

 private:
  static constexpr int kLane = kLanes<float>;

  struct Source {
    const c10::BFloat16* data;
    int64_t row_step;
  };

  Source source(int64_t channel, int64_t end) const {
    if (channel < planes_.channels && channel < end) {
      return {planes_.data + channel * planes_.channel_step, planes_.row_step};
    }
    return {constant_.get() + (channel < end ? 0 : planes_.width), 0};
  }

  template <int kStep>
  void copy(const Window& window, float* target, int64_t row_stride) const {
    constexpr auto kIndices = std::make_index_sequence<kLane>();
    const int64_t width = std::min(planes_.width, window.x0 + (window.columns - 1) * kStep + 1);
    for (int64_t row = 0; row < window.rows; ++row, target += row_stride * kLane) {
      const int64_t y = window.y0 + row * window.y_step;
      if (y < 0 || y >= planes_.height) {
        std::fill_n(target, row_stride * kLane, 0.0f);
        continue;
      }
      PixelPairs pairs[kLane];
      for (int64_t i = 0; i < kLane; ++i) {
        pairs[i] = {sources_[i].first.data + y * sources_[i].first.row_step,
                    sources_[i].second.data + y * sources_[i].second.row_step};
      }
      for (int64_t i = 0; i < row_stride; i += kLane) {
        const int64_t x = window.x0 + i * kStep;
        Vector<float> square[kLane];
        if (x >= 0 && x + kLane * kStep <= width) {
#pragma GCC unroll 16
          for (int p = 0; p < kLane; ++p) {
            square[p] = pairs[p](x);
            if constexpr (kStep == 2) {
              square[p] = every_second<float, 0>(square[p], pairs[p](x + kLane), kIndices);
            }
          }
        } else {
          const uint32_t read = lanes_inside<kLane>(x, width);
          [[maybe_unused]] const uint32_t next = lanes_inside<kLane>(x + kLane, width);
#pragma GCC unroll 16
          for (int p = 0; p < kLane; ++p) {
            square[p] = pairs[p](x, read);
            if constexpr (kStep == 2) {
              square[p] = every_second<float, 0>(square[p], pairs[p](x + kLane, next), kIndices);
            }
          }
        }
        transpose_square<float>(square);
        float* const to = target + i * kLane;
        const int64_t positions = std::min<int64_t>(kLane, row_stride - i);
#pragma GCC unroll 16
        for (int p = 0; p < kLane; ++p) {
          if (p < positions) store_vector(to + p * kLane, square[p]);
        }
      }
    }
  }

  const Planes<c10::BFloat16>& planes_;
  Scratch<c10::BFloat16> constant_;  // rows of ones and of zeros
  struct {
    Source first, second;
  } sources_[kLane];
};

// The same of an image whose channels lie side by side; the first of all pairs are its channels.
inline void copy_pixels_of_channels(const Planes<c10::BFloat16>& planes, int64_t first,
                                    int64_t second, int64_t second_end, const TapAxis& y,
                                    const TapAxis& x, const Tiles& tiles, int64_t tile_y,
                                    int64_t tile_x, float* target) {
  constexpr int kLane = kLanes<float>;
  const uint32_t partners = lanes_inside<kLane>(second, std::min(planes.channels, second_end));
  const uint32_t ones = lanes_inside<kLane>(second, second_end) & ~partners;
  const __m512i one = _mm512_maskz_set1_epi32(static_cast<__mmask16>(ones), 0x3f800000);
  for_each_run(y, x, tiles, tile_y, tile_x, [&](const Window& window, int64_t at) {
    float* to = target + at * kLane;
    for (int64_t row = 0; row < window.rows; ++row) {
      const int64_t y_at = window.y0 + row * window.y_step;
      const bool inside = y_at >= 0 && y_at < planes.height;
      const c10::BFloat16* const source = planes.data + y_at * planes.row_step;
      for (int64_t i = 0; i < tiles.row_stride(); ++i, to += kLane) {
        const int64_t x_at = window.x0 + i * window.x_step;
        __m512i pairs{};
        if (inside && x_at >= 0 && x_at < planes.width) {
          const c10::BFloat16* const pixel = source + x_at * planes.column_step;
          pairs = (__m512i)load_pairs(pixel + first, pixel + second, 0xffff, partners) | one;
        }
        store_vector(to, (Vector<float>)pairs);
      }
    }
  });
}
#endif

// The slack of a tile is read into columns that are dropped, or multiplied by zero: it must hold
// numbers.
template <class Acc>
inline void clear_slack(const Tiles& tiles, int64_t channels, Acc* scratch) {
  for (int64_t c = 0; c < channels; ++c) {
    std::fill_n(scratch + c * tiles.channel_stride() + tiles.channel_size(), tiles.slack, Acc(0));
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

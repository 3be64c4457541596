// The Winograd plan's gradient of each sample's own kernel; dynamic_conv_winograd.h has the
// transforms. With V = B4^T X B2 and M = A4 dY A2^T (6x4 each)
//
//   dW[o][c] = G4^T (sum over tiles of M[o] * V[c], entry by entry) G2
//
// The 24 sums are matrix products with the tiles as the inner dimension; V has the channels side by
// side, so that they are what vectors hold. A task owns a sample, or a fixed share of the tiles of
// one where there are few samples.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "common/parallel.h"
#include "cpu/dynamic_conv_gemm.h"
#include "cpu/dynamic_conv_scratch.h"
#include "cpu/dynamic_conv_winograd.h"

namespace ddrf_fast::DDRF_CAPABILITY {

// A4 and A2, of the gradient of outputs.
template <class Value>
DDRF_INLINE void transform_grad(const Value (&y)[4], Value (&m)[6]) {
  const Value even_near = y[0] + y[2] * float(kNear2), even_far = y[0] + y[2] * float(kFar2);
  const Value odd_near = y[1] * float(kNear) + y[3] * float(kNear * kNear2);
  const Value odd_far = y[1] * float(kFar) + y[3] * float(kFar * kFar2);
  m[0] = y[0];
  m[1] = even_near + odd_near;
  m[2] = even_near - odd_near;
  m[3] = even_far + odd_far;
  m[4] = even_far - odd_far;
  m[5] = y[3];
}

template <class Value>
DDRF_INLINE void transform_grad(const Value (&y)[2], Value (&m)[4]) {
  m[0] = y[0];
  m[1] = y[0] + y[1];
  m[2] = y[0] - y[1];
  m[3] = -y[1];
}

// G4^T and G2^T, to the gradient of taps.
template <class Value>
DDRF_INLINE void transform_tap_grad(const Value (&u)[6], Value (&g)[3]) {
  const Value even_near = u[1] + u[2], odd_near = u[1] - u[2];
  const Value even_far = u[3] + u[4], odd_far = u[3] - u[4];
  g[0] =
      u[0] * float(1 / (kNear2 * kFar2)) + even_near * float(kNearTap) + even_far * float(kFarTap);
  g[1] = odd_near * float(kNearTap * kNear) + odd_far * float(kFarTap * kFar);
  g[2] = even_near * float(kNearTap * kNear2) + even_far * float(kFarTap * kFar2) + u[5];
}

template <class Value>
DDRF_INLINE void transform_tap_grad(const Value (&u)[4], Value (&g)[3]) {
  const Value even = (u[1] + u[2]) * 0.5f;
  g[0] = u[0] + even;
  g[1] = (u[1] - u[2]) * 0.5f;
  g[2] = even + u[3];
}

template <class Scalar>
class WinogradGradient {
 public:
  using Acc = accumulate_t<Scalar>;

  static bool fits(const DynamicConvShape& shape) { return fits_winograd_gradient<Scalar>(shape); }

  // `has_ones` adds a channel of ones.
  WinogradGradient(const DynamicConvShape& shape, bool has_ones)
      : shape_(shape),
        has_ones_(has_ones),
        channels_(shape.in_per_group() + has_ones),
        outputs_(shape.out_per_group()),
        columns_(ceil_div(channels_, kLane) * kLane),
        tile_columns_(ceil_div(shape.out_size[1], kTileColumns)),
        tiles_(tile_columns_ * ceil_div(shape.out_size[0], kTileRows)),
        shares_(std::max<int64_t>(1, ceil_div(kLeastTasks, shape.batch * shape.groups))) {
    share_ = ceil_div(ceil_div(tiles_, shares_), kChunk) * kChunk;
    shares_ = ceil_div(tiles_, share_);
  }

  int64_t size() const { return shape_.groups * outputs_ * channels_ * 9; }

  // Elements of scratch for each sample of run().
  int64_t scratch_size() const { return shape_.groups * shares_ * kEntries * outputs_ * columns_; }

  // result [batch][groups * out_channels][channels with ones][taps] is overwritten.
  void run(int64_t batch, const Image<const Scalar>& image, const Image<const Scalar>& grad,
           Acc* result) const {
    if constexpr (std::is_same_v<Acc, float>) {
      const int64_t u_size = kEntries * outputs_ * columns_;
      const Scratch<Acc> u(batch * shape_.groups * shares_ * u_size);
      parallel_for(batch * shape_.groups * shares_, 1, [&](int64_t begin, int64_t end) {
        const Scratch<Acc> v(kEntries * v_entry()), m(kEntries * m_entry());
        const Scratch<Acc> window(kLane * kWindow), pixels(kLane * kWindow);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t share = task % shares_, sample_group = task / shares_;
          add_tiles(image, grad, sample_group / shape_.groups, sample_group % shape_.groups,
                    share * share_, std::min((share + 1) * share_, tiles_), v.get(), m.get(),
                    window.get(), pixels.get(), &u[task * u_size]);
        }
      });
      parallel_for(batch * shape_.groups * outputs_, 4, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
          finish_row(&u[row / outputs_ * shares_ * u_size + row % outputs_ * columns_], u_size,
                     result + row * channels_ * 9);
        }
      });
    }
  }

 private:
  static constexpr int kLane = kLanes<Acc>;
  static constexpr int kTileRows = 4, kTileColumns = 2, kEntries = 24;
  static constexpr int64_t kLeastTasks = 4, kStagger = 64 / sizeof(Acc);
  static constexpr int64_t kChunk = 48;  // tiles of one product
  // One channel's pixels for a vector of tiles: six rows (of the gradient four).
  static constexpr int64_t kRow = 3 * kLane, kWindow = 6 * kRow;

  int64_t v_entry() const { return kChunk * columns_ + kStagger; }
  int64_t m_entry() const { return outputs_ * kChunk + kStagger; }

  // U[entry][output][channel] of tiles [begin, end).
  void add_tiles(const Image<const Scalar>& image, const Image<const Scalar>& grad, int64_t sample,
                 int64_t group, int64_t begin, int64_t end, Acc* v, Acc* m, Acc* window,
                 Acc* pixels, Acc* u) const {
    const Planes<Scalar> planes = planes_of_group(image, sample, group, shape_.in_per_group(),
                                                  shape_.in_size[0], shape_.in_size[1], has_ones_);
    const Planes<Scalar> grad_planes =
        planes_of_group(grad, sample, group, outputs_, shape_.out_size[0], shape_.out_size[1]);
    for (int64_t first = begin; first < end; first += kChunk) {
      const int64_t count = std::min(kChunk, end - first);
      for (int64_t done = 0; done < count;) {
        const int64_t row = (first + done) / tile_columns_, column = (first + done) % tile_columns_;
        const int64_t taken = std::min({count - done, tile_columns_ - column, int64_t{kLane}});
        const int64_t top = row * kTileRows, left = column * kTileColumns;
        for (int64_t c = 0; c < channels_; c += kLane) {
          transform_inputs(planes, c, top - shape_.padding[0], left - shape_.padding[1], taken,
                           window, pixels, v + done * columns_ + c);
        }
        for (int64_t o = 0; o < outputs_; o += kLane) {
          const int64_t outputs = std::min<int64_t>(kLane, outputs_ - o);
          copy_window(grad_planes, o, o + outputs, Window{top, 1, 4, left, 1, 2 * kLane}, window,
                      kWindow, kRow);
          for (int64_t i = 0; i < outputs; ++i) {
            transform_grads(window + i * kWindow, taken, m + (o + i) * kChunk + done);
          }
        }
        done += taken;
      }
      std::vector<Offsets> table;
      for (int64_t t = 0; t < count; ++t) {
        table.push_back({static_cast<int32_t>(t), static_cast<int32_t>(t * columns_)});
      }
      for (int entry = 0; entry < kEntries; ++entry) {
        multiply<Acc>(m + entry * m_entry(), kChunk, outputs_, v + entry * v_entry(), table.data(),
                      count, columns_,
                      {u + entry * outputs_ * columns_, columns_,
                       first == begin ? nullptr : u + entry * outputs_ * columns_, columns_});
      }
    }
  }

  // V[entry][tile][channel] of one vector of channels.
  void transform_inputs(const Planes<Scalar>& planes, int64_t channel, int64_t top, int64_t left,
                        int64_t count, Acc* window, Acc* pixels, Acc* v) const {
    const int64_t channels = std::min<int64_t>(kLane, channels_ - channel);
    const int64_t columns = kTileColumns * count + 2;
    copy_window(planes, channel, channel + channels, Window{top, 1, 6, left, 1, columns}, window,
                kWindow, kRow);
    // Lanes beyond the last channel hold numbers too.
    for (int64_t c = channels; c < kLane; ++c) std::fill_n(window + c * kWindow, kWindow, Acc(0));
    for (int64_t y = 0; y < 6; ++y) {
      transpose(pixels + y * kRow * kLane, kLane, static_cast<const Acc*>(window + y * kRow),
                kWindow, kLane, ceil_div(columns, kLane) * kLane);
    }
    for (int64_t t = 0; t < count; ++t) {
      const Acc* source = pixels + t * kTileColumns * kLane;
      Vector<Acc> wide[4][6];
      for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
        Vector<Acc> row[4], transformed[4];
        for_each_constant<4>([&](auto j) __attribute__((always_inline)) {
          row[j()] = load_vector(source + (i() * kRow + j()) * kLane);
        });
        transform_input(row, transformed);
        for_each_constant<4>(
            [&](auto j) __attribute__((always_inline)) { wide[j()][i()] = transformed[j()]; });
      });
      for_each_constant<4>([&](auto j) __attribute__((always_inline)) {
        Vector<Acc> tall[6];
        transform_input(wide[j()], tall);
        for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
          store_vector(v + (i() * 4 + j()) * v_entry() + t * columns_, tall[i()]);
        });
      });
    }
  }

  // M[entry][output][tile] of one vector of tiles.
  void transform_grads(const Acc* window, int64_t count, Acc* m) const {
    Vector<Acc> wide[4][4];
    for_each_constant<4>([&](auto i) __attribute__((always_inline)) {
      const Acc* row = window + i() * kRow;
      Vector<Acc> pair[2];
      deinterleave<Acc>({load_vector(row), load_vector(row + kLane)}, pair);
      Vector<Acc> transformed[4];
      transform_grad(pair, transformed);
      for_each_constant<4>(
          [&](auto j) __attribute__((always_inline)) { wide[j()][i()] = transformed[j()]; });
    });
    for_each_constant<4>([&](auto j) __attribute__((always_inline)) {
      Vector<Acc> tall[6];
      transform_grad(wide[j()], tall);
      for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
        if (count == kLane) {
          store_vector(m + (i() * 4 + j()) * m_entry(), tall[i()]);
        } else {
          store_partial(m + (i() * 4 + j()) * m_entry(), tall[i()], count);
        }
      });
    });
  }

  // Sums the shares of one output channel and transforms them to [channel][tap].
  void finish_row(const Acc* u, int64_t u_size, Acc* row) const {
    const Scratch<Acc> taps(9 * kLane);
    for (int64_t c = 0; c < channels_; c += kLane) {
      Vector<Acc> narrow[3][6];
      for_each_constant<6>([&](auto i) __attribute__((always_inline)) {
        Vector<Acc> wide[4], transformed[3];
        for_each_constant<4>([&](auto j) __attribute__((always_inline)) {
          const Acc* source = u + (i() * 4 + j()) * outputs_ * columns_ + c;
          wide[j()] = load_vector(source);
          for (int64_t share = 1; share < shares_; ++share) {
            wide[j()] += load_vector(source + share * u_size);
          }
        });
        transform_tap_grad(wide, transformed);
        for_each_constant<3>(
            [&](auto j) __attribute__((always_inline)) { narrow[j()][i()] = transformed[j()]; });
      });
      for_each_constant<3>([&](auto j) __attribute__((always_inline)) {
        Vector<Acc> column[3];
        transform_tap_grad(narrow[j()], column);
        for_each_constant<3>([&](auto i) __attribute__((always_inline)) {
          store_vector(&taps[(i() * 3 + j()) * kLane], column[i()]);
        });
      });
      for (int64_t k = 0; k < std::min<int64_t>(kLane, channels_ - c); ++k) {
        for (int t = 0; t < 9; ++t) row[(c + k) * 9 + t] = taps[t * kLane + k];
      }
    }
  }

  const DynamicConvShape& shape_;
  bool has_ones_;
  int64_t channels_, outputs_, columns_;  // columns: channels up to whole vectors
  int64_t tile_columns_, tiles_;
  int64_t shares_, share_;  // of the tiles of a sample; tiles in one
};

}  // namespace ddrf_fast::DDRF_CAPABILITY

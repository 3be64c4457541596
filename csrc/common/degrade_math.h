// The index arithmetic of degrade, one source for CPU, CUDA and the NumPy module.
//
//   out[b,c,y,x] = sum_{u,v} (sum_m w[b,m,Y,X] K_m[u,v]) Z[b,c,Y-u,X-v] + noise_std n,  (Y,X) = s
//   (y,x) + offset
//
// The backends see it as a correlation over a padded image: with the taps numbered a = 0..k-1 along
// each axis and the kernel flipped beforehand (not for correlation=True),
//
//   out[y,x] = sum_{a,b} K'[a,b] P[s y + a, s x + b],   P[i,j] = Z[source(i + offset - r), source(j
//   + offset - r)]
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "common/philox.h"

namespace ddrf_fast {

enum class Padding { kReflect, kReplicate, kCircular, kZeros };

// Where the mixing weights live: one set a sample, at the image's pixels, at the output's pixels,
// or on a coarse grid that spans the image.
enum class WeightsAt { kSample, kImage, kOutput, kGrid };

inline Padding padding_from(const std::string& name) {
  if (name == "reflect") return Padding::kReflect;
  if (name == "replicate") return Padding::kReplicate;
  if (name == "circular") return Padding::kCircular;
  if (name == "zeros") return Padding::kZeros;
  throw std::invalid_argument("padding: expected reflect, replicate, circular or zeros, got " +
                              name);
}

inline WeightsAt weights_at_from(const std::string& name) {
  if (name == "sample") return WeightsAt::kSample;
  if (name == "image") return WeightsAt::kImage;
  if (name == "output") return WeightsAt::kOutput;
  if (name == "grid") return WeightsAt::kGrid;
  throw std::invalid_argument("weights_at: expected sample, image, output or grid, got " + name);
}

// The sizes and options of one call; Int is wide where speed does not care.
template <class Int>
struct DegradeShape {
  Int batch, channels, height, width, out_height, out_width;
  Int num_kernels, kernel_size, scale, offset, grid_height, grid_width;
  Padding padding;
  WeightsAt weights_at;
  bool correlation, kernels_per_sample;
  bool noise_map;  // whether noise_std has a value for each output pixel

  DegradeShape() = default;
  template <class Other>
  explicit DegradeShape(const DegradeShape<Other>& other)
      : batch(other.batch),
        channels(other.channels),
        height(other.height),
        width(other.width),
        out_height(other.out_height),
        out_width(other.out_width),
        num_kernels(other.num_kernels),
        kernel_size(other.kernel_size),
        scale(other.scale),
        offset(other.offset),
        grid_height(other.grid_height),
        grid_width(other.grid_width),
        padding(other.padding),
        weights_at(other.weights_at),
        correlation(other.correlation),
        kernels_per_sample(other.kernels_per_sample),
        noise_map(other.noise_map) {}

  DDRF_HOST_DEVICE Int num_taps() const { return kernel_size * kernel_size; }
  DDRF_HOST_DEVICE Int num_banks() const { return kernels_per_sample ? batch : 1; }
  DDRF_HOST_DEVICE Int padded_height() const { return (out_height - 1) * scale + kernel_size; }
  DDRF_HOST_DEVICE Int padded_width() const { return (out_width - 1) * scale + kernel_size; }
  // Position in the image of the first padded row and column.
  DDRF_HOST_DEVICE Int origin() const { return offset - kernel_size / 2; }
};

// Which pixel of an axis of `size` pixels stands at `position`, which may lie outside; -1: none.
DDRF_HOST_DEVICE int64_t source_index(int64_t position, int64_t size, Padding padding) {
  if (position >= 0 && position < size) return position;
  switch (padding) {
    case Padding::kZeros:
      return -1;
    case Padding::kCircular:
      position %= size;
      return position < 0 ? position + size : position;
    case Padding::kReflect:
      position = position < 0 ? -position : 2 * (size - 1) - position;
      [[fallthrough]];
    default:  // and what one reflection does not bring back
      return position < 0 ? 0 : position < size ? position : size - 1;
  }
}

// Calls visit(position) for every position in [low, high] that shows pixel `index`, in rising order
// but for reflections: what the adjoint of padding sums. One reflection is enough (radius < size).
template <class Visit>
DDRF_HOST_DEVICE void for_each_shown(int64_t index, int64_t size, int64_t low, int64_t high,
                                     Padding padding, const Visit& visit) {
  const auto visit_inside = [&](int64_t position) {
    if (position >= low && position <= high) visit(position);
  };
  if (padding == Padding::kCircular) {
    const int64_t turns = index > low ? (index - low) / size : 0;
    for (int64_t position = index - turns * size; position <= high; position += size)
      visit_inside(position);
  } else if (padding == Padding::kReplicate) {
    const int64_t first = index == 0 ? low : index, last = index == size - 1 ? high : index;
    for (int64_t position = first; position <= last; ++position) visit_inside(position);
  } else {
    visit_inside(index);
    if (padding == Padding::kReflect) {
      if (index > 0) visit_inside(-index);
      if (index < size - 1) visit_inside(2 * (size - 1) - index);
    }
  }
}

// Linear interpolation between two neighbouring grid lines: (1 - fraction) g[low] + fraction
// g[high].
template <class Real>
struct GridPlace {
  int64_t low, high;
  Real fraction;
};

// The grid's first and last lines lie on the first and last pixel (align_corners). In integers, so
// that the place is exact whatever the size.
template <class Real>
DDRF_HOST_DEVICE GridPlace<Real> grid_place(int64_t position, int64_t size, int64_t lines) {
  if (size <= 1) return {0, 0, Real(0)};
  const int64_t numerator = position * (lines - 1);
  const int64_t low = numerator / (size - 1);
  const Real fraction =
      static_cast<Real>(numerator - low * (size - 1)) / static_cast<Real>(size - 1);
  return {low, low + 1 < lines ? low + 1 : lines - 1, fraction};
}

}  // namespace ddrf_fast

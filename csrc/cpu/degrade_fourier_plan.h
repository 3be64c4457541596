// Whether a blur runs through the Fourier transform, and on which tiles: by shapes alone, compiled
// once, free of torch. degrade_fourier.h holds the loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <numbers>
#include <optional>
#include <string>
#include <vector>

#include "cpu/degrade_plan.h"

namespace ddrf_fast {

// A one-dimensional transform as passes of few numbers each, with their twiddle factors.
template <class T>
struct Fft {
  int64_t length;
  std::vector<int> radices;  // 3, 4, 5, 8
  std::vector<T> twiddles;   // [pass][group][radix - 1] times real and imaginary part

  explicit Fft(int64_t length) : length(length) {
    int64_t rest = length;
    for (const int radix : {5, 3}) {
      for (; rest % radix == 0; rest /= radix) radices.push_back(radix);
    }
    // 4 and 8 only: what is left is at least 16.
    int twos = 0;
    for (; rest > 1; rest /= 2) ++twos;
    for (; twos % 3 != 0; twos -= 2) radices.push_back(4);
    for (; twos > 0; twos -= 3) radices.push_back(8);
    int64_t remaining = length;
    for (const int radix : radices) {
      const int64_t groups = remaining / radix;
      for (int64_t group = 0; group < groups; ++group) {
        for (int i = 1; i < radix; ++i) {
          const double angle = -2 * std::numbers::pi * static_cast<double>(group * i) / remaining;
          twiddles.push_back(static_cast<T>(std::cos(angle)));
          twiddles.push_back(static_cast<T>(std::sin(angle)));
        }
      }
      remaining = groups;
    }
  }
};

// The output is cut into tiles, in each axis `count` of `sites` outputs. A tile reads `length`
// padded pixels; `sites` of their sums do not wrap around.
struct FourierAxis {
  int64_t length = 0, sites = 0, count = 0;
};

struct FourierTiles {
  FourierAxis y, x;

  int64_t count() const { return y.count * x.count; }
  int64_t area() const { return y.length * x.length; }
};

// Every vector of every instruction set divides it: the tiles do not depend on the processor.
constexpr int64_t kFourierStep = 16;
constexpr int64_t kLongestFourier = 320;

inline std::vector<FourierAxis> fourier_axes(const DegradeProblem& p, int64_t outputs) {
  std::vector<FourierAxis> axes;
  for (int64_t length = kFourierStep; length <= kLongestFourier; length += kFourierStep) {
    int64_t rest = length;
    for (const int radix : {2, 3, 5}) {
      for (; rest % radix == 0;) rest /= radix;
    }
    if (rest > 1 || length % (p.scale * kFourierStep) != 0 || length < p.kernel_size) continue;
    const int64_t sites = (length - p.kernel_size) / p.scale + 1;
    axes.push_back({length, std::min(sites, outputs), divide_up(outputs, sites)});
    if (sites >= outputs) break;
  }
  return axes;
}

// The time of a transform of that many numbers, in multiplications by a whole vector for one number.
inline double fft_cost(double area) { return area * (2.0 + 0.9 * std::log2(area)); }

// What a pass costs in all; tiles are transformed in pairs.
inline double fourier_cost(const DegradeProblem& p, const FourierTiles& tiles, bool backward) {
  const double m = p.num_kernels, c = p.channels, area = tiles.area();
  const double small = area / static_cast<double>(p.scale * p.scale);
  const double pairs = static_cast<double>(divide_up(tiles.count(), 2));
  const bool uniform = p.weights_at == WeightsAt::kSample;
  if (uniform) {
    const double pair = backward ? 2 * fft_cost(area) + fft_cost(small) + 8 * area
                                 : fft_cost(area) + fft_cost(small) + 4 * area;
    return pairs * c * pair + (backward ? 2 : 1) * fft_cost(area);
  }
  const double per_kernel = backward ? 2 * fft_cost(small) + 14 * area : fft_cost(small) + 5 * area;
  const double whole = backward ? 2 * c + m : c;
  const double bank = p.kernels_per_sample ? m : m / 4;
  return pairs * (m * c * per_kernel + whole * fft_cost(area)) + bank * fft_cost(area);
}

inline double direct_cost(const DegradeProblem& p, bool backward) {
  const double m = p.num_kernels, c = p.channels, taps = p.num_taps();
  const double sites = static_cast<double>(p.out_height) * p.out_width;
  if (p.weights_at == WeightsAt::kSample) return sites * taps * c * (backward ? 2.0 : 1.0);
  return sites * taps * (backward ? 3 * m + 3 * c : 0.7 * m + c);
}

// The tiles of the least cost, where that is less than the direct sum's.
inline std::optional<FourierTiles> choose_fourier(const DegradeProblem& p, bool backward) {
  std::optional<FourierTiles> best;
  double least = direct_cost(p, backward);
  if (const char* x = std::getenv("DDRF_X")) least *= std::atof(x);  // TEMPORARY
  const std::vector<FourierAxis> columns = fourier_axes(p, p.out_width);
  for (const FourierAxis& y : fourier_axes(p, p.out_height)) {
    for (const FourierAxis& x : columns) {
      const FourierTiles tiles{y, x};
      const double cost = fourier_cost(p, tiles, backward);
      if (const char* n = std::getenv("DDRF_N")) if (y.length != std::atoi(n) || x.length != std::atoi(n)) continue;  // TEMPORARY
      if (cost >= least) continue;
      least = cost;
      best = tiles;
    }
  }
  return best;
}

}  // namespace ddrf_fast

// Whether a blur runs through the Fourier transform, and on which tiles: by shapes alone, compiled
// once, free of torch. degrade_fourier.h holds the loops.
#pragma once

#include <cmath>
#include <cstdint>
#include <map>
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

  // The caller's thread keeps those it has made: there are few lengths, and many sines to each.
  static const Fft& of(int64_t length) {
    static thread_local std::map<int64_t, Fft> made;
    return made.try_emplace(length, length).first->second;
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

// Estimates in picoseconds of a core with AVX-512, fitted to measurements; only their ratios count,
// and other processors are faster or slower at all of it.
inline double fft_cost(double area) { return 60 * area * std::log2(area); }

inline double fourier_cost(const DegradeProblem& p, const FourierTiles& tiles, bool backward) {
  const double m = p.num_kernels, c = p.channels, area = tiles.area();
  const double sites = area / static_cast<double>(p.scale * p.scale);
  const double whole = fft_cost(area), small = fft_cost(sites);
  double cost, tasks;
  if (p.weights_at == WeightsAt::kSample) {
    tasks = static_cast<double>(divide_up(tiles.count() * p.channels, 2));
    cost = backward ? tasks * (2 * whole + small + 1900 * area) + 1.6 * whole
                    : tasks * (whole + small + 600 * area) + 0.6 * whole;
  } else {
    // A bank that the batch shares is transformed once; a training batch has a few samples.
    const double bank = (p.kernels_per_sample ? 0.6 : 0.15) * m * whole;
    tasks = static_cast<double>(divide_up(tiles.count(), 2));
    const double kernel =
        backward ? 2 * small + 1100 * area + 100 * sites : small + 230 * area + 100 * sites;
    const double channel = backward ? 2 * whole + 800 * area : whole + 400 * area;
    cost = tasks * (m * c * kernel + c * channel) + bank + (backward ? m * whole : 0);
  }
  const double out_of_cache = 1 + area / 100e3;
  const double one_thread_waits = 2 * std::ceil(tasks / 2) / tasks;
  return cost * out_of_cache * one_thread_waits;
}

inline double direct_cost(const DegradeProblem& p, bool backward) {
  const double m = p.num_kernels, c = p.channels;
  const double products = static_cast<double>(p.num_taps()) * p.out_height * p.out_width;
  if (p.weights_at == WeightsAt::kSample) return products * c * (backward ? 50 : 20);
  return products * (backward ? 30 * m + 80 * c + 60 : 8 * m + 22 * c);
}

// The tiles of the least cost, where that is less than the direct sum's.
inline std::optional<FourierTiles> choose_fourier(const DegradeProblem& p, bool backward) {
  std::optional<FourierTiles> best;
  double least = direct_cost(p, backward);
  const std::vector<FourierAxis> columns = fourier_axes(p, p.out_width);
  for (const FourierAxis& y : fourier_axes(p, p.out_height)) {
    for (const FourierAxis& x : columns) {
      const FourierTiles tiles{y, x};
      const double cost = fourier_cost(p, tiles, backward);
      if (cost >= least) continue;
      least = cost;
      best = tiles;
    }
  }
  return best;
}

// How a pass runs, in words; for `ddrf_fast.explain`.
inline std::string degrade_plan(const DegradeProblem& p, bool backward) {
  const auto text = [](int64_t a, int64_t b) {
    return std::to_string(a) + "x" + std::to_string(b);
  };
  const bool uniform = p.weights_at == WeightsAt::kSample;
  const std::string mixed = uniform ? "one kernel mixed for each sample, " : "";
  if (const auto tiles = choose_fourier(p, backward)) {
    return mixed + "Fourier transform of " + text(tiles->y.count, tiles->x.count) + " tiles of " +
           text(tiles->y.length, tiles->x.length) + " for " + text(tiles->y.sites, tiles->x.sites) +
           " outputs each";
  }
  if (uniform) return mixed + "summed directly at the sites";
  return "kernels mixed in registers at each site and summed directly, all channels at once";
}

}  // namespace ddrf_fast

// Counter-based Gaussian noise: Philox 4x32-10 and Box-Muller, one source for CPU and CUDA.
//
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3 (SC 2011). A pixel's
// noise depends on the seed, its sample id, its channel and its place in the output alone:
//
//   key = the seed's two halves;  counter = (x / 4, y, c, sample id);  lane = x % 4
//   u1 = ((r_a >> 8) + 1) 2^-24 in (0, 1],  u2 = (r_b >> 8) 2^-24 in [0, 1)
//   lanes 0 and 1 from (r0, r1), lanes 2 and 3 from (r2, r3): sqrt(-2 ln u1) cos|sin(2 pi u2)
//
// Everything is free of branches and of library calls in float32, so that loops over it vectorise.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define DDRF_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define DDRF_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace ddrf_fast {

struct PhiloxKey {
  uint32_t low, high;
};

DDRF_HOST_DEVICE PhiloxKey philox_key(int64_t seed) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
}

DDRF_HOST_DEVICE uint32_t multiply_high(uint32_t a, uint32_t b) {
  return static_cast<uint32_t>((static_cast<uint64_t>(a) * b) >> 32);
}

constexpr int kPhiloxRounds = 10;
constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// In place.
DDRF_HOST_DEVICE void philox4x32(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3,
                                 PhiloxKey key) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint32_t high0 = multiply_high(kPhiloxMultiplier0, c0), low0 = kPhiloxMultiplier0 * c0;
    const uint32_t high1 = multiply_high(kPhiloxMultiplier1, c2), low1 = kPhiloxMultiplier1 * c2;
    c0 = high1 ^ c1 ^ key.low;
    c1 = low1;
    c2 = high0 ^ c3 ^ key.high;
    c3 = low0;
    key.low += kPhiloxWeyl0;
    key.high += kPhiloxWeyl1;
  }
}

template <class To, class From>
DDRF_HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// ln(x) of a positive normal float. x = 2^e (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), where f is
// exact: close to x = 1 the result keeps its relative accuracy (the series of FreeBSD's e_logf.c).
DDRF_HOST_DEVICE float log_positive(float x) {
  constexpr uint32_t kSqrtHalf = 0x3F3504F3u;
  const uint32_t shifted = bits_as<uint32_t>(x) + (0x3F800000u - kSqrtHalf);
  const float exponent = static_cast<float>(static_cast<int32_t>(shifted >> 23) - 127);
  const float f = bits_as<float>((shifted & 0x007FFFFFu) + kSqrtHalf) - 1.0f;
  const float s = f / (2.0f + f);
  const float z = s * s;
  const float w = z * z;
  const float series =
      z * (0.66666662693f + w * 0.28498786688f) + w * (0.40000972152f + w * 0.24279078841f);
  const float half_square = 0.5f * f * f;
  constexpr float kLn2High = 6.9313812256e-01f, kLn2Low = 9.0580006145e-06f;
  return exponent * kLn2High +
         (f - (half_square - (s * (half_square + series) + exponent * kLn2Low)));
}

// cos and sin of 2 pi u. The quarter turns are taken off exactly; what is left lies within an
// eighth of a turn (the polynomials of Cephes' sinf.c).
DDRF_HOST_DEVICE void cos_sin_turns(float u, float& cosine, float& sine) {
  const float quarters = u * 4.0f;
  const int32_t quadrant = static_cast<int32_t>(quarters + 0.5f);
  const float angle = (quarters - static_cast<float>(quadrant)) * 1.57079632679f;
  const float z = angle * angle;
  const float near_sine =
      angle + angle * z * (-1.6666654611e-1f + z * (8.3321608736e-3f + z * -1.9515295891e-4f));
  const float near_cosine =
      1.0f - 0.5f * z +
      z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const bool odd = quadrant & 1;
  const uint32_t c = bits_as<uint32_t>(odd ? near_sine : near_cosine);
  const uint32_t s = bits_as<uint32_t>(odd ? near_cosine : near_sine);
  cosine = bits_as<float>(c ^ (static_cast<uint32_t>((quadrant + 1) & 2) << 30));
  sine = bits_as<float>(s ^ (static_cast<uint32_t>(quadrant & 2) << 30));
}

// Two independent standard normal numbers from two words of random bits.
DDRF_HOST_DEVICE void box_muller(uint32_t a, uint32_t b, float& even, float& odd) {
  constexpr float kUnit = 5.9604644775390625e-08f;  // 2^-24
  const float u1 = static_cast<float>(static_cast<int32_t>((a >> 8) + 1)) * kUnit;
  const float u2 = static_cast<float>(static_cast<int32_t>(b >> 8)) * kUnit;
  const float radius = sqrtf(-2.0f * log_positive(u1));
  float cosine, sine;
  cos_sin_turns(u2, cosine, sine);
  even = radius * cosine;
  odd = radius * sine;
}

DDRF_HOST_DEVICE void box_muller(uint32_t a, uint32_t b, double& even, double& odd) {
  constexpr double kUnit = 5.9604644775390625e-08;
  const double radius = sqrt(-2.0 * log(static_cast<double>((a >> 8) + 1) * kUnit));
  const double angle = 6.283185307179586476925 * (static_cast<double>(b >> 8) * kUnit);
  even = radius * cos(angle);
  odd = radius * sin(angle);
}

}  // namespace ddrf_fast

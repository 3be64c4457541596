// Vectors of the instruction set this header is compiled for (see common/capability.h): loads and
// stores that convert to and from the accumulation type, rows, transposition, sums.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "common/dtype.h"
#include "cpu/dynamic_conv.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define DDRF_INLINE inline __attribute__((always_inline))

namespace ddrf_fast::DDRF_CAPABILITY {

// An alias template may not carry the attribute itself.
template <class Element, int kBytes>
struct VectorType {
  typedef Element type __attribute__((vector_size(kBytes)));
};

template <class Acc>
using Vector = typename VectorType<Acc, DDRF_VECTOR_BYTES>::type;

template <class Acc>
inline constexpr int kLanes = DDRF_VECTOR_BYTES / sizeof(Acc);

// The registers of AVX-512 (32 instead of 16) allow larger blocks.
inline constexpr bool kManyRegisters = DDRF_VECTOR_BYTES == 64;

using Words = VectorType<uint32_t, DDRF_VECTOR_BYTES>::type;
using Halfwords = VectorType<uint16_t, DDRF_VECTOR_BYTES / 2>::type;

// The pair of two numbers that are bfloat16.
inline float pair_of(float first, float second) {
  uint32_t low, high;
  std::memcpy(&low, &first, sizeof(low));
  std::memcpy(&high, &second, sizeof(high));
  const uint32_t bits = low >> 16 | high;
  std::memcpy(&first, &bits, sizeof(first));
  return first;
}

// Whether products of pairs run on tiles of them.
#ifdef DDRF_AMX
inline constexpr bool kPairTiles = true;
#else
inline constexpr bool kPairTiles = false;
#endif

// Whether matrix products run on pairs of bfloat16, each held in the bits of a float.
#ifdef DDRF_AVX512_BF16
template <class Scalar>
inline constexpr bool kPairs = std::is_same_v<Scalar, c10::BFloat16>;

// sum + both products of the pairs
DDRF_INLINE Vector<float> add_dots(Vector<float> sum, Vector<float> a, Vector<float> b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// The pair at `source` in all lanes.
DDRF_INLINE Vector<float> same_pairs(const void* source) {
  int32_t bits;
  std::memcpy(&bits, source, sizeof(bits));
  return (Vector<float>)_mm512_set1_epi32(bits);
}

// The pairs of the lanes of both, rounded.
DDRF_INLINE Vector<float> paired(Vector<float> first, Vector<float> second) {
  const auto index = []<short... kIndex>(std::integer_sequence<short, kIndex...>) {
    return VectorType<short, 64>::type{(kIndex / 2 + kIndex % 2 * 16)...};
  }(std::make_integer_sequence<short, 32>());
  const auto halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  return (Vector<float>)_mm512_permutexvar_epi16((__m512i)index, halves);
}
#else
template <class Scalar>
inline constexpr bool kPairs = false;
#endif

// sum + a * b of entries of matrix products.
template <class Scalar, class Acc = accumulate_t<Scalar>>
DDRF_INLINE Vector<Acc> add_product(Vector<Acc> sum, Vector<Acc> a, Vector<Acc> b) {
  if constexpr (kPairs<Scalar>) {
    return add_dots(sum, a, b);
  } else {
    return sum + a * b;
  }
}

// The entry of a matrix product at `source` in all lanes.
template <class Scalar, class Acc = accumulate_t<Scalar>>
DDRF_INLINE Vector<Acc> same_entries(const Acc* source) {
  if constexpr (kPairs<Scalar>) {
    return same_pairs(source);
  } else {
    return *source - Vector<Acc>{};
  }
}

// body(std::integral_constant<int, 0>()), body(... 1 ...), up to kCount. Unlike an unrolled loop it
// leaves no doubt that an array indexed by the constants can live in registers.
template <int kCount, class Body>
DDRF_INLINE void for_each_constant(const Body& body) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, kIndex>()), ...);
  }(std::make_integer_sequence<int, kCount>());
}

// Calls body(size, first) for groups of 8, 4, 2 and 1 that make up [0, number), of at most `most`;
// the size is a constant.
template <class Body>
inline void in_groups(int64_t number, int64_t most, const Body& body) {
  int64_t first = 0;
  const auto take = [&]<int kSize>(std::integral_constant<int, kSize> size) {
    for (; kSize <= most && first + kSize <= number; first += kSize) body(size, first);
  };
  take(std::integral_constant<int, 8>());
  take(std::integral_constant<int, 4>());
  take(std::integral_constant<int, 2>());
  take(std::integral_constant<int, 1>());
}

template <class Scalar>
DDRF_INLINE Vector<accumulate_t<Scalar>> load_vector(const Scalar* source) {
  using Acc = accumulate_t<Scalar>;
  Vector<Acc> result;
  if constexpr (std::is_same_v<Scalar, Acc>) {
    std::memcpy(&result, source, sizeof(result));
  } else if constexpr (std::is_same_v<Scalar, c10::BFloat16>) {
    Halfwords bits;
    std::memcpy(&bits, source, sizeof(bits));
    const Words words = __builtin_convertvector(bits, Words) << 16;
    std::memcpy(&result, &words, sizeof(result));
  } else {
#if DDRF_VECTOR_BYTES == 64
    result =
        _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif DDRF_VECTOR_BYTES == 32
    result = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
    for (int i = 0; i < kLanes<Acc>; ++i) result[i] = source[i];
#endif
  }
  return result;
}

template <class Scalar>
DDRF_INLINE void store_vector(Scalar* target, Vector<accumulate_t<Scalar>> value) {
  using Acc = accumulate_t<Scalar>;
  if constexpr (std::is_same_v<Scalar, Acc>) {
    std::memcpy(target, &value, sizeof(value));
  } else if constexpr (std::is_same_v<Scalar, c10::BFloat16>) {
#ifdef DDRF_AVX512_BF16
    const __m256bh bits = _mm512_cvtneps_pbh(value);
#else
    Words words;
    std::memcpy(&words, &value, sizeof(words));
    const Words rounded = (words + ((words >> 16) & 1) + 0x7fff) >> 16;  // to nearest, ties to even
    const Words quiet_nan = rounded - rounded + 0x7fc0;
    const Halfwords bits = __builtin_convertvector(value == value ? rounded : quiet_nan, Halfwords);
#endif
    std::memcpy(target, &bits, sizeof(bits));
  } else {
#if DDRF_VECTOR_BYTES == 64
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(target),
        _mm512_maskz_cvtps_ph(0xffff, value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif DDRF_VECTOR_BYTES == 32
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target),
                     _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
    for (int i = 0; i < kLanes<Acc>; ++i) target[i] = static_cast<Scalar>(value[i]);
#endif
  }
}

// The lanes inside an image of `width` columns of a vector of kCount that begins at a column.
template <int kCount>
DDRF_INLINE uint32_t lanes_inside(int64_t column, int64_t width) {
  const int64_t low = std::clamp<int64_t>(-column, 0, kCount);
  const int64_t high = std::clamp<int64_t>(width - column, 0, kCount);
  return ((1u << high) - 1) & ~((1u << low) - 1);
}

// Which lanes of a vector are meant: bits or, with AVX2, a vector that is all ones in them.
#if DDRF_VECTOR_BYTES == 32
using LaneMask = __m256i;
DDRF_INLINE LaneMask lane_mask(uint32_t lanes) {
  const __m256i bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_cmpeq_epi32(bits, _mm256_and_si256(bits, _mm256_set1_epi32(lanes)));
}
#else
using LaneMask = uint32_t;
DDRF_INLINE LaneMask lane_mask(uint32_t lanes) { return lanes; }
#endif

// Whether there are loads that leave the memory of some lanes alone.
template <class Scalar>
inline constexpr bool kMaskedLoads =
    DDRF_VECTOR_BYTES == 64 || (DDRF_VECTOR_BYTES == 32 && std::is_same_v<Scalar, float>);

#if DDRF_VECTOR_BYTES == 64
// Those of the lanes at source, source + 1, ... that the mask has, the rest zero; memory of the
// rest is not touched.
template <class Scalar>
DDRF_INLINE Vector<accumulate_t<Scalar>> load_masked(const Scalar* source, LaneMask mask) {
  if constexpr (std::is_same_v<Scalar, float>) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>(mask), source);
  } else if constexpr (std::is_same_v<Scalar, double>) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(mask), source);
  } else {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), source);
    if constexpr (std::is_same_v<Scalar, c10::BFloat16>) {
      const Words words = (Words)_mm512_slli_epi32(_mm512_maskz_cvtepu16_epi32(0xffff, bits), 16);
      Vector<float> result;
      std::memcpy(&result, &words, sizeof(result));
      return result;
    } else {
      return _mm512_maskz_cvtph_ps(0xffff, bits);
    }
  }
}

// The lanes that the mask has, the rest zero.
template <class Acc>
DDRF_INLINE Vector<Acc> masked(Vector<Acc> value, LaneMask mask) {
  if constexpr (std::is_same_v<Acc, float>) {
    return _mm512_maskz_mov_ps(static_cast<__mmask16>(mask), value);
  } else {
    return _mm512_maskz_mov_pd(static_cast<__mmask8>(mask), value);
  }
}

// Stores the lanes that the mask has.
template <class Scalar>
DDRF_INLINE void store_masked(Scalar* target, Vector<accumulate_t<Scalar>> value, LaneMask mask) {
  if constexpr (std::is_same_v<Scalar, float>) {
    _mm512_mask_storeu_ps(target, static_cast<__mmask16>(mask), value);
  } else if constexpr (std::is_same_v<Scalar, double>) {
    _mm512_mask_storeu_pd(target, static_cast<__mmask8>(mask), value);
  } else {
    __m256i bits;
    store_vector(reinterpret_cast<Scalar*>(&bits), value);
    _mm256_mask_storeu_epi16(target, static_cast<__mmask16>(mask), bits);
  }
}
#elif DDRF_VECTOR_BYTES == 32
DDRF_INLINE Vector<float> load_masked(const float* source, LaneMask mask) {
  return _mm256_maskload_ps(source, mask);
}

template <class Acc>
DDRF_INLINE Vector<float> masked(Vector<float> value, LaneMask mask) {
  return _mm256_and_ps(value, _mm256_castsi256_ps(mask));
}
#endif

// The first `count` lanes, 0 < count <= kLanes, the rest zero.
template <class Scalar>
DDRF_INLINE Vector<accumulate_t<Scalar>> load_partial(const Scalar* source, int64_t count) {
  if constexpr (kMaskedLoads<Scalar>) {
    return load_masked(source, lane_mask((1u << count) - 1));
  } else {
    using Acc = accumulate_t<Scalar>;
    Scalar lanes[kLanes<Acc>] = {};
    for (int64_t i = 0; i < count; ++i) lanes[i] = source[i];
    return load_vector(lanes);
  }
}

// Stores the first `count` lanes, as many as load_partial.
template <class Scalar>
DDRF_INLINE void store_partial(Scalar* target, Vector<accumulate_t<Scalar>> value, int64_t count) {
#if DDRF_VECTOR_BYTES == 64
  store_masked(target, value, (1u << count) - 1);
#else
#if DDRF_VECTOR_BYTES == 32
  // Two halves that may overlap: masked stores are slow on some processors.
  if constexpr (std::is_same_v<Scalar, float>) {
    if (count == kLanes<float>) return store_vector(target, value);
    if (count >= 4) {
      _mm_storeu_ps(target, _mm256_castps256_ps128(value));
      const __m256i lanes = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(count) - 4),
                                             _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
      const __m256 last = _mm256_permutevar8x32_ps(value, lanes);
      _mm_storeu_ps(target + count - 4, _mm256_castps256_ps128(last));
      return;
    }
  }
#endif
  Scalar lanes[kLanes<accumulate_t<Scalar>>];
  store_vector(lanes, value);
  for (int64_t i = 0; i < count; ++i) target[i] = lanes[i];
#endif
}

// The value with all lanes from `count` on set to zero.
template <class Acc>
DDRF_INLINE Vector<Acc> first_lanes(Vector<Acc> value, int64_t count) {
  if (count >= kLanes<Acc>) return value;
  if constexpr (kMaskedLoads<Acc>) {
    return masked<Acc>(value, lane_mask((1u << count) - 1));
  } else {
    Acc lanes[kLanes<Acc>];
    store_vector(lanes, value);
    return load_partial(lanes, count);
  }
}

template <class Scalar>
inline void load_row(accumulate_t<Scalar>* target, const Scalar* source, int64_t count) {
  constexpr int kStep = kLanes<accumulate_t<Scalar>>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store_vector(target + i, load_vector(source + i));
  if (i < count) store_partial(target + i, load_partial(source + i, count - i), count - i);
}

template <class Scalar>
inline void store_row(Scalar* target, const accumulate_t<Scalar>* source, int64_t count) {
  constexpr int kStep = kLanes<accumulate_t<Scalar>>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) store_vector(target + i, load_vector(source + i));
  if (i < count) store_partial(target + i, load_partial(source + i, count - i), count - i);
}

// target += source
template <class Scalar>
inline void add_row(Scalar* target, const accumulate_t<Scalar>* source, int64_t count) {
  constexpr int kStep = kLanes<accumulate_t<Scalar>>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    store_vector(target + i, load_vector(target + i) + load_vector(source + i));
  }
  if (i == count) return;
  const int64_t left = count - i;
  store_partial(target + i, load_partial(target + i, left) + load_partial(source + i, left), left);
}

// For kSamples targets and rows of factors:
// target = sum over k of factors[k] * (the row at rows + k * stride)
// Every row is read once. What will be read next lies `ahead`; it is fetched to the second level of
// the cache, as in the first the rows of all k often fall on the same few places.
template <int kSamples, class Scalar>
inline void combine_rows(accumulate_t<Scalar>* target, int64_t target_stride,
                         const accumulate_t<Scalar>* factors, int64_t factor_stride, int64_t number,
                         const Scalar* rows, int64_t stride, int64_t ahead, int64_t count) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  constexpr int kVectors = std::clamp((kManyRegisters ? 16 : 8) / kSamples, 1, 4);
  int64_t i = 0;
  for (; i + kVectors * kStep <= count; i += kVectors * kStep) {
    Vector<Acc> sums[kSamples][kVectors] = {};
    const Scalar* row = rows + i;
    for (int64_t k = 0; k < number; ++k, row += stride) {
      Vector<Acc> values[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        values[v] = load_vector(row + v * kStep);
        if (ahead != 0) __builtin_prefetch(row + v * kStep + ahead, 0, 2);
      }
#pragma GCC unroll 8
      for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          sums[s][v] += values[v] * factors[s * factor_stride + k];
        }
      }
    }
#pragma GCC unroll 8
    for (int s = 0; s < kSamples; ++s) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        store_vector(target + s * target_stride + i + v * kStep, sums[s][v]);
      }
    }
  }
  for (; i < count; i += kStep) {
    const bool whole = i + kStep <= count;
    Vector<Acc> sums[kSamples] = {};
    const Scalar* row = rows + i;
    for (int64_t k = 0; k < number; ++k, row += stride) {
      const Vector<Acc> value = whole ? load_vector(row) : load_partial(row, count - i);
#pragma GCC unroll 8
      for (int s = 0; s < kSamples; ++s) sums[s] += value * factors[s * factor_stride + k];
    }
#pragma GCC unroll 8
    for (int s = 0; s < kSamples; ++s) {
      Acc* const to = target + s * target_stride + i;
      if (whole) {
        store_vector(to, sums[s]);
      } else {
        store_partial(to, sums[s], count - i);
      }
    }
  }
}

template <class Scalar>
inline void combine_rows(accumulate_t<Scalar>* target, const accumulate_t<Scalar>* factors,
                         int64_t number, const Scalar* rows, int64_t stride, int64_t count) {
  combine_rows<1>(target, 0, factors, 0, number, rows, stride, 0, count);
}

#ifdef DDRF_AVX512_BF16
// Numbers of 16 bit, those of the second as the upper halves.
DDRF_INLINE Vector<float> joined(__m256i first, __m256i second) {
  return (Vector<float>)_mm512_or_si512(_mm512_cvtepu16_epi32(first),
                                        _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16));
}

// The pairs of what lies at both places.
DDRF_INLINE Vector<float> load_pairs(const c10::BFloat16* first, const c10::BFloat16* second) {
  return joined(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(first)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second)));
}

// Of the lanes that each mask has; the rest is zero and its memory is not touched.
DDRF_INLINE Vector<float> load_pairs(const c10::BFloat16* first, const c10::BFloat16* second,
                                     uint32_t first_lanes, uint32_t second_lanes) {
  return joined(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes), first),
                _mm256_maskz_loadu_epi16(static_cast<__mmask16>(second_lanes), second));
}

// target[i] = the pair of first[i] and second[i], of which the latter has `partners` numbers; may
// be done in place.
inline void pair_rows(float* target, const float* first, const float* second, int64_t count,
                      int64_t partners) {
  constexpr int kStep = kLanes<float>;
  int64_t i = 0;
  for (; i + kStep <= std::min(count, partners); i += kStep) {
    store_vector(target + i, paired(load_vector(first + i), load_vector(second + i)));
  }
  for (; i < count; i += kStep) {
    const uint32_t lanes = lanes_inside<kStep>(i, count);
    const uint32_t both = lanes_inside<kStep>(i, partners);
    store_masked(target + i, paired(load_masked(first + i, lanes), load_masked(second + i, both)),
                 lanes);
  }
}

// For kSamples rows of factors: combine_rows of 32 entries, rounded, in the order of unpacked
// halves. The factors are pairs, those of the rows 2k and 2k + 1; what is wanted next lies `ahead`.
template <int kSamples>
DDRF_INLINE void combine_entries(const float* factors, int64_t factor_stride, int64_t number,
                                 const c10::BFloat16* rows, int64_t stride, int64_t ahead,
                                 uint32_t lanes, __m512i (&result)[kSamples]) {
  Vector<float> sums[kSamples][2] = {};
  for (int64_t k = 0; k < number; k += 2) {
    const __m512i even = _mm512_maskz_loadu_epi16(lanes, rows + k * stride);
    const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < number ? lanes : 0,
                                                 k + 1 < number ? rows + (k + 1) * stride : rows);
    // To the second level: in the first the rows of all kernels often fall on the same places.
    __builtin_prefetch(rows + k * stride + ahead, 0, 2);
    __builtin_prefetch(rows + (k + 1) * stride + ahead, 0, 2);
    const auto low = (Vector<float>)_mm512_unpacklo_epi16(even, odd);
    const auto high = (Vector<float>)_mm512_unpackhi_epi16(even, odd);
#pragma GCC unroll 8
    for (int s = 0; s < kSamples; ++s) {
      const Vector<float> factor = same_pairs(factors + s * factor_stride + k / 2);
      sums[s][0] = add_dots(sums[s][0], low, factor);
      sums[s][1] = add_dots(sums[s][1], high, factor);
    }
  }
#pragma GCC unroll 8
  for (int s = 0; s < kSamples; ++s) {
    result[s] = (__m512i)_mm512_cvtne2ps_pbh((__m512)sums[s][1], (__m512)sums[s][0]);
  }
}

// For kSamples targets: combine_rows of two sets of rows, as pairs.
template <int kSamples>
inline void combine_pairs(float* target, int64_t target_stride, const float* factors,
                          int64_t factor_stride, int64_t number, const c10::BFloat16* first,
                          const c10::BFloat16* second, int64_t stride, int64_t ahead, int64_t count,
                          int64_t partners) {
  // Unpacking takes 4 numbers of each 8 to the low and 4 to the high half: where number i, and its
  // partner, then lie among the numbers of both.
  const auto pairs_from = []<short... kIndex>(std::integer_sequence<short, kIndex...>, short from) {
    const auto place = [](int i) { return i / 8 * 4 + i % 4 + (i / 4 % 2) * 16; };
    return (__m512i)VectorType<short, 64>::type{
        static_cast<short>(place(from + kIndex / 2) + kIndex % 2 * 32)...};
  };
  constexpr auto kIndices = std::make_integer_sequence<short, 32>();
  const __m512i low = pairs_from(kIndices, 0), high = pairs_from(kIndices, 16);
  for (int64_t i = 0; i < count; i += 32) {
    const auto mask = [i](int64_t end) {
      return static_cast<uint32_t>((uint64_t{1} << std::clamp<int64_t>(end - i, 0, 32)) - 1);
    };
    __m512i firsts[kSamples], seconds[kSamples];
    combine_entries<kSamples>(factors, factor_stride, number, first + i, stride, ahead, mask(count),
                              firsts);
    combine_entries<kSamples>(factors, factor_stride, number, second + i, stride, ahead,
                              mask(partners), seconds);
#pragma GCC unroll 8
    for (int s = 0; s < kSamples; ++s) {
      float* const to = target + s * target_stride + i;
      const __m512i lower = _mm512_permutex2var_epi16(firsts[s], low, seconds[s]);
      const __m512i upper = _mm512_permutex2var_epi16(firsts[s], high, seconds[s]);
      store_masked(to, (Vector<float>)lower, mask(count) & 0xffff);
      store_masked(to + 16, (Vector<float>)upper, mask(count) >> 16);
    }
  }
}
#endif

// target += factor * source
template <class Scalar>
inline void add_scaled_row(accumulate_t<Scalar>* target, accumulate_t<Scalar> factor,
                           const Scalar* source, int64_t count) {
  constexpr int kStep = kLanes<accumulate_t<Scalar>>;
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    store_vector(target + i, load_vector(target + i) + factor * load_vector(source + i));
  }
  for (; i < count; ++i) target[i] += factor * load_as_accumulate(source + i);
}

template <class Acc, int kHalf, size_t... kIndex>
DDRF_INLINE Vector<Acc> add_rotated(Vector<Acc> value, std::index_sequence<kIndex...>) {
  constexpr int kSize = sizeof...(kIndex);
  return value +
         __builtin_shufflevector(value, value, static_cast<int>((kIndex + kHalf) % kSize)...);
}

// The sum of all lanes, by halves.
template <class Acc, int kHalf = kLanes<Acc> / 2>
DDRF_INLINE Acc sum_lanes(Vector<Acc> value) {
  value = add_rotated<Acc, kHalf>(value, std::make_index_sequence<kLanes<Acc>>());
  if constexpr (kHalf > 1) {
    return sum_lanes<Acc, kHalf / 2>(value);
  } else {
    return value[0];
  }
}

template <class Scalar>
inline accumulate_t<Scalar> dot_rows(const accumulate_t<Scalar>* a, const Scalar* b,
                                     int64_t count) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    sums[0] += load_vector(a + i) * load_vector(b + i);
    sums[1] += load_vector(a + i + kStep) * load_vector(b + i + kStep);
  }
  for (; i + kStep <= count; i += kStep) sums[0] += load_vector(a + i) * load_vector(b + i);
  if (i < count) sums[1] += load_partial(a + i, count - i) * load_partial(b + i, count - i);
  return sum_lanes<Acc>(sums[0] + sums[1]);
}

// sums[r] = the products of entries (of matrix products) of row r of a with those of b.
template <class Scalar, int kRows, class Acc = accumulate_t<Scalar>>
DDRF_INLINE void dot_entries(const Acc* a, int64_t a_row, const Acc* b, int64_t count, Acc* sums) {
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> sum[kRows] = {};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const Vector<Acc> value = load_vector(b + i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sum[r] = add_product<Scalar>(sum[r], load_vector(a + r * a_row + i), value);
    }
  }
  if (i < count) {
    const Vector<Acc> value = load_partial(b + i, count - i);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      sum[r] = add_product<Scalar>(sum[r], load_partial(a + r * a_row + i, count - i), value);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) sums[r] = sum_lanes<Acc>(sum[r]);
}

// A sum of many vectors, in parts, since a float32 sum of thousands loses digits.
template <class Acc>
class SumOfParts {
 public:
  // `index` counts what is added, such as rows: every 64th ends a part.
  DDRF_INLINE void add(Vector<Acc> value, int64_t index) {
    part_ += value;
    if (index % 64 == 63) {
      whole_ += part_;
      part_ = Vector<Acc>{};
    }
  }
  DDRF_INLINE Vector<Acc> get() const { return whole_ + part_; }

 private:
  Vector<Acc> part_{}, whole_{};
};

template <class Scalar>
inline accumulate_t<Scalar> sum_row(const Scalar* source, int64_t count) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  Vector<Acc> sums[2] = {};
  int64_t i = 0;
  for (; i + 2 * kStep <= count; i += 2 * kStep) {
    sums[0] += load_vector(source + i);
    sums[1] += load_vector(source + i + kStep);
  }
  Acc sum = sum_lanes<Acc>(sums[0] + sums[1]);
  for (; i < count; ++i) sum += load_as_accumulate(source + i);
  return sum;
}

// The sums over every kLanes-th number, lane by lane.
template <class Scalar>
DDRF_INLINE Vector<accumulate_t<Scalar>> folded_row(const Scalar* source, int64_t count) {
  constexpr int kStep = kLanes<accumulate_t<Scalar>>;
  Vector<accumulate_t<Scalar>> sum{};
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) sum += load_vector(source + i);
  if (i < count) sum += load_partial(source + i, count - i);
  return sum;
}

// The lanes of a and, after them, b: every second one from kFirst on.
template <class Acc, int kFirst, size_t... kIndex>
DDRF_INLINE Vector<Acc> every_second(Vector<Acc> a, Vector<Acc> b, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(2 * kIndex + kFirst)...);
}

// The lanes of a but the first, and after them lane kLast of b.
template <class Acc, int kLast, size_t... kIndex>
DDRF_INLINE Vector<Acc> followed_by(Vector<Acc> a, Vector<Acc> b, std::index_sequence<kIndex...>) {
  constexpr int kSize = sizeof...(kIndex);
  return __builtin_shufflevector(
      a, b, static_cast<int>(kIndex + 1 < kSize ? kIndex + 1 : kSize + kLast)...);
}

// Within each of the parts of kPart lanes: lane[i] = value[i + kShift], zero beyond either end.
template <class Acc, int kShift, int kPart, size_t... kIndex>
DDRF_INLINE Vector<Acc> shift_lanes(Vector<Acc> value, std::index_sequence<kIndex...>) {
  constexpr int kSize = sizeof...(kIndex);
  if constexpr (kShift == 0) return value;
  return __builtin_shufflevector(value, Vector<Acc>{},
                                 static_cast<int>(kIndex % kPart) + kShift < 0 ||
                                         static_cast<int>(kIndex % kPart) + kShift >= kPart
                                     ? kSize
                                     : static_cast<int>(kIndex) + kShift...);
}

// The lower half of a and, above it, that of b.
template <class Acc, size_t... kIndex>
DDRF_INLINE Vector<Acc> lower_halves(Vector<Acc> a, Vector<Acc> b, std::index_sequence<kIndex...>) {
  constexpr int kHalf = sizeof...(kIndex) / 2;
  return __builtin_shufflevector(a, b,
                                 static_cast<int>(kIndex < kHalf ? kIndex : kIndex + kHalf)...);
}

// target[i] = source[2 * i]
template <class Scalar>
inline void load_every_second(accumulate_t<Scalar>* target, const Scalar* source, int64_t count) {
  using Acc = accumulate_t<Scalar>;
  constexpr int kStep = kLanes<Acc>;
  constexpr auto kIndices = std::make_index_sequence<kStep>();
  int64_t i = 0;
  // The second vector ends beyond the last entry that is asked for, except before the last ones.
  for (; i + kStep < count; i += kStep) {
    store_vector(target + i, every_second<Acc, 0>(load_vector(source + 2 * i),
                                                  load_vector(source + 2 * i + kStep), kIndices));
  }
  for (; i < count; ++i) target[i] = load_as_accumulate(source + 2 * i);
}

// Interleaves the lower (kOffset 0) or upper (kOffset lanes / 2) halves of a and b.
template <class Acc, int kOffset, size_t... kIndex>
DDRF_INLINE Vector<Acc> interleave(Vector<Acc> a, Vector<Acc> b, std::index_sequence<kIndex...>) {
  return __builtin_shufflevector(
      a, b, static_cast<int>(kOffset + kIndex / 2 + (kIndex % 2) * sizeof...(kIndex))...);
}

// The pixels of 2 or 4 vectors that lie side by side: columns[j] has every second or fourth one,
// from pixel j on.
template <class Acc>
DDRF_INLINE void deinterleave(const Vector<Acc> (&parts)[2], Vector<Acc> (&columns)[2]) {
  constexpr auto kIndices = std::make_index_sequence<kLanes<Acc>>();
  columns[0] = every_second<Acc, 0>(parts[0], parts[1], kIndices);
  columns[1] = every_second<Acc, 1>(parts[0], parts[1], kIndices);
}

template <class Acc>
DDRF_INLINE void deinterleave(const Vector<Acc> (&parts)[4], Vector<Acc> (&columns)[4]) {
  Vector<Acc> first[2], second[2], even[2], odd[2];
  deinterleave<Acc>({parts[0], parts[1]}, first);
  deinterleave<Acc>({parts[2], parts[3]}, second);
  deinterleave<Acc>({first[0], second[0]}, even);
  deinterleave<Acc>({first[1], second[1]}, odd);
  columns[0] = even[0];
  columns[1] = odd[0];
  columns[2] = even[1];
  columns[3] = odd[1];
}

// The other way round.
template <class Acc>
DDRF_INLINE void interleave(const Vector<Acc> (&columns)[2], Vector<Acc> (&parts)[2]) {
  constexpr auto kIndices = std::make_index_sequence<kLanes<Acc>>();
  parts[0] = interleave<Acc, 0>(columns[0], columns[1], kIndices);
  parts[1] = interleave<Acc, kLanes<Acc> / 2>(columns[0], columns[1], kIndices);
}

template <class Acc>
DDRF_INLINE void interleave(const Vector<Acc> (&columns)[4], Vector<Acc> (&parts)[4]) {
  Vector<Acc> even[2], odd[2], low[2], high[2];
  interleave<Acc>({columns[0], columns[2]}, even);
  interleave<Acc>({columns[1], columns[3]}, odd);
  interleave<Acc>({even[0], odd[0]}, low);
  interleave<Acc>({even[1], odd[1]}, high);
  parts[0] = low[0];
  parts[1] = low[1];
  parts[2] = high[0];
  parts[3] = high[1];
}

// Within each 16 bytes: the lower (kUpper false) or upper halves of a and b, interleaved.
template <class Acc, bool kUpper, size_t... kIndex>
DDRF_INLINE Vector<Acc> interleave_parts(Vector<Acc> a, Vector<Acc> b,
                                         std::index_sequence<kIndex...>) {
  constexpr size_t kPart = 16 / sizeof(Acc);
  return __builtin_shufflevector(
      a, b,
      static_cast<int>(kIndex / kPart * kPart + kUpper * kPart / 2 + kIndex % kPart / 2 +
                       kIndex % 2 * sizeof...(kIndex))...);
}

// Every second 16 bytes of a and, after them, b, from the first or (kOdd) the second on.
template <class Acc, bool kOdd, size_t... kIndex>
DDRF_INLINE Vector<Acc> every_second_part(Vector<Acc> a, Vector<Acc> b,
                                          std::index_sequence<kIndex...>) {
  constexpr size_t kPart = 16 / sizeof(Acc);
  return __builtin_shufflevector(
      a, b, static_cast<int>((kIndex / kPart * 2 + kOdd) * kPart + kIndex % kPart)...);
}

// Transposes the square of kLanes rows in place: small squares of 16 bytes by perfect shuffles,
// then the square of those by perfect shuffles the other way round. Each is an instruction.
template <class Acc>
DDRF_INLINE void transpose_square(Vector<Acc> (&rows)[kLanes<Acc>]) {
  constexpr int kSize = kLanes<Acc>, kPart = 16 / sizeof(Acc);
  constexpr auto kIndices = std::make_index_sequence<kSize>();
  Vector<Acc> next[kSize];
#pragma GCC unroll 4
  for (int stage = 1; stage < kPart; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kSize / 2; ++i) {
      const int first = i / (kPart / 2) * kPart + i % (kPart / 2);
      next[2 * i] = interleave_parts<Acc, false>(rows[first], rows[first + kPart / 2], kIndices);
      next[2 * i + 1] = interleave_parts<Acc, true>(rows[first], rows[first + kPart / 2], kIndices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 4
  for (int stage = kPart; stage < kSize; stage *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kSize / 2; ++i) {
      // Rows that are equal but for their small square are kPart apart.
      const int first = i / kPart * 2 * kPart + i % kPart;
      next[i] = every_second_part<Acc, false>(rows[first], rows[first + kPart], kIndices);
      next[i + kSize / 2] =
          every_second_part<Acc, true>(rows[first], rows[first + kPart], kIndices);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) rows[i] = next[i];
  }
}

template <class Acc>
DDRF_INLINE Vector<Acc> rectified(Activation activation, Vector<Acc> value) {
  if (activation == Activation::kNone) return value;
  const Vector<Acc> slope = activation == Activation::kRelu ? Vector<Acc>{} : value * Acc(0.01);
  return value < 0 ? slope : value;
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

// So few columns are faster transposed one by one.
template <class Acc>
inline constexpr int64_t kFew = kLanes<Acc> / 4;

// Rows of `count` numbers, as many as load_partial, the rest of the square zero.
template <class Scalar, class Acc = accumulate_t<Scalar>>
DDRF_INLINE void load_square(const Scalar* source, int64_t stride, int64_t count,
                             Vector<Acc> (&rows)[kLanes<Acc>]) {
  if (count == kLanes<Acc>) {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<Acc>; ++k) rows[k] = load_vector(source + k * stride);
  } else {
#pragma GCC unroll 16
    for (int k = 0; k < kLanes<Acc>; ++k) rows[k] = load_partial(source + k * stride, count);
  }
}

// target[j * target_stride + i] = source[i * source_stride + j] for i < rows, j < columns,
// converting.
template <class Target, class Source>
inline void transpose(Target* target, int64_t target_stride, const Source* source,
                      int64_t source_stride, int64_t rows, int64_t columns) {
  using Acc = accumulate_t<Source>;
  constexpr int kSize = kLanes<Acc>;
  const int64_t whole_rows = rows - rows % kSize;
  const int64_t taken = columns % kSize > kFew<Acc> ? columns : columns - columns % kSize;
  for (int64_t i = 0; i < whole_rows; i += kSize) {
    for (int64_t j = 0; j < taken; j += kSize) {
      const int64_t count = std::min<int64_t>(kSize, columns - j);
      Vector<Acc> square[kSize];
      load_square(source + i * source_stride + j, source_stride, count, square);
      transpose_square<Acc>(square);
#pragma GCC unroll 16
      for (int k = 0; k < kSize; ++k) {
        if (k < count) store_vector(target + (j + k) * target_stride + i, square[k]);
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = i < whole_rows ? taken : 0; j < columns; ++j) {
      target[j * target_stride + i] =
          static_cast<Target>(load_as_accumulate(source + i * source_stride + j));
    }
  }
}

}  // namespace ddrf_fast::DDRF_CAPABILITY

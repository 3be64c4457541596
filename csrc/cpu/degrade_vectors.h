// Vectors of the instruction set, and rows of numbers as they are stored and as they are computed.
//
// One of the parts of degrade_kernel.h, which includes it.

template <class T>
struct Vectors {
  typedef T Type __attribute__((vector_size(DDRF_VECTOR_BYTES)));
  // The same, anywhere in memory.
  typedef T Loose __attribute__((vector_size(DDRF_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int kLanes = DDRF_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vector = typename Vectors<T>::Type;
template <class T>
constexpr int kLanes = Vectors<T>::kLanes;

// Taps mixed at a time: with tiles of two vectors, what fits the registers.
constexpr int kBlockTaps = DDRF_VECTOR_BYTES == 64 ? 8 : 4;
constexpr int kTile = 2;
// Vectors of a row in the blur with one kernel.
constexpr int kUniformTile = 4;

template <class T>
DDRF_INLINE void load(Vector<T>& v, const T* p) {
  v = *reinterpret_cast<const typename Vectors<T>::Loose*>(p);
}

template <class T>
DDRF_INLINE void store(T* p, const Vector<T>& v) {
  *reinterpret_cast<typename Vectors<T>::Loose*>(p) = v;
}

// By halves, down to the 16 bytes that every processor has.
template <class T, int kBytes, class Wide>
DDRF_INLINE T sum_halves(const Wide& v) {
  if constexpr (kBytes > 16) {
    typedef T Half __attribute__((vector_size(kBytes / 2)));
    Half halves[2];
    memcpy(halves, &v, kBytes);
    return sum_halves<T, kBytes / 2>(halves[0] + halves[1]);
  } else if constexpr (sizeof(T) == 4) {
    return (v[0] + v[2]) + (v[1] + v[3]);
  } else {
    return v[0] + v[1];
  }
}

template <class T>
DDRF_INLINE T sum_lanes(const Vector<T>& v) {
  return sum_halves<T, DDRF_VECTOR_BYTES>(v);
}

// Bit by bit, because denormal half-precision numbers must survive the flushing of denormal floats.
DDRF_INLINE float half_to_float(uint16_t half) {
  const uint32_t magnitude = half & 0x7FFFu, sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (magnitude >= 0x7C00u ? 0x70000000u : 0x38000000u);
  const uint32_t tiny =
      bits_as<uint32_t>(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  return bits_as<float>(sign | (magnitude < 0x0400u ? tiny : normal));
}

// To nearest even. Adding 0.5, whose last place is 2^-24, rounds what is denormal in half
// precision.
DDRF_INLINE uint16_t float_to_half(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  const uint32_t rounded = magnitude + 0x0FFFu + (magnitude >> 13 & 1u);
  const uint32_t normal = (rounded - 0x38000000u) >> 13;
  const uint32_t tiny = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  return static_cast<uint16_t>(sign | (magnitude >= 0x477FF000u ? large : finite));
}

DDRF_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_as<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// The integer that stands for `value` of [0, 1].
template <class Integer>
DDRF_INLINE Integer to_integer(float value) {
  constexpr float kMax = static_cast<Integer>(-1);
  const float clipped = value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;  // NaN becomes 0
  return static_cast<Integer>(static_cast<int32_t>(__builtin_rintf(clipped * kMax)));
}

template <class Stored, class T, class Convert>
DDRF_INLINE void convert_row(const Stored* from, int64_t from_stride, T* to, int64_t to_stride,
                             int64_t count, const Convert& convert) {
  const auto run = [&](auto step, auto to_step) {
    for (int64_t i = 0; i < count; ++i) to[i * to_step] = convert(from[i * step]);
  };
  // The usual strides as constants: the compiler then has vectors for them.
  constexpr std::integral_constant<int64_t, 1> kOne{};
  if (to_stride != 1) return run(from_stride, to_stride);
  switch (from_stride) {
    case 1:
      return run(kOne, kOne);
    case 2:
      return run(std::integral_constant<int64_t, 2>{}, kOne);
    case 3:
      return run(std::integral_constant<int64_t, 3>{}, kOne);
    case 4:
      return run(std::integral_constant<int64_t, 4>{}, kOne);
    default:
      return run(from_stride, kOne);
  }
}

// `count` numbers from element `offset` on, `stride` elements apart.
template <class T>
static void load_row(const Input& array, int64_t offset, int64_t stride, int64_t count, T* to) {
  const char* from = array.data + offset * element_size(array.element);
  const auto from16 = reinterpret_cast<const uint16_t*>(from);
  switch (array.element) {
    case Element::kFloat32:
      return convert_row(reinterpret_cast<const float*>(from), stride, to, 1, count,
                         [](float x) { return static_cast<T>(x); });
    case Element::kFloat64:
      return convert_row(reinterpret_cast<const double*>(from), stride, to, 1, count,
                         [](double x) { return static_cast<T>(x); });
    case Element::kBFloat16:
      return convert_row(from16, stride, to, 1, count, [](uint16_t x) {
        return static_cast<T>(bits_as<float>(static_cast<uint32_t>(x) << 16));
      });
    case Element::kFloat16:
      return convert_row(from16, stride, to, 1, count,
                         [](uint16_t x) { return static_cast<T>(half_to_float(x)); });
    case Element::kUInt8:
      return convert_row(reinterpret_cast<const uint8_t*>(from), stride, to, 1, count,
                         [](uint8_t x) { return static_cast<T>(x) / T(255); });
    case Element::kUInt16:
      return convert_row(from16, stride, to, 1, count,
                         [](uint16_t x) { return static_cast<T>(x) / T(65535); });
  }
}

template <class T>
static void store_row(const Output& array, int64_t offset, int64_t stride, int64_t count,
                      const T* from) {
  char* to = array.data + offset * element_size(array.element);
  const auto to16 = reinterpret_cast<uint16_t*>(to);
  switch (array.element) {
    case Element::kFloat32:
      return convert_row(from, 1, reinterpret_cast<float*>(to), stride, count,
                         [](T x) { return static_cast<float>(x); });
    case Element::kFloat64:
      return convert_row(from, 1, reinterpret_cast<double*>(to), stride, count,
                         [](T x) { return static_cast<double>(x); });
    case Element::kBFloat16:
      return convert_row(from, 1, to16, stride, count,
                         [](T x) { return float_to_bfloat16(static_cast<float>(x)); });
    case Element::kFloat16:
      return convert_row(from, 1, to16, stride, count,
                         [](T x) { return float_to_half(static_cast<float>(x)); });
    case Element::kUInt8:
      return convert_row(from, 1, reinterpret_cast<uint8_t*>(to), stride, count,
                         [](T x) { return to_integer<uint8_t>(static_cast<float>(x)); });
    case Element::kUInt16:
      return convert_row(from, 1, to16, stride, count,
                         [](T x) { return to_integer<uint16_t>(static_cast<float>(x)); });
  }
}

static inline int64_t offset_of(const int64_t (&stride)[4], int64_t i, int64_t j, int64_t k) {
  return i * stride[0] + j * stride[1] + k * stride[2];
}

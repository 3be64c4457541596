// The Fourier transform of degrade_fourier.h: complex, two-dimensional, of lengths 2^a 3^b 5^c.
//
// One of the parts of degrade_kernel.h, which includes it. Each axis is transformed by Stockham's
// method (no bit reversal) for a vector of columns at a time, which stay in the first cache;
// between the axes the matrix is transposed. Real and imaginary parts are apart, so the inverse is
// the forward transform with the two exchanged. Nothing is normalised.

template <class T>
struct Complex {
  Vector<T> re, im;
};

template <class T>
DDRF_INLINE Complex<T> operator+(const Complex<T>& a, const Complex<T>& b) {
  return {a.re + b.re, a.im + b.im};
}
template <class T>
DDRF_INLINE Complex<T> operator-(const Complex<T>& a, const Complex<T>& b) {
  return {a.re - b.re, a.im - b.im};
}
template <class T>
DDRF_INLINE Complex<T> operator*(const Complex<T>& a, T b) {
  return {a.re * b, a.im * b};
}
template <class T>
DDRF_INLINE Complex<T> minus_i(const Complex<T>& a) {
  return {a.im, -a.re};
}
template <class T>
DDRF_INLINE Complex<T> rotate(const Complex<T>& a, T re, T im) {
  return {a.re * re - a.im * im, a.re * im + a.im * re};
}

// The product of the real parts, and that of the imaginary parts.
template <class T>
DDRF_INLINE Complex<T> each(const Complex<T>& a, const Complex<T>& b) {
  return {a.re * b.re, a.im * b.im};
}

// The transforms of a few numbers, in place.
template <class T>
DDRF_INLINE void butterfly(Complex<T> (&x)[3]) {
  constexpr T kSin = 0.86602540378443864676;  // of 60 degrees
  const Complex<T> sum = x[1] + x[2], turned = minus_i((x[1] - x[2]) * kSin);
  const Complex<T> middle = x[0] - sum * T(0.5);
  x[0] = x[0] + sum;
  x[1] = middle + turned;
  x[2] = middle - turned;
}

template <class T>
DDRF_INLINE void butterfly(Complex<T> (&x)[4]) {
  const Complex<T> even = x[0] + x[2], odd = x[1] + x[3];
  const Complex<T> low = x[0] - x[2], high = minus_i(x[1] - x[3]);
  x[0] = even + odd;
  x[1] = low + high;
  x[2] = even - odd;
  x[3] = low - high;
}

template <class T>
DDRF_INLINE void butterfly(Complex<T> (&x)[5]) {
  constexpr T kCos1 = 0.30901699437494742410,
              kCos2 = -0.80901699437494742410;  // of 72, 144 degrees
  constexpr T kSin1 = 0.95105651629515357212, kSin2 = 0.58778525229247312917;
  const Complex<T> sum1 = x[1] + x[4], sum2 = x[2] + x[3];
  const Complex<T> difference1 = x[1] - x[4], difference2 = x[2] - x[3];
  const Complex<T> middle1 = x[0] + sum1 * kCos1 + sum2 * kCos2;
  const Complex<T> middle2 = x[0] + sum1 * kCos2 + sum2 * kCos1;
  const Complex<T> turned1 = minus_i(difference1 * kSin1 + difference2 * kSin2);
  const Complex<T> turned2 = minus_i(difference1 * kSin2 - difference2 * kSin1);
  x[0] = x[0] + sum1 + sum2;
  x[1] = middle1 + turned1;
  x[2] = middle2 + turned2;
  x[3] = middle2 - turned2;
  x[4] = middle1 - turned1;
}

template <class T>
DDRF_INLINE void butterfly(Complex<T> (&x)[8]) {
  constexpr T kHalf = 0.70710678118654752440;
  Complex<T> even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
  butterfly(even);
  butterfly(odd);
  odd[1] = Complex<T>{odd[1].re + odd[1].im, odd[1].im - odd[1].re} * kHalf;
  odd[2] = minus_i(odd[2]);
  odd[3] = Complex<T>{odd[3].im - odd[3].re, -odd[3].re - odd[3].im} * kHalf;
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    x[i] = even[i] + odd[i];
    x[i + 4] = even[i] - odd[i];
  }
}

// Vectors of complex numbers, the i-th at i * stride in either part.
template <class T>
struct Columns {
  T *re, *im;
  int64_t stride;

  DDRF_INLINE Complex<T> operator[](int64_t i) const {
    Complex<T> x;
    load<T>(x.re, re + i * stride);
    load<T>(x.im, im + i * stride);
    return x;
  }
  DDRF_INLINE void put(int64_t i, const Complex<T>& x) const {
    store<T>(re + i * stride, x.re);
    store<T>(im + i * stride, x.im);
  }
  Columns exchanged() const { return {im, re, stride}; }
};

// A matrix with `length` rows held as blocks of kLanes columns, so that those are read in a stream.
template <class T>
static Columns<T> block_columns(T* matrix, int64_t column, int64_t length) {
  T* re = matrix + 2 * column * length;
  return {re, re + kLanes<T>, 2 * kLanes<T>};
}

// One pass: `groups` transforms of kRadix numbers for each of `done` results of the passes before.
template <int kRadix, bool kLast, class T>
static void fft_pass(const T* twiddle, int64_t groups, int64_t done, const Columns<T> from,
                     const Columns<T> to) {
  for (int64_t group = 0; group < groups; ++group, twiddle += 2 * (kRadix - 1)) {
    for (int64_t q = 0; q < done; ++q) {
      Complex<T> x[kRadix];
#pragma GCC unroll 8
      for (int i = 0; i < kRadix; ++i) x[i] = from[q + done * (group + groups * i)];
      butterfly(x);
#pragma GCC unroll 8
      for (int i = 0; i < kRadix; ++i) {
        if (!kLast && i > 0) x[i] = rotate(x[i], twiddle[2 * i - 2], twiddle[2 * i - 1]);
        to.put(q + done * (kRadix * group + i), x[i]);
      }
    }
  }
}

template <int kRadix, class T>
static void fft_pass(bool last, const T* twiddle, int64_t groups, int64_t done,
                     const Columns<T>& from, const Columns<T>& to) {
  const auto run = last ? fft_pass<kRadix, true, T> : fft_pass<kRadix, false, T>;
  run(twiddle, groups, done, from, to);
}

// Transforms `from`, which may be scratch[1], to `to`, which may be scratch[kept_in(fft)].
template <class T>
static void fft_columns(const Fft<T>& fft, Columns<T> from, const Columns<T> (&scratch)[2],
                        const Columns<T>& to) {
  int64_t done = 1, twiddle = 0;
  int free = 0;
  for (const int radix : fft.radices) {
    const int64_t groups = fft.length / done / radix;
    const bool last = groups == 1;
    const T* w = fft.twiddles.data() + twiddle;
    const Columns<T>& target = last ? to : scratch[free];
    switch (radix) {
      case 3:
        fft_pass<3>(last, w, groups, done, from, target);
        break;
      case 4:
        fft_pass<4>(last, w, groups, done, from, target);
        break;
      case 5:
        fft_pass<5>(last, w, groups, done, from, target);
        break;
      default:
        fft_pass<8>(last, w, groups, done, from, target);
    }
    twiddle += 2 * (radix - 1) * groups;
    done *= radix;
    from = target;
    free = 1 - free;
  }
}

// Which half of the scratch is free at the end.
template <class T>
static int kept_in(const Fft<T>& fft) {
  return static_cast<int>(fft.radices.size() + 1) % 2;
}

template <class T, size_t... kIndex>
DDRF_INLINE void interleave(const Vector<T>& a, const Vector<T>& b, Vector<T>& low, Vector<T>& high,
                            std::index_sequence<kIndex...>) {
  constexpr int kHalf = kLanes<T> / 2;
  low = __builtin_shufflevector(a, b, static_cast<int>(kIndex / 2 + kIndex % 2 * kLanes<T>)...);
  high = __builtin_shufflevector(a, b,
                                 static_cast<int>(kHalf + kIndex / 2 + kIndex % 2 * kLanes<T>)...);
}

// Transposes a square of kLanes rows: log2(kLanes) perfect shuffles of its rows.
template <class T>
DDRF_INLINE void transpose(const T* from, T* to, int64_t to_stride) {
  constexpr int kSize = kLanes<T>;
  Vector<T> rows[2][kSize];
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) load<T>(rows[0][i], from + i * kSize);
  constexpr int kRounds = kSize == 16 ? 4 : kSize == 8 ? 3 : kSize == 4 ? 2 : 1;
#pragma GCC unroll 4
  for (int round = 0; round < kRounds; ++round) {
    const int now = round % 2;
#pragma GCC unroll 8
    for (int i = 0; i < kSize / 2; ++i) {
      interleave<T>(rows[now][i], rows[now][i + kSize / 2], rows[1 - now][2 * i],
                    rows[1 - now][2 * i + 1], std::make_index_sequence<kSize>{});
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kSize; ++i) store<T>(to + i * to_stride, rows[kRounds % 2][i]);
}

// Scratch of one thread: transforms of up to `longest` along an axis, `area` numbers in all.
template <class T>
class FftScratch {
 public:
  FftScratch(int64_t longest, int64_t area)
      : columns_(Buffer<T>::uninitialised(4 * longest * kLanes<T>)),
        turned_(Buffer<T>::uninitialised(2 * area)),
        longest_(longest) {}

  // Transforms a matrix along its first axis, and along its second. load(column, scratch) tells
  // where kLanes columns from `column` on are, which may be the scratch that it fills. Of the
  // result, kLanes rows from `row` on are the columns that store(row, columns) is given; or else
  // store(row) tells where they go. Columns from `filled` on are zero, and rows from `wanted` on
  // are not computed.
  template <class Load, class Store>
  void transform(const Fft<T>& first, const Fft<T>& second, int64_t filled, int64_t wanted,
                 const Load& load_columns, const Store& store_columns) {
    constexpr int64_t kStep = kLanes<T>;
    const Columns<T> scratch[2] = {part(0), part(1)};
    const Columns<T> kept = scratch[kept_in(first)];
    int64_t column = 0;
    for (; column < filled; column += kStep) {
      fft_columns(first, load_columns(column, scratch[1]), scratch, kept);
      for (int64_t row = 0; row < first.length; row += kStep) {
        const Columns<T> to = block_columns(turned_.get(), row, second.length);
        transpose(kept.re + row * kStep, to.re + column * to.stride, to.stride);
        transpose(kept.im + row * kStep, to.im + column * to.stride, to.stride);
      }
    }
    for (int64_t row = 0; row < wanted; row += kStep) {
      const Columns<T> from = block_columns(turned_.get(), row, second.length);
      if (column < second.length) {
        std::memset(from.re + column * from.stride, 0,
                    (second.length - column) * from.stride * sizeof(T));
      }
      if constexpr (std::is_invocable_v<Store, int64_t>) {
        fft_columns(second, from, scratch, store_columns(row));
      } else {
        const Columns<T> result = scratch[kept_in(second)];
        fft_columns(second, from, scratch, result);
        store_columns(row, result);
      }
    }
  }

 private:
  Columns<T> part(int i) const {
    T* re = columns_.get() + 2 * i * longest_ * kLanes<T>;
    return {re, re + longest_ * kLanes<T>, kLanes<T>};
  }

  Buffer<T> columns_, turned_;
  int64_t longest_;
};

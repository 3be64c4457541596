// Rows of the problem: noise, the padded image, the weights, the output.
//
// One of the parts of degrade_kernel.h, which includes it.

// Counters handled at a time, each of two pairs of words.
constexpr int kQuads = DDRF_VECTOR_BYTES == 32 ? 4 : 8;
constexpr int kPairs = 2 * kQuads;

// first[2 i + j], second[2 i + j]: the pair j of the random words of counter (quad + i, y, c,
// sample).
#if DDRF_VECTOR_BYTES == 16
DDRF_INLINE void random_pairs(uint32_t quad, uint32_t y, uint32_t c, uint32_t sample, PhiloxKey key,
                              uint32_t (&first)[kPairs], uint32_t (&second)[kPairs]) {
  for (int i = 0; i < kQuads; ++i) {
    uint32_t c0 = quad + i, c1 = y, c2 = c, c3 = sample;
    philox4x32(c0, c1, c2, c3, key);
    first[2 * i] = c0;
    second[2 * i] = c1;
    first[2 * i + 1] = c2;
    second[2 * i + 1] = c3;
  }
}
#else
// A counter has a lane of 64 bits for each word, so that one instruction makes a whole product. Of
// a lane only the low half counts: what is above it is left as it comes.
typedef uint64_t Words __attribute__((vector_size(DDRF_VECTOR_BYTES)));

DDRF_INLINE void multiply_words(const Words& a, uint32_t b, Words& product) {
#if DDRF_VECTOR_BYTES == 64
  product = (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#else
  product = (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#endif
}

DDRF_INLINE void random_pairs(uint32_t quad, uint32_t y, uint32_t c, uint32_t sample, PhiloxKey key,
                              uint32_t (&first)[kPairs], uint32_t (&second)[kPairs]) {
  constexpr uint64_t kLow = 0xFFFFFFFFu;
  alignas(64) static constexpr uint64_t kSteps[8] = {0, 1, 2, 3, 4, 5, 6, 7};
  Words c0, c1 = Words{} + y, c2 = Words{} + c, c3 = Words{} + sample;
  memcpy(&c0, kSteps, sizeof(c0));
  c0 += quad;
#pragma GCC unroll 10
  for (int round = 0; round < kPhiloxRounds; ++round) {
    Words product0, product1;
    multiply_words(c0, kPhiloxMultiplier0, product0);
    multiply_words(c2, kPhiloxMultiplier1, product1);
    c0 = (product1 >> 32) ^ c1 ^ key.low;
    c1 = product1;
    c2 = (product0 >> 32) ^ c3 ^ key.high;
    c3 = product0;
    key.low += kPhiloxWeyl0;
    key.high += kPhiloxWeyl1;
  }
  const Words low = (c0 & kLow) | c2 << 32, high = (c1 & kLow) | c3 << 32;
  memcpy(first, &low, sizeof(low));
  memcpy(second, &high, sizeof(high));
}
#endif

static inline int64_t noise_row_size(int64_t width) { return round_up(width, 2 * kPairs); }

// Standard normal numbers for the row (b, c, y) from `first` on, which is a multiple of 4, up to
// `last`; `to` has room for noise_row_size(last - first).
template <class T>
static void noise_row(const DegradeProblem& p, int64_t b, int64_t c, int64_t y, int64_t first,
                      int64_t last, T* to) {
  const PhiloxKey key = philox_key(p.seed);
  const uint32_t sample = static_cast<uint32_t>(p.sample_ids[b]);
  const uint32_t channel = static_cast<uint32_t>(p.noise_channel(b, c));
  for (; first < last; first += 2 * kPairs, to += 2 * kPairs) {
    uint32_t radius[kPairs], angle[kPairs];
    random_pairs(static_cast<uint32_t>(first / 4), static_cast<uint32_t>(y), channel, sample, key,
                 radius, angle);
    T even[kPairs], odd[kPairs];
    for (int i = 0; i < kPairs; ++i) box_muller(radius[i], angle[i], even[i], odd[i]);
    for (int i = 0; i < kPairs; ++i) {
      to[2 * i] = even[i];
      to[2 * i + 1] = odd[i];
    }
  }
}

// Fills one padded row of one channel, row i counted from the padded image's top.
template <class T>
static void load_padded_row(const DegradeProblem& p, const PaddedLayout& layout,
                            const ColumnMap& map, int64_t b, int64_t c, int64_t i, T* line, T* to) {
  const int64_t y = source_index(i + p.origin(), p.height, p.padding);
  if (y < 0) {
    std::memset(to, 0, layout.row * sizeof(T));
    return;
  }
  const int64_t start = offset_of(p.image.stride, b, c, y) + map.begin * p.image.stride[3];
  const bool as_is = p.image.element == (sizeof(T) == 8 ? Element::kFloat64 : Element::kFloat32) &&
                     p.image.stride[3] == 1;
  if (!as_is) load_row(p.image, start, p.image.stride[3], map.end - map.begin, line);
  const T* from = as_is ? reinterpret_cast<const T*>(p.image.data) + start : line;
  const auto shown = [&](int64_t x) { return x < 0 ? T(0) : from[x - map.begin]; };
  for (int64_t q = 0; q < p.scale; ++q) {
    const int64_t* source = map.source.data() + q * layout.plane;
    T* plane = to + q * layout.plane;
    const int64_t first = map.first[q], last = map.last[q], count = layout.columns_of(q);
    for (int64_t j = 0; j < first; ++j) plane[j] = shown(source[j]);
    if (first < last)
      convert_row(from + source[first] - map.begin, p.scale, plane + first, 1, last - first,
                  [](T x) { return x; });
    for (int64_t j = last; j < count; ++j) plane[j] = shown(source[j]);
  }
}

// Where the output's columns lie between those of a coarse grid.
template <class T>
class GridColumns {
 public:
  explicit GridColumns(const DegradeProblem& p) : fractions_(p.out_width) {
    for (int64_t x = 0; x < p.out_width; ++x) {
      const GridPlace<T> place = grid_place<T>(x * p.scale + p.offset, p.width, p.grid_width);
      if (x == 0 || place.low != runs_.back().low) runs_.push_back({x, x, place.low, place.high});
      runs_.back().end = x + 1;
      fractions_[x] = place.fraction;
    }
  }

  // `count` columns from x0 on of a line of the grid.
  void interpolate(const T* line, int64_t x0, int64_t count, T* to) const {
    for (const Run& run : runs_) {
      const T low = line[run.low], high = line[run.high];
      const int64_t end = std::min(run.end, x0 + count);
      for (int64_t x = std::max(run.begin, x0); x < end; ++x)
        to[x - x0] = (T(1) - fractions_[x]) * low + fractions_[x] * high;
    }
  }

  // The adjoint: adds all columns' shares to a line of the grid.
  void gather(const T* from, T* line) const {
    for (const Run& run : runs_) {
      T low = 0, high = 0;
#pragma omp simd reduction(+ : low, high)
      for (int64_t x = run.begin; x < run.end; ++x) {
        low += (T(1) - fractions_[x]) * from[x];
        high += fractions_[x] * from[x];
      }
      line[run.low] += low;
      line[run.high] += high;
    }
  }

 private:
  struct Run {
    int64_t begin, end, low, high;  // columns between the same two of the grid
  };
  std::vector<Run> runs_;
  Buffer<T> fractions_;
};

// The mixing weights of one row of output pixels.
template <class T>
class WeightRows {
 public:
  explicit WeightRows(const DegradeProblem& p) : p_(p) {
    if (p.weights_at == WeightsAt::kGrid) columns_.emplace(p);
  }

  // Two lines of scratch.
  int64_t scratch_size() const { return 2 * p_.grid_width; }

  // weights[m * stride + x] for the row y of sample b, `count` of them from column x0 on.
  void load(int64_t b, int64_t y, int64_t x0, int64_t count, T* scratch, T* weights,
            int64_t stride) const {
    for (int64_t m = 0; m < p_.num_kernels; ++m)
      load_kernel(b, m, y, x0, count, scratch, weights + m * stride);
  }

  // Those of one kernel, `count` of them from column x0 on.
  void load_kernel(int64_t b, int64_t m, int64_t y, int64_t x0, int64_t count, T* scratch,
                   T* to) const {
    const auto& s = p_.weights.stride;
    const int64_t site = y * p_.scale + p_.offset;
    if (p_.weights_at == WeightsAt::kOutput) {
      load_row(p_.weights, offset_of(s, b, m, y) + x0 * s[3], s[3], count, to);
    } else if (p_.weights_at == WeightsAt::kImage) {
      const int64_t start = offset_of(s, b, m, site) + (x0 * p_.scale + p_.offset) * s[3];
      load_row(p_.weights, start, p_.scale * s[3], count, to);
    } else {
      const GridPlace<T> place = grid_place<T>(site, p_.height, p_.grid_height);
      T *low = scratch, *high = scratch + p_.grid_width;
      load_row(p_.weights, offset_of(s, b, m, place.low), s[3], p_.grid_width, low);
      load_row(p_.weights, offset_of(s, b, m, place.high), s[3], p_.grid_width, high);
      for (int64_t x = 0; x < p_.grid_width; ++x) {
        low[x] = (T(1) - place.fraction) * low[x] + place.fraction * high[x];
      }
      columns_->interpolate(low, x0, count, to);
    }
  }

 private:
  const DegradeProblem& p_;
  std::optional<GridColumns<T>> columns_;
};

// Adds the noise to finished numbers of a row and stores them.
template <class T>
class OutputRows {
 public:
  OutputRows(const DegradeProblem& p, const Output& out)
      : p_(p),
        out_(out),
        noise_(p.noise_std.data ? noise_row_size(p.out_width + 3) : 0),
        std_(p.out_width) {}

  // `count` numbers from column x0 on.
  void finish(int64_t b, int64_t c, int64_t y, int64_t x0, int64_t count, T* row) {
    if (p_.noise_std.data) {
      const int64_t start = x0 / 4 * 4;  // numbers come by fours
      noise_row(p_, b, c, y, start, x0 + count, noise_.get());
      const int64_t* s = p_.noise_std.stride;
      if (p_.noise_map) {
        load_row(p_.noise_std, b * s[0] + y * s[2] + x0 * s[3], s[3], count, std_.get());
      } else {
        T number;
        load_row(p_.noise_std, b * s[0], 0, 1, &number);
        std::fill_n(std_.get(), count, number);
      }
      if (p_.shot_noise.data) {
        T shot;
        load_row(p_.shot_noise, b * p_.shot_noise.stride[0], 0, 1, &shot);
        for (int64_t x = 0; x < count; ++x)
          std_[x] = std::sqrt(shot * std::max(row[x], T(0)) + std_[x] * std_[x]);
      }
      const T* noise = noise_.get() + x0 - start;
      for (int64_t x = 0; x < count; ++x) row[x] += std_[x] * noise[x];
    }
    store_row(out_, offset_of(out_.stride, b, c, y) + x0 * out_.stride[3], out_.stride[3], count,
              row);
  }

 private:
  const DegradeProblem& p_;
  const Output& out_;
  Buffer<T> noise_, std_;
};

// All kernels, oriented, [B|1][M][k * k].
template <class T>
static Buffer<T> load_kernels(const DegradeProblem& p) {
  const int64_t k = p.kernel_size, taps = p.num_taps();
  const int64_t banks = p.num_banks();
  Buffer<T> plain(p.num_kernels * taps), oriented(banks * p.num_kernels * taps);
  for (int64_t bank = 0; bank < banks; ++bank) {
    for (int64_t m = 0; m < p.num_kernels; ++m) {
      for (int64_t row = 0; row < k; ++row) {
        load_row(p.kernels, offset_of(p.kernels.stride, bank, m, row), p.kernels.stride[3], k,
                 plain.get() + m * taps + row * k);
      }
    }
    oriented_kernels(p, plain.get(), oriented.get() + bank * p.num_kernels * taps);
  }
  return oriented;
}

template <class T>
static const T* kernels_of(const DegradeProblem& p, const Buffer<T>& kernels, int64_t b) {
  return kernels.get() + (p.kernels_per_sample ? b * p.num_kernels * p.num_taps() : 0);
}

template <class T>
static std::vector<Bank<T>> make_banks(const DegradeProblem& p, const PaddedLayout& layout,
                                       const Buffer<T>& kernels, bool keep_all) {
  std::vector<Bank<T>> banks;
  for (int64_t b = 0; b < p.num_banks(); ++b) {
    banks.emplace_back(p, layout, kernels_of(p, kernels, b), kBlockTaps, keep_all);
  }
  return banks;
}

// How the direct sums of the forward pass are cut into tasks: rows, many, to read few of them
// twice, but within the cache and so few that every thread has work; and strips of columns, one but
// for wide images, of whose rows the cache holds too few. No result depends on it.
template <class T>
struct ForwardTasks {
  int64_t columns, rows;        // outputs of a task
  int64_t strips, per_strip;    // tasks
  PaddedLayout layout;          // of a strip
  std::vector<ColumnMap> maps;  // of each

  ForwardTasks(const DegradeProblem& p, int64_t channels, int64_t planes, const Threads& threads)
      : columns(columns_of_strip(p, channels)),
        strips(divide_up(p.out_width, columns)),
        layout(p, kLanes<T>, columns) {
    const int64_t cached = numbers_in_cache(channels) / layout.row;
    const int64_t wanted = (cached - p.kernel_size) / p.scale + 1;
    const int64_t share = divide_up(planes * strips * p.out_height, 4 * threads.count);
    rows = std::clamp<int64_t>(std::min(wanted, share), std::min<int64_t>(2, p.out_height),
                               p.out_height);
    per_strip = divide_up(p.out_height, rows);
    for (int64_t strip = 0; strip < strips; ++strip) maps.emplace_back(p, layout, strip * columns);
  }

  int64_t count() const { return strips * per_strip; }
  // Rows of the padded image under `outputs` rows.
  int64_t padded_rows(int64_t outputs) const {
    return (outputs - 1) * layout.scale + layout.kernel_size;
  }

 private:
  static int64_t numbers_in_cache(int64_t channels) {
    constexpr int64_t kCacheBytes = 512 << 10;
    return kCacheBytes / (channels * static_cast<int64_t>(sizeof(T)));
  }
  // All of them where twice a kernel's rows are cached; else even shares of as many as that allows.
  static int64_t columns_of_strip(const DegradeProblem& p, int64_t channels) {
    constexpr int64_t kWhole = kUniformTile * kLanes<T>;
    const int64_t padded = numbers_in_cache(channels) / (2 * p.kernel_size);
    const int64_t fitting = std::max((padded - p.kernel_size) / p.scale, 4 * kWhole);
    const int64_t share = divide_up(p.out_width, divide_up(p.out_width, fitting));
    return std::min(round_up(share, kWhole), p.out_width);
  }
};

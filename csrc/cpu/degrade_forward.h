// The forward pass of degrade.
//
// One of the parts of degrade_kernel.h, which includes it.

// ---- Weights that vary over the image

// Mixes one block of taps for a tile of pixels: mixed[t] = sum_m K'_m[t] weights_m.
template <int kTaps, int kVectors, class T>
DDRF_INLINE void mix(const Bank<T>& bank, const typename Bank<T>::Block& block, const T* weights,
                     int64_t weight_stride, Vector<T> (&mixed)[kTaps][kVectors]) {
  constexpr int kStep = kLanes<T>;
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) mixed[t][v] = Vector<T>{};
  }
  const int64_t* index = bank.index.data() + block.index;
  const T* coefficient = bank.coefficients.data() + block.coefficient;
  for (int64_t j = 0; j < block.active; ++j, coefficient += kTaps) {
    const T* weight = weights + index[j] * weight_stride;
    Vector<T> w[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) load<T>(w[v], weight + v * kStep);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) mixed[t][v] += w[v] * coefficient[t];
    }
  }
}

template <int kTaps, int kVectors, class T>
DDRF_INLINE void forward_block(const Bank<T>& bank, const typename Bank<T>::Block& block,
                               const T* weights, int64_t weight_stride, const T* site,
                               int64_t channel_stride, int64_t channels, T* out,
                               int64_t out_stride) {
  constexpr int kStep = kLanes<T>;
  Vector<T> mixed[kTaps][kVectors];
  mix<kTaps, kVectors>(bank, block, weights, weight_stride, mixed);
  const int64_t* offset = bank.offsets.data() + block.tap;
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T> sum[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) load<T>(sum[v], out + c * out_stride + v * kStep);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
      const T* from = site + c * channel_stride + offset[t];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> pixels;
        load<T>(pixels, from + v * kStep);
        sum[v] += mixed[t][v] * pixels;
      }
    }
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store<T>(out + c * out_stride + v * kStep, sum[v]);
  }
}

template <int kVectors, class T>
static void forward_tile(const Bank<T>& bank, const T* weights, int64_t weight_stride,
                         const T* site, int64_t channel_stride, int64_t channels, T* out,
                         int64_t out_stride) {
  for (const auto& block : bank.blocks) {
    if (block.taps == kBlockTaps) {
      forward_block<kBlockTaps, kVectors>(bank, block, weights, weight_stride, site, channel_stride,
                                          channels, out, out_stride);
    } else {
      forward_block<1, kVectors>(bank, block, weights, weight_stride, site, channel_stride,
                                 channels, out, out_stride);
    }
  }
}

template <class T>
static void forward_mixed_direct(const DegradeProblem& p, const Output& out,
                                 const Threads& threads) {
  const ForwardTasks<T> tasks(p, p.channels, p.batch, threads);
  const PaddedLayout& layout = tasks.layout;
  const Buffer<T> kernels = load_kernels<T>(p);
  const std::vector<Bank<T>> banks = make_banks(p, layout, kernels, /*keep_all=*/false);
  const WeightRows<T> weight_rows(p);
  const int64_t channel_stride = tasks.padded_rows(tasks.rows) * layout.row;

  threads.parallel_for(p.batch * tasks.count(), [&](int64_t begin, int64_t end) {
    Buffer<T> padded(p.channels * channel_stride), line(p.width),
        scratch(weight_rows.scratch_size());
    Buffer<T> weights(p.num_kernels * layout.wide), result(p.channels * layout.wide);
    OutputRows<T> output_rows(p, out);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tasks.count(), strip = task % tasks.count() / tasks.per_strip;
      const int64_t y0 = task % tasks.per_strip * tasks.rows;
      const int64_t y1 = std::min(y0 + tasks.rows, p.out_height);
      const int64_t x0 = strip * tasks.columns, count = std::min(tasks.columns, p.out_width - x0);
      const Bank<T>& bank = banks[p.kernels_per_sample ? b : 0];
      for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t i = 0; i < tasks.padded_rows(y1 - y0); ++i) {
          load_padded_row(p, layout, tasks.maps[strip], b, c, y0 * p.scale + i, line.get(),
                          padded.get() + c * channel_stride + i * layout.row);
        }
      }
      for (int64_t y = y0; y < y1; ++y) {
        weight_rows.load(b, y, x0, count, scratch.get(), weights.get(), layout.wide);
        std::memset(result.get(), 0, p.channels * layout.wide * sizeof(T));
        const T* site = padded.get() + (y - y0) * p.scale * layout.row;
        int64_t x = 0;
        for (; x + kTile * kLanes<T> <= layout.wide; x += kTile * kLanes<T>) {
          forward_tile<kTile>(bank, weights.get() + x, layout.wide, site + x, channel_stride,
                              p.channels, result.get() + x, layout.wide);
        }
        for (; x < layout.wide; x += kLanes<T>) {
          forward_tile<1>(bank, weights.get() + x, layout.wide, site + x, channel_stride,
                          p.channels, result.get() + x, layout.wide);
        }
        for (int64_t c = 0; c < p.channels; ++c)
          output_rows.finish(b, c, y, x0, count, result.get() + c * layout.wide);
      }
    }
  });
}

// ---- One kernel for the whole sample

// Blurs kVectors vectors of one output row, or of two rows `shift` input rows apart.
template <int kVectors, bool kPair, class T>
DDRF_INLINE void uniform_tile(const UniformKernel<T>& kernel, const T* from, int64_t row_stride,
                              int64_t shift, T* first, T* second) {
  constexpr int kStep = kLanes<T>;
  Vector<T> sum0[kVectors], sum1[kVectors];
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) sum0[v] = sum1[v] = Vector<T>{};
  const int64_t rows = kernel.rows;
  const int64_t alone = kPair ? std::min(shift, rows) : rows;
  for (int64_t b = 0; b < kernel.columns; ++b) {
    const T* coefficient = kernel.coefficients.data() + b * rows;
    const T* column = from + kernel.offsets[b];
    int64_t i = 0;
    for (; i < alone; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> pixels;
        load<T>(pixels, column + i * row_stride + v * kStep);
        sum0[v] += pixels * coefficient[i];
      }
    }
    if constexpr (kPair) {
      for (; i < rows; ++i) {
        const T c0 = coefficient[i], c1 = coefficient[i - shift];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> pixels;
          load<T>(pixels, column + i * row_stride + v * kStep);
          sum0[v] += pixels * c0;
          sum1[v] += pixels * c1;
        }
      }
      for (i = std::max(i, shift); i < rows + shift; ++i) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> pixels;
          load<T>(pixels, column + i * row_stride + v * kStep);
          sum1[v] += pixels * coefficient[i - shift];
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < kVectors; ++v) {
    store<T>(first + v * kStep, sum0[v]);
    if constexpr (kPair) store<T>(second + v * kStep, sum1[v]);
  }
}

template <bool kPair, class T>
static void uniform_rows(const UniformKernel<T>& kernel, const T* from, int64_t row_stride,
                         int64_t shift, int64_t wide, T* first, T* second) {
  int64_t x = 0;
  for (; x + kUniformTile * kLanes<T> <= wide; x += kUniformTile * kLanes<T>) {
    uniform_tile<kUniformTile, kPair>(kernel, from + x, row_stride, shift, first + x, second + x);
  }
  for (; x < wide; x += kLanes<T>) {
    uniform_tile<1, kPair>(kernel, from + x, row_stride, shift, first + x, second + x);
  }
}

// `count` output rows, `shift` input rows apart, each of `wide` columns; row y goes to to(y).
template <class T, class To>
static void blur_rows(const UniformKernel<T>& kernel, const T* from, int64_t row_stride,
                      int64_t shift, int64_t wide, int64_t count, const To& to) {
  from += kernel.first_row * row_stride;
  int64_t y = 0;
  for (; y + 2 <= count; y += 2) {
    uniform_rows<true>(kernel, from + y * shift * row_stride, row_stride, shift, wide, to(y),
                       to(y + 1));
  }
  if (y < count)
    uniform_rows<false>(kernel, from + y * shift * row_stride, row_stride, shift, wide, to(y),
                        to(y));
}

// sum_m weights[b, m] K'_m.
template <class T>
static Buffer<T> mix_kernels(const DegradeProblem& p, const Buffer<T>& kernels) {
  Buffer<T> mixed(p.batch * p.num_taps()), weights(p.num_kernels);
  for (int64_t b = 0; b < p.batch; ++b) {
    load_row(p.weights, b * p.weights.stride[0], p.weights.stride[1], p.num_kernels, weights.get());
    const T* bank = kernels_of(p, kernels, b);
    T* to = mixed.get() + b * p.num_taps();
    for (int64_t m = 0; m < p.num_kernels; ++m) {
      for (int64_t tap = 0; tap < p.num_taps(); ++tap)
        to[tap] += weights[m] * bank[m * p.num_taps() + tap];
    }
  }
  return mixed;
}

template <class T>
static void forward_uniform_direct(const DegradeProblem& p, const Output& out,
                                   const Threads& threads) {
  const ForwardTasks<T> tasks(p, 1, p.batch * p.channels, threads);
  const PaddedLayout& layout = tasks.layout;
  const Buffer<T> mixed = mix_kernels(p, load_kernels<T>(p));
  std::vector<UniformKernel<T>> kernels;
  for (int64_t b = 0; b < p.batch; ++b) {
    kernels.emplace_back(mixed.get() + b * p.num_taps(), p.kernel_size, p.kernel_size,
                         [&](int64_t j) { return layout.column(j); });
  }

  threads.parallel_for(p.batch * p.channels * tasks.count(), [&](int64_t begin, int64_t end) {
    Buffer<T> padded(tasks.padded_rows(tasks.rows) * layout.row), line(p.width);
    Buffer<T> result(tasks.rows * layout.wide);
    OutputRows<T> output_rows(p, out);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / tasks.count(), strip = task % tasks.count() / tasks.per_strip;
      const int64_t b = plane / p.channels, c = plane % p.channels;
      const int64_t y0 = task % tasks.per_strip * tasks.rows, x0 = strip * tasks.columns;
      const int64_t count = std::min(tasks.rows, p.out_height - y0);
      for (int64_t i = 0; i < tasks.padded_rows(count); ++i) {
        load_padded_row(p, layout, tasks.maps[strip], b, c, y0 * p.scale + i, line.get(),
                        padded.get() + i * layout.row);
      }
      const auto row_of = [&](int64_t y) { return result.get() + y * layout.wide; };
      blur_rows(kernels[b], padded.get(), layout.row, p.scale, layout.wide, count, row_of);
      for (int64_t y = 0; y < count; ++y)
        output_rows.finish(b, c, y0 + y, x0, std::min(tasks.columns, p.out_width - x0), row_of(y));
    }
  });
}

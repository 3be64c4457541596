// The backward pass of degrade.
//
// One of the parts of degrade_kernel.h, which includes it.

template <class T>
static void backward_noise_std(const DegradeProblem& p, const DegradeGradients& g,
                               const Threads& threads) {
  // A row at a time: summed over the channels for a map, and over the row's pixels too for a
  // number.
  Buffer<T> row_sums(p.noise_map ? 0 : p.batch * p.out_height);
  threads.parallel_for(p.batch * p.out_height, [&](int64_t begin, int64_t end) {
    Buffer<T> noise(noise_row_size(p.out_width)), grad(p.out_width), sum(p.out_width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.out_height, y = task % p.out_height;
      std::memset(sum.get(), 0, p.out_width * sizeof(T));
      for (int64_t c = 0; c < p.channels; ++c) {
        noise_row(p, b, c, y, 0, p.out_width, noise.get());
        load_row(g.grad, offset_of(g.grad.stride, b, c, y), g.grad.stride[3], p.out_width,
                 grad.get());
        for (int64_t x = 0; x < p.out_width; ++x) sum[x] += grad[x] * noise[x];
      }
      if (p.noise_map) {
        store_row(g.noise_std, offset_of(g.noise_std.stride, b, 0, y), 1, p.out_width, sum.get());
      } else {
        for (int64_t x = 0; x < p.out_width; ++x) row_sums[task] += sum[x];
      }
    }
  });
  if (p.noise_map) return;
  for (int64_t b = 0; b < p.batch; ++b) {
    T total = 0;
    for (int64_t y = 0; y < p.out_height; ++y) total += row_sums[b * p.out_height + y];
    store_row(g.noise_std, b * g.noise_std.stride[0], 1, 1, &total);
  }
}

// to[j * kScale + q] = planes[q][j].
template <int kScale, class T>
static void interleave_planes(const T* planes, int64_t plane, int64_t count, T* to) {
  for (int64_t j = 0; j < count; ++j) {
    for (int q = 0; q < kScale; ++q) to[j * kScale + q] = planes[q * plane + j];
  }
}

// Adds a row of the padded image's gradient, in the layout's planes, to one of the image's, `sum`.
template <class T>
static void fold_row(const DegradeProblem& p, const PaddedLayout& layout, const ColumnMap& map,
                     const T* planes, T* sum) {
  // Columns of the padded image that are columns of the image, and of these whole rounds of planes.
  const int64_t s = p.scale, origin = p.origin(), first = std::max<int64_t>(-origin, 0);
  const int64_t last = std::clamp(p.width - origin, first, std::max(first, layout.columns));
  const int64_t from = std::min(round_up(first, s), last), until = std::max(from, last / s * s);
  const auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sum[i + origin] = planes[layout.column(i)];
  };
  const auto interleave = [&](auto run) {
    run(planes + from / s, layout.plane, (until - from) / s, sum + from + origin);
  };
  std::memset(sum, 0, p.width * sizeof(T));
  copy(first, from);
  switch (s) {
    case 1:
      interleave(interleave_planes<1, T>);
      break;
    case 2:
      interleave(interleave_planes<2, T>);
      break;
    case 4:
      interleave(interleave_planes<4, T>);
      break;
    default:
      copy(from, until);
  }
  copy(until, last);
  for (int64_t q = 0; q < s; ++q) {
    const int64_t* source = map.source.data() + q * layout.plane;
    const auto add_mapped = [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        if (source[j] >= 0) sum[source[j]] += planes[q * layout.plane + j];
      }
    };
    add_mapped(0, map.first[q]);
    add_mapped(map.last[q], layout.columns_of(q));
  }
}

// The adjoint of padding. `padded` is [batch][bands][channels][rows][layout.row].
template <class T>
static void fold_image(const DegradeProblem& p, const DegradeGradients& g,
                       const PaddedLayout& layout, const ColumnMap& map, const Buffer<T>& padded,
                       int64_t bands, int64_t step, int64_t rows, const Threads& threads) {
  const RowFold fold(p, bands, step, rows);
  threads.parallel_for(p.batch * p.height, [&](int64_t begin, int64_t end) {
    Buffer<T> sum(p.width), planes(layout.row);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / p.height, y = task % p.height;
      for (int64_t c = 0; c < p.channels; ++c) {
        std::memset(planes.get(), 0, layout.row * sizeof(T));
        for (int64_t n = fold.begin[y]; n < fold.begin[y + 1]; ++n) {
          const auto [band, row] = fold.sources[n];
          const T* from =
              padded.get() + (((b * bands + band) * p.channels + c) * rows + row) * layout.row;
          for (int64_t i = 0; i < layout.row; ++i) planes[i] += from[i];
        }
        fold_row(p, layout, map, planes.get(), sum.get());
        store_row(g.image, offset_of(g.image.stride, b, c, y), g.image.stride[3], p.width,
                  sum.get());
      }
    }
  });
}

// Stores gradients [B|1][M][k * k] of oriented kernels.
template <class T>
static void store_kernels(const DegradeProblem& p, const DegradeGradients& g,
                          const Buffer<T>& oriented) {
  const int64_t k = p.kernel_size;
  Buffer<T> line(k);
  for (int64_t bank = 0; bank < p.num_banks(); ++bank) {
    for (int64_t m = 0; m < p.num_kernels; ++m) {
      const T* from = kernels_of(p, oriented, bank) + m * p.num_taps();
      for (int64_t row = 0; row < k; ++row) {
        for (int64_t column = 0; column < k; ++column) {
          const int64_t a = p.correlation ? row : k - 1 - row;
          const int64_t b = p.correlation ? column : k - 1 - column;
          line[column] = from[b * k + a];
        }
        store_row(g.kernels, offset_of(g.kernels.stride, bank, m, row), 1, k, line.get());
      }
    }
  }
}

// ---- Weights that vary over the image

// A block of output rows of one sample; pixel = row * wide + column.
template <class T>
struct PixelBlock {
  int64_t pixels;
  int64_t stride;    // from one kernel, channel or tap to the next, below
  const T* weights;  // [M]
  const T* grad;     // [C]
  T* weight_grad;    // [M], or nullptr
  T* product;        // [kBlockTaps], or nullptr
};

template <int kTaps, int kVectors, class T>
DDRF_INLINE void backward_tile(const Bank<T>& bank, const typename Bank<T>::Block& block,
                               const PixelBlock<T>& at, int64_t pixel, const T* site, T* site_grad,
                               int64_t channel_stride, int64_t channels) {
  constexpr int kStep = kLanes<T>;
  const int64_t* offset = bank.offsets.data() + block.tap;
  if (site_grad) {
    Vector<T> mixed[kTaps][kVectors];
    mix<kTaps, kVectors>(bank, block, at.weights + pixel, at.stride, mixed);
    for (int64_t c = 0; c < channels; ++c) {
      Vector<T> grad[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        load<T>(grad[v], at.grad + c * at.stride + pixel + v * kStep);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) {
        T* to = site_grad + c * channel_stride + offset[t];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) {
          Vector<T> sum;
          load<T>(sum, to + v * kStep);
          sum += mixed[t][v] * grad[v];
          store<T>(to + v * kStep, sum);
        }
      }
    }
  }
  if (!at.weight_grad && !at.product) return;

  Vector<T> product[kTaps][kVectors];
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) product[t][v] = Vector<T>{};
  }
  for (int64_t c = 0; c < channels; ++c) {
    Vector<T> grad[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v)
      load<T>(grad[v], at.grad + c * at.stride + pixel + v * kStep);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
      const T* from = site + c * channel_stride + offset[t];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> pixels;
        load<T>(pixels, from + v * kStep);
        product[t][v] += grad[v] * pixels;
      }
    }
  }
  if (at.weight_grad) {
    const int64_t* index = bank.index.data() + block.index;
    const T* coefficient = bank.coefficients.data() + block.coefficient;
    for (int64_t j = 0; j < block.active; ++j, coefficient += kTaps) {
      T* to = at.weight_grad + index[j] * at.stride + pixel;
      Vector<T> sum[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) load<T>(sum[v], to + v * kStep);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[v] += product[t][v] * coefficient[t];
      }
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store<T>(to + v * kStep, sum[v]);
    }
  }
  if (at.product) {
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        store<T>(at.product + t * at.stride + pixel + v * kStep, product[t][v]);
    }
  }
}

// kernel_grad[m][taps[t]] += sum over the pixels of weights_m product[t], for kKernels kernels from
// `m` on.
template <int kTaps, int kKernels, class T>
DDRF_INLINE void add_kernel_grad(const PixelBlock<T>& at, int64_t m, const int64_t* taps,
                                 int64_t num_taps, T* kernel_grad) {
  Vector<T> sum[kKernels][kTaps];
#pragma GCC unroll 8
  for (int n = 0; n < kKernels; ++n) {
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) sum[n][t] = Vector<T>{};
  }
  for (int64_t pixel = 0; pixel < at.pixels; pixel += kLanes<T>) {
    Vector<T> weight[kKernels];
#pragma GCC unroll 8
    for (int n = 0; n < kKernels; ++n) load<T>(weight[n], at.weights + (m + n) * at.stride + pixel);
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t) {
      Vector<T> product;
      load<T>(product, at.product + t * at.stride + pixel);
#pragma GCC unroll 8
      for (int n = 0; n < kKernels; ++n) sum[n][t] += weight[n] * product;
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < kKernels; ++n) {
#pragma GCC unroll 8
    for (int t = 0; t < kTaps; ++t)
      kernel_grad[(m + n) * num_taps + taps[t]] += sum_lanes<T>(sum[n][t]);
  }
}

template <int kTaps, class T>
static void backward_block(const Bank<T>& bank, const typename Bank<T>::Block& block,
                           const PixelBlock<T>& at, int64_t wide, const T* sites, T* sites_grad,
                           int64_t site_row, int64_t channel_stride, int64_t channels,
                           int64_t num_kernels, int64_t num_taps, T* kernel_grad) {
  for (int64_t row = 0; row * wide < at.pixels; ++row) {
    const T* site = sites + row * site_row;
    T* site_grad = sites_grad ? sites_grad + row * site_row : nullptr;
    int64_t x = 0;
    for (; x + kTile * kLanes<T> <= wide; x += kTile * kLanes<T>) {
      backward_tile<kTaps, kTile>(bank, block, at, row * wide + x, site + x,
                                  site_grad ? site_grad + x : nullptr, channel_stride, channels);
    }
    for (; x < wide; x += kLanes<T>) {
      backward_tile<kTaps, 1>(bank, block, at, row * wide + x, site + x,
                              site_grad ? site_grad + x : nullptr, channel_stride, channels);
    }
  }
  if (!at.product) return;
  const int64_t* taps = bank.taps.data() + block.tap;
  int64_t m = 0;
  for (; m + 2 <= num_kernels; m += 2)
    add_kernel_grad<kTaps, 2>(at, m, taps, num_taps, kernel_grad);
  if (m < num_kernels) add_kernel_grad<kTaps, 1>(at, m, taps, num_taps, kernel_grad);
}

// Sums each grid point's share of the sites [B][M][H'][W'].
template <class T>
static void gather_to_grid(const DegradeProblem& p, const DegradeGradients& g,
                           const Buffer<T>& sites, const Threads& threads) {
  const GridColumns<T> columns(p);
  const auto place_of = [&](int64_t y) {
    return grid_place<T>(y * p.scale + p.offset, p.height, p.grid_height);
  };
  threads.parallel_for(p.batch * p.num_kernels, [&](int64_t begin, int64_t end) {
    Buffer<T> grid(p.grid_height * p.grid_width), low(p.out_width), high(p.out_width);
    for (int64_t task = begin; task < end; ++task) {
      std::memset(grid.get(), 0, p.grid_height * p.grid_width * sizeof(T));
      for (int64_t y = 0; y < p.out_height;) {  // the rows between the same two of the grid
        std::memset(low.get(), 0, p.out_width * sizeof(T));
        std::memset(high.get(), 0, p.out_width * sizeof(T));
        const GridPlace<T> first = place_of(y);
        for (; y < p.out_height; ++y) {
          const GridPlace<T> place = place_of(y);
          if (place.low != first.low) break;
          const T* from = sites.get() + (task * p.out_height + y) * p.out_width;
          for (int64_t x = 0; x < p.out_width; ++x) {
            low[x] += (T(1) - place.fraction) * from[x];
            high[x] += place.fraction * from[x];
          }
        }
        columns.gather(low.get(), grid.get() + first.low * p.grid_width);
        columns.gather(high.get(), grid.get() + first.high * p.grid_width);
      }
      const int64_t b = task / p.num_kernels, m = task % p.num_kernels;
      for (int64_t y = 0; y < p.grid_height; ++y) {
        store_row(g.weights, offset_of(g.weights.stride, b, m, y), 1, p.grid_width,
                  grid.get() + y * p.grid_width);
      }
    }
  });
}

// Where the gradient of the weights at the sites goes: a grid's is gathered first.
template <class T>
class SiteGradients {
 public:
  SiteGradients(const DegradeProblem& p, const Output& weights)
      : p_(p),
        weights_(weights),
        sites_(weights.data && p.weights_at == WeightsAt::kGrid
                   ? p.batch * p.num_kernels * p.out_height * p.out_width
                   : 0) {}

  // `count` numbers from column x0 on.
  void store(int64_t b, int64_t m, int64_t y, int64_t x0, int64_t count, const T* from) const {
    const auto& s = weights_.stride;
    if (p_.weights_at == WeightsAt::kGrid) {
      std::memcpy(sites_.get() + ((b * p_.num_kernels + m) * p_.out_height + y) * p_.out_width + x0,
                  from, count * sizeof(T));
    } else if (p_.weights_at == WeightsAt::kImage) {  // elsewhere it is zero already
      const int64_t start = offset_of(s, b, m, y * p_.scale + p_.offset) + p_.offset;
      store_row(weights_, start + x0 * p_.scale, p_.scale, count, from);
    } else {
      store_row(weights_, offset_of(s, b, m, y) + x0, 1, count, from);
    }
  }

  const Buffer<T>& sites() const { return sites_; }

 private:
  const DegradeProblem& p_;
  const Output& weights_;
  Buffer<T> sites_;
};

// Adds up partial gradients of the banks [B][parts], each [M][k * k].
template <class T>
static void sum_banks(const DegradeProblem& p, const Buffer<T>& partial, int64_t parts,
                      Buffer<T>& sum) {
  const int64_t bank_size = p.num_kernels * p.num_taps();
  for (int64_t n = 0; n < p.batch * parts; ++n) {
    T* to = sum.get() + (p.kernels_per_sample ? n / parts * bank_size : 0);
    for (int64_t i = 0; i < bank_size; ++i) to[i] += partial[n * bank_size + i];
  }
}

// Fills `site_grad` and `kernel_grad` [B|1][M][k * k] of the gradients that are asked for, stores
// those of the image.
template <class T>
static void backward_mixed_direct(const DegradeProblem& p, const DegradeGradients& g,
                                  const WeightRows<T>& weight_rows, const Buffer<T>& kernels,
                                  Buffer<T>& kernel_grad, const SiteGradients<T>& site_grad,
                                  const Threads& threads) {
  constexpr int64_t kPixels =
      1024;  // in a block: enough to hide the sums over lanes, and within the caches
  const PaddedLayout layout(p, kLanes<T>);
  const ColumnMap map(p, layout);
  const std::vector<Bank<T>> banks =
      make_banks(p, layout, kernels, /*keep_all=*/g.kernels.data != nullptr);
  const Bands bands(p);
  const int64_t rows = std::clamp<int64_t>(kPixels / layout.wide, 1, bands.rows),
                pixels = rows * layout.wide;
  const int64_t channel_stride = bands.padded_rows(p) * layout.row;
  const int64_t bank_size = p.num_kernels * p.num_taps();

  const Buffer<T> image_grad = Buffer<T>::uninitialised(
      g.image.data ? p.batch * bands.count * p.channels * channel_stride : 0);
  const Buffer<T> partial(g.kernels.data ? p.batch * bands.count * bank_size : 0);

  threads.parallel_for(p.batch * bands.count, [&](int64_t begin, int64_t end) {
    const bool product = g.kernels.data || g.weights.data;
    Buffer<T> padded(product ? p.channels * channel_stride : 0), line(p.width);
    Buffer<T> scratch(weight_rows.scratch_size());
    Buffer<T> weights(p.num_kernels * pixels), grad(p.channels * pixels);
    Buffer<T> weight_grad(g.weights.data ? p.num_kernels * pixels : 0);
    Buffer<T> products(g.kernels.data ? kBlockTaps * pixels : 0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / bands.count, band = task % bands.count;
      const int64_t y0 = band * bands.rows, y1 = std::min(y0 + bands.rows, p.out_height);
      const Bank<T>& bank = banks[p.kernels_per_sample ? b : 0];
      T* band_grad = g.image.data ? image_grad.get() + task * p.channels * channel_stride : nullptr;
      if (band_grad) std::memset(band_grad, 0, p.channels * channel_stride * sizeof(T));
      for (int64_t c = 0; product && c < p.channels; ++c) {
        for (int64_t i = 0; i < (y1 - y0 - 1) * p.scale + p.kernel_size; ++i) {
          load_padded_row(p, layout, map, b, c, y0 * p.scale + i, line.get(),
                          padded.get() + c * channel_stride + i * layout.row);
        }
      }
      for (int64_t y = y0; y < y1; y += rows) {
        const int64_t count = std::min(rows, y1 - y);
        for (int64_t row = 0; row < count; ++row) {
          weight_rows.load(b, y + row, 0, p.out_width, scratch.get(),
                           weights.get() + row * layout.wide, pixels);
          for (int64_t c = 0; c < p.channels; ++c) {
            load_row(g.grad, offset_of(g.grad.stride, b, c, y + row), g.grad.stride[3], p.out_width,
                     grad.get() + c * pixels + row * layout.wide);
          }
        }
        if (g.weights.data) std::memset(weight_grad.get(), 0, p.num_kernels * pixels * sizeof(T));
        const PixelBlock<T> at{count * layout.wide,
                               pixels,
                               weights.get(),
                               grad.get(),
                               g.weights.data ? weight_grad.get() : nullptr,
                               g.kernels.data ? products.get() : nullptr};
        const int64_t place = (y - y0) * p.scale * layout.row;
        T* sites_grad = band_grad ? band_grad + place : nullptr;
        for (const auto& block : bank.blocks) {
          const auto run =
              block.taps == kBlockTaps ? backward_block<kBlockTaps, T> : backward_block<1, T>;
          run(bank, block, at, layout.wide, padded.get() + place, sites_grad, p.scale * layout.row,
              channel_stride, p.channels, p.num_kernels, p.num_taps(),
              partial.get() + task * bank_size);
        }
        for (int64_t m = 0; g.weights.data && m < p.num_kernels; ++m) {
          for (int64_t row = 0; row < count; ++row) {
            site_grad.store(b, m, y + row, 0, p.out_width,
                            weight_grad.get() + m * pixels + row * layout.wide);
          }
        }
      }
    }
  });

  if (g.image.data) {
    fold_image(p, g, layout, map, image_grad, bands.count, bands.rows * p.scale,
               bands.padded_rows(p), threads);
  }
  if (g.kernels.data) sum_banks(p, partial, bands.count, kernel_grad);
}

// ---- One kernel for the whole sample

// The gradient of the padded image. What has the same residues modulo the scale is a plain blur of
// `grad` with every scale-th tap, so nothing is scattered.
template <class T>
static void backward_uniform_image(const DegradeProblem& p, const DegradeGradients& g,
                                   const Buffer<T>& mixed, const Threads& threads) {
  constexpr int64_t kRows = 32;  // rows of one residue in a task
  const PaddedLayout layout(p, kLanes<T>);
  const ColumnMap map(p, layout);
  const int64_t k = p.kernel_size, s = p.scale,
                reach = (k - 1) / s;  // taps of one residue, less one
  const int64_t row_stride = round_up(layout.plane + reach, kLanes<T>);
  const int64_t per_plane = divide_up(p.out_height + reach, kRows);

  // Kernels [b][row residue][column residue], backwards; those of a short residue begin with zeros.
  std::vector<UniformKernel<T>> kernels;
  Buffer<T> part((reach + 1) * (reach + 1));
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t qa = 0; qa < s; ++qa) {
      for (int64_t qb = 0; qb < s; ++qb) {
        for (int64_t i = 0; i <= reach; ++i) {
          for (int64_t j = 0; j <= reach; ++j) {
            const int64_t a_tap = qa + s * (reach - i), b_tap = qb + s * (reach - j);
            const bool exists = a_tap < k && b_tap < k;
            part[j * (reach + 1) + i] = exists ? mixed[b * k * k + b_tap * k + a_tap] : T(0);
          }
        }
        kernels.emplace_back(part.get(), reach + 1, reach + 1, [](int64_t j) { return j; });
      }
    }
  }

  const auto image_grad =
      Buffer<T>::uninitialised(p.batch * p.channels * p.padded_height() * layout.row);
  threads.parallel_for(p.batch * p.channels * per_plane, [&](int64_t begin, int64_t end) {
    Buffer<T> grad((kRows + reach) * row_stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / per_plane, b = plane / p.channels, c = plane % p.channels;
      const int64_t i0 = task % per_plane * kRows;
      for (int64_t i = 0; i < kRows + reach; ++i) {
        const int64_t y = i0 + i - reach;
        T* to = grad.get() + i * row_stride;
        if (y >= 0 && y < p.out_height) {
          load_row(g.grad, offset_of(g.grad.stride, b, c, y), g.grad.stride[3], p.out_width,
                   to + reach);
        } else {
          std::memset(to, 0, row_stride * sizeof(T));
        }
      }
      for (int64_t qa = 0; qa < s; ++qa) {
        const int64_t total = qa < p.padded_height() ? divide_up(p.padded_height() - qa, s) : 0;
        const int64_t count = std::clamp<int64_t>(total - i0, 0, kRows);
        for (int64_t qb = 0; qb < s; ++qb) {
          const int64_t wide = round_up(layout.columns_of(qb), kLanes<T>);
          T* to = image_grad.get() + (plane * p.padded_height() + qa + s * i0) * layout.row +
                  qb * layout.plane;
          blur_rows(kernels[(b * s + qa) * s + qb], grad.get(), row_stride, 1, wide, count,
                    [&](int64_t i) { return to + i * s * layout.row; });
        }
      }
    }
  });
  fold_image(p, g, layout, map, image_grad, 1, 0, p.padded_height(), threads);
}

// sums[tap] += sum over the pixels of grad * (the padded image at the tap), for kTaps taps.
template <int kTaps, class T>
DDRF_INLINE void correlate(const T* grad, const T* padded, int64_t rows, int64_t wide,
                           int64_t site_row, const int64_t* offsets, T* sums) {
  Vector<T> sum[kTaps];
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) sum[t] = Vector<T>{};
  for (int64_t row = 0; row < rows; ++row) {
    const T* from = padded + row * site_row;
    for (int64_t x = 0; x < wide; x += kLanes<T>) {
      Vector<T> g;
      load<T>(g, grad + row * wide + x);
#pragma GCC unroll 8
      for (int t = 0; t < kTaps; ++t) {
        Vector<T> pixels;
        load<T>(pixels, from + offsets[t] + x);
        sum[t] += g * pixels;
      }
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTaps; ++t) sums[t] += sum_lanes<T>(sum[t]);
}

// The gradient [B][k * k] of each sample's mixed kernel.
template <class T>
static void backward_uniform_kernels(const DegradeProblem& p, const DegradeGradients& g,
                                     Buffer<T>& mixed_grad, const Threads& threads) {
  constexpr int64_t kPixels = 2048;  // within the first cache, with the image around them
  constexpr int kTaps = 8;
  const PaddedLayout layout(p, kLanes<T>);
  const ColumnMap map(p, layout);
  const Bands bands(p);
  const int64_t rows = std::clamp<int64_t>(kPixels / layout.wide, 1, bands.rows),
                num_taps = p.num_taps();
  std::vector<int64_t> offsets;
  for (int64_t tap = 0; tap < num_taps; ++tap) {
    offsets.push_back(tap % p.kernel_size * layout.row + layout.column(tap / p.kernel_size));
  }

  Buffer<T> partial(p.batch * bands.count * num_taps);
  threads.parallel_for(p.batch * bands.count, [&](int64_t begin, int64_t end) {
    Buffer<T> padded(((rows - 1) * p.scale + p.kernel_size) * layout.row), line(p.width);
    Buffer<T> grad(rows * layout.wide);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / bands.count, y0 = task % bands.count * bands.rows;
      const int64_t y1 = std::min(y0 + bands.rows, p.out_height);
      T* sums = partial.get() + task * num_taps;
      for (int64_t c = 0; c < p.channels; ++c) {
        for (int64_t y = y0; y < y1; y += rows) {
          const int64_t count = std::min(rows, y1 - y);
          for (int64_t i = 0; i < (count - 1) * p.scale + p.kernel_size; ++i) {
            load_padded_row(p, layout, map, b, c, y * p.scale + i, line.get(),
                            padded.get() + i * layout.row);
          }
          for (int64_t row = 0; row < count; ++row) {
            load_row(g.grad, offset_of(g.grad.stride, b, c, y + row), g.grad.stride[3], p.out_width,
                     grad.get() + row * layout.wide);
          }
          int64_t tap = 0;
          for (; tap + kTaps <= num_taps; tap += kTaps) {
            correlate<kTaps>(grad.get(), padded.get(), count, layout.wide, p.scale * layout.row,
                             offsets.data() + tap, sums + tap);
          }
          for (; tap < num_taps; ++tap) {
            correlate<1>(grad.get(), padded.get(), count, layout.wide, p.scale * layout.row,
                         offsets.data() + tap, sums + tap);
          }
        }
      }
    }
  });

  for (int64_t task = 0; task < p.batch * bands.count; ++task) {
    T* to = mixed_grad.get() + task / bands.count * num_taps;
    for (int64_t tap = 0; tap < num_taps; ++tap) to[tap] += partial[task * num_taps + tap];
  }
}

// Forward and backward of degrade through the Fourier transform, for large kernels.
//
// One of the parts of degrade_kernel.h, which includes it. The output is cut into tiles; what a
// tile reads is transformed whole, multiplied by the spectra of the kernels, and only sums that do
// not wrap around are kept (overlap-save). Two tiles go through a transform at once, as the real
// and the imaginary part: the kernels are real, so the parts stay apart. With P the spectrum of a
// tile of the padded image, K that of a kernel (conjugate, over the number of pixels) and S that of
// weights_m grad_c at the sites,
//
//   output      sum_m weights_m IFFT(P_c K_m)           d image_c    IFFT(sum_m S_mc conj(K_m))
//   d weights_m sum_c grad_c IFFT(P_c K_m)              d kernels_m  Re IFFT(sum_c P_c conj(S_mc))
//
// At a scale s, only every s-th sum is wanted: the spectrum is folded s times along each axis, and
// the inverse is s^2 times smaller. The spectrum of what is zero between the sites repeats.
//
// A transform mixes all numbers of a tile. Those beyond kFourierLimit, and what is not a number,
// would spoil their neighbours, so they are looked for, and the call is left to the direct sums.

constexpr double kFourierLimit = 1e12;

template <class T>
static bool within_limit(const T* numbers, int64_t count) {
  int beyond = 0;
  for (int64_t i = 0; i < count; ++i) beyond |= !(std::fabs(numbers[i]) <= T(kFourierLimit));
  return !beyond;
}

// A tile's place among the outputs.
struct SiteTile {
  int64_t y, x, rows, columns;
};

template <class T>
class Fourier {
 public:
  using Scratch = FftScratch<T>;

  Fourier(const DegradeProblem& p, const FourierTiles& tiles)
      : p_(p),
        tiles_(tiles),
        pixels_{Fft<T>::of(tiles.y.length), Fft<T>::of(tiles.x.length)},
        sites_{Fft<T>::of(tiles.y.length / p.scale), Fft<T>::of(tiles.x.length / p.scale)} {}

  // Pixels of a tile; a spectrum or a pair of tiles is two such planes, real and imaginary.
  int64_t area() const { return tiles_.area(); }
  // Sites of a tile, with rows of whole vectors.
  int64_t site_stride() const { return round_up(tiles_.x.sites, kLanes<T>); }
  int64_t site_area() const { return tiles_.y.sites * site_stride(); }
  Scratch scratch() const { return Scratch(std::max(tiles_.y.length, tiles_.x.length), area()); }

  SiteTile tile(int64_t index) const {
    if (index >= tiles_.count()) return {0, 0, 0, 0};
    const int64_t y = index / tiles_.x.count * tiles_.y.sites;
    const int64_t x = index % tiles_.x.count * tiles_.x.sites;
    return {y, x, std::min(tiles_.y.sites, p_.out_height - y),
            std::min(tiles_.x.sites, p_.out_width - x)};
  }

  // The spectra of `count` oriented kernels.
  Buffer<T> kernel_spectra(const T* oriented, int64_t count, const Threads& threads) const {
    const int64_t k = p_.kernel_size;
    const T norm = T(1) / static_cast<T>(area());
    auto spectra = Buffer<T>::uninitialised(count * 2 * area());
    threads.parallel_for(count, [&](int64_t begin, int64_t end) {
      Scratch scratch = this->scratch();
      for (int64_t m = begin; m < end; ++m) {
        const T* kernel = oriented + m * k * k;
        const auto load_columns = [&](int64_t column, const Columns<T>& to) {
          std::memset(to.re, 0, tiles_.y.length * kLanes<T> * sizeof(T));
          std::memset(to.im, 0, tiles_.y.length * kLanes<T> * sizeof(T));
          for (int64_t b = column; b < std::min<int64_t>(column + kLanes<T>, k); ++b) {
            for (int64_t a = 0; a < k; ++a) to.re[a * kLanes<T> + b - column] = kernel[b * k + a];
          }
          return to;
        };
        T* spectrum = spectra.get() + m * 2 * area();
        const auto store_columns = [&](int64_t row, const Columns<T> from) {
          const Columns<T> to = spectrum_columns(spectrum, row);
          for (int64_t i = 0; i < tiles_.x.length; ++i) {
            const Complex<T> x = from[i] * norm;
            to.put(i, {x.re, -x.im});
          }
        };
        scratch.transform(pixels_.y, pixels_.x, k, tiles_.y.length, load_columns, store_columns);
      }
    });
    return spectra;
  }

  // What a tile reads of the padded image; false if some of it is beyond the limit.
  bool load_pixels(int64_t b, int64_t c, const SiteTile& tile, T* to) const {
    const int64_t width = tiles_.x.length, origin = p_.origin() + tile.x * p_.scale;
    const int64_t shown =
        std::clamp<int64_t>(p_.padded_width() - tile.x * p_.scale, 0, tile.rows ? width : 0);
    const int64_t first = std::clamp<int64_t>(-origin, 0, shown);
    const int64_t last = std::clamp<int64_t>(p_.width - origin, first, shown);
    bool within = true;
    for (int64_t i = 0; i < tiles_.y.length; ++i, to += width) {
      const int64_t row = tile.y * p_.scale + i;
      const int64_t y = tile.rows && row < p_.padded_height()
                            ? source_index(row + p_.origin(), p_.height, p_.padding)
                            : -1;
      if (y < 0) {
        std::memset(to, 0, width * sizeof(T));
        continue;
      }
      const int64_t start = offset_of(p_.image.stride, b, c, y), step = p_.image.stride[3];
      const auto load_outside = [&](int64_t from, int64_t end) {
        for (int64_t j = from; j < end; ++j) {
          const int64_t x = source_index(origin + j, p_.width, p_.padding);
          if (x < 0) {
            to[j] = 0;
          } else {
            load_row(p_.image, start + x * step, step, 1, to + j);
          }
        }
      };
      load_outside(0, first);
      load_row(p_.image, start + (origin + first) * step, step, last - first, to + first);
      load_outside(last, shown);
      std::memset(to + shown, 0, (width - shown) * sizeof(T));
      within &= within_limit(to, shown);
    }
    return within;
  }

  // The spectrum of a pair of tiles.
  void transform_pixels(Scratch& scratch, T* pixels, T* spectrum) const {
    const auto load_columns = [&](int64_t column, const Columns<T>&) {
      return Columns<T>{pixels + column, pixels + area() + column, tiles_.x.length};
    };
    const auto store_columns = [&](int64_t row) { return spectrum_columns(spectrum, row); };
    scratch.transform(pixels_.y, pixels_.x, tiles_.x.length, tiles_.y.length, load_columns,
                      store_columns);
  }

  // The inverse of a spectrum, up to `wanted` columns: store(column, values) vectors of columns.
  template <class Store>
  void inverse(Scratch& scratch, T* spectrum, int64_t wanted, const Store& store_values) const {
    const auto load_columns = [&](int64_t column, const Columns<T>&) {
      return spectrum_columns(spectrum, column).exchanged();
    };
    const auto store_columns = [&](int64_t column, const Columns<T>& from) {
      store_values(column, from.exchanged());
    };
    scratch.transform(pixels_.x, pixels_.y, tiles_.y.length, wanted, load_columns, store_columns);
  }

  // The image of the spectrum `pixels`, blurred with the kernel of the spectrum `kernel`, at the
  // sites: store(column, values) vectors of columns.
  template <class Store>
  void blur(Scratch& scratch, T* pixels, T* kernel, const Store& store_values) const {
    const auto load_columns = [&](int64_t column, const Columns<T> to) {
      for (int64_t fold = 0; fold < p_.scale * p_.scale; ++fold) {
        const Columns<T> of_pixels = spectrum_columns(pixels, column, fold);
        const Columns<T> of_kernel = spectrum_columns(kernel, column, fold);
        for (int64_t i = 0; i < sites_.x.length; ++i) {
          const Complex<T> x = of_pixels[i], k = of_kernel[i];
          const Complex<T> product{x.re * k.re - x.im * k.im, x.re * k.im + x.im * k.re};
          to.put(i, fold > 0 ? to[i] + product : product);
        }
      }
      return to.exchanged();
    };
    const auto store_columns = [&](int64_t column, const Columns<T>& from) {
      store_values(column, from.exchanged());
    };
    scratch.transform(sites_.x, sites_.y, sites_.y.length, tiles_.x.sites, load_columns,
                      store_columns);
  }

  // With S the spectrum of a pair of values at the sites, load(column, to) columns of both: adds
  // S conj(kernel) to `image_grad`, and pixels conj(S) to `kernel_grad`, where these are asked for.
  template <class Load>
  void correlate(Scratch& scratch, const Load& load_values, T* pixels, T* kernel, T* image_grad,
                 T* kernel_grad) const {
    const auto load_columns = [&](int64_t column, const Columns<T>& to) {
      load_values(column, to);
      const int64_t used = tiles_.y.sites * kLanes<T>;
      const int64_t rest = sites_.y.length * kLanes<T> - used;
      std::memset(to.re + used, 0, rest * sizeof(T));
      std::memset(to.im + used, 0, rest * sizeof(T));
      return to;
    };
    const auto store_columns = [&](int64_t column, const Columns<T> from) {
      for (int64_t fold = 0; fold < p_.scale * p_.scale; ++fold) {
        if (image_grad) {
          const Columns<T> of_kernel = spectrum_columns(kernel, column, fold);
          const Columns<T> sum = spectrum_columns(image_grad, column, fold);
          for (int64_t i = 0; i < sites_.x.length; ++i) {
            const Complex<T> s = from[i], k = of_kernel[i];
            sum.put(i, sum[i] + Complex<T>{s.re * k.re + s.im * k.im, s.im * k.re - s.re * k.im});
          }
        }
        if (kernel_grad) {
          const Columns<T> of_pixels = spectrum_columns(pixels, column, fold);
          const Columns<T> sum = spectrum_columns(kernel_grad, column, fold);
          for (int64_t i = 0; i < sites_.x.length; ++i) {
            const Complex<T> s = from[i], x = of_pixels[i];
            sum.put(i, sum[i] + Complex<T>{x.re * s.re + x.im * s.im, x.im * s.re - x.re * s.im});
          }
        }
      }
    };
    scratch.transform(sites_.y, sites_.x, tiles_.x.sites, sites_.y.length, load_columns,
                      store_columns);
  }

  // Adds the oriented kernel of a spectrum of kernel gradients.
  void add_kernel(Scratch& scratch, T* spectrum, T* oriented) const {
    const int64_t k = p_.kernel_size;
    const T norm = T(1) / static_cast<T>(area());
    inverse(scratch, spectrum, k, [&](int64_t column, const Columns<T>& from) {
      for (int64_t row = 0; row < k; ++row) {
        for (int64_t b = column; b < std::min<int64_t>(column + kLanes<T>, k); ++b)
          oriented[b * k + row] += norm * from.re[row * from.stride + b - column];
      }
    });
  }

  // Columns at a tile's sites; planes of both parts.
  Columns<T> site_columns(T* sites, int64_t column) const {
    return {sites + column, sites + site_area() + column, site_stride()};
  }

 private:
  // Columns of a spectrum, or of that part of it that the sites' spectrum has as its part `fold`.
  Columns<T> spectrum_columns(T* spectrum, int64_t column, int64_t fold = 0) const {
    const Columns<T> all =
        block_columns(spectrum, column + fold % p_.scale * sites_.y.length, tiles_.x.length);
    const int64_t first = fold / p_.scale * sites_.x.length * all.stride;
    return {all.re + first, all.im + first, all.stride};
  }

  const DegradeProblem& p_;
  const FourierTiles& tiles_;
  const struct {
    const Fft<T>&y, &x;  // along each axis
  } pixels_, sites_;
};

// How many samples have their spectra, `of_sample` numbers each, in memory at a time.
template <class T>
static int64_t samples_at_once(const DegradeProblem& p, int64_t of_sample) {
  constexpr int64_t kBytes = 64 << 20;
  return std::clamp<int64_t>(kBytes / (of_sample * static_cast<int64_t>(sizeof(T))), 1, p.batch);
}

// How the backward pass cuts the pairs of a sample into groups of nearly equal size. Sums run over
// a group and then over the groups, so this follows from the shapes alone: enough of them for many
// threads, few enough that the inverse transforms of their kernel gradients do not count.
struct PairGroups {
  int64_t pairs, count;

  PairGroups(const DegradeProblem& p, int64_t pairs)
      : pairs(pairs),
        count(std::min(pairs, std::max(divide_up(8, p.batch), divide_up(pairs, 8)))) {}

  int64_t first(int64_t group) const { return group * pairs / count; }
};

// ---- One kernel for the whole sample

// False where numbers are beyond the limit; the output is then still to be made.
template <class T>
static bool forward_uniform_fourier(const DegradeProblem& p, const FourierTiles& tiles,
                                    const Output& out, const Threads& threads) {
  const Fourier<T> fourier(p, tiles);
  const Buffer<T> mixed = mix_kernels(p, load_kernels<T>(p));
  const int64_t planes = p.channels * tiles.count(), pairs = divide_up(planes, 2);
  const int64_t size = 2 * fourier.area(), samples = samples_at_once<T>(p, size);
  std::atomic<bool> within = within_limit(mixed.get(), p.batch * p.num_taps());

  for (int64_t b0 = 0; b0 < p.batch && within; b0 += samples) {
    const int64_t count = std::min(samples, p.batch - b0);
    const Buffer<T> kernels =
        fourier.kernel_spectra(mixed.get() + b0 * p.num_taps(), count, threads);
    threads.parallel_for(count * pairs, [&](int64_t begin, int64_t end) {
      auto scratch = fourier.scratch();
      const auto pixels = Buffer<T>::uninitialised(size), spectrum = Buffer<T>::uninitialised(size);
      const auto sites = Buffer<T>::uninitialised(2 * fourier.site_area());
      OutputRows<T> output_rows(p, out);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = b0 + task / pairs, first = 2 * (task % pairs);
        for (int64_t part = 0; part < 2; ++part) {
          const int64_t plane = first + part;
          const SiteTile tile =
              fourier.tile(plane < planes ? plane % tiles.count() : tiles.count());
          if (!fourier.load_pixels(b, plane / tiles.count(), tile,
                                   pixels.get() + part * fourier.area()))
            within = false;
        }
        fourier.transform_pixels(scratch, pixels.get(), spectrum.get());
        const int64_t stride = fourier.site_stride();
        fourier.blur(scratch, spectrum.get(), kernels.get() + (b - b0) * size,
                     [&](int64_t column, const Columns<T> from) {
                       const Columns<T> to = fourier.site_columns(sites.get(), column);
                       for (int64_t i = 0; i < tiles.y.sites; ++i) to.put(i, from[i]);
                     });
        for (int64_t part = 0; part < 2 && first + part < planes; ++part) {
          const SiteTile tile = fourier.tile((first + part) % tiles.count());
          for (int64_t row = 0; row < tile.rows; ++row) {
            output_rows.finish(b, (first + part) / tiles.count(), tile.y + row, tile.x,
                               tile.columns,
                               sites.get() + part * fourier.site_area() + row * stride);
          }
        }
      }
    });
  }
  return within;
}

// The adjoint of padding. `tiles_grad` is [batch][channels][tiles][y.length][x.length].
template <class T>
static void fold_tiles(const DegradeProblem& p, const DegradeGradients& g,
                       const FourierTiles& tiles, const Buffer<T>& tiles_grad,
                       const Threads& threads) {
  const auto read = [&](int64_t sites) { return (sites - 1) * p.scale + p.kernel_size; };
  const RowFold fold(p, tiles.y.count, tiles.y.sites * p.scale, read(tiles.y.sites));
  // In the order in which the tiles were made: a thread finds most of its own in its caches.
  threads.parallel_for(p.batch * p.channels * p.height, [&](int64_t begin, int64_t end) {
    Buffer<T> sum(p.width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / p.height, y = task % p.height;
      std::memset(sum.get(), 0, p.width * sizeof(T));
      for (int64_t n = fold.begin[y]; n < fold.begin[y + 1]; ++n) {
        const auto [tile_row, row] = fold.sources[n];
        for (int64_t tile_column = 0; tile_column < tiles.x.count; ++tile_column) {
          const int64_t start = tile_column * tiles.x.sites * p.scale, origin = start + p.origin();
          const int64_t tile = (plane * tiles.y.count + tile_row) * tiles.x.count + tile_column;
          const T* from = tiles_grad.get() + (tile * tiles.y.length + row) * tiles.x.length;
          const int64_t shown = std::min(read(tiles.x.sites), p.padded_width() - start);
          const int64_t first = std::clamp<int64_t>(-origin, 0, shown);
          const int64_t last = std::clamp<int64_t>(p.width - origin, first, shown);
          const auto add_mapped = [&](int64_t j) {
            const int64_t x = source_index(origin + j, p.width, p.padding);
            if (x >= 0) sum[x] += from[j];
          };
          for (int64_t j = 0; j < first; ++j) add_mapped(j);
          T* to = sum.get() + origin;
          for (int64_t j = first; j < last; ++j) to[j] += from[j];
          for (int64_t j = last; j < shown; ++j) add_mapped(j);
        }
      }
      store_row(g.image, offset_of(g.image.stride, plane / p.channels, plane % p.channels, y),
                g.image.stride[3], p.width, sum.get());
    }
  });
}

// Loads one channel of the gradient at a tile's sites; false if some of it is beyond the limit.
template <class T>
static bool load_grad(const DegradeGradients& g, int64_t b, int64_t c, const SiteTile& tile,
                      int64_t rows, int64_t stride, T* to) {
  std::memset(to, 0, rows * stride * sizeof(T));
  bool within = true;
  for (int64_t row = 0; row < tile.rows; ++row, to += stride) {
    const int64_t start = offset_of(g.grad.stride, b, c, tile.y + row);
    load_row(g.grad, start + tile.x * g.grad.stride[3], g.grad.stride[3], tile.columns, to);
    within &= within_limit(to, tile.columns);
  }
  return within;
}

// The inverse of a spectrum of image gradients, to two of the tiles above (or one: the second
// null).
template <class T>
static void store_tiles(const Fourier<T>& fourier, const FourierTiles& tiles,
                        FftScratch<T>& scratch, T* spectrum, T* first, T* second) {
  const int64_t stride = tiles.x.length;
  fourier.inverse(scratch, spectrum, stride, [&](int64_t column, const Columns<T> from) {
    T *re = first + column, *im = second + column;
    for (int64_t i = 0; i < tiles.y.length; ++i) {
      const Complex<T> values = from[i];
      store<T>(re + i * stride, values.re);
      if (second) store<T>(im + i * stride, values.im);
    }
  });
}

// Makes the gradient of the image, and that of each sample's mixed kernel [B][k * k].
template <class T>
static bool backward_uniform_fourier(const DegradeProblem& p, const FourierTiles& tiles,
                                     const DegradeGradients& g, const Buffer<T>& mixed,
                                     Buffer<T>& mixed_grad, const Threads& threads) {
  const Fourier<T> fourier(p, tiles);
  const bool to_kernels = g.kernels.data || g.weights.data;
  const int64_t planes = p.channels * tiles.count(), pairs = divide_up(planes, 2);
  const PairGroups groups(p, pairs);
  const int64_t area = fourier.area(), size = 2 * area, taps = p.num_taps();
  const int64_t samples = samples_at_once<T>(p, size);
  const auto tiles_grad = Buffer<T>::uninitialised(g.image.data ? p.batch * planes * area : 0);
  Buffer<T> partial(to_kernels ? p.batch * groups.count * taps : 0);
  std::atomic<bool> within = within_limit(mixed.get(), p.batch * taps);

  for (int64_t b0 = 0; b0 < p.batch && within; b0 += samples) {
    const int64_t count = std::min(samples, p.batch - b0);
    const Buffer<T> kernels =
        fourier.kernel_spectra(mixed.get() + b0 * taps, g.image.data ? count : 0, threads);
    threads.parallel_for(count * groups.count, [&](int64_t begin, int64_t end) {
      auto scratch = fourier.scratch();
      const auto pixels = Buffer<T>::uninitialised(size), spectrum = Buffer<T>::uninitialised(size);
      const auto grad = Buffer<T>::uninitialised(2 * fourier.site_area());
      const auto image_grad = Buffer<T>::uninitialised(g.image.data ? size : 0);
      const auto kernel_grad = Buffer<T>::uninitialised(to_kernels ? size : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = b0 + task / groups.count, group = task % groups.count;
        if (to_kernels) std::memset(kernel_grad.get(), 0, size * sizeof(T));
        for (int64_t pair = groups.first(group); pair < groups.first(group + 1); ++pair) {
          for (int64_t part = 0; part < 2; ++part) {
            const int64_t plane = 2 * pair + part, c = plane / tiles.count();
            const SiteTile tile =
                fourier.tile(plane < planes ? plane % tiles.count() : tiles.count());
            if (to_kernels && !fourier.load_pixels(b, c, tile, pixels.get() + part * area))
              within = false;
            if (!load_grad(g, b, c, tile, tiles.y.sites, fourier.site_stride(),
                           grad.get() + part * fourier.site_area()))
              within = false;
          }
          if (to_kernels) fourier.transform_pixels(scratch, pixels.get(), spectrum.get());
          if (g.image.data) std::memset(image_grad.get(), 0, size * sizeof(T));
          const auto load_values = [&](int64_t column, const Columns<T> to) {
            const Columns<T> from = fourier.site_columns(grad.get(), column);
            for (int64_t i = 0; i < tiles.y.sites; ++i) to.put(i, from[i]);
          };
          fourier.correlate(scratch, load_values, spectrum.get(), kernels.get() + (b - b0) * size,
                            g.image.data ? image_grad.get() : nullptr,
                            to_kernels ? kernel_grad.get() : nullptr);
          if (!g.image.data) continue;
          T* to = tiles_grad.get() + (b * planes + 2 * pair) * area;
          store_tiles(fourier, tiles, scratch, image_grad.get(), to,
                      2 * pair + 1 < planes ? to + area : nullptr);
        }
        if (to_kernels) {
          fourier.add_kernel(scratch, kernel_grad.get(),
                             partial.get() + (b * groups.count + group) * taps);
        }
      }
    });
  }
  if (!within) return false;
  if (g.image.data) fold_tiles(p, g, tiles, tiles_grad, threads);
  for (int64_t n = 0; to_kernels && n < p.batch * groups.count; ++n) {
    T* to = mixed_grad.get() + n / groups.count * taps;
    for (int64_t tap = 0; tap < taps; ++tap) to[tap] += partial[n * taps + tap];
  }
  return true;
}

// ---- Weights that vary over the image

// Loads the weights of one kernel at the sites of a pair of tiles; false if some are beyond the
// limit.
template <class T>
static bool load_weights(const Fourier<T>& fourier, const WeightRows<T>& weight_rows, int64_t b,
                         int64_t m, const SiteTile (&tiles)[2], T* scratch, T* to) {
  std::memset(to, 0, 2 * fourier.site_area() * sizeof(T));
  bool within = true;
  for (const SiteTile& tile : tiles) {
    for (int64_t row = 0; row < tile.rows; ++row) {
      T* line = to + row * fourier.site_stride();
      weight_rows.load_kernel(b, m, tile.y + row, tile.x, tile.columns, scratch, line);
      within &= within_limit(line, tile.columns);
    }
    to += fourier.site_area();
  }
  return within;
}

// Samples whose banks have their spectra in memory at a time: all of them where they share one.
template <class T>
static int64_t banks_at_once(const DegradeProblem& p, int64_t size) {
  return p.kernels_per_sample ? samples_at_once<T>(p, p.num_kernels * size) : p.batch;
}

template <class T>
static bool forward_mixed_fourier(const DegradeProblem& p, const FourierTiles& tiles,
                                  const Output& out, const Threads& threads) {
  const Fourier<T> fourier(p, tiles);
  const WeightRows<T> weight_rows(p);
  const Buffer<T> kernels = load_kernels<T>(p);
  const int64_t pairs = divide_up(tiles.count(), 2);
  const int64_t size = 2 * fourier.area(), samples = banks_at_once<T>(p, size);
  const int64_t site_area = fourier.site_area(), stride = fourier.site_stride();
  std::atomic<bool> within =
      within_limit(kernels.get(), p.num_banks() * p.num_kernels * p.num_taps());

  for (int64_t b0 = 0; b0 < p.batch && within; b0 += samples) {
    const int64_t count = std::min(samples, p.batch - b0);
    const Buffer<T> spectra = fourier.kernel_spectra(
        kernels_of(p, kernels, b0), (p.kernels_per_sample ? count : 1) * p.num_kernels, threads);
    threads.parallel_for(count * pairs, [&](int64_t begin, int64_t end) {
      auto scratch = fourier.scratch();
      const auto pixels = Buffer<T>::uninitialised(size);
      const auto spectrum = Buffer<T>::uninitialised(p.channels * size);
      const auto weights = Buffer<T>::uninitialised(2 * site_area);
      const auto sites = Buffer<T>::uninitialised(p.channels * 2 * site_area);
      Buffer<T> line(weight_rows.scratch_size());
      OutputRows<T> output_rows(p, out);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = b0 + task / pairs, first = 2 * (task % pairs);
        const SiteTile tile[2] = {fourier.tile(first), fourier.tile(first + 1)};
        for (int64_t c = 0; c < p.channels; ++c) {
          for (int64_t part = 0; part < 2; ++part) {
            if (!fourier.load_pixels(b, c, tile[part], pixels.get() + part * fourier.area()))
              within = false;
          }
          fourier.transform_pixels(scratch, pixels.get(), spectrum.get() + c * size);
        }
        std::memset(sites.get(), 0, p.channels * 2 * site_area * sizeof(T));
        T* bank = spectra.get() + (p.kernels_per_sample ? (b - b0) * p.num_kernels * size : 0);
        for (int64_t m = 0; m < p.num_kernels; ++m) {
          if (!load_weights(fourier, weight_rows, b, m, tile, line.get(), weights.get()))
            within = false;
          for (int64_t c = 0; c < p.channels; ++c) {
            const auto add_values = [&](int64_t column, const Columns<T> values) {
              const Columns<T> weight = fourier.site_columns(weights.get(), column);
              const Columns<T> sum = fourier.site_columns(sites.get() + c * 2 * site_area, column);
              for (int64_t i = 0; i < tiles.y.sites; ++i)
                sum.put(i, sum[i] + each(values[i], weight[i]));
            };
            fourier.blur(scratch, spectrum.get() + c * size, bank + m * size, add_values);
          }
        }
        for (int64_t c = 0; c < p.channels; ++c) {
          for (int64_t part = 0; part < 2; ++part) {
            for (int64_t row = 0; row < tile[part].rows; ++row) {
              output_rows.finish(b, c, tile[part].y + row, tile[part].x, tile[part].columns,
                                 sites.get() + (c * 2 + part) * site_area + row * stride);
            }
          }
        }
      }
    });
  }
  return within;
}

// Fills `site_grad` and `kernel_grad` [B|1][M][k * k] of the gradients that are asked for, stores
// those of the image.
template <class T>
static bool backward_mixed_fourier(const DegradeProblem& p, const FourierTiles& tiles,
                                   const DegradeGradients& g, const WeightRows<T>& weight_rows,
                                   const Buffer<T>& kernels, Buffer<T>& kernel_grad,
                                   const SiteGradients<T>& site_grad, const Threads& threads) {
  const Fourier<T> fourier(p, tiles);
  const PairGroups groups(p, divide_up(tiles.count(), 2));
  const int64_t area = fourier.area(), size = 2 * area;
  const int64_t samples = banks_at_once<T>(p, size), bank_size = p.num_kernels * p.num_taps();
  const int64_t site_area = fourier.site_area(), stride = fourier.site_stride();
  const bool to_image = g.image.data, to_kernels = g.kernels.data, to_weights = g.weights.data;
  const auto tiles_grad =
      Buffer<T>::uninitialised(to_image ? p.batch * p.channels * tiles.count() * area : 0);
  Buffer<T> partial(to_kernels ? p.batch * groups.count * bank_size : 0);
  std::atomic<bool> within = within_limit(kernels.get(), p.num_banks() * bank_size);

  for (int64_t b0 = 0; b0 < p.batch && within; b0 += samples) {
    const int64_t count = std::min(samples, p.batch - b0);
    const Buffer<T> spectra = fourier.kernel_spectra(
        kernels_of(p, kernels, b0), (p.kernels_per_sample ? count : 1) * p.num_kernels, threads);
    threads.parallel_for(count * groups.count, [&](int64_t begin, int64_t end) {
      auto scratch = fourier.scratch();
      const auto pixels = Buffer<T>::uninitialised(size);
      const auto spectrum = Buffer<T>::uninitialised(p.channels * size);
      const auto grad = Buffer<T>::uninitialised(p.channels * 2 * site_area);
      const auto weights = Buffer<T>::uninitialised(2 * site_area);
      const auto weight_grad = Buffer<T>::uninitialised(to_weights ? 2 * site_area : 0);
      const auto image_spectrum = Buffer<T>::uninitialised(to_image ? p.channels * size : 0);
      const auto kernel_spectrum = Buffer<T>::uninitialised(to_kernels ? p.num_kernels * size : 0);
      Buffer<T> line(weight_rows.scratch_size());
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = b0 + task / groups.count, group = task % groups.count;
        T* bank = spectra.get() + (p.kernels_per_sample ? (b - b0) * p.num_kernels * size : 0);
        if (to_kernels) std::memset(kernel_spectrum.get(), 0, p.num_kernels * size * sizeof(T));
        for (int64_t pair = groups.first(group); pair < groups.first(group + 1); ++pair) {
          const SiteTile tile[2] = {fourier.tile(2 * pair), fourier.tile(2 * pair + 1)};
          for (int64_t c = 0; c < p.channels; ++c) {
            for (int64_t part = 0; part < 2; ++part) {
              if (!fourier.load_pixels(b, c, tile[part], pixels.get() + part * area) ||
                  !load_grad(g, b, c, tile[part], tiles.y.sites, stride,
                             grad.get() + (c * 2 + part) * site_area))
                within = false;
            }
            if (to_kernels || to_weights)
              fourier.transform_pixels(scratch, pixels.get(), spectrum.get() + c * size);
          }
          if (to_image) std::memset(image_spectrum.get(), 0, p.channels * size * sizeof(T));
          for (int64_t m = 0; m < p.num_kernels; ++m) {
            if (!load_weights(fourier, weight_rows, b, m, tile, line.get(), weights.get()))
              within = false;
            if (to_weights) std::memset(weight_grad.get(), 0, 2 * site_area * sizeof(T));
            for (int64_t c = 0; c < p.channels; ++c) {
              T* of_channel = grad.get() + c * 2 * site_area;
              const auto weighted_grad = [&](int64_t column, const Columns<T> to) {
                const Columns<T> from = fourier.site_columns(of_channel, column);
                const Columns<T> weight = fourier.site_columns(weights.get(), column);
                for (int64_t i = 0; i < tiles.y.sites; ++i) to.put(i, each(from[i], weight[i]));
              };
              const auto add_weight_grad = [&](int64_t column, const Columns<T> values) {
                const Columns<T> from = fourier.site_columns(of_channel, column);
                const Columns<T> sum = fourier.site_columns(weight_grad.get(), column);
                for (int64_t i = 0; i < tiles.y.sites; ++i)
                  sum.put(i, sum[i] + each(values[i], from[i]));
              };
              if (to_image || to_kernels) {
                fourier.correlate(scratch, weighted_grad, spectrum.get() + c * size,
                                  bank + m * size,
                                  to_image ? image_spectrum.get() + c * size : nullptr,
                                  to_kernels ? kernel_spectrum.get() + m * size : nullptr);
              }
              if (to_weights) {
                fourier.blur(scratch, spectrum.get() + c * size, bank + m * size, add_weight_grad);
              }
            }
            for (int64_t part = 0; to_weights && part < 2; ++part) {
              for (int64_t row = 0; row < tile[part].rows; ++row) {
                site_grad.store(b, m, tile[part].y + row, tile[part].x, tile[part].columns,
                                weight_grad.get() + part * site_area + row * stride);
              }
            }
          }
          for (int64_t c = 0; to_image && c < p.channels; ++c) {
            T* to = tiles_grad.get() + ((b * p.channels + c) * tiles.count() + 2 * pair) * area;
            store_tiles(fourier, tiles, scratch, image_spectrum.get() + c * size, to,
                        2 * pair + 1 < tiles.count() ? to + area : nullptr);
          }
        }
        for (int64_t m = 0; to_kernels && m < p.num_kernels; ++m) {
          fourier.add_kernel(
              scratch, kernel_spectrum.get() + m * size,
              partial.get() + (b * groups.count + group) * bank_size + m * p.num_taps());
        }
      }
    });
  }
  if (!within) return false;
  if (to_image) fold_tiles(p, g, tiles, tiles_grad, threads);
  if (to_kernels) sum_banks(p, partial, groups.count, kernel_grad);
  return true;
}

// What degrade works on, and how the work is laid out: compiled once, for any processor.
//
// Free of torch, because the NumPy module runs the same kernels. degrade_kernel.h holds the loops.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <vector>

#include "common/degrade_math.h"

// For what must end up inside its caller: vectors travel in registers, and the caller's instruction
// set is the one that counts.
#define DDRF_INLINE inline __attribute__((always_inline))

namespace ddrf_fast {

// How a number is stored. Integers stand for [0, 1]; only images have them.
enum class Element : int { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8, kUInt16 };

inline int64_t element_size(Element element) {
  switch (element) {
    case Element::kFloat64:
      return 8;
    case Element::kFloat32:
      return 4;
    case Element::kUInt8:
      return 1;
    default:
      return 2;
  }
}

// Four dimensions of somebody else's memory; strides in elements.
struct Input {
  const char* data = nullptr;
  Element element = Element::kFloat32;
  int64_t stride[4] = {};
};

struct Output {
  char* data = nullptr;
  Element element = Element::kFloat32;
  int64_t stride[4] = {};
};

struct DegradeProblem : DegradeShape<int64_t> {
  Input image;      // [B, C, H, W]
  Input kernels;    // [B|1, M, k, k]
  Input weights;    // [B, M, 1|H|H'|gh, 1|W|W'|gw]
  Input noise_std;  // [B, 1, 1|H', 1|W'], or no memory: no noise
  int64_t seed;
  std::vector<int64_t> sample_ids;
  std::vector<char> gray_noise;  // [B], whether all channels have one noise; empty: none does
  Input shot_noise;              // [B], or no memory

  // Whose noise the channel c of sample b has.
  int64_t noise_channel(int64_t b, int64_t c) const {
    return !gray_noise.empty() && gray_noise[b] ? 0 : c;
  }
};

// The gradient of the output, and where the others go; those without memory are not asked for.
struct DegradeGradients {
  Input grad;  // [B, C, H', W']
  Output image, kernels, weights, noise_std;
};

// Whoever runs the kernels brings the threads: parallel_for(count, body) calls body(begin, end) for
// disjoint ranges that cover [0, count).
struct Threads {
  int64_t count;
  std::function<void(int64_t, const std::function<void(int64_t, int64_t)>&)> parallel_for;
};

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// Memory on a cache line's boundary, zeroed unless asked otherwise.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : Buffer(uninitialised(size)) {
    std::memset(get(), 0, size * sizeof(T));
  }

  static Buffer uninitialised(int64_t size) {
    const int64_t bytes = round_up(std::max<int64_t>(size, 1) * sizeof(T), 64);
    return Buffer(static_cast<T*>(std::aligned_alloc(64, bytes)));
  }
  T* get() const { return memory_.get(); }
  T& operator[](int64_t i) const { return memory_.get()[i]; }

 private:
  explicit Buffer(T* memory) : memory_(memory) {
    if (!memory) throw std::bad_alloc();
  }
  struct Free {
    void operator()(T* pointer) const { std::free(pointer); }
  };
  std::unique_ptr<T[], Free> memory_;
};

// A padded row is stored as `scale` planes, one for each residue of the column: what neighbouring
// outputs read with one tap is then contiguous, whatever the scale.
struct PaddedLayout {
  int64_t scale, kernel_size, columns;
  int64_t wide;   // output columns, up to whole vectors
  int64_t plane;  // columns of one residue, up to whole vectors
  int64_t row;    // all residues

  PaddedLayout(const DegradeProblem& p, int64_t lanes) : PaddedLayout(p, lanes, p.out_width) {}
  // Of a strip of `outputs` columns.
  PaddedLayout(const DegradeProblem& p, int64_t lanes, int64_t outputs)
      : scale(p.scale), kernel_size(p.kernel_size), columns((outputs - 1) * scale + kernel_size) {
    wide = round_up(outputs, lanes);
    plane = round_up(wide + (kernel_size - 1) / scale, lanes);
    row = scale * plane;
  }
  int64_t column(int64_t j) const { return (j % scale) * plane + j / scale; }
  int64_t columns_of(int64_t residue) const {
    return residue < columns ? divide_up(columns - residue, scale) : 0;
  }
};

// For each padded column, in the layout's order, the image column it shows; and for each residue,
// the run [first, last) of columns inside the image, which step through it by `scale`.
struct ColumnMap {
  std::vector<int64_t> source;  // -1: nothing there
  std::vector<int64_t> first, last;
  int64_t begin, end;  // of the columns that are shown

  // Of the strip from output column x0 on.
  ColumnMap(const DegradeProblem& p, const PaddedLayout& layout, int64_t x0 = 0)
      : source(layout.row, -1), first(p.scale), last(p.scale), begin(p.width), end(0) {
    for (int64_t q = 0; q < p.scale; ++q) {
      const int64_t count = layout.columns_of(q);
      const int64_t start = q + p.origin() + x0 * p.scale;
      first[q] = std::clamp<int64_t>(start >= 0 ? 0 : divide_up(-start, p.scale), 0, count);
      last[q] = std::clamp<int64_t>(start >= p.width ? 0 : divide_up(p.width - start, p.scale),
                                    first[q], count);
      for (int64_t j = 0; j < count; ++j) {
        const int64_t x = source_index(start + j * p.scale, p.width, p.padding);
        source[q * layout.plane + j] = x;
        if (x < 0) continue;
        begin = std::min(begin, x);
        end = std::max(end, x + 1);
      }
    }
  }
};

// The kernels as a correlation reads them: K'[m][tap], tap = b * k + a, column by column, so that
// neighbours in the list touch different rows.
template <class T>
void oriented_kernels(const DegradeProblem& p, const T* kernels, T* oriented) {
  const int64_t k = p.kernel_size;
  for (int64_t m = 0; m < p.num_kernels; ++m) {
    for (int64_t b = 0; b < k; ++b) {
      for (int64_t a = 0; a < k; ++a) {
        const int64_t row = p.correlation ? a : k - 1 - a, column = p.correlation ? b : k - 1 - b;
        oriented[m * k * k + b * k + a] = kernels[(m * k + row) * k + column];
      }
    }
  }
}

// A kernel bank cut into blocks of taps. A block lists the kernels that are not zero on all of its
// taps; taps with the same support are brought together, so that little is multiplied by zero.
template <class T>
struct Bank {
  struct Block {
    int64_t taps, active, tap, index, coefficient;  // counts, then where its lists begin
  };
  std::vector<Block> blocks;
  std::vector<int64_t> taps;     // tap numbers in the order of the blocks
  std::vector<int64_t> offsets;  // where they read, relative to the output's place
  std::vector<int64_t> index;    // [block][active] kernel numbers
  std::vector<T> coefficients;   // [block][active][taps of the block]

  // `keep_all` keeps taps at which every kernel is zero (their gradient need not be).
  Bank(const DegradeProblem& p, const PaddedLayout& layout, const T* oriented, int64_t block_size,
       bool keep_all) {
    const int64_t k = p.kernel_size, num_taps = k * k, num_kernels = p.num_kernels;
    std::vector<uint64_t> support(num_taps, 0);
    bool any_zero = false;
    for (int64_t m = 0; m < num_kernels; ++m) {
      for (int64_t tap = 0; tap < num_taps; ++tap) {
        const bool nonzero = oriented[m * num_taps + tap] != T(0);
        support[tap] |= static_cast<uint64_t>(nonzero) << (m % 64);
        any_zero |= !nonzero;
      }
    }
    for (int64_t tap = 0; tap < num_taps; ++tap) {
      if (keep_all || support[tap]) taps.push_back(tap);
    }
    if (any_zero) {
      std::stable_sort(taps.begin(), taps.end(),
                       [&](int64_t x, int64_t y) { return support[x] < support[y]; });
    }
    for (const int64_t tap : taps)
      offsets.push_back((tap % k) * layout.row + layout.column(tap / k));
    const int64_t count = static_cast<int64_t>(taps.size());
    for (int64_t begin = 0; begin < count;) {
      Block block{count - begin >= block_size ? block_size : 1, 0, begin,
                  static_cast<int64_t>(index.size()), static_cast<int64_t>(coefficients.size())};
      for (int64_t m = 0; m < num_kernels; ++m) {
        const T* kernel = oriented + m * num_taps;
        bool zero = true;
        for (int64_t t = 0; t < block.taps; ++t) zero &= kernel[taps[begin + t]] == T(0);
        if (zero) continue;
        for (int64_t t = 0; t < block.taps; ++t) coefficients.push_back(kernel[taps[begin + t]]);
        index.push_back(m);
        ++block.active;
      }
      blocks.push_back(block);
      begin += block.taps;
    }
  }
};

// One kernel for a whole image, without the zeros around it: coefficients [columns][rows].
template <class T>
struct UniformKernel {
  int64_t first_row = 0, rows = 0, columns = 0;
  std::vector<int64_t> offsets;  // of each column
  std::vector<T> coefficients;

  // `kernel` is [k columns][k rows]; column b reads at column_offset(b).
  template <class ColumnOffset>
  UniformKernel(const T* kernel, int64_t k_columns, int64_t k_rows,
                const ColumnOffset& column_offset) {
    int64_t last_row = -1, first_column = k_columns, last_column = -1;
    first_row = k_rows;
    for (int64_t b = 0; b < k_columns; ++b) {
      for (int64_t a = 0; a < k_rows; ++a) {
        if (kernel[b * k_rows + a] == T(0)) continue;
        first_row = std::min(first_row, a);
        last_row = std::max(last_row, a);
        first_column = std::min(first_column, b);
        last_column = b;
      }
    }
    if (last_row < 0) {
      first_row = 0;
      return;
    }
    rows = last_row - first_row + 1;
    columns = last_column - first_column + 1;
    for (int64_t b = first_column; b <= last_column; ++b) {
      offsets.push_back(column_offset(b));
      const T* column = kernel + b * k_rows + first_row;
      coefficients.insert(coefficients.end(), column, column + rows);
    }
  }
};

// How the backward pass cuts a sample into bands of output rows. Sums run within a band and then
// over the bands in order, so this must follow from the shapes alone, never from the threads.
struct Bands {
  int64_t rows, count;

  explicit Bands(const DegradeProblem& p) {
    const int64_t wanted = divide_up(64, p.batch);
    rows =
        std::max({divide_up(p.out_height, wanted), divide_up(p.kernel_size, p.scale), int64_t{8}});
    rows = std::min(rows, p.out_height);
    count = divide_up(p.out_height, rows);
  }
  int64_t padded_rows(const DegradeProblem& p) const {
    return (rows - 1) * p.scale + p.kernel_size;
  }
};

// For each image row, the padded rows that show it, in order: the adjoint of padding sums them.
struct RowFold {
  struct Source {
    int64_t band, row;
  };
  std::vector<int64_t> begin;  // [height + 1]
  std::vector<Source> sources;

  // Band n holds the padded rows from n * step on, `rows` of them, none beyond the padded height.
  RowFold(const DegradeProblem& p, int64_t bands, int64_t step, int64_t rows)
      : begin(p.height + 1, 0) {
    const auto for_each = [&](const auto& visit) {
      for (int64_t band = 0; band < bands; ++band) {
        for (int64_t i = 0; i < rows && band * step + i < p.padded_height(); ++i) {
          const int64_t y = source_index(band * step + i + p.origin(), p.height, p.padding);
          if (y >= 0) visit(y, Source{band, i});
        }
      }
    };
    for_each([&](int64_t y, Source) { ++begin[y + 1]; });
    for (int64_t y = 0; y < p.height; ++y) begin[y + 1] += begin[y];
    std::vector<int64_t> next(begin.begin(), begin.end() - 1);
    sources.resize(begin[p.height]);
    for_each([&](int64_t y, Source source) { sources[next[y]++] = source; });
  }
};

}  // namespace ddrf_fast

// Device code of degrade. degrade.cu checks, allocates and launches.
//
// Forward: a block computes a tile of output pixels from the part of the image it needs, copied
// into shared memory with its columns split by their residue modulo the scale, so that a warp reads
// neighbours without bank conflicts. A thread mixes a block of taps for several pixels in registers
// and applies them to every channel. Weights of the whole sample are mixed into one kernel first.
//
// Backward: sums run in an order fixed by the shapes, in two passes, without atomics.
//   products   p[tap] = sum_c grad_c P_c[tap] for a block of taps; d weights and, a block's share
//   of, d kernels gather     d image, padded: each padded pixel collects from the outputs that read
//   it fold       the adjoint of padding
// T is how numbers are stored, A what they are computed in.
#pragma once

#include <cstdint>

#include "common/degrade_math.h"
#include "cuda/degrade_launch.cuh"

namespace ddrf_fast {

constexpr int kThreads = 128;
constexpr int kTileColumns = 32;                      // a warp's lanes
constexpr int kThreadRows = kThreads / kTileColumns;  // a warp a row of threads
constexpr int kTaps = 8;                              // mixed at a time
constexpr int kChannels = 4;                          // of one block
constexpr int kGatherRows = 4;                        // of one thread of the gather kernel
constexpr int kReduceKernels = 4;                     // of one warp in the sum for d kernels

// Memory with strides in elements, [.., .., .., ..] like a tensor.
template <class T>
struct Strided {
  T* data;
  int64_t stride[4];

  DDRF_HOST_DEVICE T& at(int64_t i, int64_t j, int64_t k, int64_t l) const {
    return data[i * stride[0] + j * stride[1] + k * stride[2] + l * stride[3]];
  }
};

// The image [B, C, H, W]: numbers as T, or integers that stand for [0, 1].
template <class T>
struct ImageArray {
  const void* data;
  int64_t stride[4];
  int integer_bytes;  // 0: no integers

  template <class A>
  DDRF_HOST_DEVICE A at(int64_t b, int64_t c, int64_t y, int64_t x) const {
    const int64_t i = b * stride[0] + c * stride[1] + y * stride[2] + x * stride[3];
    if (integer_bytes == 1) return A(static_cast<const uint8_t*>(data)[i]) * (A(1) / A(255));
    if (integer_bytes == 2) return A(static_cast<const uint16_t*>(data)[i]) * (A(1) / A(65535));
    return static_cast<A>(static_cast<const T*>(data)[i]);
  }
};

template <class T>
struct CudaProblem : DegradeShape<int> {
  ImageArray<T> image;
  Strided<const T> kernels, weights, noise_std;  // in four dimensions, as in degrade_plan.h
  const int64_t* seed;                           // nullptr: no noise
  const int64_t* sample_ids;
  int64_t sample_ids_stride;
  const bool* gray_noise;  // [B], or nullptr
  int64_t gray_noise_stride;
  const T* shot_noise;  // [B], or nullptr
  int64_t shot_noise_stride;
};

// Tiles of kTileColumns x kThreadRows * rows_per_thread outputs, and the padded image under one.
struct Tiling {
  int columns, rows;            // tiles along each axis
  int tile_rows;                // outputs
  int padded_rows, plane, row;  // of the tile: rows, columns of one residue, and of all residues
  int channel;                  // numbers of one channel

  template <class T>
  DDRF_HOST_DEVICE Tiling(const CudaProblem<T>& p, int rows_per_thread) {
    tile_rows = kThreadRows * rows_per_thread;
    columns = (p.out_width + kTileColumns - 1) / kTileColumns;
    rows = (p.out_height + tile_rows - 1) / tile_rows;
    padded_rows = (tile_rows - 1) * p.scale + p.kernel_size;
    plane = (kTileColumns + (p.kernel_size - 1) / p.scale) | 1;
    row = plane * p.scale;
    channel = padded_rows * row;
  }
  DDRF_HOST_DEVICE int tiles() const { return columns * rows; }
};

// ---- Kernels and weights, brought into the form the others read

// Where coefficient m of tap stands in a packed bank: blocks [M][kTaps], then single taps [M].
DDRF_HOST_DEVICE int64_t packed_index(int tap, int m, int num_taps, int num_kernels) {
  const int full = num_taps / kTaps * kTaps;
  if (tap >= full) return static_cast<int64_t>(tap) * num_kernels + m;
  return (static_cast<int64_t>(tap / kTaps) * num_kernels + m) * kTaps + tap % kTaps;
}

// The coefficient K'_m[tap], tap = b * k + a, of sample or bank `bank`.
template <class A, class T>
__device__ __forceinline__ A oriented(const CudaProblem<T>& p, int bank, int m, int tap) {
  const int k = p.kernel_size, a = tap % k, b = tap / k;
  const int row = p.correlation ? a : k - 1 - a, column = p.correlation ? b : k - 1 - b;
  return static_cast<A>(p.kernels.at(bank, m, row, column));
}

// packed[banks][M * taps].
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3) pack_kernels(CudaProblem<T> p, A* packed) {
  const int64_t size = static_cast<int64_t>(p.num_kernels) * p.num_taps();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= size * p.num_banks()) return;
  const int bank = i / size, m = i % size / p.num_taps(), tap = i % p.num_taps();
  packed[bank * size + packed_index(tap, m, p.num_taps(), p.num_kernels)] =
      oriented<A>(p, bank, m, tap);
}

// mixed[B][taps]: one kernel a sample.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3) mix_kernels(CudaProblem<T> p, A* mixed) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.batch) * p.num_taps()) return;
  const int b = i / p.num_taps(), tap = i % p.num_taps(), bank = p.kernels_per_sample ? b : 0;
  A sum = 0;
  for (int m = 0; m < p.num_kernels; ++m) {
    sum += static_cast<A>(p.weights.at(b, m, 0, 0)) * oriented<A>(p, bank, m, tap);
  }
  mixed[i] = sum;
}

// The weight of kernel m at the output pixel (y, x).
template <class A, class T>
__device__ __forceinline__ A weight_at(const CudaProblem<T>& p, int b, int m, int y, int x) {
  if (p.weights_at == WeightsAt::kOutput) return static_cast<A>(p.weights.at(b, m, y, x));
  const int64_t row = static_cast<int64_t>(y) * p.scale + p.offset;
  const int64_t column = static_cast<int64_t>(x) * p.scale + p.offset;
  if (p.weights_at == WeightsAt::kImage) return static_cast<A>(p.weights.at(b, m, row, column));
  const GridPlace<A> v = grid_place<A>(row, p.height, p.grid_height);
  const GridPlace<A> h = grid_place<A>(column, p.width, p.grid_width);
  const auto value = [&](int64_t i, int64_t j) { return static_cast<A>(p.weights.at(b, m, i, j)); };
  const A left = (A(1) - v.fraction) * value(v.low, h.low) + v.fraction * value(v.high, h.low);
  const A right = (A(1) - v.fraction) * value(v.low, h.high) + v.fraction * value(v.high, h.high);
  return (A(1) - h.fraction) * left + h.fraction * right;
}

// sites[B][M][H'][W'], for the backward pass, which reads each weight many times.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3) site_weights(CudaProblem<T> p, A* sites) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  if (i >= pixels * p.batch * p.num_kernels) return;
  const int64_t plane = i / pixels, pixel = i % pixels;
  sites[i] = weight_at<A>(p, plane / p.num_kernels, plane % p.num_kernels, pixel / p.out_width,
                          pixel % p.out_width);
}

// ---- Noise

template <class A, class T>
__device__ __forceinline__ A noise_at(const CudaProblem<T>& p, int b, int c, int y, int x) {
  uint32_t r0 = static_cast<uint32_t>(x / 4), r1 = static_cast<uint32_t>(y),
           r2 = p.gray_noise && p.gray_noise[b * p.gray_noise_stride] ? 0u
                                                                      : static_cast<uint32_t>(c);
  uint32_t r3 = static_cast<uint32_t>(p.sample_ids[b * p.sample_ids_stride]);
  philox4x32(r0, r1, r2, r3, philox_key(*p.seed));
  A even, odd;
  box_muller(x & 2 ? r2 : r0, x & 2 ? r3 : r1, even, odd);
  return x & 1 ? odd : even;
}

// ---- Reading the padded image

// Copies the padded image under the tile whose first output is (y0, x0), `count` channels from c0
// on.
template <class A, class T>
__device__ void load_tile(const CudaProblem<T>& p, const Tiling& tiling, int b, int c0, int count,
                          int y0, int x0, A* tile) {
  const int lane = threadIdx.x % kTileColumns, warp = threadIdx.x / kTileColumns;
  const int columns = (kTileColumns - 1) * p.scale + p.kernel_size;
  for (int i = warp; i < tiling.padded_rows; i += kThreadRows) {
    const int64_t y =
        source_index(static_cast<int64_t>(y0) * p.scale + i + p.origin(), p.height, p.padding);
    for (int j = lane; j < columns; j += kTileColumns) {
      const int64_t x =
          source_index(static_cast<int64_t>(x0) * p.scale + j + p.origin(), p.width, p.padding);
      A* to = tile + i * tiling.row + j % p.scale * tiling.plane + j / p.scale;
      for (int c = 0; c < count; ++c) {
        to[c * tiling.channel] = y < 0 || x < 0 ? A(0) : p.image.template at<A>(b, c0 + c, y, x);
      }
    }
  }
}

// Where each tap reads in the tile, relative to its output's first tap.
template <class T>
__device__ void load_tap_offsets(const CudaProblem<T>& p, const Tiling& tiling, int* offsets) {
  for (int tap = threadIdx.x; tap < p.num_taps(); tap += kThreads) {
    const int a = tap % p.kernel_size, b = tap / p.kernel_size;
    offsets[tap] = a * tiling.row + b % p.scale * tiling.plane + b / p.scale;
  }
}

// What the outputs of one thread read: kRows pixels below each other. From shared memory where the
// tile fits, else from the image itself.
template <class A, class T, int kRows, bool kShared>
struct Pixels {
  const CudaProblem<T>& p;
  const Tiling& tiling;
  const A* tile;       // the thread's first output in it
  const int* offsets;  // of the taps
  int b, c0, y, x;     // the thread's first output

  // The value under `tap` for channel c (of the block's) of output q.
  __device__ __forceinline__ A at(int tap, int c, int q) const {
    if constexpr (kShared) {
      return tile[c * tiling.channel + offsets[tap] + q * p.scale * tiling.row];
    } else {
      const int a = tap % p.kernel_size, column = tap / p.kernel_size;
      const int64_t row =
          source_index(static_cast<int64_t>(y + q) * p.scale + a + p.origin(), p.height, p.padding);
      const int64_t col =
          source_index(static_cast<int64_t>(x) * p.scale + column + p.origin(), p.width, p.padding);
      return row < 0 || col < 0 ? A(0) : p.image.template at<A>(b, c0 + c, row, col);
    }
  }
};

// ---- Forward

// Mixes kCount taps from `tap` on for the thread's pixels.
template <class A, int kCount, int kRows>
__device__ __forceinline__ void mix_taps(const A* packed, int num_kernels, const A* weights,
                                         int64_t weight_stride, int64_t row_stride,
                                         A (&mixed)[kCount][kRows]) {
#pragma unroll
  for (int t = 0; t < kCount; ++t) {
#pragma unroll
    for (int q = 0; q < kRows; ++q) mixed[t][q] = A(0);
  }
  for (int m = 0; m < num_kernels; ++m) {
    A coefficient[kCount], weight[kRows];
#pragma unroll
    for (int t = 0; t < kCount; ++t) coefficient[t] = packed[m * kCount + t];
#pragma unroll
    for (int q = 0; q < kRows; ++q) weight[q] = weights[m * weight_stride + q * row_stride];
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
      for (int q = 0; q < kRows; ++q) mixed[t][q] += coefficient[t] * weight[q];
    }
  }
}

// Applies kCount mixed taps to the block's channels.
template <class A, int kCount, int kRows, class Reader>
__device__ __forceinline__ void apply_taps(const A (&mixed)[kCount][kRows], const Reader& pixels,
                                           int tap, int channels, A (&sum)[kChannels][kRows]) {
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (c >= channels) break;
#pragma unroll
    for (int t = 0; t < kCount; ++t) {
#pragma unroll
      for (int q = 0; q < kRows; ++q) sum[c][q] += mixed[t][q] * pixels.at(tap + t, c, q);
    }
  }
}

// Blurs with one kernel, column by column: with the scale known, the compiler sees which of the
// pixels below each other are the same and reads them once.
template <class A, class T, int kRows, int kScale>
__device__ __forceinline__ void blur_tile(const CudaProblem<T>& p, const Tiling& tiling,
                                          const A* kernel, const A* tile, int channels,
                                          A (&sum)[kChannels][kRows]) {
  const int k = p.kernel_size, scale = kScale ? kScale : p.scale;
  for (int b = 0; b < k; ++b) {
    const A* column = tile + b % scale * tiling.plane + b / scale;
    const A* taps = kernel + b * k;
    int a = 0;
    for (; a + kTaps <= k; a += kTaps) {
      A coefficient[kTaps];
#pragma unroll
      for (int t = 0; t < kTaps; ++t) coefficient[t] = taps[a + t];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c >= channels) break;
        const A* from = column + c * tiling.channel + a * tiling.row;
#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
#pragma unroll
          for (int q = 0; q < kRows; ++q)
            sum[c][q] += coefficient[t] * from[(t + q * scale) * tiling.row];
        }
      }
    }
    for (; a < k; ++a) {
      const A coefficient = taps[a];
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c >= channels) break;
        const A* from = column + c * tiling.channel + a * tiling.row;
#pragma unroll
        for (int q = 0; q < kRows; ++q) sum[c][q] += coefficient * from[q * scale * tiling.row];
      }
    }
  }
}

// Shared memory: the tile, the thread's own weights [M][kRows][kThreads], the tap offsets.
template <class T>
int64_t forward_shared(const CudaProblem<T>& p, int rows, int64_t number_size, bool uniform) {
  const Tiling tiling(p, rows);
  const int64_t numbers =
      static_cast<int64_t>(tiling.channel) * (p.channels < kChannels ? p.channels : kChannels) +
      (uniform ? 0 : static_cast<int64_t>(p.num_kernels) * rows * kThreads);
  return numbers * number_size + p.num_taps() * static_cast<int64_t>(sizeof(int));
}

// Blocks: [B][channels / kChannels][tiles]. `kernels` is mixed[B][taps] if kUniform, else packed
// banks.
template <class A, class T, int kRows, bool kShared, bool kUniform>
__global__ void __launch_bounds__(kThreads, 3)
    forward_kernel(CudaProblem<T> p, const A* kernels, Strided<T> out) {
  const Tiling tiling(p, kRows);
  const int chunks = (p.channels + kChannels - 1) / kChannels;
  const int tile_index = blockIdx.x % tiling.tiles(), chunk = blockIdx.x / tiling.tiles() % chunks;
  const int b = blockIdx.x / tiling.tiles() / chunks, c0 = chunk * kChannels;
  const int channels = p.channels - c0 < kChannels ? p.channels - c0 : kChannels;
  const int y0 = tile_index / tiling.columns * tiling.tile_rows,
            x0 = tile_index % tiling.columns * kTileColumns;
  const int lane = threadIdx.x % kTileColumns, warp = threadIdx.x / kTileColumns;
  const int y = y0 + warp * kRows, x = x0 + lane;

  // Weights of pixels beyond the image are those of its last ones: read, never used.
  const auto weight = [&](int m, int q) {
    const int last_y = p.out_height - 1, last_x = p.out_width - 1;
    return weight_at<A>(p, b, m, y + q < last_y ? y + q : last_y, x < last_x ? x : last_x);
  };
  A* tile = shared_memory<A>();
  A* weights = tile + static_cast<int64_t>(tiling.channel) * channels;
  int* offsets = reinterpret_cast<int*>(
      weights + (kUniform ? 0 : static_cast<int64_t>(p.num_kernels) * kRows * kThreads));
  if constexpr (kShared) {
    load_tile(p, tiling, b, c0, channels, y0, x0, tile);
    if constexpr (!kUniform) {
      load_tap_offsets(p, tiling, offsets);
      for (int m = 0; m < p.num_kernels; ++m) {
        for (int q = 0; q < kRows; ++q)
          weights[(m * kRows + q) * kThreads + threadIdx.x] = weight(m, q);
      }
    }
    __syncthreads();
  }

  A sum[kChannels][kRows] = {};
  const A* site = tile + warp * kRows * p.scale * tiling.row + lane;
  const Pixels<A, T, kRows, kShared> pixels{p, tiling, site, offsets, b, c0, y, x};
  if constexpr (kUniform && kShared) {
    const A* kernel = kernels + static_cast<int64_t>(b) * p.num_taps();
    if (p.scale == 1) {
      blur_tile<A, T, kRows, 1>(p, tiling, kernel, site, channels, sum);
    } else if (p.scale == 2) {
      blur_tile<A, T, kRows, 2>(p, tiling, kernel, site, channels, sum);
    } else if (p.scale == 4) {
      blur_tile<A, T, kRows, 4>(p, tiling, kernel, site, channels, sum);
    } else {
      blur_tile<A, T, kRows, 0>(p, tiling, kernel, site, channels, sum);
    }
  } else if constexpr (kUniform) {
    for (int tap = 0; tap < p.num_taps(); ++tap) {
      A mixed[1][kRows];
      for (int q = 0; q < kRows; ++q)
        mixed[0][q] = kernels[static_cast<int64_t>(b) * p.num_taps() + tap];
      apply_taps(mixed, pixels, tap, channels, sum);
    }
  } else {
    const int64_t bank =
        p.kernels_per_sample ? static_cast<int64_t>(b) * p.num_kernels * p.num_taps() : 0;
    int tap = 0;
    for (; kShared && tap + kTaps <= p.num_taps(); tap += kTaps) {
      A mixed[kTaps][kRows];
      mix_taps(kernels + bank + static_cast<int64_t>(tap) * p.num_kernels, p.num_kernels,
               weights + threadIdx.x, kRows * kThreads, kThreads, mixed);
      apply_taps(mixed, pixels, tap, channels, sum);
    }
    for (; tap < p.num_taps(); ++tap) {
      A mixed[1][kRows] = {};
      for (int m = 0; m < p.num_kernels; ++m) {
        const A coefficient = kernels[bank + packed_index(tap, m, p.num_taps(), p.num_kernels)];
        for (int q = 0; q < kRows; ++q) {
          mixed[0][q] += coefficient * (kShared ? weights[(m * kRows + q) * kThreads + threadIdx.x]
                                                : weight(m, q));
        }
      }
      apply_taps(mixed, pixels, tap, channels, sum);
    }
  }

#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (c >= channels) break;
#pragma unroll
    for (int q = 0; q < kRows; ++q) {
      if (y + q >= p.out_height || x >= p.out_width) continue;
      if (p.seed) {
        A std = static_cast<A>(p.noise_std.at(b, 0, p.noise_map ? y + q : 0, p.noise_map ? x : 0));
        if (p.shot_noise) {
          const A shot = static_cast<A>(p.shot_noise[b * p.shot_noise_stride]);
          std = sqrt(shot * (sum[c][q] > 0 ? sum[c][q] : A(0)) + std * std);
        }
        sum[c][q] += std * noise_at<A>(p, b, c0 + c, y + q, x);
      }
      out.at(b, c0 + c, y + q, x) = static_cast<T>(sum[c][q]);
    }
  }
}

// ---- Backward: weights and kernels

constexpr int kProductRows = 2;
constexpr int kProductPixels = kThreads * kProductRows;
constexpr int kWarps = kThreads / kTileColumns;
// One number more than a warp's lanes, so that summing over lanes reads without bank conflicts.
constexpr int kReduceRow = kTileColumns + 1;

// Shared memory: products, the sums of each warp, and if kShared the tile, weights, their gradient
// and the tap offsets.
template <class T>
int64_t product_shared(const CudaProblem<T>& p, int64_t number_size, bool uniform, bool shared) {
  const Tiling tiling(p, kProductRows);
  int64_t numbers = kTaps * kProductPixels + kWarps * kReduceKernels * kTaps * kReduceRow;
  if (shared) {
    numbers +=
        static_cast<int64_t>(tiling.channel) * (p.channels < kChannels ? p.channels : kChannels);
    if (!uniform) numbers += 2 * static_cast<int64_t>(p.num_kernels) * kProductPixels;
  }
  return numbers * number_size + (shared ? p.num_taps() * static_cast<int64_t>(sizeof(int)) : 0);
}

// d weights at the sites, weight_grad[B][M][H'][W'], and each block's share of d kernels,
// partial[blocks][M][taps]; both accumulate and must hold zeros; either may be nullptr.
//
// Blocks: [B][blocks_per_sample], each with every blocks_per_sample-th tile of its sample. With
// kUniform there is one kernel whose weight is 1 everywhere, and `packed` and `sites` are not read.
template <class A, class T, bool kShared, bool kUniform>
__global__ void __launch_bounds__(kThreads, 3)
    product_kernel(CudaProblem<T> p, Strided<const T> grad, const A* packed, const A* sites,
                   int blocks_per_sample, A* weight_grad, A* partial) {
  constexpr int kRows = kProductRows;
  const Tiling tiling(p, kRows);
  const int num_kernels = kUniform ? 1 : p.num_kernels, num_taps = p.num_taps();
  const int b = blockIdx.x / blocks_per_sample;
  const int lane = threadIdx.x % kTileColumns, warp = threadIdx.x / kTileColumns;
  const int64_t out_pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  const int max_channels = p.channels < kChannels ? p.channels : kChannels;

  A* products = shared_memory<A>();               // [kTaps][kRows][kThreads]
  A* reduce = products + kTaps * kProductPixels;  // [warps][kernels * taps][kReduceRow]
  A* tile = reduce + kWarps * kReduceKernels * kTaps * kReduceRow;
  A* weights = tile + static_cast<int64_t>(tiling.channel) * max_channels;  // [M][kRows][kThreads]
  A* own_grad = weights + (kUniform ? 0 : static_cast<int64_t>(num_kernels) * kProductPixels);
  int* offsets = reinterpret_cast<int*>(
      own_grad + (kUniform ? 0 : static_cast<int64_t>(num_kernels) * kProductPixels));
  if constexpr (kShared) load_tap_offsets(p, tiling, offsets);
  if (kUniform)
    packed = nullptr;
  else
    packed += p.kernels_per_sample ? static_cast<int64_t>(b) * num_kernels * num_taps : 0;

  for (int tile_index = blockIdx.x % blocks_per_sample; tile_index < tiling.tiles();
       tile_index += blocks_per_sample) {
    const int y0 = tile_index / tiling.columns * tiling.tile_rows,
              x0 = tile_index % tiling.columns * kTileColumns;
    const int y = y0 + warp * kRows, x = x0 + lane;
    const auto inside = [&](int q) { return y + q < p.out_height && x < p.out_width; };
    const auto site = [&](int m, int q) {
      return (static_cast<int64_t>(b) * num_kernels + m) * out_pixels +
             static_cast<int64_t>(y + q) * p.out_width + x;
    };
    if constexpr (kShared && !kUniform) {
      for (int m = 0; m < num_kernels; ++m) {
        for (int q = 0; q < kRows; ++q) {
          const int at = (m * kRows + q) * kThreads + threadIdx.x;
          weights[at] = inside(q) ? sites[site(m, q)] : A(0);
          own_grad[at] = A(0);
        }
      }
    }
    for (int c0 = 0; c0 < p.channels; c0 += kChannels) {
      const int channels = p.channels - c0 < kChannels ? p.channels - c0 : kChannels;
      __syncthreads();  // the last tile has been read
      if constexpr (kShared) {
        load_tile(p, tiling, b, c0, channels, y0, x0, tile);
        __syncthreads();
      }
      A gradient[kChannels][kRows] = {};
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
#pragma unroll
        for (int q = 0; q < kRows; ++q) {
          if (c < channels && inside(q))
            gradient[c][q] = static_cast<A>(grad.at(b, c0 + c, y + q, x));
        }
      }
      const Pixels<A, T, kRows, kShared> pixels{
          p, tiling, tile + warp * kRows * p.scale * tiling.row + lane, offsets, b, c0, y, x};

      for (int tap = 0; tap < num_taps; tap += kTaps) {
        const int count = num_taps - tap < kTaps ? num_taps - tap : kTaps;
        A product[kTaps][kRows] = {};
#pragma unroll
        for (int c = 0; c < kChannels; ++c) {
          if (c >= channels) break;
#pragma unroll
          for (int t = 0; t < kTaps; ++t) {
            if (t >= count) break;
#pragma unroll
            for (int q = 0; q < kRows; ++q)
              product[t][q] += gradient[c][q] * pixels.at(tap + t, c, q);
          }
        }
        if (!kUniform && weight_grad) {
          for (int m = 0; m < num_kernels; ++m) {
            A sum[kRows] = {};
#pragma unroll
            for (int t = 0; t < kTaps; ++t) {
              if (t >= count) break;
              const A coefficient = packed[packed_index(tap + t, m, num_taps, num_kernels)];
#pragma unroll
              for (int q = 0; q < kRows; ++q) sum[q] += coefficient * product[t][q];
            }
#pragma unroll
            for (int q = 0; q < kRows; ++q) {
              if constexpr (kShared) {
                own_grad[(m * kRows + q) * kThreads + threadIdx.x] += sum[q];
              } else if (inside(q)) {
                weight_grad[site(m, q)] += sum[q];
              }
            }
          }
        }
        if (!partial) continue;

#pragma unroll
        for (int t = 0; t < kTaps; ++t) {
#pragma unroll
          for (int q = 0; q < kRows; ++q)
            products[(t * kRows + q) * kThreads + threadIdx.x] = product[t][q];
        }
        __syncthreads();
        // A warp sums kReduceKernels kernels over the block's pixels, its lanes side by side.
        for (int m0 = 0; m0 < num_kernels; m0 += kWarps * kReduceKernels) {
          const int first = m0 + warp * kReduceKernels;
          A sum[kReduceKernels][kTaps] = {};
          for (int i = lane; i < kProductPixels; i += kTileColumns) {
            // Pixel i belongs to thread i % kThreads, as its row i / kThreads.
            const int owner = i % kThreads, row = i / kThreads;
            const int pixel_y = y0 + owner / kTileColumns * kRows + row,
                      pixel_x = x0 + owner % kTileColumns;
            const bool exists = pixel_y < p.out_height && pixel_x < p.out_width;
            A weight[kReduceKernels];
#pragma unroll
            for (int n = 0; n < kReduceKernels; ++n) {
              const int m = first + n;
              if (m >= num_kernels || !exists) {
                weight[n] = A(0);
              } else if constexpr (kUniform) {
                weight[n] = A(1);
              } else if constexpr (kShared) {
                weight[n] = weights[m * kProductPixels + i];
              } else {
                weight[n] = sites[(static_cast<int64_t>(b) * num_kernels + m) * out_pixels +
                                  static_cast<int64_t>(pixel_y) * p.out_width + pixel_x];
              }
            }
#pragma unroll
            for (int t = 0; t < kTaps; ++t) {
              const A value = products[t * kProductPixels + i];
#pragma unroll
              for (int n = 0; n < kReduceKernels; ++n) sum[n][t] += weight[n] * value;
            }
          }
          A* mine = reduce + warp * kReduceKernels * kTaps * kReduceRow;
#pragma unroll
          for (int n = 0; n < kReduceKernels; ++n) {
#pragma unroll
            for (int t = 0; t < kTaps; ++t) mine[(n * kTaps + t) * kReduceRow + lane] = sum[n][t];
          }
          __syncthreads();
          static_assert(kReduceKernels * kTaps == kTileColumns, "a lane for each sum");
          const int m = first + lane / kTaps, t = lane % kTaps;
          if (m < num_kernels && t < count) {
            A total = 0;
            for (int i = 0; i < kTileColumns; ++i) total += mine[lane * kReduceRow + i];
            partial[(static_cast<int64_t>(blockIdx.x) * num_kernels + m) * num_taps + tap + t] +=
                total;
          }
          __syncthreads();
        }
      }
    }
    if constexpr (kShared && !kUniform) {
      for (int m = 0; weight_grad && m < num_kernels; ++m) {
        for (int q = 0; q < kRows; ++q) {
          if (inside(q))
            weight_grad[site(m, q)] = own_grad[(m * kRows + q) * kThreads + threadIdx.x];
        }
      }
    }
  }
}

// sum[banks][M][taps] over blocks [B][blocks_per_sample], in order.
template <class A>
__global__ void __launch_bounds__(kThreads, 3)
    sum_partial(const A* partial, int banks, int blocks_per_bank, int64_t size, A* sum) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= banks * size) return;
  const A* from = partial + i / size * blocks_per_bank * size + i % size;
  A total = 0;
  for (int n = 0; n < blocks_per_bank; ++n) total += from[n * size];
  sum[i] = total;
}

// Stores kernel gradients [banks][M][taps] the way round that the kernels have.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    store_kernels(CudaProblem<T> p, const A* oriented_grad, Strided<T> to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(p.num_kernels) * p.num_taps();
  if (i >= size * p.num_banks()) return;
  const int k = p.kernel_size, bank = i / size, m = i % size / p.num_taps(), tap = i % p.num_taps(),
            a = tap % k, b = tap / k;
  to.at(bank, m, p.correlation ? a : k - 1 - a, p.correlation ? b : k - 1 - b) =
      static_cast<T>(oriented_grad[i]);
}

// For weights of the whole sample: from the gradient mixed_grad[B][taps] of the mixed kernels.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    unmix_kernels(CudaProblem<T> p, const A* mixed_grad, A* kernel_grad) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t size = static_cast<int64_t>(p.num_kernels) * p.num_taps();
  if (i >= size * p.num_banks()) return;
  const int bank = i / size, m = i % size / p.num_taps(), tap = i % p.num_taps();
  A sum = 0;
  for (int b = p.kernels_per_sample ? bank : 0; b < (p.kernels_per_sample ? bank + 1 : p.batch);
       ++b) {
    sum += static_cast<A>(p.weights.at(b, m, 0, 0)) *
           mixed_grad[static_cast<int64_t>(b) * p.num_taps() + tap];
  }
  kernel_grad[i] = sum;
}

template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    unmix_weights(CudaProblem<T> p, const A* mixed_grad, Strided<T> to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.batch) * p.num_kernels) return;
  const int b = i / p.num_kernels, m = i % p.num_kernels;
  A sum = 0;
  for (int tap = 0; tap < p.num_taps(); ++tap) {
    sum += oriented<A>(p, p.kernels_per_sample ? b : 0, m, tap) *
           mixed_grad[static_cast<int64_t>(b) * p.num_taps() + tap];
  }
  to.at(b, m, 0, 0) = static_cast<T>(sum);
}

// The gradient at the sites, at the place the weights came from; `to` is [B][M][.][.], one thread
// each.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    store_site_weights(CudaProblem<T> p, const A* sites, Strided<T> to) {
  const bool at_output = p.weights_at == WeightsAt::kOutput;
  const int height = at_output ? p.out_height : p.height, width = at_output ? p.out_width : p.width;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= static_cast<int64_t>(p.batch) * p.num_kernels * height * width) return;
  const int64_t plane = i / (static_cast<int64_t>(height) * width);
  int y = i / width % height, x = i % width;
  T& target = to.at(plane / p.num_kernels, plane % p.num_kernels, y, x);
  bool read = true;
  if (!at_output) {
    y -= p.offset;
    x -= p.offset;
    read = y >= 0 && x >= 0 && y % p.scale == 0 && x % p.scale == 0;
    y /= p.scale;
    x /= p.scale;
    read = read && y < p.out_height && x < p.out_width;
  }
  target = static_cast<T>(read ? sites[(plane * p.out_height + y) * p.out_width + x] : A(0));
}

// Sums the block's values, for each of its threads.
template <class A>
__device__ __forceinline__ A block_sum(A value, A* shared) {
  shared[threadIdx.x] = value;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) shared[threadIdx.x] += shared[threadIdx.x + width];
  }
  __syncthreads();
  return shared[0];
}

// The first output row (or column) at or after image position `position`.
DDRF_HOST_DEVICE int64_t first_site(int64_t position, int scale, int offset) {
  return position <= offset ? 0 : (position - offset + scale - 1) / scale;
}

// A block for each point of the grid collects from the sites around it.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    store_grid_weights(CudaProblem<T> p, const A* sites, Strided<T> to) {
  const int64_t cells = static_cast<int64_t>(p.grid_height) * p.grid_width;
  const int64_t plane = blockIdx.x / cells;
  const int row = blockIdx.x % cells / p.grid_width, column = blockIdx.x % p.grid_width;
  // The sites between the neighbouring lines of the grid, [first, last).
  const auto range = [&](int line, int lines, int size, int count, int64_t& first, int64_t& last) {
    first = 0;
    last = count;
    if (lines <= 1 || size <= 1) return;
    const int64_t low = line > 0 ? static_cast<int64_t>(line - 1) * (size - 1) / (lines - 1) : 0;
    const int64_t high = (static_cast<int64_t>(line + 1) * (size - 1) + lines - 2) / (lines - 1);
    first = first_site(low, p.scale, p.offset);
    last = first_site(high + 1, p.scale, p.offset);
    if (last > count) last = count;
  };
  const auto share = [](const GridPlace<A>& place, int line) {
    A sum = 0;
    if (place.low == line) sum += A(1) - place.fraction;
    if (place.high == line) sum += place.fraction;
    return sum;
  };
  int64_t y0, y1, x0, x1;
  range(row, p.grid_height, p.height, p.out_height, y0, y1);
  range(column, p.grid_width, p.width, p.out_width, x0, x1);
  const int64_t across = x1 > x0 ? x1 - x0 : 0, count = y1 > y0 ? across * (y1 - y0) : 0;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    const int64_t y = y0 + i / across, x = x0 + i % across;
    const GridPlace<A> v = grid_place<A>(y * p.scale + p.offset, p.height, p.grid_height);
    const GridPlace<A> h = grid_place<A>(x * p.scale + p.offset, p.width, p.grid_width);
    sum += share(v, row) * share(h, column) * sites[(plane * p.out_height + y) * p.out_width + x];
  }
  sum = block_sum(sum, shared_memory<A>());
  if (threadIdx.x == 0)
    to.at(plane / p.num_kernels, plane % p.num_kernels, row, column) = static_cast<T>(sum);
}

// ---- Backward: the image

// The gradient padded[B][C][Hp][Wp] of the padded image. A warp takes pixels of one residue modulo
// the scale, which the same taps reach: row i = s i' + qa collects tap a = s a' + qa of output i' -
// a'.
//
// Blocks: [B][channels / kChannels][residues][rows][columns]. `kernels` is mixed[B][taps] if
// kUniform, else [banks][M][taps], packed; `sites` the weights [B][M][H'][W'].
template <class A, class T, bool kUniform>
__global__ void __launch_bounds__(kThreads, 3)
    gather_kernel(CudaProblem<T> p, Strided<const T> grad, const A* kernels, const A* sites,
                  A* padded) {
  const int s = p.scale, k = p.kernel_size, num_taps = p.num_taps(),
            num_kernels = kUniform ? 1 : p.num_kernels;
  const int height = p.padded_height(), width = p.padded_width();
  const int columns = ((width + s - 1) / s + kTileColumns - 1) / kTileColumns;
  const int rows =
      ((height + s - 1) / s + kThreadRows * kGatherRows - 1) / (kThreadRows * kGatherRows);
  const int chunks = (p.channels + kChannels - 1) / kChannels;
  int block = blockIdx.x;
  const int lane = threadIdx.x % kTileColumns, warp = threadIdx.x / kTileColumns;
  const int j = block % columns * kTileColumns + lane;
  block /= columns;
  const int i0 = (block % rows * kThreadRows + warp) * kGatherRows;
  block /= rows;
  const int qb = block % s, qa = block / s % s;
  block /= s * s;
  const int c0 = block % chunks * kChannels, b = block / chunks;
  const int channels = p.channels - c0 < kChannels ? p.channels - c0 : kChannels;

  const A* bank = kernels;
  if (kUniform || p.kernels_per_sample) bank += static_cast<int64_t>(b) * num_kernels * num_taps;
  const int64_t out_pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  const int taps_a = (k - qa + s - 1) / s, taps_b = (k - qb + s - 1) / s;
  const int first = i0 - taps_a + 1 > 0 ? i0 - taps_a + 1 : 0;
  const int last = i0 + kGatherRows < p.out_height ? i0 + kGatherRows : p.out_height;
  A sum[kChannels][kGatherRows] = {};
  for (int tap_b = 0; tap_b < taps_b; ++tap_b) {
    const int x = j - tap_b, tap_column = (qb + s * tap_b) * k + qa;
    if (x < 0 || x >= p.out_width) continue;
    for (int y = first; y < last; ++y) {
      const int64_t pixel = static_cast<int64_t>(y) * p.out_width + x;
      A mixed[kGatherRows] = {};
      for (int m = 0; m < num_kernels; ++m) {
        const A weight =
            kUniform ? A(1)
                     : sites[(static_cast<int64_t>(b) * num_kernels + m) * out_pixels + pixel];
#pragma unroll
        for (int q = 0; q < kGatherRows; ++q) {
          const int tap_a = i0 + q - y;
          if (tap_a < 0 || tap_a >= taps_a) continue;
          const int tap = tap_column + s * tap_a;
          mixed[q] +=
              weight * (kUniform ? bank[tap] : bank[packed_index(tap, m, num_taps, num_kernels)]);
        }
      }
#pragma unroll
      for (int c = 0; c < kChannels; ++c) {
        if (c >= channels) break;
        const A gradient = static_cast<A>(grad.at(b, c0 + c, y, x));
#pragma unroll
        for (int q = 0; q < kGatherRows; ++q) sum[c][q] += mixed[q] * gradient;
      }
    }
  }
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    if (c >= channels) break;
#pragma unroll
    for (int q = 0; q < kGatherRows; ++q) {
      const int row = (i0 + q) * s + qa, column = j * s + qb;
      if (row < height && column < width) {
        padded[((static_cast<int64_t>(b) * p.channels + c0 + c) * height + row) * width + column] =
            sum[c][q];
      }
    }
  }
}

// The adjoint of padding, a thread for each pixel of the image.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    fold_kernel(CudaProblem<T> p, const A* padded, Strided<T> to) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pixels = static_cast<int64_t>(p.height) * p.width;
  if (i >= pixels * p.batch * p.channels) return;
  const int64_t plane = i / pixels;
  const int y = i / p.width % p.height, x = i % p.width;
  const int low = p.origin(), high_y = low + p.padded_height() - 1,
            high_x = low + p.padded_width() - 1;
  A sum = 0;
  for_each_shown(y, p.height, low, high_y, p.padding, [&](int64_t row) {
    const A* line = padded + (plane * p.padded_height() + row - low) * p.padded_width();
    for_each_shown(x, p.width, low, high_x, p.padding,
                   [&](int64_t column) { sum += line[column - low]; });
  });
  to.at(plane / p.channels, plane % p.channels, y, x) = static_cast<T>(sum);
}

// ---- Backward: the noise

// Summed over the channels, a thread for each output pixel: into `to` for a map, else into `sums`
// [B][H'][W'].
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    noise_kernel(CudaProblem<T> p, Strided<const T> grad, Strided<T> to, A* sums) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  if (i >= pixels * p.batch) return;
  const int b = i / pixels, y = i / p.out_width % p.out_height, x = i % p.out_width;
  A sum = 0;
  for (int c = 0; c < p.channels; ++c)
    sum += static_cast<A>(grad.at(b, c, y, x)) * noise_at<A>(p, b, c, y, x);
  if (p.noise_map) {
    to.at(b, 0, y, x) = static_cast<T>(sum);
  } else {
    sums[i] = sum;
  }
}

// A block for each sample.
template <class A, class T>
__global__ void __launch_bounds__(kThreads, 3)
    sum_noise(CudaProblem<T> p, const A* sums, Strided<T> to) {
  const int64_t pixels = static_cast<int64_t>(p.out_height) * p.out_width;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < pixels; i += kThreads) sum += sums[blockIdx.x * pixels + i];
  sum = block_sum(sum, shared_memory<A>());
  if (threadIdx.x == 0) to.at(blockIdx.x, 0, 0, 0) = static_cast<T>(sum);
}

}  // namespace ddrf_fast

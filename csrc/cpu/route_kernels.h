// The sums of route for one instruction set; route.cpp includes it once for each, in a namespace
// of its own, with DDRF_VECTOR_BYTES set. No include guard. Nothing of the standard library is
// called: it would be compiled for one set and linked for all.
//
// How a sum is cut depends on shapes and strides only. Sums over pixels are float within a block
// and double across blocks, so that an image of any size loses no more than a block does.

constexpr int64_t kBlock = 1024;

// [source, source + count) in the accumulation type: itself, or converted into buffer.
template <class Scalar>
inline const accumulate_t<Scalar>* widened(const Scalar* source, int64_t count,
                                           accumulate_t<Scalar>* buffer) {
  if constexpr (std::is_same_v<Scalar, accumulate_t<Scalar>>) {
    return source;
  } else {
    int64_t i = 0;
#if DDRF_VECTOR_BYTES >= 32
    if constexpr (std::is_same_v<Scalar, c10::Half>) {
      for (; i + 8 <= count; i += 8) {
        const auto* eight = reinterpret_cast<const __m128i*>(source + i);
        _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(eight)));
      }
    }
#endif
    for (; i < count; ++i) buffer[i] = load_as_accumulate(source + i);
    return buffer;
  }
}

// Of at most kBlock numbers; many of them in four streams that do not wait for each other.
template <class Acc>
inline double sum_block(const Acc* values, int64_t count) {
  const int64_t quarter = count / 4;
  Acc a = 0, b = 0, c = 0, d = 0;
  if (count < 256) {
#pragma omp simd reduction(+ : a)
    for (int64_t i = 0; i < count; ++i) a += values[i];
    return static_cast<double>(a);
  }
#pragma omp simd reduction(+ : a, b, c, d)
  for (int64_t i = 0; i < quarter; ++i) {
    a += values[i];
    b += values[quarter + i];
    c += values[2 * quarter + i];
    d += values[3 * quarter + i];
  }
  for (int64_t i = 4 * quarter; i < count; ++i) a += values[i];
  return static_cast<double>((a + b) + (c + d));
}

template <class Scalar>
inline double sum_row(const Scalar* row, int64_t count, int64_t stride) {
  accumulate_t<Scalar> buffer[kBlock];
  double total = 0;
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    if (stride == 1) {
      total += sum_block(widened(row + start, size, buffer), size);
    } else {
      for (int64_t i = 0; i < size; ++i) buffer[i] = load_as_accumulate(row + (start + i) * stride);
      total += sum_block(buffer, size);
    }
  }
  return total;
}

// The means of planes [begin, end) of all samples' channels; that of channel c of sample b is at
// pooled[b * row + c].
template <class Scalar>
void mean_planes(const Pixels<Scalar>& x, int64_t begin, int64_t end, accumulate_t<Scalar>* pooled,
                 int64_t row) {
  const bool flat = x.stride[2] == x.width * x.stride[3];
  const int64_t rows = flat ? 1 : x.height, columns = flat ? x.height * x.width : x.width;
  const double share = 1.0 / static_cast<double>(x.height * x.width);
  int64_t sample = begin / x.channels, channel = begin % x.channels;
  for (int64_t i = begin; i < end; ++i) {
    const Scalar* plane = x.data + sample * x.stride[0] + channel * x.stride[1];
    double total = 0;
    for (int64_t r = 0; r < rows; ++r) {
      total += sum_row(plane + r * x.stride[2], columns, x.stride[3]);
    }
    pooled[sample * row + channel] = static_cast<accumulate_t<Scalar>>(total * share);
    if (++channel == x.channels) {
      channel = 0;
      ++sample;
    }
  }
}

// totals[channel] = the sum over pixels [begin, end), row by row, of one sample whose channels are
// next to each other in memory. scratch holds 2 * piece_size numbers.
template <class Scalar>
void sum_pixels(const Pixels<Scalar>& x, int64_t sample, int64_t begin, int64_t end, double* totals,
                accumulate_t<Scalar>* scratch) {
  using Acc = accumulate_t<Scalar>;
  constexpr int64_t kSummands = 64;  // pieces that are summed in a block
  const int64_t channels = x.channels;
  const bool dense = x.stride[3] == channels && x.stride[2] == x.width * channels;
  // Several pixels side by side, where that makes a longer loop.
  const int64_t together = dense ? piece_size(channels) / channels : 1;
  const int64_t piece = together * channels;
  Acc *sums = scratch, *buffer = scratch + piece;
  for (int64_t i = 0; i < channels; ++i) totals[i] = 0;
  for (int64_t pixel = begin; pixel < end;) {
    for (int64_t i = 0; i < piece; ++i) sums[i] = 0;
    for (int64_t k = 0; k < kSummands && pixel < end; ++k) {
      const int64_t taken = together < end - pixel ? together : end - pixel;
      const int64_t size = taken * channels;
      const int64_t offset =
          dense ? pixel * channels : pixel / x.width * x.stride[2] + pixel % x.width * x.stride[3];
      const Acc* values = widened(x.data + sample * x.stride[0] + offset, size, buffer);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) sums[i] += values[i];
      pixel += taken;
    }
    for (int64_t t = 0; t < together; ++t) {
      for (int64_t i = 0; i < channels; ++i) totals[i] += sums[t * channels + i];
    }
  }
}

// result[b * result_row + j] = values[b, :] . weights[j, :] for j < outputs, which are at most 4;
// rows of both have `count` numbers.
template <class Scalar>
void dot_products(const accumulate_t<Scalar>* values, int64_t batch, int64_t count,
                  const Scalar* weights, int64_t outputs, accumulate_t<Scalar>* result,
                  int64_t result_row) {
  using Acc = accumulate_t<Scalar>;
  Acc buffer[4][kBlock];
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t j = 0; j < outputs; ++j) result[b * result_row + j] = 0;
  }
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = count - start < kBlock ? count - start : kBlock;
    const Acc* rows[4];
    for (int64_t j = 0; j < 4; ++j) {  // a missing row repeats the last
      const int64_t row = j < outputs ? j : outputs - 1;
      rows[j] = widened(weights + row * count + start, size, buffer[j]);
    }
    const Acc *w0 = rows[0], *w1 = rows[1], *w2 = rows[2], *w3 = rows[3];
    for (int64_t b = 0; b < batch; ++b) {
      const Acc* v = values + b * count + start;
      Acc s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
      for (int64_t i = 0; i < size; ++i) {
        s0 += v[i] * w0[i];
        s1 += v[i] * w1[i];
        s2 += v[i] * w2[i];
        s3 += v[i] * w3[i];
      }
      const Acc sums[4] = {s0, s1, s2, s3};
      for (int64_t j = 0; j < outputs; ++j) result[b * result_row + j] += sums[j];
    }
  }
}

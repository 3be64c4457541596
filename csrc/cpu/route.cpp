// The raw operator ddrf_fast::route on the CPU: the attention of a dynamic convolution.
//
//   pooled = mean of x over its pixels, or x itself where it is [B, C]; then code
//   hidden = relu(pooled squeeze_weight^T + squeeze_bias), or pooled without squeeze_weight
//   result = scale . normalization((hidden excite_weight^T + excite_bias) / temperature)
//
// x is read once, in any layout and without a copy: plane by plane, or where channels are innermost
// in stretches of pixels whose length the shapes decide.
#include "cpu/route.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/capability.h"
#include "common/checks.h"
#include "common/dtype.h"
#include "common/parallel.h"

namespace ddrf_fast {
namespace {

// Those of the instruction set in use.
template <class Scalar>
RouteKernels<Scalar> kernels() {
#if DDRF_X86_CAPABILITIES
  if (cpu_capability() >= Capability::kAvx512) return avx512::route_kernels<Scalar>();
  if (cpu_capability() == Capability::kAvx2) return avx2::route_kernels<Scalar>();
#endif
  return baseline::route_kernels<Scalar>();
}

// How many tasks of so many operations each are worth a thread.
int64_t grain(int64_t operations) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, operations));
}

// pooled[b * row + c] = the mean of channel c of sample b.
template <class Scalar>
void pool(const Pixels<Scalar>& x, int64_t batch, int64_t row, accumulate_t<Scalar>* pooled) {
  using Acc = accumulate_t<Scalar>;
  const RouteKernels<Scalar> k = kernels<Scalar>();
  const int64_t channels = x.channels, pixels = x.height * x.width;
  if (batch * channels == 0) return;
  if (x.stride[1] != 1 || channels == 1) {
    parallel_for(batch * channels, grain(pixels),
                 [&](int64_t begin, int64_t end) { k.mean_planes(x, begin, end, pooled, row); });
    return;
  }
  const int64_t parts = std::clamp<int64_t>(pixels * channels / 32768, 1, 64);
  std::vector<double> totals(batch * parts * channels);
  parallel_for(batch * parts, grain(pixels * channels / parts), [&](int64_t begin, int64_t end) {
    std::vector<Acc> scratch(scratch_size(channels));
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts;
      k.sum_pixels(x, i / parts, part * pixels / parts, (part + 1) * pixels / parts,
                   totals.data() + i * channels, scratch.data());
    }
  });
  const double share = 1.0 / static_cast<double>(pixels);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      double total = 0;
      for (int64_t part = 0; part < parts; ++part) {
        total += totals[(b * parts + part) * channels + c];
      }
      pooled[b * row + c] = static_cast<Acc>(total * share);
    }
  }
}

// result[b, o] = values[b, :] . weight[o, :] + bias[o]; values are [B, inputs].
template <class Scalar>
void linear(const accumulate_t<Scalar>* values, int64_t batch, int64_t inputs, const Tensor& weight,
            const std::optional<Tensor>& bias, bool rectify,
            std::vector<accumulate_t<Scalar>>& result) {
  using Acc = accumulate_t<Scalar>;
  constexpr int64_t kSamples = 16, kOutputs = 4;  // of a task
  const auto dot_products = kernels<Scalar>().dot_products;
  const int64_t outputs = weight.size(0), groups = (outputs + kOutputs - 1) / kOutputs;
  const Scalar* weights = weight.const_data_ptr<Scalar>();
  const Scalar* biases = bias ? bias->const_data_ptr<Scalar>() : nullptr;
  result.resize(batch * outputs);
  const int64_t tasks = (batch + kSamples - 1) / kSamples * groups;
  const int64_t samples = std::min(kSamples, batch);
  parallel_for(tasks, grain(samples * kOutputs * inputs), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b0 = i / groups * kSamples, o0 = i % groups * kOutputs;
      const int64_t size = std::min(kSamples, batch - b0), count = std::min(kOutputs, outputs - o0);
      Acc* target = result.data() + b0 * outputs + o0;
      dot_products(values + b0 * inputs, size, inputs, weights + o0 * inputs, count, target,
                   outputs);
      for (int64_t b = 0; b < size; ++b) {
        for (int64_t o = 0; o < count; ++o) {
          Acc& sum = target[b * outputs + o];
          if (biases) sum += load_as_accumulate(biases + o0 + o);
          if (rectify && sum < 0) sum = 0;  // NaN stays
        }
      }
    }
  });
}

// target[b * target_row + i] = source[b * row + i * step] for i < count.
template <class Scalar>
void copy_rows(const Scalar* source, int64_t row, int64_t step, int64_t batch, int64_t count,
               accumulate_t<Scalar>* target, int64_t target_row) {
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = 0; i < count; ++i) {
      target[b * target_row + i] = load_as_accumulate(source + b * row + i * step);
    }
  }
}

template <class Acc>
void softmax(Acc* row, int64_t count) {
  const Acc most = *std::max_element(row, row + count);
  Acc sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    row[i] = std::exp(row[i] - most);
    sum += row[i];
  }
  for (int64_t i = 0; i < count; ++i) row[i] /= sum;
}

double value_of(const Tensor& scalar) {
  double value = 0;
  DDRF_DISPATCH_FLOATING(scalar.scalar_type(), "temperature", ([&] {
                           value = static_cast<double>(*scalar.const_data_ptr<scalar_t>());
                         }));
  return value;
}

template <class Scalar>
void run(const Tensor& x, const std::optional<Tensor>& squeeze_weight,
         const std::optional<Tensor>& squeeze_bias, const Tensor& excite_weight,
         const std::optional<Tensor>& excite_bias, const std::optional<Tensor>& code,
         double temperature, bool use_softmax, double scale, const Tensor& result) {
  using Acc = accumulate_t<Scalar>;
  const int64_t batch = x.size(0), channels = x.size(1);
  const int64_t codes = code ? code->size(1) : 0, inputs = channels + codes;
  std::vector<Acc> pooled(batch * inputs), hidden, logits;
  const Scalar* data = x.const_data_ptr<Scalar>();
  if (x.dim() == 4) {
    pool<Scalar>({data,
                  channels,
                  x.size(2),
                  x.size(3),
                  {x.stride(0), x.stride(1), x.stride(2), x.stride(3)}},
                 batch, inputs, pooled.data());
  } else {
    copy_rows(data, x.stride(0), x.stride(1), batch, channels, pooled.data(), inputs);
  }
  if (code) {
    copy_rows(code->const_data_ptr<Scalar>(), codes, 1, batch, codes, pooled.data() + channels,
              inputs);
  }
  if (squeeze_weight) {
    linear<Scalar>(pooled.data(), batch, inputs, *squeeze_weight, squeeze_bias, true, hidden);
  } else {
    hidden.swap(pooled);
  }
  linear<Scalar>(hidden.data(), batch, excite_weight.size(1), excite_weight, excite_bias, false,
                 logits);

  const int64_t count = excite_weight.size(0);
  Scalar* out = result.mutable_data_ptr<Scalar>();
  for (int64_t b = 0; b < batch; ++b) {
    Acc* row = logits.data() + b * count;
    for (int64_t i = 0; i < count; ++i) row[i] /= static_cast<Acc>(temperature);
    if (use_softmax) {
      softmax(row, count);
    } else {
      for (int64_t i = 0; i < count; ++i) row[i] = 1 / (1 + std::exp(-row[i]));
    }
    for (int64_t i = 0; i < count; ++i) {
      out[b * count + i] = static_cast<Scalar>(row[i] * static_cast<Acc>(scale));
    }
  }
}

Tensor route_cpu(Tensor x, std::optional<Tensor> squeeze_weight, std::optional<Tensor> squeeze_bias,
                 Tensor excite_weight, std::optional<Tensor> excite_bias,
                 std::optional<Tensor> code, std::optional<Tensor> temperature,
                 StringHandle normalization_text, double scale) {
  const std::string normalization = take_string(normalization_text);
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 2,
                  "x: expected 4 dimensions, or 2 where it is pooled, got shape ",
                  shape_text(x.sizes()));
  STD_TORCH_CHECK(x.is_cpu(), "x: expected a CPU tensor");
  STD_TORCH_CHECK(x.dim() == 2 || (x.size(2) > 0 && x.size(3) > 0),
                  "x: expected at least one pixel, got shape ", shape_text(x.sizes()));
  STD_TORCH_CHECK(normalization == "softmax" || normalization == "sigmoid",
                  "normalization: expected softmax or sigmoid, got ", normalization);
  const int64_t batch = x.size(0);
  int64_t units = x.size(1);
  if (code) {
    check_dim("code", *code, 2);
    check_tensor("code", *code, {batch, code->size(1)}, x);
    units += code->size(1);
  }
  if (squeeze_weight) {
    check_dim("squeeze_weight", *squeeze_weight, 2);
    const int64_t hidden = squeeze_weight->size(0);
    check_tensor("squeeze_weight", *squeeze_weight, {hidden, units}, x);
    if (squeeze_bias) check_tensor("squeeze_bias", *squeeze_bias, {hidden}, x);
    units = hidden;
  }
  STD_TORCH_CHECK(squeeze_weight || !squeeze_bias, "squeeze_bias: needs squeeze_weight");
  check_dim("excite_weight", excite_weight, 2);
  const int64_t count = excite_weight.size(0);
  STD_TORCH_CHECK(count >= 1, "excite_weight: expected at least one row");
  check_tensor("excite_weight", excite_weight, {count, units}, x);
  if (excite_bias) check_tensor("excite_bias", *excite_bias, {count}, x);
  if (temperature) {
    STD_TORCH_CHECK(temperature->is_cpu() && temperature->dim() == 0,
                    "temperature: expected a number on the CPU, without dimensions");
  }
  squeeze_weight = as_contiguous(squeeze_weight);
  squeeze_bias = as_contiguous(squeeze_bias);
  excite_weight = as_contiguous(excite_weight);
  excite_bias = as_contiguous(excite_bias);
  code = as_contiguous(code);
  Tensor result = empty_tensor(x, {batch, count});
  DDRF_DISPATCH_FLOATING(x.scalar_type(), "route", ([&] {
                           run<scalar_t>(x, squeeze_weight, squeeze_bias, excite_weight,
                                         excite_bias, code,
                                         temperature ? value_of(*temperature) : 1.0,
                                         normalization == "softmax", scale, result);
                         }));
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast, CPU, m) { m.impl("route", TORCH_BOX(&route_cpu)); }

}  // namespace ddrf_fast

// ddrf_fast_native::degrade and ddrf_fast_native::degrade_backward on CUDA, for ddrf_fast::degrade
// to choose.
//
// degrade_kernels.cuh holds the device code and says how it works.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/checks.h"
#include "common/degrade_arguments.h"
#include "common/dtype.h"
#include "cuda/degrade_kernels.cuh"

namespace ddrf_fast {
namespace {

using torch::headeronly::ScalarType;

template <class T>
Strided<T> strided(const Tensor& tensor, const std::vector<int>& at) {
  Strided<T> result{};
  if constexpr (std::is_const_v<T>) {
    result.data = static_cast<T*>(tensor.const_data_ptr());
  } else {
    result.data = static_cast<T*>(tensor.mutable_data_ptr());
  }
  for (size_t d = 0; d < at.size(); ++d) result.stride[at[d]] = tensor.stride(d);
  return result;
}

template <class T>
ImageArray<T> image_array(const Tensor& image) {
  ImageArray<T> result{image.const_data_ptr(), {}, 0};
  if (is_integer(image)) result.integer_bytes = image.scalar_type() == ScalarType::Byte ? 1 : 2;
  for (int d = 0; d < 4; ++d) result.stride[d] = image.stride(d);
  return result;
}

const std::vector<int> kAllDims{0, 1, 2, 3};

template <class T>
CudaProblem<T> make_problem(const DegradeArguments& in) {
  CudaProblem<T> p{DegradeShape<int>(check_arguments(in)),
                   {},
                   {},
                   {},
                   {},
                   nullptr,
                   nullptr,
                   0,
                   nullptr,
                   0,
                   nullptr,
                   0};
  p.image = image_array<T>(in.image);
  p.kernels = strided<const T>(in.kernels, kernel_dims(p));
  p.weights = strided<const T>(in.weights, weight_dims(p));
  if (in.noise_std) {
    p.noise_std = strided<const T>(*in.noise_std, kAllDims);
    p.seed = in.seed->const_data_ptr<int64_t>();
    p.sample_ids = in.sample_ids->const_data_ptr<int64_t>();
    p.sample_ids_stride = in.sample_ids->stride(0);
  }
  if (in.gray_noise) {
    p.gray_noise = in.gray_noise->const_data_ptr<bool>();
    p.gray_noise_stride = in.gray_noise->stride(0);
  }
  if (in.shot_noise) {
    p.shot_noise = static_cast<const T*>(in.shot_noise->const_data_ptr());
    p.shot_noise_stride = in.shot_noise->stride(0);
  }
  return p;
}

// Memory for numbers of type A while the kernels run, from torch's allocator.
template <class A>
struct Workspace {
  Tensor tensor;
  A* data = nullptr;

  Workspace(const Tensor& like, int64_t size, bool zeroed = false)
      : tensor(torch::stable::empty(std::vector<int64_t>{size},
                                    sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float,
                                    std::nullopt, like.device())) {
    if (zeroed) torch::stable::zero_(tensor);
    data = static_cast<A*>(tensor.mutable_data_ptr());
  }
};

int64_t blocks_for(int64_t threads) { return (threads + kThreads - 1) / kThreads; }

template <class A, class T>
Workspace<A> prepared_kernels(const OnDeviceOf& device, const CudaProblem<T>& p,
                              const Tensor& like) {
  const bool uniform = p.weights_at == WeightsAt::kSample;
  const int64_t size = uniform ? int64_t{p.batch} * p.num_taps()
                               : int64_t{p.num_banks()} * p.num_kernels * p.num_taps();
  Workspace<A> kernels(like, size);
  device.launch(uniform ? mix_kernels<A, T> : pack_kernels<A, T>, blocks_for(size), kThreads, 0, p,
                kernels.data);
  return kernels;
}

template <class A, class T, bool kUniform>
void launch_forward(const OnDeviceOf& device, const CudaProblem<T>& p, const A* kernels,
                    const Strided<T>& out) {
  const int64_t many = forward_shared(p, 4, sizeof(A), kUniform),
                few = forward_shared(p, 2, sizeof(A), kUniform);
  const auto launch = [&](auto kernel, int rows, int64_t shared) {
    const int64_t chunks = (p.channels + kChannels - 1) / kChannels;
    device.launch(kernel, p.batch * chunks * Tiling(p, rows).tiles(), kThreads, shared, p, kernels,
                  out);
  };
  // Four rows a thread read less for each result, as long as two blocks find room on a
  // multiprocessor.
  if (many <= device.max_shared() / 2) {
    launch(forward_kernel<A, T, 4, true, kUniform>, 4, many);
  } else if (few <= device.max_shared()) {
    launch(forward_kernel<A, T, 2, true, kUniform>, 2, few);
  } else {
    launch(forward_kernel<A, T, 2, false, kUniform>, 2, 0);
  }
}

template <class T>
void forward(const OnDeviceOf& device, const CudaProblem<T>& p, const Tensor& image,
             const Tensor& result) {
  using A = accumulate_t<T>;
  const auto out = strided<T>(result, kAllDims);
  const Workspace<A> kernels = prepared_kernels<A>(device, p, image);
  if (p.weights_at == WeightsAt::kSample) {
    launch_forward<A, T, true>(device, p, kernels.data, out);
  } else {
    launch_forward<A, T, false>(device, p, kernels.data, out);
  }
}

template <class A, class T, bool kUniform>
void launch_products(const OnDeviceOf& device, const CudaProblem<T>& p,
                     const Strided<const T>& grad, const A* kernels, const A* sites,
                     int blocks_per_sample, A* weight_grad, A* partial) {
  const int64_t shared = product_shared(p, sizeof(A), kUniform, true);
  const int64_t blocks = int64_t{p.batch} * blocks_per_sample;
  if (shared <= device.max_shared()) {
    device.launch(product_kernel<A, T, true, kUniform>, blocks, kThreads, shared, p, grad, kernels,
                  sites, blocks_per_sample, weight_grad, partial);
  } else {
    device.launch(product_kernel<A, T, false, kUniform>, blocks, kThreads,
                  product_shared(p, sizeof(A), kUniform, false), p, grad, kernels, sites,
                  blocks_per_sample, weight_grad, partial);
  }
}

// The gradients asked for: [image, kernels, weights, noise_std]; the others are empty tensors.
template <class T>
void backward(const OnDeviceOf& device, const CudaProblem<T>& p, const Tensor& image,
              const Tensor& grad_tensor, int64_t mask, const Tensor& image_grad,
              const Tensor& kernel_grad, const Tensor& weight_grad, const Tensor& noise_grad) {
  using A = accumulate_t<T>;
  const auto grad = strided<const T>(grad_tensor, kAllDims);
  const int64_t out_pixels = int64_t{p.out_height} * p.out_width,
                bank = int64_t{p.num_kernels} * p.num_taps();
  const bool uniform = p.weights_at == WeightsAt::kSample;

  if (mask & 8) {
    const auto to = strided<T>(noise_grad, kAllDims);
    const Workspace<A> sums(image, p.noise_map ? 0 : p.batch * out_pixels);
    device.launch(noise_kernel<A, T>, blocks_for(p.batch * out_pixels), kThreads, 0, p, grad, to,
                  sums.data);
    if (!p.noise_map)
      device.launch(sum_noise<A, T>, p.batch, kThreads, kThreads * sizeof(A), p, sums.data, to);
  }
  if (!(mask & 7)) return;

  const Workspace<A> kernels = prepared_kernels<A>(device, p, image);
  const int64_t num_sites = uniform ? 0 : p.batch * p.num_kernels * out_pixels;
  const Workspace<A> sites(image, num_sites);
  if (!uniform)
    device.launch(site_weights<A, T>, blocks_for(num_sites), kThreads, 0, p, sites.data);

  if (mask & 1) {
    const Workspace<A> padded(image,
                              int64_t{p.batch} * p.channels * p.padded_height() * p.padded_width());
    const auto pieces = [&](int64_t size, int64_t piece) {
      return ((size + p.scale - 1) / p.scale + piece - 1) / piece;
    };
    const int64_t blocks = int64_t{p.batch} * ((p.channels + kChannels - 1) / kChannels) * p.scale *
                           p.scale * pieces(p.padded_height(), kThreadRows * kGatherRows) *
                           pieces(p.padded_width(), kTileColumns);
    device.launch(uniform ? gather_kernel<A, T, true> : gather_kernel<A, T, false>, blocks,
                  kThreads, 0, p, grad, kernels.data, sites.data, padded.data);
    device.launch(fold_kernel<A, T>, blocks_for(image.numel()), kThreads, 0, p, padded.data,
                  strided<T>(image_grad, kAllDims));
  }
  if (!(mask & 6)) return;

  // Enough blocks to fill a device, from the shapes alone: sums are then the same on every device.
  const int tiles = Tiling(p, kProductRows).tiles();
  const int blocks_per_sample = std::min(tiles, std::max(1, 1024 / p.batch));
  const int64_t size = uniform ? p.num_taps() : bank;
  const int sum_banks = uniform ? p.batch : p.num_banks();
  const bool want_partial = uniform || (mask & 2);
  const Workspace<A> partial(image, want_partial ? int64_t{p.batch} * blocks_per_sample * size : 0,
                             true);
  const Workspace<A> site_grad(image, mask & 4 ? num_sites : 0, true),
      sum(image, want_partial ? sum_banks * size : 0);
  (uniform ? launch_products<A, T, true>
           : launch_products<A, T, false>)(device, p, grad, kernels.data, sites.data,
                                           blocks_per_sample, mask & 4 ? site_grad.data : nullptr,
                                           want_partial ? partial.data : nullptr);
  if (want_partial) {
    device.launch(sum_partial<A>, blocks_for(sum_banks * size), kThreads, 0,
                  static_cast<const A*>(partial.data), sum_banks,
                  blocks_per_sample * (p.batch / sum_banks), size, sum.data);
  }

  const auto to_weights = mask & 4 ? strided<T>(weight_grad, weight_dims(p)) : Strided<T>{};
  if (mask & 2) {
    const auto to = strided<T>(kernel_grad, kernel_dims(p));
    if (uniform) {
      const Workspace<A> banks(image, p.num_banks() * bank);
      device.launch(unmix_kernels<A, T>, blocks_for(p.num_banks() * bank), kThreads, 0, p, sum.data,
                    banks.data);
      device.launch(store_kernels<A, T>, blocks_for(p.num_banks() * bank), kThreads, 0, p,
                    banks.data, to);
    } else {
      device.launch(store_kernels<A, T>, blocks_for(p.num_banks() * bank), kThreads, 0, p, sum.data,
                    to);
    }
  }
  if (mask & 4) {
    if (uniform) {
      device.launch(unmix_weights<A, T>, blocks_for(int64_t{p.batch} * p.num_kernels), kThreads, 0,
                    p, sum.data, to_weights);
    } else if (p.weights_at == WeightsAt::kGrid) {
      device.launch(store_grid_weights<A, T>, weight_grad.numel(), kThreads, kThreads * sizeof(A),
                    p, site_grad.data, to_weights);
    } else {
      device.launch(store_site_weights<A, T>, blocks_for(weight_grad.numel()), kThreads, 0, p,
                    site_grad.data, to_weights);
    }
  }
}

Tensor degrade_cuda(const Tensor& image, const Tensor& kernels, const Tensor& weights,
                    std::optional<Tensor> noise_std, std::optional<Tensor> seed,
                    std::optional<Tensor> sample_ids, std::optional<Tensor> gray_noise,
                    std::optional<Tensor> shot_noise, int64_t scale, int64_t offset,
                    std::vector<int64_t> out_size, StringHandle padding, bool correlation,
                    StringHandle weights_at) {
  STD_TORCH_CHECK(out_size.size() == 2, "out_size: expected two sizes, got ", out_size.size());
  const DegradeArguments arguments{image,       kernels,     weights,    noise_std,   seed,
                                   sample_ids,  gray_noise,  shot_noise, scale,       offset,
                                   out_size[0], out_size[1], padding,    correlation, weights_at};
  Tensor out;
  DDRF_DISPATCH_FLOATING(kernels.scalar_type(), "degrade", ([&] {
                           const auto p = make_problem<scalar_t>(arguments);
                           out = empty_tensor(kernels,
                                              {p.batch, p.channels, p.out_height, p.out_width},
                                              is_channels_last(image));
                           if (out.numel() > 0) forward(OnDeviceOf(image), p, image, out);
                         }));
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> degrade_backward_cuda(
    const Tensor& grad, const Tensor& image, const Tensor& kernels, const Tensor& weights,
    std::optional<Tensor> noise_std, std::optional<Tensor> seed, std::optional<Tensor> sample_ids,
    std::optional<Tensor> gray_noise, int64_t scale, int64_t offset, StringHandle padding,
    bool correlation, StringHandle weights_at, int64_t output_mask) {
  check_dim("grad", grad, 4);
  check_gradients(output_mask, image, noise_std);
  const DegradeArguments arguments{
      image, kernels, weights,      noise_std,    seed,    sample_ids,  gray_noise, std::nullopt,
      scale, offset,  grad.size(2), grad.size(3), padding, correlation, weights_at};
  const bool empty = grad.numel() == 0;
  std::tuple<Tensor, Tensor, Tensor, Tensor> grads;
  DDRF_DISPATCH_FLOATING(
      kernels.scalar_type(), "degrade_backward", ([&] {
        const auto p = make_problem<scalar_t>(arguments);
        check_like("grad", grad, {p.batch, p.channels, p.out_height, p.out_width}, kernels);
        grads = {new_gradient(output_mask, 0, image, is_channels_last(image), empty),
                 new_gradient(output_mask, 1, kernels, false, empty),
                 new_gradient(output_mask, 2, weights, false, empty),
                 new_gradient(output_mask, 3, noise_std ? *noise_std : image, false, empty)};
        if (!empty) {
          backward(OnDeviceOf(image), p, image, grad, output_mask, std::get<0>(grads),
                   std::get<1>(grads), std::get<2>(grads), std::get<3>(grads));
        }
      }));
  return grads;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast_native, CUDA, m) {
  m.impl("degrade", TORCH_BOX(&degrade_cuda));
  m.impl("degrade_backward", TORCH_BOX(&degrade_backward_cuda));
}

}  // namespace ddrf_fast

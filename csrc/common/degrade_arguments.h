// The arguments of the raw operators of degrade: their checks, for the CPU and CUDA alike.
//
// The public Python function has already raised friendly errors; these guard against reading
// outside a tensor. Everything that the kernels need to know about sizes follows from here.
#pragma once

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "common/checks.h"
#include "common/degrade_math.h"

namespace ddrf_fast {

struct DegradeArguments {
  const Tensor &image, &kernels, &weights;
  const std::optional<Tensor>&noise_std, &seed, &sample_ids, &gray_noise, &shot_noise;
  int64_t scale, offset, out_height, out_width;
  StringHandle padding;  // both are taken by check_arguments
  bool correlation;
  StringHandle weights_at;
};

// Integers, which images may have: they stand for [0, 1].
inline bool is_integer(const Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Byte ||
         tensor.scalar_type() == torch::headeronly::ScalarType::UInt16;
}

// Device, dtype and shape.
inline void check_like(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                       const Tensor& like) {
  STD_TORCH_CHECK(tensor.device() == like.device(), name, ": expected the device of image");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": expected dtype ",
                  torch::headeronly::toString(like.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end()), name,
                  ": expected shape ", shape_text(shape), ", got ", shape_text(sizes));
}

inline DegradeShape<int64_t> check_arguments(const DegradeArguments& in) {
  constexpr int64_t kMaxSize = 1 << 24;  // products of two sizes and a kernel's fit anywhere
  check_dim("image", in.image, 4);
  DegradeShape<int64_t> p{};
  p.batch = in.image.size(0);
  p.channels = in.image.size(1);
  p.height = in.image.size(2);
  p.width = in.image.size(3);
  p.scale = in.scale;
  p.offset = in.offset;
  p.out_height = in.out_height;
  p.out_width = in.out_width;
  p.padding = padding_from(take_string(in.padding));
  p.weights_at = weights_at_from(take_string(in.weights_at));
  p.correlation = in.correlation;
  STD_TORCH_CHECK(std::max({p.batch, p.channels, p.height, p.width}) < kMaxSize,
                  "image: expected sizes below ", kMaxSize, ", got shape ",
                  shape_text(in.image.sizes()));
  STD_TORCH_CHECK(p.scale >= 1 && p.scale < kMaxSize, "scale: expected at least 1, got ", p.scale);
  STD_TORCH_CHECK(p.offset >= 0 && p.offset < kMaxSize, "offset: expected from 0 to below ",
                  kMaxSize, ", got ", p.offset);
  STD_TORCH_CHECK(
      std::min(p.out_height, p.out_width) >= 0 && std::max(p.out_height, p.out_width) < kMaxSize,
      "out_size: expected sizes from 0 to below ", kMaxSize, ", got [", p.out_height, ", ",
      p.out_width, "]");

  STD_TORCH_CHECK(in.kernels.dim() == 3 || in.kernels.dim() == 4,
                  "kernels: expected [M, k, k] or [B, M, k, k], got shape ",
                  shape_text(in.kernels.sizes()));
  p.kernels_per_sample = in.kernels.dim() == 4;
  p.num_kernels = in.kernels.size(in.kernels.dim() - 3);
  p.kernel_size = in.kernels.size(in.kernels.dim() - 1);
  STD_TORCH_CHECK(p.kernel_size % 2 == 1, "kernels: expected an odd size, got ", p.kernel_size);
  std::vector<int64_t> kernel_shape{p.num_kernels, p.kernel_size, p.kernel_size};
  if (p.kernels_per_sample) kernel_shape.insert(kernel_shape.begin(), p.batch);
  STD_TORCH_CHECK(in.kernels.device() == in.image.device(),
                  "kernels: expected the device of image");
  STD_TORCH_CHECK(!is_integer(in.kernels), "kernels: expected a floating dtype, got ",
                  torch::headeronly::toString(in.kernels.scalar_type()));
  check_like("kernels", in.kernels, kernel_shape, is_integer(in.image) ? in.kernels : in.image);

  if (p.out_height > 0 && p.out_width > 0) {
    STD_TORCH_CHECK(p.offset + p.scale * (p.out_height - 1) < p.height &&
                        p.offset + p.scale * (p.out_width - 1) < p.width,
                    "out_size: [", p.out_height, ", ", p.out_width, "] at scale ", p.scale,
                    " and offset ", p.offset, " reaches outside the image [", p.height, ", ",
                    p.width, "]");
    STD_TORCH_CHECK(
        p.padding != Padding::kReflect || p.kernel_size / 2 < std::min(p.height, p.width),
        "padding: reflect expects an image larger than half the kernel, got [", p.height, ", ",
        p.width, "] and a kernel of ", p.kernel_size);
  }

  std::vector<int64_t> weight_shape{p.batch, p.num_kernels};
  if (p.weights_at == WeightsAt::kImage) {
    weight_shape.insert(weight_shape.end(), {p.height, p.width});
  } else if (p.weights_at == WeightsAt::kOutput) {
    weight_shape.insert(weight_shape.end(), {p.out_height, p.out_width});
  } else if (p.weights_at == WeightsAt::kGrid) {
    check_dim("weights", in.weights, 4);
    p.grid_height = in.weights.size(2);
    p.grid_width = in.weights.size(3);
    STD_TORCH_CHECK(p.grid_height > 0 && p.grid_width > 0,
                    "weights: expected a grid of at least one point, got shape ",
                    shape_text(in.weights.sizes()));
    weight_shape.insert(weight_shape.end(), {p.grid_height, p.grid_width});
  }
  check_like("weights", in.weights, weight_shape, in.kernels);

  if (in.noise_std) {
    check_dim("noise_std", *in.noise_std, 4);
    p.noise_map = in.noise_std->size(2) != 1 || in.noise_std->size(3) != 1;
    check_like("noise_std", *in.noise_std,
               {p.batch, 1, p.noise_map ? p.out_height : 1, p.noise_map ? p.out_width : 1},
               in.kernels);
    const auto is_int64 = [&](const std::optional<Tensor>& t) {
      return t && t->scalar_type() == torch::headeronly::ScalarType::Long &&
             t->device() == in.image.device();
    };
    STD_TORCH_CHECK(is_int64(in.seed) && in.seed->numel() == 1,
                    "seed: expected one int64 number on the device of image along with noise_std");
    STD_TORCH_CHECK(
        is_int64(in.sample_ids) && in.sample_ids->dim() == 1 && in.sample_ids->size(0) == p.batch,
        "sample_ids: expected int64 [", p.batch, "] on the device of image along with noise_std");
  }
  if (in.gray_noise) {
    STD_TORCH_CHECK(in.gray_noise->scalar_type() == torch::headeronly::ScalarType::Bool &&
                        in.gray_noise->device() == in.image.device() && in.gray_noise->dim() == 1 &&
                        in.gray_noise->size(0) == p.batch,
                    "gray_noise: expected bool [", p.batch, "] on the device of image");
  }
  if (in.shot_noise) {
    STD_TORCH_CHECK(in.noise_std, "shot_noise: expected along with noise_std, which may be 0");
    check_like("shot_noise", *in.shot_noise, {p.batch}, in.kernels);
  }
  return p;
}

// Which of four dimensions those of kernels [M, k, k] or [B, M, k, k], and of weights [B, M] or
// [B, M, ., .], are: the kernels see all arrays with four.
template <class Int>
std::vector<int> kernel_dims(const DegradeShape<Int>& p) {
  return p.kernels_per_sample ? std::vector<int>{0, 1, 2, 3} : std::vector<int>{1, 2, 3};
}
template <class Int>
std::vector<int> weight_dims(const DegradeShape<Int>& p) {
  return p.weights_at == WeightsAt::kSample ? std::vector<int>{0, 1} : std::vector<int>{0, 1, 2, 3};
}

inline void check_gradients(int64_t output_mask, const Tensor& image,
                            const std::optional<Tensor>& noise_std) {
  STD_TORCH_CHECK(!(output_mask & 1) || !is_integer(image),
                  "output_mask: asks for the gradient of image, which holds integers");
  STD_TORCH_CHECK(!(output_mask & 8) || noise_std,
                  "output_mask: asks for the gradient of noise_std, which is None");
}

// What backward starts from for the argument that bit `bit` of output_mask stands for: memory to
// fill, or an empty tensor. Zeros where `zeroed`.
inline Tensor new_gradient(int64_t output_mask, int bit, const Tensor& argument, bool channels_last,
                           bool zeroed) {
  if (!(output_mask >> bit & 1)) return empty_tensor(argument, {0});
  const auto sizes = argument.sizes();
  Tensor result = empty_tensor(argument, {sizes.begin(), sizes.end()}, channels_last);
  if (zeroed) torch::stable::zero_(result);
  return result;
}

}  // namespace ddrf_fast

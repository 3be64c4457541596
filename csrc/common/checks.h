// Checks and allocations every operator needs.
//
// The public Python functions have already raised friendly errors; these guard the raw operators,
// which anybody may call, against reading outside a tensor.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/MemoryFormat.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

namespace ddrf_fast {

using torch::stable::Tensor;

template <class Range>
std::string shape_text(const Range& shape) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < shape.size(); ++i) text << (i ? ", " : "") << shape[i];
  text << ']';
  return text.str();
}

// A string argument, which ends with this. Operators take the handle: torch's own conversion of an
// argument to std::string (stable ABI of 2.13) loses one string in every call.
inline std::string take_string(StringHandle handle) {
  const char* data = nullptr;
  size_t length = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_length(handle, &length));
  STABLE_TORCH_ERROR_CODE_CHECK(torch_string_c_str(handle, &data));
  std::string text(data, length);
  STABLE_TORCH_ERROR_CODE_CHECK(torch_delete_string(handle));
  return text;
}

// `tensor` is on the CPU and has exactly this shape and, unless it is `like` itself, like's dtype.
inline void check_tensor(const char* name, const Tensor& tensor, const std::vector<int64_t>& shape,
                         const Tensor& like) {
  STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type(), name, ": expected dtype ",
                  torch::headeronly::toString(like.scalar_type()), ", got ",
                  torch::headeronly::toString(tensor.scalar_type()));
  const auto sizes = tensor.sizes();
  bool same = sizes.size() == shape.size();
  for (size_t i = 0; same && i < shape.size(); ++i) same = sizes[i] == shape[i];
  STD_TORCH_CHECK(same, name, ": expected shape ", shape_text(shape), ", got ", shape_text(sizes));
}

inline void check_dim(const char* name, const Tensor& tensor, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got shape ",
                  shape_text(tensor.sizes()));
}

// The memory format rule of all operators: channels_last only if the tensor is contiguous that way
// and not contiguous in the default sense.
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.dim() != 4 || tensor.is_contiguous()) return false;
  int64_t expected = 1;
  for (int d : {1, 3, 2, 0}) {
    if (tensor.size(d) == 1) continue;
    if (tensor.stride(d) != expected) return false;
    expected *= tensor.size(d);
  }
  return true;
}

// Uninitialised, of the dtype and on the device of `like`.
inline Tensor empty_tensor(const Tensor& like, const std::vector<int64_t>& shape,
                           bool channels_last = false) {
  return torch::stable::empty(shape, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              channels_last ? torch::headeronly::MemoryFormat::ChannelsLast
                                            : torch::headeronly::MemoryFormat::Contiguous);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional<Tensor>(as_contiguous(*tensor)) : std::nullopt;
}

}  // namespace ddrf_fast

// Tells which instruction set the kernels run with, by its name in
// DDRF_FAST_CPU_CAPABILITY.
#include "common/capability.h"

#include <torch/csrc/stable/library.h>

namespace {

using namespace ddrf_fast;

std::string cpu_capability_name() {
  switch (cpu_capability()) {
    case Capability::kAmxBf16:
      return "amx_bf16";
    case Capability::kAvx512Bf16:
      return "avx512_bf16";
    case Capability::kAvx512:
      return "avx512";
    case Capability::kAvx2:
      return "avx2";
    case Capability::kDefault:
      break;
  }
  return "default";
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability_name));
}

// Tells which instruction set the kernels run with, by its name in
// DDRF_FAST_CPU_CAPABILITY.
#include "common/capability.h"

#include <torch/csrc/stable/library.h>

namespace {

using namespace ddrf_fast;

std::string cpu_capability_name() { return kCapabilityNames[static_cast<int>(cpu_capability())]; }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(ddrf_fast_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&cpu_capability_name));
}

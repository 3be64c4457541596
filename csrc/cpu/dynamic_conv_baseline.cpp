// The dynamic_conv kernels for every processor of the architecture; see common/capability.h.
#include "common/capability.h"
#include "common/dtype.h"
#include "common/parallel.h"
#include "cpu/dynamic_conv_plan.h"
#include "cpu/scratch_memory.h"

// All standard headers come before the pragma.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#define DDRF_CAPABILITY baseline
#define DDRF_VECTOR_BYTES 16
#include "cpu/dynamic_conv_kernels.h"

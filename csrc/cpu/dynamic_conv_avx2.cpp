// The dynamic_conv kernels for AVX2, FMA and F16C; see common/capability.h.
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

#if DDRF_X86_CAPABILITIES
#include <immintrin.h>

DDRF_TARGET_AVX2
#define DDRF_CAPABILITY avx2
#define DDRF_VECTOR_BYTES 32
#include "cpu/dynamic_conv_kernels.h"
#endif

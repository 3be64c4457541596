// The bfloat16 kernels of dynamic_conv for AVX-512 (F, BW, DQ, VL) and AMX, both with BF16; see
// common/capability.h.
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

DDRF_TARGET_AMX_BF16
#define DDRF_CAPABILITY amx_bf16
#define DDRF_VECTOR_BYTES 64
#define DDRF_AVX512_BF16 1
#define DDRF_AMX 1
#include "cpu/dynamic_conv_kernels.h"
#endif

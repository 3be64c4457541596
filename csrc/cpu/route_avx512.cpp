// The route kernels for AVX-512 (F, BW, DQ, VL); see common/capability.h.
#include "common/capability.h"
#include "common/dtype.h"
#include "cpu/route.h"

// All standard headers come before the pragma.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>

#if DDRF_X86_CAPABILITIES
#include <immintrin.h>

DDRF_TARGET_AVX512
#define DDRF_CAPABILITY avx512
#define DDRF_VECTOR_BYTES 64
#include "cpu/route_kernels.h"
#endif

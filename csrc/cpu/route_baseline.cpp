// The route kernels for every processor of the architecture; see common/capability.h.
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

#define DDRF_CAPABILITY baseline
#define DDRF_VECTOR_BYTES 16
#include "cpu/route_kernels.h"

// Memory for the length of a call. Each thread keeps some of what it has used: fresh pages would
// cost a small convolution a tenth of its time.
#pragma once

#include <cstddef>

namespace ddrf_fast {

// Uninitialised, aligned to cache lines.
void* take_scratch(size_t bytes);

// In the thread that took it, with the same number of bytes.
void give_scratch(void* memory, size_t bytes) noexcept;

}  // namespace ddrf_fast

// Threads of libtorch for kernels, with denormals flushed to zero while a kernel runs.
//
// The tails of blur kernels and the weights of trained networks hold denormals, which slow a
// convolution 5 to 40 times; each thread therefore sets FTZ/DAZ for its share of the work and
// restores the caller's mode afterwards.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

#include "common/flush_denormals.h"

namespace ddrf_fast {

// Calls body(begin, end) for disjoint ranges that cover [0, count), on libtorch's threads.
//
// How the range is cut depends on the number of threads, so a result must not depend on it: give
// each index its own outputs, and reduce over a number of indices that the shapes alone decide.
template <class Body>
void parallel_for(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  torch::stable::parallel_for(0, count, grain, [&body](int64_t begin, int64_t end) {
    FlushDenormals flush;
    body(begin, end);
  });
}

}  // namespace ddrf_fast

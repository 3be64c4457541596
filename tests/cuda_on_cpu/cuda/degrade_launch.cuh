// csrc/cuda/degrade_launch.cuh for a host compiler: CUDA kernels as they stand run on the CPU, for
// tests.
//
// Found before the real one on the include path. The threads of a block are fibers; __syncthreads()
// gives way to the next, and each stretch between two barriers runs the threads in another order,
// so that a barrier which is missing shows. Shared memory starts as NaN and ends in a canary. The
// operators register for CPU tensors. DDRF_FAST_TEST_SHARED sets how much shared memory there is.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/tensor.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <vector>

#define CUDA CPU  // the dispatch key; after torch's headers, whose enumerations have that name too
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Index {
  int64_t x;
};
inline thread_local Index blockIdx, threadIdx;

namespace ddrf_fast {

class EmulatedBlock {
 public:
  static inline thread_local EmulatedBlock* current = nullptr;

  EmulatedBlock(int threads, int64_t shared)
      : fibers_(threads), shared_((shared + 15) / 16 * 2 + kCanary) {}

  void run(const std::function<void()>& body) {
    body_ = &body;
    current = this;
    std::fill(shared_.begin(), shared_.end(), kPoison);
    for (auto& fiber : fibers_) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack = {fiber.stack.get(), 0, kStack};
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, &EmulatedBlock::enter, 0);
    }
    std::vector<int> order(fibers_.size());
    std::iota(order.begin(), order.end(), 0);
    for (size_t live = fibers_.size(); live > 0;) {
      for (size_t i = order.size() - 1; i > 0; --i)
        std::swap(order[i], order[next_random() % (i + 1)]);
      size_t finished = 0;
      for (const int index : order) {
        threadIdx.x = index;
        swapcontext(&scheduler_, &fibers_[index].context);
        finished += fibers_[index].done;
      }
      if (finished != 0 && finished != live)
        throw std::runtime_error("some threads of a block missed a barrier");
      live -= finished;
    }
    if (!std::all_of(shared_.end() - kCanary, shared_.end(),
                     [](uint64_t x) { return x == kPoison; })) {
      throw std::runtime_error("a block wrote beyond its shared memory");
    }
  }

  void barrier() { swapcontext(&fibers_[threadIdx.x].context, &scheduler_); }
  void* shared() { return shared_.data(); }

 private:
  static constexpr size_t kStack = 64 << 10, kCanary = 1024;
  static constexpr uint64_t kPoison = ~uint64_t{0};  // NaN as float and as double
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done;
  };

  static void enter() {
    const int64_t index = threadIdx.x;
    (*current->body_)();
    current->fibers_[index].done = true;
  }
  uint32_t next_random() { return (state_ = state_ * 1664525u + 1013904223u) >> 8; }

  std::vector<Fiber> fibers_;
  std::vector<uint64_t> shared_;
  const std::function<void()>* body_ = nullptr;
  ucontext_t scheduler_;
  uint32_t state_ = 1;
};

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor&) {}

  int64_t max_shared() const {
    const char* value = std::getenv("DDRF_FAST_TEST_SHARED");
    return value ? std::atoll(value) : 227 << 10;
  }

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared,
              const Arguments&... arguments) const {
    // 64 KiB can be had on every GPU that the build supports, whatever the test pretends.
    if (shared > std::max<int64_t>(max_shared(), 64 << 10))
      throw std::runtime_error("too much shared memory");
    EmulatedBlock block(threads, shared);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      block.run([&] { kernel(arguments...); });
  }
};

template <class T>
T* shared_memory() {
  return static_cast<T*>(EmulatedBlock::current->shared());
}

}  // namespace ddrf_fast

inline void __syncthreads() { ddrf_fast::EmulatedBlock::current->barrier(); }

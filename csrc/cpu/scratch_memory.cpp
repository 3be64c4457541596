#include "cpu/scratch_memory.h"

#include <array>
#include <bit>
#include <new>
#include <vector>

namespace ddrf_fast {
namespace {

constexpr std::align_val_t kAlignment{64};
constexpr size_t kLargest = size_t{1} << 62;
constexpr size_t kSmallest = 4096, kMostKept = size_t{32} << 20;  // bytes of a block; of a thread

// Blocks come in sizes of a power of two, so that those of one call fit the next one of about its
// size. The part of a block that is not asked for is never touched, and costs no memory.
size_t block_size(size_t bytes) {
  if (bytes > kLargest) throw std::bad_alloc();
  return std::bit_ceil(bytes < kSmallest ? kSmallest : bytes);
}

class Kept {
 public:
  Kept() = default;
  Kept(const Kept&) = delete;
  Kept& operator=(const Kept&) = delete;
  ~Kept() {
    for (auto& blocks : free_) {
      for (void* block : blocks) ::operator delete(block, kAlignment);
    }
  }

  void* take(size_t size) {
    auto& blocks = free_[std::countr_zero(size)];
    if (blocks.empty()) return ::operator new(size, kAlignment);
    void* block = blocks.back();
    blocks.pop_back();
    bytes_ -= size;
    return block;
  }

  void give(void* block, size_t size) {
    if (bytes_ + size > kMostKept) return ::operator delete(block, kAlignment);
    free_[std::countr_zero(size)].push_back(block);
    bytes_ += size;
  }

 private:
  std::array<std::vector<void*>, 64> free_;  // by the exponent of their size
  size_t bytes_ = 0;
};

Kept& kept() {
  thread_local Kept blocks;
  return blocks;
}

}  // namespace

void* take_scratch(size_t bytes) { return kept().take(block_size(bytes)); }

void give_scratch(void* memory, size_t bytes) noexcept { kept().give(memory, block_size(bytes)); }

}  // namespace ddrf_fast

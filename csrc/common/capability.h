// Which instruction set the hot kernels run with.
//
// The library is built for every x86-64 processor; a hot kernel is a header that several .cpp
// files compile, each for one instruction set:
//
//   #include <standard and torch headers>       // before the pragma: shared inline functions must
//   DDRF_TARGET_AVX2                            // not be compiled for one set and linked for all
//   #define DDRF_CAPABILITY avx2                // the namespace of this set's kernels
//   #define DDRF_VECTOR_BYTES 32
//   #include "the_kernel.h"
//
// The environment variable DDRF_FAST_CPU_CAPABILITY, read once, asks for a lower set than the best
// one, for tests and for measurements.
#pragma once

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

// GCC knows AMX from version 11 on.
#if defined(__x86_64__) && !defined(__clang__) && defined(__GNUC__) && __GNUC__ >= 11
#define DDRF_X86_CAPABILITIES 1
#define DDRF_TARGET_AVX2 _Pragma("GCC target(\"avx2,fma,f16c\")")
#define DDRF_TARGET_AVX512 \
  _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl\")")
#define DDRF_TARGET_AVX512_BF16 \
  _Pragma("GCC target(\"avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16\")")
#define DDRF_TARGET_AMX_BF16 DDRF_TARGET_AVX512_BF16 _Pragma("GCC target(\"amx-tile,amx-bf16\")")
#else
#define DDRF_X86_CAPABILITIES 0
#endif

#if DDRF_X86_CAPABILITIES && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace ddrf_fast {

// Those above kAvx512 differ from it for bfloat16 only.
enum class Capability { kDefault, kAvx2, kAvx512, kAvx512Bf16, kAmxBf16 };

// Their names in DDRF_FAST_CPU_CAPABILITY.
inline constexpr const char* kCapabilityNames[] = {"default", "avx2", "avx512", "avx512_bf16",
                                                   "amx_bf16"};
inline constexpr int kCapabilities = std::size(kCapabilityNames);

// Whether this process may use AMX with bfloat16, for which it asks the system. Visible and weak,
// so that an emulator of these instructions can answer in its place.
extern "C" __attribute__((visibility("default"), weak)) bool ddrf_fast_ask_for_amx_bf16() {
#if DDRF_X86_CAPABILITIES && defined(__linux__)
  // Linux keeps the 8 KB of tiles in the state of a thread for those processes only that ask.
  constexpr long kAskForState = 0x1023, kTiles = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kAskForState, kTiles) == 0;
#else
  return false;
#endif
}

inline Capability best_capability() {
#if DDRF_X86_CAPABILITIES
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      if (!__builtin_cpu_supports("avx512bf16")) return Capability::kAvx512;
      return ddrf_fast_ask_for_amx_bf16() ? Capability::kAmxBf16 : Capability::kAvx512Bf16;
    }
    return Capability::kAvx2;
  }
#endif
  return Capability::kDefault;
}

inline Capability choose_capability() {
  const Capability best = best_capability();
  const char* variable = std::getenv("DDRF_FAST_CPU_CAPABILITY");
  if (variable == nullptr || *variable == '\0') return best;
  const std::string asked = variable;
  int chosen = 0;
  while (chosen < kCapabilities && asked != kCapabilityNames[chosen]) ++chosen;
  if (chosen == kCapabilities) {
    std::string names = kCapabilityNames[0];
    for (int i = 1; i < kCapabilities; ++i) {
      names += (i + 1 < kCapabilities ? ", " : " or ") + std::string(kCapabilityNames[i]);
    }
    throw std::runtime_error("DDRF_FAST_CPU_CAPABILITY: expected " + names + ", got '" + asked +
                             "'");
  }
  if (chosen > static_cast<int>(best)) {
    throw std::runtime_error("DDRF_FAST_CPU_CAPABILITY: this processor or this build has no '" +
                             asked + "'");
  }
  return static_cast<Capability>(chosen);
}

inline Capability cpu_capability() {
  static const Capability capability = choose_capability();
  return capability;
}

// Whether sizes are to be those that suit Intel's cores.
inline bool is_intel() {
#if DDRF_X86_CAPABILITIES
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
}

}  // namespace ddrf_fast

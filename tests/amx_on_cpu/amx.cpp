// Runs the AMX instructions of a program on a processor without them, for tests: preloaded, it
// answers that AMX is there, and executes each such instruction when the processor refuses it.
// Written from Intel's description of the instructions (SDM, volume 2); what that forbids, such as
// tiles that do not fit each other, ends the process with a message.
#include <immintrin.h>
#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

struct Tile {
  uint8_t row[kMostRows][kMostBytes];
};

thread_local Configuration configuration;
thread_local Tile tiles[kTiles];

[[noreturn]] void fail(const char* what) {
  char text[128];
  const int length = std::snprintf(text, sizeof(text), "amx emulator: %s\n", what);
  if (write(STDERR_FILENO, text, static_cast<size_t>(length)) < 0) _exit(99);
  _exit(98);
}

void expect(bool condition, const char* what) {
  if (!condition) fail(what);
}

int rows(int tile) { return configuration.rows[tile]; }
int row_bytes(int tile) { return configuration.row_bytes[tile]; }

void expect_configured(int tile) {
  expect(configuration.palette == 1, "a tile is used before ldtilecfg");
  expect(rows(tile) > 0 && row_bytes(tile) > 0, "a tile is used that is not configured");
}

void load_configuration(const uint8_t* from) {
  Configuration given;
  std::memcpy(&given, from, sizeof(given));
  expect(given.palette == 1, "ldtilecfg with a palette other than 1");
  expect(given.start_row == 0, "ldtilecfg with a start row");
  for (uint8_t byte : given.reserved) expect(byte == 0, "ldtilecfg with reserved bytes");
  for (int i = 0; i < 16; ++i) {
    expect(i < kTiles || (given.rows[i] == 0 && given.row_bytes[i] == 0), "more than 8 tiles");
    expect(given.rows[i] <= kMostRows && given.row_bytes[i] <= kMostBytes, "a tile is too large");
  }
  configuration = given;
  std::memset(tiles, 0, sizeof(tiles));
}

void release() {
  configuration = {};
  std::memset(tiles, 0, sizeof(tiles));
}

void load(int tile, const uint8_t* from, int64_t stride) {
  expect_configured(tile);
  std::memset(&tiles[tile], 0, sizeof(Tile));
  for (int r = 0; r < rows(tile); ++r) {
    std::memcpy(tiles[tile].row[r], from + r * stride, static_cast<size_t>(row_bytes(tile)));
  }
}

void store(int tile, uint8_t* to, int64_t stride) {
  expect_configured(tile);
  for (int r = 0; r < rows(tile); ++r) {
    std::memcpy(to + r * stride, tiles[tile].row[r], static_cast<size_t>(row_bytes(tile)));
  }
}

float number(const Tile& tile, int row, int column) {
  float value;
  std::memcpy(&value, &tile.row[row][4 * column], sizeof(value));
  return value;
}

float bfloat16(const Tile& tile, int row, int column) {
  uint16_t half;
  std::memcpy(&half, &tile.row[row][2 * column], sizeof(half));
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// c += a * b
void multiply_pairs(int c, int a, int b) {
  for (int tile : {c, a, b}) expect_configured(tile);
  expect(c != a && c != b && a != b, "tdpbf16ps with a tile twice");
  const int pairs = row_bytes(a) / 4, columns = row_bytes(b) / 4;
  expect(rows(c) == rows(a) && row_bytes(c) == row_bytes(b) && pairs == rows(b),
         "tdpbf16ps with tiles that do not fit each other");
  for (int m = 0; m < rows(c); ++m) {
    for (int n = 0; n < columns; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < pairs; ++k) {
        even = std::fma(bfloat16(tiles[a], m, 2 * k), bfloat16(tiles[b], k, 2 * n), even);
        odd = std::fma(bfloat16(tiles[a], m, 2 * k + 1), bfloat16(tiles[b], k, 2 * n + 1), odd);
      }
      const float sum = number(tiles[c], m, n) + (even + odd);
      std::memcpy(&tiles[c].row[m][4 * n], &sum, sizeof(sum));
    }
  }
}

// The fields of an instruction with a three-byte VEX prefix.
struct Instruction {
  int prefix, reg, rm, second;  // 0 none, 1 66, 2 F3, 3 F2; registers
  bool in_memory;
  uint8_t* address;
  int64_t index;  // the index register, scaled: the distance of rows
  int64_t length;
};

int64_t general_register(const ucontext_t& context, int number) {
  constexpr int kPlaces[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP,
                             REG_RSI, REG_RDI, REG_R8,  REG_R9,  REG_R10, REG_R11,
                             REG_R12, REG_R13, REG_R14, REG_R15};
  return context.uc_mcontext.gregs[kPlaces[number]];
}

Instruction decode(const ucontext_t& context, const uint8_t* code) {
  Instruction result{};
  const int high_index = code[1] & 0x40 ? 0 : 8, high_base = code[1] & 0x20 ? 0 : 8;
  result.prefix = code[2] & 3;
  result.second = ~(code[2] >> 3) & 15;
  const int mode = code[4] >> 6;
  result.reg = (code[4] >> 3) & 7;
  result.rm = code[4] & 7;
  result.in_memory = mode != 3;
  const uint8_t* next = code + 5;
  if (result.in_memory) {
    int base = result.rm;
    if (base == 4) {
      const int index = ((*next >> 3) & 7) + high_index, scale = *next >> 6;
      if (index != 4) result.index = general_register(context, index) << scale;
      base = *next++ & 7;
    }
    int64_t start = 0;
    const bool no_base = mode == 0 && base == 5;
    if (!no_base) start = general_register(context, base + high_base);
    if (mode == 1) {
      start += static_cast<int8_t>(*next++);
    } else if (mode == 2 || no_base) {
      int32_t displacement;
      std::memcpy(&displacement, next, sizeof(displacement));
      next += sizeof(displacement);
      start += displacement;
      if (no_base && result.rm == 5) start += reinterpret_cast<int64_t>(next);  // relative to rip
    }
    result.address = reinterpret_cast<uint8_t*>(start);
  }
  result.length = next - code;
  return result;
}

struct sigaction earlier;

void on_illegal_instruction(int signal, siginfo_t*, void* pointer) {
  auto& context = *static_cast<ucontext_t*>(pointer);
  auto& place = context.uc_mcontext.gregs[REG_RIP];
  const auto* code = reinterpret_cast<const uint8_t*>(place);
  // VEX, map 0F38, W0, 128 bits; other illegal instructions are not ours.
  const bool ours = code[0] == 0xc4 && (code[1] & 31) == 2 && (code[2] & 0x84) == 0 &&
                    (code[3] == 0x49 || code[3] == 0x4b || code[3] == 0x5c);
  if (!ours) {
    sigaction(signal, &earlier, nullptr);
    return;
  }
  _mm_setcsr(_mm_getcsr() | 0x8040);  // denormals are zeros, whatever the program's mode
  const Instruction it = decode(context, code);
  if (code[3] == 0x49 && it.in_memory && it.prefix == 0 && it.reg == 0) {
    load_configuration(it.address + it.index);
  } else if (code[3] == 0x49 && !it.in_memory && it.prefix == 0 && it.reg == 0) {
    release();
  } else if (code[3] == 0x49 && !it.in_memory && it.prefix == 3) {
    expect_configured(it.reg);
    std::memset(&tiles[it.reg], 0, sizeof(Tile));
  } else if (code[3] == 0x4b && it.in_memory && (it.prefix == 3 || it.prefix == 1)) {
    load(it.reg, it.address, it.index);
  } else if (code[3] == 0x4b && it.in_memory && it.prefix == 2) {
    store(it.reg, it.address, it.index);
  } else if (code[3] == 0x5c && !it.in_memory && it.prefix == 2) {
    multiply_pairs(it.reg, it.rm, it.second);
  } else {
    fail("an instruction that is not known");
  }
  place += it.length;
}

__attribute__((constructor)) void begin() {
  struct sigaction action{};
  action.sa_sigaction = on_illegal_instruction;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGILL, &action, &earlier);
}

}  // namespace

extern "C" bool ddrf_fast_ask_for_amx_bf16() { return true; }

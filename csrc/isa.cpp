// Which instruction set runs: feature bits of the CPU and of the operating system, never the model's name.
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace fastbert {

#define FASTBERT_DECLARE_ENCODER(isa)                          \
  namespace isa {                                              \
  template <class T>                                           \
  EncoderKernels<T> encoder_table();                           \
  bool offers_fours();                                         \
  Peaks peak_table();                                          \
  bool tiles_agree();                                          \
  extern template EncoderKernels<float> encoder_table();       \
  extern template EncoderKernels<bf16> encoder_table();        \
  extern template EncoderKernels<std::int8_t> encoder_table(); \
  extern template EncoderKernels<split> encoder_table();       \
  }
#define FASTBERT_DECLARE(isa)             \
  FASTBERT_DECLARE_ENCODER(isa)           \
  namespace isa {                         \
  template <class T>                      \
  Kernels<T> table();                     \
  extern template Kernels<float> table(); \
  extern template Kernels<bf16> table();  \
  }
FASTBERT_DECLARE(portable)
#if defined(__x86_64__)
FASTBERT_DECLARE(avx2)
FASTBERT_DECLARE(avxvnni)
FASTBERT_DECLARE(avx512)
FASTBERT_DECLARE(avx512vnni)
FASTBERT_DECLARE(avx512bf16)
// Of these only the encoder differs.
FASTBERT_DECLARE_ENCODER(amx)
FASTBERT_DECLARE_ENCODER(amxemulated)
#endif

namespace {

struct Current {
  const char* name;
  Kernels<float> of_float;
  Kernels<bf16> of_bf16;
  EncoderKernels<float> encoder_float;
  EncoderKernels<bf16> encoder_bf16;
  EncoderKernels<std::int8_t> encoder_int8;
  EncoderKernels<split> encoder_split;
  bool fours;
  Peaks peaks;
};

struct Isa {
  const char* name;
  bool supported;
  Current (*load)();
};

#define FASTBERT_LOAD_ENCODER(isa, ops)                                         \
  [] {                                                                          \
    return Current{#isa,                                                        \
                   ops::table<float>(),                                         \
                   ops::table<bf16>(),                                          \
                   isa::encoder_table<float>(),                                 \
                   isa::encoder_table<bf16>(),                                  \
                   isa::encoder_table<std::int8_t>(),                           \
                   isa::encoder_table<split>(),                                 \
                   isa::offers_fours(),                                         \
                   isa::peak_table()};                                          \
  }
#define FASTBERT_LOAD(isa) FASTBERT_LOAD_ENCODER(isa, isa)

#if defined(__x86_64__)
struct Registers {
  unsigned a, b, c, d;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
  Registers r{};
  __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);  // leaves zeros where the leaf does not exist
  return r;
}

// Which register files the operating system saves at a context switch; 0 where it cannot say.
std::uint64_t saved_state(const Registers& leaf1) {
  if (!(leaf1.c >> 27 & 1)) return 0;  // OSXSAVE
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return static_cast<std::uint64_t>(high) << 32 | low;
}

bool has(std::uint64_t bits, std::uint64_t wanted) { return (bits & wanted) == wanted; }

bool has_avx2() {
  const Registers leaf1 = cpuid(1);
  return has(leaf1.c, 1u << 12 | 1u << 28 | 1u << 29)  // FMA, AVX, F16C
         && has(cpuid(7).b, 1u << 5)                   // AVX2
         && has(saved_state(leaf1), 0x06);             // xmm, ymm
}

bool has_avxvnni() { return has_avx2() && has(cpuid(7, 1).a, 1u << 4); }

bool has_avx512() {
  return has_avx2() && has(cpuid(7).b, 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31)  // F, DQ, BW, VL
         && has(saved_state(cpuid(1)), 0xe6);                                     // and the masks, zmm
}

bool has_avx512vnni() { return has_avx512() && has(cpuid(7).c, 1u << 11); }

bool has_avx512bf16() { return has_avx512vnni() && has(cpuid(7, 1).a, 1u << 5); }

// Whether pairs of bf16 are multiplied faster than fp32: at twice the rate on AMD's cores, at half of it on Intel's.
bool has_fast_pairs() {
  const Registers maker = cpuid(0);
  return maker.b == 0x68747541 && maker.d == 0x69746e65 && maker.c == 0x444d4163;  // "Auth" "enti" "cAMD"
}

// Linux saves tiles for a process that asks; and they are trusted after they have computed something known.
bool has_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  if (has_avx512bf16() && has(cpuid(7).d, 1u << 22 | 1u << 24 | 1u << 25)  // BF16, TILE, INT8
      && has(saved_state(cpuid(1)), 3u << 17)                              // configuration, tiles
      && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) {
    if (amx::tiles_agree()) return true;
    std::fputs("fastbert: the AMX tiles of this CPU give wrong products, so they stay unused. Please report it.\n", stderr);
  }
#endif
  return false;
}
#endif

// Best last; what only computes as another CPU would is never chosen by itself.
const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
#if defined(__x86_64__)
      {"amxemulated", has_avx512bf16(), FASTBERT_LOAD_ENCODER(amxemulated, avx512bf16)},
#endif
      {"portable", true, FASTBERT_LOAD(portable)},
#if defined(__x86_64__)
      {"avx2", has_avx2(), FASTBERT_LOAD(avx2)},
      {"avxvnni", has_avxvnni(), FASTBERT_LOAD(avxvnni)},
      {"avx512", has_avx512(), FASTBERT_LOAD(avx512)},
      {"avx512vnni", has_avx512vnni(), FASTBERT_LOAD(avx512vnni)},
      {"avx512bf16", has_avx512bf16(), FASTBERT_LOAD(avx512bf16)},
      {"amx", has_amx(), FASTBERT_LOAD_ENCODER(amx, avx512bf16)},
#endif
  };
  return all;
}

Current loaded(const Isa& isa) {
  Current all = isa.load();
#if defined(__x86_64__)
  Kernels<bf16>& ops = all.of_bf16;
  if (!has_fast_pairs() && ops.attention_fwd == avx512bf16::table<bf16>().attention_fwd) {
    ops.attention_fwd = avx512vnni::table<bf16>().attention_fwd;
    ops.attention_bwd = avx512vnni::table<bf16>().attention_bwd;
  }
#endif
  return all;
}

Current& current() {
  static Current chosen = [] {
    const Isa* best = nullptr;
    for (const Isa& isa : isas())
      if (isa.supported) best = &isa;
    return loaded(*best);
  }();
  return chosen;
}

}  // namespace

template <>
const Kernels<float>& kernels() {
  return current().of_float;
}

template <>
const Kernels<bf16>& kernels() {
  return current().of_bf16;
}

template <>
const EncoderKernels<float>& encoder_kernels() {
  return current().encoder_float;
}

template <>
const EncoderKernels<bf16>& encoder_kernels() {
  return current().encoder_bf16;
}

template <>
const EncoderKernels<std::int8_t>& encoder_kernels() {
  return current().encoder_int8;
}

template <>
const EncoderKernels<split>& encoder_kernels() {
  return current().encoder_split;
}

bool has_fours() { return current().fours; }

bool has_split() { return current().encoder_split.encoder_fwd != nullptr; }

const Peaks& peaks() { return current().peaks; }

const char* isa() { return current().name; }

std::vector<const char*> supported_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : isas())
    if (isa.supported) names.push_back(isa.name);
  return names;
}

void set_isa(const char* name) {
  std::string offered;
  for (const char* s : supported_isas()) offered += std::string(offered.empty() ? "" : ", ") + s;
  for (const Isa& isa : isas()) {
    if (std::strcmp(isa.name, name) != 0) continue;
    if (!isa.supported)
      throw std::invalid_argument(std::string("this CPU (or its operating system) lacks the instruction set '") + name +
                                  "'; it offers " + offered);
    current() = loaded(isa);
    return;
  }
  throw std::invalid_argument(std::string("unknown instruction set '") + name + "'; this CPU offers " + offered);
}

}  // namespace fastbert

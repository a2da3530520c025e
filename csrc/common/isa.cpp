#include "common/isa.h"

#include <cstdint>
#include <cstdlib>
#include <cstring>

#if GENFUSE_X86
#include <cpuid.h>
#endif

namespace genfuse {
namespace {

#if GENFUSE_X86

// By hand, because __builtin_cpu_supports needs a run-time library that clang-cl does not link.
struct Cpu {
  bool sse42 = false, avx = false, f16c = false, fma = false, avx2 = false;
  bool avx512f = false, avx512dq = false, avx512bw = false, avx512vl = false, avx512vnni = false, avx512bf16 = false;

  Cpu() {
    uint32_t a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return;
    const auto bit = [](uint32_t word, int index) { return ((word >> index) & 1) != 0; };
    sse42 = bit(c, 20);
    // The operating system must save the wider registers, too: bits 1, 2 (SSE, AVX) and 5 to 7 (AVX-512) of XCR0.
    uint32_t saved = 0;
    if (bit(c, 27)) {
      uint32_t high;
      __asm__("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    }
    const bool ymm = (saved & 0x06) == 0x06, zmm = ymm && (saved & 0xe0) == 0xe0;
    avx = ymm && bit(c, 28);
    f16c = avx && bit(c, 29);
    fma = avx && bit(c, 12);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    const uint32_t leaves = a;
    avx2 = avx && bit(b, 5);
    avx512f = zmm && bit(b, 16);
    avx512dq = avx512f && bit(b, 17);
    avx512bw = avx512f && bit(b, 30);
    avx512vl = avx512f && bit(b, 31);
    avx512vnni = avx512f && bit(c, 11);
    if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) avx512bf16 = avx512f && bit(a, 5);
  }

  Isa best() const {
    if (!(avx2 && fma && f16c)) return Isa::baseline;
    return avx512f && avx512bw && avx512dq && avx512vl ? Isa::avx512 : Isa::avx2;
  }
};

Isa choose() {
  const Isa best = Cpu().best();
  if (const char* wanted = std::getenv("GENFUSE_ISA")) {
    for (Isa isa : {Isa::baseline, Isa::avx2}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && isa < best) return isa;
    }
  }
  return best;
}

#else

Isa choose() { return Isa::baseline; }

#endif

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx2:
      return "avx2";
    case Isa::avx512:
      return "avx512";
    default:
      return "baseline";
  }
}

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names(1);
  for (const char* c = GENFUSE_ISAS; *c; ++c) {
    if (*c == ',') {
      names.emplace_back();
    } else {
      names.back() += *c;
    }
  }
  return names;
}

std::vector<std::string> cpu_features() {
  std::vector<std::string> names;
#if GENFUSE_X86
  const Cpu cpu;
  const struct {
    const char* name;
    bool there;
  } features[] = {
      {"sse4.2", cpu.sse42},
      {"avx", cpu.avx},
      {"f16c", cpu.f16c},
      {"fma", cpu.fma},
      {"avx2", cpu.avx2},
      {"avx512f", cpu.avx512f},
      {"avx512dq", cpu.avx512dq},
      {"avx512bw", cpu.avx512bw},
      {"avx512vl", cpu.avx512vl},
      {"avx512vnni", cpu.avx512vnni},
      {"avx512bf16", cpu.avx512bf16},
  };
  for (const auto& feature : features) {
    if (feature.there) names.emplace_back(feature.name);
  }
#elif defined(__aarch64__) || defined(_M_ARM64)
  names.emplace_back("neon");
#endif
  return names;
}

}  // namespace genfuse

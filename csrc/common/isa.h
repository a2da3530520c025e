// Which version of a kernel runs.
//
// Every csrc/*/*_cpu.cpp is compiled once for each instruction set, with GENFUSE_ISA defined as `baseline`, `avx2` or
// `avx512`, and puts its functions into the namespace of that name (GENFUSE_NAMESPACE). Callers choose through
// GENFUSE_DISPATCH.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) || defined(_M_X64)
#define GENFUSE_X86 1
#else
#define GENFUSE_X86 0
#endif

namespace genfuse {

enum class Isa { baseline, avx2, avx512 };

// The instruction set in use: the best that this CPU has. The environment variable GENFUSE_ISA (baseline, avx2 or
// avx512, read once) asks for less; asking for more than the CPU has changes nothing.
Isa isa();

const char* isa_name(Isa isa);

// The instruction sets that this binary holds, oldest first.
std::vector<std::string> compiled_isas();

// What this CPU can do, of what the kernels could use: "avx2", "fma", "avx512f", "neon", ...
std::vector<std::string> cpu_features();

}  // namespace genfuse

// Declares `signature` once for each instruction set:
//     GENFUSE_DECLARE(void lstm_forward(const LstmArguments& arguments))
// and GENFUSE_DISPATCH(lstm_forward) is the version for this CPU, to be called or stored.
#if GENFUSE_X86
#define GENFUSE_DECLARE(...) \
  namespace baseline {       \
  __VA_ARGS__;               \
  }                          \
  namespace avx2 {           \
  __VA_ARGS__;               \
  }                          \
  namespace avx512 {         \
  __VA_ARGS__;               \
  }
#define GENFUSE_DISPATCH(function)                                           \
  (::genfuse::isa() == ::genfuse::Isa::avx512 ? &::genfuse::avx512::function \
   : ::genfuse::isa() == ::genfuse::Isa::avx2 ? &::genfuse::avx2::function   \
                                              : &::genfuse::baseline::function)
#else
#define GENFUSE_DECLARE(...) \
  namespace baseline {       \
  __VA_ARGS__;               \
  }
#define GENFUSE_DISPATCH(function) (&::genfuse::baseline::function)
#endif

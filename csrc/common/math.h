// Scalar elementary functions for host and device. The SIMD counterparts, with the same names, are in simd.h.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define GENFUSE_HD __host__ __device__ __forceinline__
#elif defined(_MSC_VER) && !defined(__clang__)
#define GENFUSE_HD __forceinline
#else
#define GENFUSE_HD inline __attribute__((always_inline))
#endif

// Every instruction set gets its own copy of each inline function: merged by the linker, a function compiled
// for AVX-512 could end up being called on a machine that lacks it.
#ifdef GENFUSE_ISA
#define GENFUSE_NAMESPACE namespace GENFUSE_ISA
#else
#define GENFUSE_NAMESPACE inline namespace portable
#endif

namespace genfuse {
GENFUSE_NAMESPACE {

GENFUSE_HD float exp(float x) { return ::expf(x); }
GENFUSE_HD double exp(double x) { return ::exp(x); }
GENFUSE_HD float tanh(float x) { return ::tanhf(x); }
GENFUSE_HD double tanh(double x) { return ::tanh(x); }

// One rounding, where a value computed twice must come out the same: the compiler may contract a * b + c * d either
// way.
GENFUSE_HD float fma(float a, float b, float c) { return ::fmaf(a, b, c); }
GENFUSE_HD double fma(double a, double b, double c) { return ::fma(a, b, c); }

// 1 / (1 + e^-x): e^-x overflows to infinity for very negative x, and 1 / infinity is the right limit.
GENFUSE_HD float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
GENFUSE_HD double sigmoid(double x) { return 1.0 / (1.0 + exp(-x)); }

}  // namespace GENFUSE_ISA
}  // namespace genfuse

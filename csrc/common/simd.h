// One source for every instruction set: Vec<T> is a GCC/Clang vector as wide as the registers that this translation
// unit is compiled for, with the loads, the elementary functions and the reductions that the kernels need.
//
// exp follows the usual reduction x = n ln 2 + r; its polynomial is that of expm1, so that tanh keeps its relative
// accuracy near 0. NaN passes through everything; exp saturates at the largest power of two instead of overflowing,
// which sigmoid cannot tell from infinity. Largest errors measured against long double: exp 1, sigmoid 1.5, tanh 2 ulp.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "common/math.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace genfuse {
GENFUSE_NAMESPACE {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kVectorRegisters = 32;
#else
inline constexpr int kVectorRegisters = 16;
#endif

template <class T>
struct VecTraits;
template <>
struct VecTraits<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float unaligned __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t integer __attribute__((vector_size(kVectorBytes)));
  using scalar_integer = int32_t;
};
template <>
struct VecTraits<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double unaligned __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t integer __attribute__((vector_size(kVectorBytes)));
  using scalar_integer = int64_t;
};

template <class T>
using Vec = typename VecTraits<T>::type;
template <class T>
using VecInt = typename VecTraits<T>::integer;
template <class T>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
GENFUSE_HD Vec<T> load(const T* p) {
  return *reinterpret_cast<const typename VecTraits<T>::unaligned*>(p);
}
template <class T>
GENFUSE_HD void store(T* p, Vec<T> v) {
  *reinterpret_cast<typename VecTraits<T>::unaligned*>(p) = v;
}
template <class T>
GENFUSE_HD Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// The first n lanes (0 <= n < kLanes); the others read as 0 and are not touched in memory.
GENFUSE_HD Vec<float> load_partial(const float* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p));
#else
  Vec<float> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
GENFUSE_HD Vec<double> load_partial(const double* p, int n) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<double>>(_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p));
#else
  Vec<double> v{};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
#endif
}
GENFUSE_HD void store_partial(float* p, Vec<float> v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), reinterpret_cast<__m512>(v));
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
GENFUSE_HD void store_partial(double* p, Vec<double> v, int n) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), reinterpret_cast<__m512d>(v));
#else
  for (int i = 0; i < n; ++i) p[i] = v[i];
#endif
}
// min(n, kLanes) lanes.
template <class T>
GENFUSE_HD Vec<T> load_upto(const T* p, int64_t n) {
  return n >= kLanes<T> ? load(p) : load_partial(p, static_cast<int>(n));
}
template <class T>
GENFUSE_HD void store_upto(T* p, Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) {
    store(p, v);
  } else {
    store_partial(p, v, static_cast<int>(n));
  }
}

// Lane i plus lane i + half, and so on down: always the same tree.
template <int Half, class V, size_t... I>
GENFUSE_HD V add_halves(V v, std::index_sequence<I...>) {
  return v + __builtin_shufflevector(v, v, static_cast<int>(I ^ Half)...);
}
template <class T>
GENFUSE_HD T sum(Vec<T> v) {
  constexpr int lanes = kLanes<T>;
  constexpr auto all = std::make_index_sequence<lanes>{};
  if constexpr (lanes >= 16) v = add_halves<8>(v, all);
  if constexpr (lanes >= 8) v = add_halves<4>(v, all);
  if constexpr (lanes >= 4) v = add_halves<2>(v, all);
  return add_halves<1>(v, all)[0];
}

// In place: rows[i][j] <-> rows[j][i], by log2(lanes) perfect shuffles.
template <class V, size_t... I>
GENFUSE_HD V interleave_low(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(I / 2 + I % 2 * sizeof...(I))...);
}
template <class V, size_t... I>
GENFUSE_HD V interleave_high(V a, V b, std::index_sequence<I...>) {
  return __builtin_shufflevector(a, b, static_cast<int>(sizeof...(I) / 2 + I / 2 + I % 2 * sizeof...(I))...);
}
template <class T>
GENFUSE_HD void transpose(Vec<T> (&rows)[kLanes<T>]) {
  constexpr int lanes = kLanes<T>;
  constexpr auto all = std::make_index_sequence<lanes>{};
#pragma GCC unroll 4
  for (int stage = 1; stage < lanes; stage *= 2) {
    Vec<T> next[lanes];
#pragma GCC unroll 16
    for (int i = 0; i < lanes / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + lanes / 2], all);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + lanes / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) rows[i] = next[i];
  }
}

// x if n lanes or more are wanted, else zeros from lane n on.
template <class T>
GENFUSE_HD Vec<T> keep_first(Vec<T> v, int64_t n) {
  if (n >= kLanes<T>) return v;
  VecInt<T> lane;
  for (int i = 0; i < kLanes<T>; ++i) lane[i] = i;
  return lane < static_cast<typename VecTraits<T>::scalar_integer>(n) ? v : Vec<T>{};
}

template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  static constexpr float magic = 0x1.8p23f, ln2_high = 0x1.62e400p-1f, ln2_low = 0x1.7f7d1cp-20f;
  static constexpr float lowest = -87.33f, highest = 88.36f, tanh_limit = 9.02f;
  static constexpr int mantissa_bits = 23, bias = 127;
};
template <>
struct ExpConstants<double> {
  static constexpr double magic = 0x1.8p52, ln2_high = 0x1.62e42fee00000p-1, ln2_low = 0x1.a39ef35793c76p-33;
  static constexpr double lowest = -708.3, highest = 709.42, tanh_limit = 19.1;
  static constexpr int mantissa_bits = 52, bias = 1023;
};

// expm1(r) - r for |r| <= ln(2)/2: Taylor's series, truncated below half an ulp of expm1.
GENFUSE_HD Vec<float> exp_tail(Vec<float> r) {
  Vec<float> p = r * (1.0f / 5040) + (1.0f / 720);
  p = p * r + (1.0f / 120);
  p = p * r + (1.0f / 24);
  p = p * r + (1.0f / 6);
  p = p * r + 0.5f;
  return r * r * p;
}
GENFUSE_HD Vec<double> exp_tail(Vec<double> r) {
  Vec<double> p = r * (1.0 / 6227020800.0) + (1.0 / 479001600.0);
  p = p * r + (1.0 / 39916800.0);
  p = p * r + (1.0 / 3628800.0);
  p = p * r + (1.0 / 362880.0);
  p = p * r + (1.0 / 40320.0);
  p = p * r + (1.0 / 5040.0);
  p = p * r + (1.0 / 720.0);
  p = p * r + (1.0 / 120.0);
  p = p * r + (1.0 / 24.0);
  p = p * r + (1.0 / 6.0);
  p = p * r + 0.5;
  return r * r * p;
}

// x = n ln 2 + r; returns expm1(r) and 2^n. Adding `magic` rounds to the nearest integer and leaves it in the low bits.
template <class T>
GENFUSE_HD Vec<T> exp_reduced(Vec<T> x, Vec<T>& scale) {
  using C = ExpConstants<T>;
  using I = VecInt<T>;
  const Vec<T> shifted = x * static_cast<T>(1.4426950408889634) + C::magic;
  const Vec<T> n = shifted - C::magic;
  const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
  const Vec<T> magic = broadcast(C::magic);
  const I exponent = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic) + C::bias;
  scale = reinterpret_cast<Vec<T>>(exponent << C::mantissa_bits);
  return exp_tail(r) + r;
}

template <class T>
GENFUSE_HD Vec<T> exp_vector(Vec<T> x) {
  using C = ExpConstants<T>;
  // Comparisons are false for NaN, which therefore stays.
  x = x < C::lowest ? broadcast(C::lowest) : x;
  x = x > C::highest ? broadcast(C::highest) : x;
  Vec<T> scale;
  const Vec<T> p = exp_reduced<T>(x, scale);
  return scale * p + scale;
}

template <class T>
GENFUSE_HD Vec<T> tanh_vector(Vec<T> x) {
  using C = ExpConstants<T>;
  x = x < -C::tanh_limit ? broadcast(-C::tanh_limit) : x;
  x = x > C::tanh_limit ? broadcast(C::tanh_limit) : x;
  Vec<T> scale;
  const Vec<T> p = exp_reduced<T>(x + x, scale);
  const Vec<T> expm1 = scale * p + (scale - 1);
  return expm1 / (expm1 + 2);
}

GENFUSE_HD Vec<float> exp(Vec<float> x) { return exp_vector<float>(x); }
GENFUSE_HD Vec<double> exp(Vec<double> x) { return exp_vector<double>(x); }
GENFUSE_HD Vec<float> tanh(Vec<float> x) { return tanh_vector<float>(x); }
GENFUSE_HD Vec<double> tanh(Vec<double> x) { return tanh_vector<double>(x); }
GENFUSE_HD Vec<float> sigmoid(Vec<float> x) { return 1.0f / (1.0f + exp(-x)); }
GENFUSE_HD Vec<double> sigmoid(Vec<double> x) { return 1.0 / (1.0 + exp(-x)); }

// fma of math.h; without such an instruction there is only one way to round, so two roundings serve as well.
GENFUSE_HD Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<float>>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec<float>>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  Vec<float> r;
  for (int i = 0; i < kLanes<float>; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}
GENFUSE_HD Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec<double>>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec<double>>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#elif defined(__aarch64__)
  Vec<double> r;
  for (int i = 0; i < kLanes<double>; ++i) r[i] = __builtin_fma(a[i], b[i], c[i]);
  return r;
#else
  return a * b + c;
#endif
}

// bfloat16 is the upper half of a float32.
GENFUSE_HD Vec<float> load_bf16(const uint16_t* p) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Bits) << 16);
}
// Rounds to nearest even; NaN stays NaN.
GENFUSE_HD void store_bf16(uint16_t* p, Vec<float> v) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = reinterpret_cast<Bits>(v);
  const Bits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x40u;
  *reinterpret_cast<Half*>(p) = __builtin_convertvector(v == v ? rounded : quiet, Half);
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

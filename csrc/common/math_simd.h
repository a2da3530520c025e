// Elementary functions for vectors beyond simd.h: logarithms, and exponentials over the whole range of the type.
#pragma once

#include "common/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace genfuse {
GENFUSE_NAMESPACE {

using VecFloat = Vec<float>;
using VecInt32 = VecInt<float>;

GENFUSE_HD VecFloat as_float(VecInt32 v) { return reinterpret_cast<VecFloat>(v); }
GENFUSE_HD VecInt32 as_int(VecFloat v) { return reinterpret_cast<VecInt32>(v); }
GENFUSE_HD VecFloat to_float(VecInt32 v) { return __builtin_convertvector(v, VecFloat); }

GENFUSE_HD VecFloat square_root(VecFloat x) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecFloat>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecFloat>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecFloat>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#elif defined(__aarch64__)
  return reinterpret_cast<VecFloat>(vsqrtq_f32(reinterpret_cast<float32x4_t>(x)));
#else
  VecFloat r;
  for (int i = 0; i < kLanes<float>; ++i) r[i] = __builtin_sqrtf(x[i]);
  return r;
#endif
}

// exponent ln 2 + ln(1 + f), -1/4 <= f <= 1/2; the polynomial is the minimax one of (ln(1 + f) - f + f^2 / 2) / f^3.
GENFUSE_HD VecFloat log_reduced(VecFloat exponent, VecFloat f) {
  VecFloat p = f * -0.04507668688893318f + 0.10463249683380127f;
  p = p * f - 0.1316125988960266f;
  p = p * f + 0.14478380978107452f;
  p = p * f - 0.16647304594516754f;
  p = p * f + 0.19990861415863037f;
  p = p * f - 0.2500009536743164f;
  p = p * f + 0.3333345055580139f;
  const VecFloat square = f * f;
  const VecFloat rest = exponent * 1.42860677e-6f + (square * f * p - 0.5f * square);
  return exponent * 0.693145751953125f + (f + rest);
}

// x = 2^e m, 3/4 <= m < 3/2: e, and m - 1 in `f`. For positive normal x.
GENFUSE_HD VecInt32 log_reduce(VecFloat x, VecFloat& f) {
  const VecInt32 exponent = (as_int(x) - 0x3f400000) >> 23;
  f = as_float(as_int(x) - (exponent << 23)) - 1.0f;
  return exponent;
}

GENFUSE_HD VecFloat log_positive(VecFloat x) {
  VecFloat f;
  const VecInt32 exponent = log_reduce(x, f);
  return log_reduced(to_float(exponent), f);
}

// ln(1 + u) for 0 <= u <= 1.
GENFUSE_HD VecFloat log1p_unit(VecFloat u) {
  const VecInt32 large = u > 0.5f;
  return log_reduced(large ? VecFloat{} + 1.0f : VecFloat{}, large ? 0.5f * u - 0.5f : u);
}
GENFUSE_HD Vec<double> log1p_unit(Vec<double> u) {
  Vec<double> r{};
  for (int i = 0; i < kLanes<double>; ++i) r[i] = ::log1p(u[i]);
  return r;
}

// e^x = (1 + expm1) low high, where the two powers of two share the exponent, so that what overflows becomes infinity,
// and what underflows loses its places gradually. `tail` is expm1(r) - r of the reduced argument r, which is x itself
// where the exponent is 0.
template <class T>
struct WideExp {
  Vec<T> expm1, tail, low, high;
  VecInt<T> whole;  // the exponent

  GENFUSE_HD explicit WideExp(Vec<T> x) {
    using C = ExpConstants<T>;
    using I = VecInt<T>;
    constexpr T limit = sizeof(T) == 4 ? T(175) : T(1416);
    x = x < -limit ? broadcast(-limit) : x;  // false for NaN, which therefore stays
    x = x > limit ? broadcast(limit) : x;
    const Vec<T> shifted = x * static_cast<T>(1.4426950408889634) + C::magic;
    const Vec<T> n = shifted - C::magic;
    const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
    const Vec<T> magic = broadcast(C::magic);
    whole = reinterpret_cast<I>(shifted) - reinterpret_cast<I>(magic);
    const I half = whole >> 1;
    low = reinterpret_cast<Vec<T>>((half + C::bias) << C::mantissa_bits);
    high = reinterpret_cast<Vec<T>>((whole - half + C::bias) << C::mantissa_bits);
    tail = exp_tail(r);
    expm1 = tail + r;
  }
  GENFUSE_HD Vec<T> value() const { return (low * expm1 + low) * high; }
};

// e^x, infinite or 0 where it is.
template <class T>
GENFUSE_HD Vec<T> exp_wide(Vec<T> x) {
  return WideExp<T>(x).value();
}

// e^x - 1, and e^x - 1 - x, with their digits for small x.
template <class T>
GENFUSE_HD void exp_minus(Vec<T> x, Vec<T>& less_one, Vec<T>& less_one_and_x) {
  const WideExp<T> e(x);
  const VecInt<T> near = (e.whole == 0) & (x == x);
  const Vec<T> far = e.value() - 1;
  less_one = near ? e.expm1 : far;
  constexpr T limit = sizeof(T) == 4 ? T(175) : T(1416);
  less_one_and_x = near ? e.tail : far - (x > limit ? broadcast(limit) : x);  // infinity less infinity is none
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

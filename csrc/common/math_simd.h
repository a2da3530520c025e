// Elementary functions for vectors beyond simd.h: logarithms, and exponentials over the whole range of the type.
#pragma once

#include <limits>

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

// x = 2^e m, 3/4 <= m < 3/2: e, and m - 1 in `f`. For positive normal x; of others the bits wrap around, unsigned.
GENFUSE_HD VecInt32 log_reduce(VecFloat x, VecFloat& f) {
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  const Bits bits = reinterpret_cast<Bits>(x);
  const VecInt32 exponent = reinterpret_cast<VecInt32>(bits - 0x3f400000u) >> 23;
  f = reinterpret_cast<VecFloat>(bits - (reinterpret_cast<Bits>(exponent) << 23)) - 1.0f;
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

// The range in which the two functions below have their exponents; beyond it e^x is infinite or 0.
template <class T>
inline constexpr T kWideLimit = sizeof(T) == 4 ? T(175) : T(1416);

// Whether a comparison holds in any lane.
GENFUSE_HD bool any_lane(VecInt32 v) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(v), reinterpret_cast<__m512i>(v)) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256(reinterpret_cast<__m256i>(v), reinterpret_cast<__m256i>(v)) == 0;
#else
  int32_t all = 0;
  for (int i = 0; i < kLanes<float>; ++i) all |= v[i];
  return all != 0;
#endif
}
GENFUSE_HD bool any_lane(VecInt<double> v) { return any_lane(reinterpret_cast<VecInt32>(v)); }

// x within limits that are not NaN; NaN stays.
GENFUSE_HD VecFloat within(VecFloat x, float low, float high) {
#if defined(__AVX512F__)
  const __m512 above = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), reinterpret_cast<__m512>(x));
  return reinterpret_cast<VecFloat>(_mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), above));
#else
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
#endif
}
GENFUSE_HD Vec<double> within(Vec<double> x, double low, double high) {
  x = x < low ? broadcast(low) : x;
  return x > high ? broadcast(high) : x;
}

// m 2^n for a whole n, infinite or 0 where it is. The power is shared between two factors, so that what overflows
// becomes infinity, and what underflows loses its places gradually.
template <class T>
GENFUSE_HD Vec<T> scale_by_power(Vec<T> m, Vec<T> n, VecInt<T> whole) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return reinterpret_cast<VecFloat>(
        _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(m), reinterpret_cast<__m512>(n)));
  }
#endif
  (void)n;
  using C = ExpConstants<T>;
  const VecInt<T> half = whole >> 1;
  const Vec<T> low = reinterpret_cast<Vec<T>>((half + C::bias) << C::mantissa_bits);
  const Vec<T> high = reinterpret_cast<Vec<T>>((whole - half + C::bias) << C::mantissa_bits);
  return m * low * high;
}

// e^x over the whole range of the type: x = n ln 2 + r, and `tail` is expm1(r) - r, where r is x itself if n is 0.
template <class T>
struct WideExp {
  Vec<T> tail, expm1, value;
  VecInt<T> near;  // whether n is 0

  GENFUSE_HD explicit WideExp(Vec<T> x) {
    using C = ExpConstants<T>;
    x = within(x, -kWideLimit<T>, kWideLimit<T>);
    const Vec<T> shifted = x * static_cast<T>(1.4426950408889634) + C::magic;
    const Vec<T> n = shifted - C::magic;
    const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
    const Vec<T> magic = broadcast(C::magic);
    tail = exp_tail(r);
    expm1 = tail + r;
    value =
        scale_by_power<T>(T(1) + expm1, n, reinterpret_cast<VecInt<T>>(shifted) - reinterpret_cast<VecInt<T>>(magic));
    near = n == 0;  // false for NaN
  }
};

// e^x, infinite or 0 where it is.
template <class T>
GENFUSE_HD Vec<T> exp_wide(Vec<T> x) {
  return WideExp<T>(x).value;
}

// e^x, but the largest number where it is infinite: a factor of what may be 0.
template <class T>
GENFUSE_HD Vec<T> finite_exp(Vec<T> x) {
  return within(exp_wide<T>(x), T(0), std::numeric_limits<T>::max());
}

// ln x over the whole range of the type: -infinity for 0, NaN below.
GENFUSE_HD VecFloat log_wide(VecFloat x) {
  const VecFloat infinite = broadcast(std::numeric_limits<float>::infinity());
  const VecFloat none = broadcast(std::numeric_limits<float>::quiet_NaN());
  const VecInt32 small = x < std::numeric_limits<float>::min();
  VecFloat f;
  const VecFloat exponent = to_float(log_reduce(small ? 0x1p24f * x : x, f));
  const VecFloat log = log_reduced(small ? exponent - 24.0f : exponent, f);
  return x > 0 ? (x == infinite ? x : log) : (x == 0 ? -infinite : none);
}
GENFUSE_HD Vec<double> log_wide(Vec<double> x) {
  Vec<double> r{};
  for (int i = 0; i < kLanes<double>; ++i) r[i] = ::log(x[i]);
  return r;
}

// ln(1 / (1 + e^-x)), where u is e^-|x|; NaN stays.
template <class T>
GENFUSE_HD Vec<T> log_sigmoid(Vec<T> x, Vec<T> u) {
  return (x > 0 ? Vec<T>{} : x) - log1p_unit(u);
}

// By atan x = pi/4 + atan((x - 1) / (x + 1)) or pi/2 - atan(1 / x) of an argument up to tan(pi/8), where the polynomial
// is the minimax one of (atan(t) / t - 1) / t^2; off by 3 ulp at most.
GENFUSE_HD VecFloat atan(VecFloat x) {
  const VecFloat one = VecFloat{} + 1.0f, y = as_float(as_int(x) & 0x7fffffff);
  const VecInt32 middle = y > 0.41421357f, far = y > 2.4142137f;
  const VecFloat above = far ? -one : (middle ? y - one : y), below = far ? y : (middle ? y + one : one);
  const VecFloat quarter = VecFloat{} + 0.78539819f, t = above / below, square = t * t;
  VecFloat p = square * 0.08052483201026917f - 0.13877321779727936f;
  p = p * square + 0.1997767984867096f;
  p = p * square - 0.3333294987678528f;
  const VecFloat r = (far ? quarter + quarter : (middle ? quarter : VecFloat{})) + (t + t * square * p);
  return as_float(as_int(r) | (as_int(x) & static_cast<int32_t>(0x80000000u)));
}
GENFUSE_HD Vec<double> atan(Vec<double> x) {
  Vec<double> r{};
  for (int i = 0; i < kLanes<double>; ++i) r[i] = ::atan(x[i]);
  return r;
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// The formulas of noise_math.h for vectors of float32. A normal is off by 3.3 ulp at most, measured against float64.
#pragma once

#include "common/philox_simd.h"
#include "sampling/noise_math.h"

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

// ln((w + 1/2) / 2^32), exact to the last places at both ends: in the upper half, from the distance to 1.
GENFUSE_HD VecFloat log_of_word(VecWord w) {
  const VecInt32 number = reinterpret_cast<VecInt32>(w);
  const VecFloat x = to_float(number) + 0.5f;  // in the upper half, less 2^32
  VecFloat f;
  const VecFloat exponent = to_float(log_reduce(x, f)) - 32.0f;
  const VecFloat distance = x * 0x1p-32f;  // u - 1
  const VecInt32 far = distance < -0.25f, upper = number < 0;
  const VecFloat f_upper = far ? 2.0f * distance + 1.0f : distance, e_upper = far ? VecFloat{} - 1.0f : VecFloat{};
  return log_reduced(upper ? e_upper : exponent, upper ? f_upper : f);
}

GENFUSE_HD void normal_pair(VecWord radius, VecWord angle, VecFloat& even, VecFloat& odd) {
  const VecFloat r = square_root(-2.0f * log_of_word(radius));
  // Quarter turns, and what is left, in [-pi/4, pi/4].
  const VecWord quarter = (angle + 0x20000000u) >> 30;
  const VecFloat left = to_float(reinterpret_cast<VecInt32>(angle - (quarter << 30))) + 0.5f;
  const VecFloat x = left * 1.46291807926715968e-9f;  // pi / 2^31
  const VecFloat t = x * x;
  VecFloat s = t * 2.71831219e-6f - 1.98393349e-4f;
  s = s * t + 8.33332939e-3f;
  s = s * t - 1.66666666e-1f;
  const VecFloat sine = x + x * t * s;
  VecFloat c = t * 2.44384542e-5f - 1.38873675e-3f;
  c = c * t + 4.16666469e-2f;
  const VecFloat cosine = 1.0f + t * (t * c - 0.5f);
  const VecInt32 swapped = reinterpret_cast<VecInt32>(quarter << 31) < 0;
  const VecInt32 even_sign = reinterpret_cast<VecInt32>(((quarter + 1) & 2) << 30);
  const VecInt32 odd_sign = reinterpret_cast<VecInt32>((quarter & 2) << 30);
  even = r * as_float(as_int(swapped ? sine : cosine) ^ even_sign);
  odd = r * as_float(as_int(swapped ? cosine : sine) ^ odd_sign);
}
GENFUSE_HD VecFloat gumbel(VecWord w) { return -log_positive(-log_of_word(w)); }
GENFUSE_HD VecFloat logistic(VecWord w) { return log_of_word(w) - log_of_word(~w); }

}  // namespace GENFUSE_ISA
}  // namespace genfuse

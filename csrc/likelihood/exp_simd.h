// The exponential of the likelihoods of pixels, whose weights and masses are compared with 1.
#pragma once

#include "common/math_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {

// e^x, held where it is a normal number: 1 to the last place at 0, within 1.5 ulp near it. Its absolute error is what
// counts, so x = n ln 2 + r is reduced in one step, which costs |n| 2e-9 of the value. The polynomial is the minimax
// one with the first two coefficients 1.
GENFUSE_HD VecFloat exp_moderate(VecFloat x) {
  x = within(x, -87.0f, 88.0f);
  const VecFloat shifted = x * 1.44269504f + 0x1.8p23f, n = shifted - 0x1.8p23f, r = x - n * 0.69314718f;
  VecFloat p = r * 0.001384364441037178f + 0.008374163880944252f;
  p = p * r + 0.04166800156235695f;
  p = p * r + 0.16666431725025177f;
  p = p * r + 0.4999999403953552f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#if defined(__AVX512F__)
  return reinterpret_cast<VecFloat>(
      _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  return p * as_float((as_int(shifted) << 23) + (127 << 23));  // a product, in which NaN stays
#endif
}
GENFUSE_HD Vec<double> exp_moderate(Vec<double> x) { return exp(x); }

// The same for x <= 0, and 0 where it is held: a weight that is none.
template <class T>
GENFUSE_HD Vec<T> exp_weight(Vec<T> x) {
  const Vec<T> e = exp_moderate(x);
  return x < (sizeof(T) == 4 ? T(-87) : T(-708)) ? Vec<T>{} : e;
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

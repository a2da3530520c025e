// From the cipher's words to noise, once for a scalar on host or device (T: float or double) and once for a float
// vector. A word w stands for u = (w + 1/2) / 2^32, which is never 0 or 1, so every result is finite.
//
//   normal    Box and Muller 1958: words 2j and 2j + 1 of a block give r = sqrt(-2 ln u) and the angle 2 pi u',
//   elements
//             2j and 2j + 1 are r cos and r sin. |normal| < 6.77.
//   gumbel    -ln(-ln u)
//   logistic  ln u - ln(1 - u)
#pragma once

#include "common/math.h"

namespace genfuse {
GENFUSE_NAMESPACE {

GENFUSE_HD double log_of_word(uint32_t w) {
  // In the upper half the distance from 1 is what counts: ln(1 - d) with an exact d.
  return w >> 31 != 0 ? ::log1p(-(static_cast<double>(~w) + 0.5) * 0x1p-32)
                      : ::log((static_cast<double>(w) + 0.5) * 0x1p-32);
}

// r cos and r sin.
GENFUSE_HD void normal_pair(uint32_t radius, uint32_t angle, double& even, double& odd) {
  const double r = ::sqrt(-2.0 * log_of_word(radius));
  const double turn = (static_cast<double>(angle) + 0.5) * 0x1p-32 * 6.283185307179586;
  even = r * ::cos(turn);
  odd = r * ::sin(turn);
}
GENFUSE_HD double gumbel(uint32_t w) { return -::log(-log_of_word(w)); }
GENFUSE_HD double logistic(uint32_t w) { return log_of_word(w) - log_of_word(~w); }

}  // namespace GENFUSE_ISA
}  // namespace genfuse

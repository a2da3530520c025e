// Storage types of the CUDA kernels, for host and device.
#pragma once

#include <cstdint>

#include "common/math.h"

namespace genfuse {

// bfloat16 as a storage type: the upper half of a float32, rounded to nearest even.
struct BFloat16 {
  uint16_t bits;
};

inline namespace GENFUSE_ISA {

union FloatBits {
  float value;
  uint32_t bits;
};

GENFUSE_HD float to_float(float x) { return x; }
GENFUSE_HD float to_float(BFloat16 x) {
  FloatBits u;
  u.bits = static_cast<uint32_t>(x.bits) << 16;
  return u.value;
}

template <class T>
GENFUSE_HD T from_float(float x);
template <>
GENFUSE_HD float from_float<float>(float x) {
  return x;
}
template <>
GENFUSE_HD BFloat16 from_float<BFloat16>(float x) {
  FloatBits u;
  u.value = x;
  const bool nan = (u.bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = (u.bits + 0x7fffu + ((u.bits >> 16) & 1u)) >> 16;
  return BFloat16{static_cast<uint16_t>(nan ? (u.bits >> 16) | 0x40u : rounded)};
}

}  // namespace GENFUSE_ISA

}  // namespace genfuse

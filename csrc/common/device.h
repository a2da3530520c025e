// What a CUDA kernel uses of its device, in one place, so that tests/cuda_host can compile the same kernel source as
// plain C++ and run a grid's threads as host threads: block and grid barriers, shuffles and shared memory go through
// here, everything else is ordinary C++.
#pragma once

#include <cstdint>

#include "common/math.h"

#ifdef GENFUSE_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace genfuse {

// All threads of a cooperative launch; what was written before is seen after.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char genfuse_shared_memory[];
  return genfuse_shared_memory;
}

// Reads what other blocks have written during this kernel: past the first-level cache, which is not coherent.
__device__ inline float load_fresh(const float* p) { return __ldcg(p); }
__device__ inline int64_t load_fresh(const int64_t* p) {
  return static_cast<int64_t>(__ldcg(reinterpret_cast<const long long*>(p)));
}

}  // namespace genfuse
#endif

namespace genfuse {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

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

__device__ inline float load_fresh(const BFloat16* p) {
#ifdef GENFUSE_CUDA_ON_HOST
  return to_float(*p);
#else
  return to_float(BFloat16{__ldcg(reinterpret_cast<const unsigned short*>(p))});
#endif
}

// Four neighbours in one access; p is aligned to their size.
__device__ inline void load4(const float* p, float (&v)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(p);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}
__device__ inline void load4(const BFloat16* p, float (&v)[4]) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  v[0] = to_float(BFloat16{static_cast<uint16_t>(x.x)});
  v[1] = to_float(BFloat16{static_cast<uint16_t>(x.x >> 16)});
  v[2] = to_float(BFloat16{static_cast<uint16_t>(x.y)});
  v[3] = to_float(BFloat16{static_cast<uint16_t>(x.y >> 16)});
}

}  // namespace genfuse

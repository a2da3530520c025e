// Philox (philox.h) for a vector of blocks at once. A word of the cipher's state sits in the low half of a 64-bit lane:
// a 32 x 32 -> 64 bit multiplication reads no more than that, so what gathers in the upper half never has to be
// cleared.
#pragma once

#include "common/philox.h"
#include "common/simd.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace genfuse {
GENFUSE_NAMESPACE {

typedef uint64_t VecWide __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecWord __attribute__((vector_size(kVectorBytes)));

inline constexpr int kPhiloxBlocks = kVectorBytes / 8;               // to a vector
inline constexpr int kPhiloxGroup = 4 * kPhiloxBlocks;               // words of those blocks
inline constexpr int kPhiloxVectors = kPhiloxGroup / kLanes<float>;  // that hold them: 2

// Products of the lanes' low halves.
GENFUSE_HD VecWide multiply_low(VecWide a, VecWide b) {
#if defined(__AVX512F__)
  // With a mask of ones: GCC 12 warns of an uninitialised value inside the plain form.
  return reinterpret_cast<VecWide>(
      _mm512_maskz_mul_epu32(0xff, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<VecWide>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<VecWide>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif defined(__aarch64__)
  return reinterpret_cast<VecWide>(
      vmull_u32(vmovn_u64(reinterpret_cast<uint64x2_t>(a)), vmovn_u64(reinterpret_cast<uint64x2_t>(b))));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Words 0 to 3 of kPhiloxBlocks blocks from `block` on, each in the lanes' low halves; what is above is undefined.
struct PhiloxVector {
  VecWide word[4];
};

template <int N>
GENFUSE_HD void philox_vectors(uint64_t seed, uint64_t offset, uint64_t block, PhiloxVector (&out)[N]) {
  VecWide lane;
  for (int i = 0; i < kPhiloxBlocks; ++i) lane[i] = static_cast<uint64_t>(i);
  VecWide c0[N], c1[N], c2[N], c3[N];
#pragma GCC unroll 4
  for (int n = 0; n < N; ++n) {
    c0[n] = lane + (block + static_cast<uint64_t>(n * kPhiloxBlocks));
    c1[n] = c0[n] >> 32;
    c2[n] = VecWide{} + offset;
    c3[n] = VecWide{} + (offset >> 32);
  }
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  const VecWide m0 = VecWide{} + 0xD2511F53u, m1 = VecWide{} + 0xCD9E8D57u;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 4
    for (int n = 0; n < N; ++n) {
      const VecWide p0 = multiply_low(c0[n], m0), p1 = multiply_low(c2[n], m1);
      c0[n] = (p1 >> 32) ^ c1[n] ^ (VecWide{} + k0);
      c2[n] = (p0 >> 32) ^ c3[n] ^ (VecWide{} + k1);
      c1[n] = p1;
      c3[n] = p0;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int n = 0; n < N; ++n) out[n] = {{c0[n], c1[n], c2[n], c3[n]}};
}

// Two words a lane: `low` and `high` are words of the same blocks.
GENFUSE_HD VecWide join_words(VecWide low, VecWide high) { return (low & 0xffffffffu) | (high << 32); }

// The words in the order of their elements.
GENFUSE_HD void philox_in_order(const PhiloxVector& v, VecWord (&out)[kPhiloxVectors]) {
  constexpr auto all = std::make_index_sequence<kPhiloxBlocks>{};
  const VecWide first = join_words(v.word[0], v.word[1]), second = join_words(v.word[2], v.word[3]);
  out[0] = reinterpret_cast<VecWord>(interleave_low(first, second, all));
  out[1] = reinterpret_cast<VecWord>(interleave_high(first, second, all));
}

// philox_to_uniform.
GENFUSE_HD Vec<float> philox_to_uniform(VecWord words) {
  return __builtin_convertvector(reinterpret_cast<VecInt<float>>(words >> 8), Vec<float>) * 0x1p-24f;
}

// Calls group(block, at) for groups of kPhiloxGroup elements that cover [first, first + count): `block` is the group's
// first block, and its first element stands at out[at] of the caller's array. The first group may begin before 0, the
// last end beyond count.
template <class Group>
inline void for_philox_groups(uint64_t first, int64_t count, Group group) {
  uint64_t block = first / 4;
  for (int64_t at = -static_cast<int64_t>(first % 4); at < count; at += kPhiloxGroup, block += kPhiloxBlocks) {
    group(block, at);
  }
}

// Uniforms of elements [first, first + count).
inline void philox_fill(uint64_t seed, uint64_t offset, uint64_t first, int64_t count, float* out) {
  for_philox_groups(first, count, [&](uint64_t block, int64_t at) {
    PhiloxVector bits[1];
    philox_vectors(seed, offset, block, bits);
    VecWord words[kPhiloxVectors];
    philox_in_order(bits[0], words);
    if (at >= 0 && at + kPhiloxGroup <= count) {
      for (int v = 0; v < kPhiloxVectors; ++v) store(out + at + v * kLanes<float>, philox_to_uniform(words[v]));
      return;
    }
    float u[kPhiloxGroup];
    for (int v = 0; v < kPhiloxVectors; ++v) store(u + v * kLanes<float>, philox_to_uniform(words[v]));
    for (int64_t i = at < 0 ? -at : 0; i < kPhiloxGroup && at + i < count; ++i) out[at + i] = u[i];
  });
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

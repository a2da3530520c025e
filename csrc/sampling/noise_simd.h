// The formulas of noise_math.h for vectors of float32. A normal is off by 3.3 ulp at most, measured against float64.
#pragma once

#include <cstring>

#include "common/math_simd.h"
#include "common/philox_simd.h"
#include "sampling/noise.h"
#include "sampling/noise_math.h"

namespace genfuse {
GENFUSE_NAMESPACE {

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

// out[kPhiloxGroup] = a group's elements. A uniform has as many bits as the result's dtype holds exactly.
template <Noise noise>
GENFUSE_HD void noise_of_group(const PhiloxVector& bits, int uniform_bits, float* out) {
  constexpr int L = kLanes<float>;
  const auto as_words = [](VecWide w) { return reinterpret_cast<VecWord>(w); };
  VecFloat value[2];
  if constexpr (noise == Noise::normal) {
    constexpr auto all = std::make_index_sequence<L>{};
    VecFloat even, odd;
    normal_pair(as_words(join_words(bits.word[0], bits.word[2])), as_words(join_words(bits.word[1], bits.word[3])),
                even, odd);
    value[0] = interleave_low(even, odd, all);
    value[1] = interleave_high(even, odd, all);
  } else {
    VecWord words[2];
    philox_in_order(bits, words);
    for (int v = 0; v < 2; ++v) {
      if constexpr (noise == Noise::uniform) {
        const VecWord top = words[v] >> static_cast<uint32_t>(32 - uniform_bits);
        value[v] = to_float(reinterpret_cast<VecInt32>(top)) * (1.0f / static_cast<float>(1 << uniform_bits));
      } else {
        value[v] = noise == Noise::gumbel ? gumbel(words[v]) : logistic(words[v]);
      }
    }
  }
  for (int v = 0; v < 2; ++v) store(out + v * L, value[v]);
}

// float64 and raw bits, an element at a time.
template <Noise noise, class T>
inline void noise_of_group(const PhiloxVector& bits, int uniform_bits, T* out) {
  VecWord words[2];
  philox_in_order(bits, words);
  uint32_t word[kPhiloxGroup];
  std::memcpy(word, words, sizeof(word));
  for (int i = 0; i < kPhiloxGroup; ++i) {
    if constexpr (noise == Noise::bits) {
      out[i] = word[i];
    } else if constexpr (noise == Noise::uniform) {
      out[i] = static_cast<T>(word[i] >> (32 - uniform_bits)) / static_cast<T>(1 << uniform_bits);
    } else if constexpr (noise == Noise::normal) {
      if (i % 2 == 0) normal_pair(word[i], word[i + 1], out[i], out[i + 1]);
    } else {
      out[i] = noise == Noise::gumbel ? gumbel(word[i]) : logistic(word[i]);
    }
  }
}

inline constexpr int kNoiseGroups = 4;  // at once: one group's chain of multiplications leaves most ports empty
inline constexpr int64_t kNoiseDrawn = kNoiseGroups * kPhiloxGroup;

// Elements [first, first + count) of a stream; first is a multiple of 4. `out` has room for count rounded up to a
// multiple of kNoiseDrawn, and what lies beyond count is overwritten.
template <Noise noise, class T>
inline void draw_noise(uint64_t seed, uint64_t offset, int64_t first, int64_t count, T* out, int uniform_bits = 24) {
  for (int64_t at = 0; at < count; at += kNoiseDrawn) {
    PhiloxVector bits[kNoiseGroups];
    philox_vectors(seed, offset, static_cast<uint64_t>(first + at) / 4, bits);
    for (int n = 0; n < kNoiseGroups; ++n) noise_of_group<noise>(bits[n], uniform_bits, out + at + n * kPhiloxGroup);
  }
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

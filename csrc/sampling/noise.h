// Random numbers by address: element e of a stream (seed, offset) is a function of those three alone (docs/random.md).
// Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

enum class Noise : int64_t { bits, uniform, normal, gumbel, logistic };
inline constexpr int64_t kNoises = 5;

template <class T>
struct NoiseFill {
  Noise noise = Noise::uniform;
  uint64_t seed = 0, offset = 0;
  int uniform_bits = 24;  // of a uniform: as many as the result's dtype holds exactly
  T* out = nullptr;       // [count]; elements [0, count)
  int64_t count = 0;
};

// T is float or double; int64_t holds bits only.
GENFUSE_DECLARE(template <class T> KernelOf<NoiseFill<T>> noise_kernel())

}  // namespace genfuse

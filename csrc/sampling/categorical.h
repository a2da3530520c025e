// Classes drawn from the softmax of each row by inversion. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

template <class T>
struct Categorical {
  int64_t rows = 0, classes = 0, samples = 0;
  const T* logits = nullptr;  // [rows][classes]
  const T* u = nullptr;       // [rows][samples] in [0, 1), or null: drawn
  uint64_t seed = 0, offset = 0;
  int64_t* out = nullptr;  // [rows][samples]; -1 where a row is no distribution
};

GENFUSE_DECLARE(template <class T> KernelOf<Categorical<T>> categorical_kernel())

}  // namespace genfuse

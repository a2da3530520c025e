// Dequantisation followed by a logit, with ln |det| summed over each row; and back to levels. Plain data: no torch, no
// Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"
#include "common/periodic.h"

namespace genfuse {

// y = ln p - ln q of element e of row e / row: p = alpha + (1 - 2 alpha) (x + u) / levels, and q = 1 - p.
template <class T>
struct Dequantize {
  int64_t count = 0, row = 1;
  Periodic<T> x, u;                // u null: uniforms of the stream (seed, offset)
  const uint8_t* bytes = nullptr;  // x of another type
  uint64_t seed = 0, offset = 0;
  T levels = 256, alpha = 0;
  T* y = nullptr;            // [count]
  T* log_abs_det = nullptr;  // [count / row]
};

template <class T>
struct DequantizeBackward {
  Dequantize<T> forward;
  const T* grad_y = nullptr;            // [count]; null for zeros
  const T* grad_log_abs_det = nullptr;  // [count / row]; null for zeros
  T* grad = nullptr;                    // [count], of x as of u
};

template <class T>
struct LogitQuantize {
  int64_t count = 0;
  const T* y = nullptr;
  T levels = 256, alpha = 0;
  T* x = nullptr;
};

GENFUSE_DECLARE(template <class T> KernelOf<Dequantize<T>> dequantize_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<DequantizeBackward<T>> dequantize_backward_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<LogitQuantize<T>> logit_quantize_kernel())

}  // namespace genfuse

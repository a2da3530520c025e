// Actnorm: y = x s + b, or (x + b) s, with s = e^log_scale and b of each channel, or the inverse; in one pass, as are
// all its gradients. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

template <class T>
struct Actnorm {
  int64_t batch = 0, channels = 0, space = 1;
  bool add_first = false, inverse = false;
  const T* x = nullptr;
  int64_t stride = 0;                             // of x, between batch rows
  const T *log_scale = nullptr, *bias = nullptr;  // [channels]
  T* y = nullptr;                                 // [batch, channels, space]
  T* log_abs_det = nullptr;                       // [batch]
};

template <class T>
struct ActnormBackward {
  Actnorm<T> forward;
  const T* grad_y = nullptr;                                             // as y; null for zeros
  const T* grad_log_abs_det = nullptr;                                   // [batch]; null for zeros
  T *grad_x = nullptr, *grad_log_scale = nullptr, *grad_bias = nullptr;  // null if not wanted
};

GENFUSE_DECLARE(template <class T> KernelOf<Actnorm<T>> actnorm_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<ActnormBackward<T>> actnorm_backward_kernel())

}  // namespace genfuse

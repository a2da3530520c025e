// A matrix over the channels of images: y[b] = weight x[b] + bias. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

template <class T>
struct Conv1x1 {
  int64_t batch = 0, inputs = 1, outputs = 1, places = 1;
  const T *x = nullptr, *weight = nullptr, *bias = nullptr;  // [batch][inputs][places], [outputs][inputs], [outputs]
  T* y = nullptr;                                            // [batch][outputs][places]
};

template <class T>
struct Conv1x1Backward {
  Conv1x1<T> forward;
  const T* grad_y = nullptr;
  T *grad_x = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;  // null if not wanted
};

GENFUSE_DECLARE(template <class T> KernelOf<Conv1x1<T>> conv1x1_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<Conv1x1Backward<T>> conv1x1_backward_kernel())

}  // namespace genfuse

// y = x (mask W)^T + b, where an output sees the inputs that come before it in order of their degrees. Plain data: no
// torch, no Python. Inputs and outputs keep their own order in memory; `order` says which lies at each place.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

template <class T>
struct MaskedLinear {
  int64_t rows = 0, inputs = 0, outputs = 0;
  const T* x = nullptr;       // [rows, inputs]
  const T* weight = nullptr;  // [outputs, inputs]
  const T* bias = nullptr;    // [outputs] or null
  const int64_t *in_order = nullptr, *out_order = nullptr;
  bool in_sorted = false, out_sorted = false;  // everything lies at the place of its own number
  const int64_t* live = nullptr;               // [outputs]: how many places of the inputs the output at each place sees
  const int64_t* first = nullptr;              // [inputs]: from which place on the outputs see the input at each place
  T* y = nullptr;                              // [rows, outputs]
};

template <class T>
struct MaskedLinearBackward {
  MaskedLinear<T> forward;
  const T* grad_y = nullptr;                                          // [rows, outputs]
  T *grad_x = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;  // null if not wanted
};

GENFUSE_DECLARE(template <class T> KernelOf<MaskedLinear<T>> masked_linear_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<MaskedLinearBackward<T>> masked_linear_backward_kernel())

}  // namespace genfuse

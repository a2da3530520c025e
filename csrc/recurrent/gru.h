// One GRU layer in one direction over a whole sequence. Plain data: no torch, no Python.
#pragma once

#include "common/isa.h"
#include "common/kernel.h"
#include "recurrent/sequence.h"

namespace genfuse {

// Weights are contiguous, torch's layout and gate order (r, z, n). Absent ones are null.
template <class T>
struct GruInputs {
  Sequence seq;
  Regularizers reg;
  const T* x = nullptr;     // strides in seq; the last is 1
  const T* h0 = nullptr;    // [batch, hidden]
  const T* w_ih = nullptr;  // [3 hidden, input]
  const T* w_hh = nullptr;  // [3 hidden, hidden]
  const T* b_ih = nullptr;  // [3 hidden]
  const T* b_hh = nullptr;
};

template <class T>
struct GruForward : GruInputs<T> {
  T* hidden = nullptr;  // reserve, [rows, hidden]: h before the output mask; null without one, or in inference
  T* gates = nullptr;   // reserve, [rows, 4 hidden]: r, z, n and hn = W_hn h + b_hn; null in inference
  T* y = nullptr;       // [rows, hidden]
  T* h_n = nullptr;     // [batch, hidden]
};

template <class T>
struct GruBackward : GruInputs<T> {
  const T* hidden = nullptr;
  const T* gates = nullptr;
  const T* y = nullptr;
  const T* grad_y = nullptr;  // null: zeros
  const T* grad_h_n = nullptr;
  bool needs_x = false, needs_weights = false;
  T* grad_x = nullptr;  // [rows, input]
  T* grad_h0 = nullptr;
  T* grad_w_ih = nullptr;
  T* grad_w_hh = nullptr;
  T* grad_b_ih = nullptr;  // null: no bias
  T* grad_b_hh = nullptr;
};

template <class T>
struct GruKernels {
  KernelOf<GruForward<T>> forward;
  KernelOf<GruBackward<T>> backward;
};

GENFUSE_DECLARE(template <class T> GruKernels<T> gru_kernels())

}  // namespace genfuse

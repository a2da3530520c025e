// One LSTM layer in one direction over a whole sequence. Plain data: no torch, no Python.
#pragma once

#include "common/isa.h"
#include "common/kernel.h"
#include "recurrent/sequence.h"

namespace genfuse {

// Weights are contiguous, torch's layout and gate order (i, f, g, o). Absent ones are null.
template <class T>
struct LstmInputs {
  Sequence seq;
  Regularizers reg;
  double eps = 1e-5;
  const T* x = nullptr;     // strides in seq; the last is 1
  const T* h0 = nullptr;    // [batch, state]
  const T* c0 = nullptr;    // [batch, hidden]
  const T* w_ih = nullptr;  // [4 hidden, input]
  const T* w_hh = nullptr;  // [4 hidden, state]
  const T* b_ih = nullptr;  // [4 hidden]
  const T* b_hh = nullptr;
  const T* w_hr = nullptr;   // [state, hidden]: a projection
  const T* ln_ih = nullptr;  // [4 hidden]: layer norm; given all together or not at all
  const T* ln_hh = nullptr;
  const T* ln_c_weight = nullptr;  // [hidden]
  const T* ln_c_bias = nullptr;

  bool projected() const { return w_hr != nullptr; }
  bool layer_norm() const { return ln_ih != nullptr; }
};

// What the backward pass needs of the forward one; null, all of it, in inference.
template <class T>
struct LstmReserve {
  T* hidden = nullptr;     // [rows, state]: h before the output mask, where there is one
  T* cells = nullptr;      // [rows, hidden]: c_t
  T* gates = nullptr;      // [rows, 4 hidden]: i, f, g, o; layer norm: W_ih x, not normalised
  T* recurrent = nullptr;  // [rows, 4 hidden]: layer norm: W_hh h, not normalised
  T* stats = nullptr;      // [rows, 6]: layer norm: mean and 1/std of W_ih x, of W_hh h and of c~
};

template <class T>
struct LstmForward : LstmInputs<T> {
  LstmReserve<T> reserve;
  T* y = nullptr;    // [rows, state]
  T* h_n = nullptr;  // [batch, state]
  T* c_n = nullptr;  // [batch, hidden]
};

template <class T>
struct LstmBackward : LstmInputs<T> {
  LstmReserve<T> reserve;
  const T* y = nullptr;
  const T* grad_y = nullptr;  // null: zeros
  const T* grad_h_n = nullptr;
  const T* grad_c_n = nullptr;
  bool needs_x = false, needs_weights = false;
  T* grad_x = nullptr;  // [rows, input]
  T* grad_h0 = nullptr;
  T* grad_c0 = nullptr;
  T* grad_w_ih = nullptr;
  T* grad_w_hh = nullptr;
  T* grad_bias = nullptr;  // of either bias
  T* grad_w_hr = nullptr;
  T* grad_ln_ih = nullptr;
  T* grad_ln_hh = nullptr;
  T* grad_ln_c_weight = nullptr;
  T* grad_ln_c_bias = nullptr;
};

template <class T>
struct LstmKernels {
  KernelOf<LstmForward<T>> forward;
  KernelOf<LstmBackward<T>> backward;
};

GENFUSE_DECLARE(template <class T> LstmKernels<T> lstm_kernels())

}  // namespace genfuse

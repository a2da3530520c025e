// The gate of autoregressive networks, y = act(a) sigmoid(b) + residual with [a; b] = x + bias + conditional, and the
// concatenated ELU, y = [elu(x); elu(-x)]: each in one pass, as are all their gradients. A tensor is [outer, channels,
// inner] here, however its dimensions lie: inner is what lies within a channel (1 for channels last). Plain data: no
// torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

// Rows [channels, inner], dense, `stride` elements after one another. Null if absent.
template <class T>
struct ChannelRows {
  const T* data = nullptr;
  int64_t stride = 0;
};

template <class T>
struct Gate {
  int64_t outer = 0, channels = 0, inner = 1;  // of y; x has twice the channels
  bool linear = false;                         // act is the identity, and not tanh
  ChannelRows<T> x;
  const T* bias = nullptr;  // [2 channels], or null
  ChannelRows<T> full;      // a conditional of x's shape
  const T* rows = nullptr;  // or one of [outer / group, 2 channels], each row for `group` rows of x
  int64_t group = 1;
  ChannelRows<T> residual;
  T* y = nullptr;  // dense
};

template <class T>
struct GateBackward {
  Gate<T> forward;
  ChannelRows<T> grad_y;
  T* grad_x = nullptr;                           // dense; it is also a full conditional's gradient
  T *grad_bias = nullptr, *grad_rows = nullptr;  // null if not wanted
};

template <class T>
struct ConcatElu {
  int64_t outer = 0, channels = 0, inner = 1;  // of x
  ChannelRows<T> x;
  T* y = nullptr;  // dense, twice the channels
};

template <class T>
struct ConcatEluBackward {
  ConcatElu<T> forward;
  ChannelRows<T> grad_y;
  T* grad_x = nullptr;  // dense
};

GENFUSE_DECLARE(template <class T> KernelOf<Gate<T>> gate_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<GateBackward<T>> gate_backward_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<ConcatElu<T>> concat_elu_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<ConcatEluBackward<T>> concat_elu_backward_kernel())

}  // namespace genfuse

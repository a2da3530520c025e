// Affine and additive couplings. Plain data: no torch, no Python.
//
// x is [batch, channels, space], of which `moved` channels are transformed: y = x s + t, s a function of a raw scale
// (python/genfuse/reference/flow/coupling.py). A coupling's tensors are read where they lie: each has a stride between
// batch rows (0 repeats a row), and of channel j of those transformed it knows where in a row it is.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

// As in the operator's schema; `none` (s = 1) is the additive coupling.
enum class ScaleKind : int64_t {
  exp,
  sigmoid,
  inverse_sigmoid,
  softplus,
  tanh,
  atan,
  sigmoid_clamp,
  softclip,
  clip,
  none
};

// Channel j is at first + j step; or, with a list, at list[j].
struct ChannelMap {
  int64_t first = 0, step = 1;
  const int64_t* list = nullptr;

  int64_t operator[](int64_t j) const { return list != nullptr ? list[j] : first + j * step; }
  bool together() const { return list == nullptr && step == 1; }
};

template <class T>
struct CouplingInput {
  const T* data = nullptr;
  int64_t stride = 0;  // between batch rows
  ChannelMap channel;
};

template <class T>
struct Coupling {
  int64_t batch = 0, channels = 0, space = 1, moved = 0;
  ScaleKind scale = ScaleKind::exp;
  bool add_first = false;  // y = (x + t) s
  bool inverse = false;
  T offset = 0, eps = 0, low = 0, clamp = 0;  // of "softclip" clamp is |ln slope|; of "softplus" low is ln clamp
  CouplingInput<T> x, raw, shift;             // no raw for ScaleKind::none
  const int64_t* kept = nullptr;              // [channels - moved]: the others; null if x's channels lie together
  const uint8_t* mask = nullptr;              // [channels, space]: what is transformed, if not all of those channels
  T* y = nullptr;                             // [batch, channels, space]
  T* log_abs_det = nullptr;                   // [batch]
  T* each = nullptr;                          // or of each element: as y, and 0 where nothing is transformed
};

template <class T>
struct CouplingBackward {
  Coupling<T> forward;
  const T* grad_y = nullptr;            // as y; null for zeros
  const T* grad_log_abs_det = nullptr;  // [batch]
  const T* grad_each = nullptr;         // or of each element
  // Null if not wanted. grad_raw and grad_shift have the channels of raw and shift.
  T *grad_x = nullptr, *grad_raw = nullptr, *grad_shift = nullptr;
  int64_t raw_stride = 0, shift_stride = 0;  // of these two, between batch rows
};

GENFUSE_DECLARE(template <class T> KernelOf<Coupling<T>> coupling_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<CouplingBackward<T>> coupling_backward_kernel())

}  // namespace genfuse

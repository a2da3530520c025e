// Relaxed discrete samples: Gumbel-softmax (Jang, Gu and Poole 2016) and relaxed Bernoulli (Maddison, Mnih and Teh
// 2016). Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"
#include "common/periodic.h"

namespace genfuse {

// rows x classes; a relaxed Bernoulli has no use for the rows.
template <class T>
struct Relaxed {
  int64_t rows = 0, classes = 0;
  Periodic<T> logits, noise;  // noise may be absent: it is drawn
  uint64_t seed = 0, offset = 0;
  T tau = 1;
  bool hard = false;
  T* y = nullptr;
};

template <class T>
struct RelaxedBackward {
  Relaxed<T> forward;
  bool recompute = false;  // the soft sample, which y is not
  const T *y = nullptr, *grad_y = nullptr;
  T* grad_logits = nullptr;
};

GENFUSE_DECLARE(template <class T> KernelOf<Relaxed<T>> gumbel_softmax_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<RelaxedBackward<T>> gumbel_softmax_backward_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<Relaxed<T>> relaxed_bernoulli_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<RelaxedBackward<T>> relaxed_bernoulli_backward_kernel())

}  // namespace genfuse

// Negative log-likelihoods of rows. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"
#include "common/periodic.h"

namespace genfuse {

enum class Likelihood : int64_t { bernoulli, gaussian, discretized_gaussian };

// Element e of row e / row.
template <class T>
struct Nll {
  Likelihood kind = Likelihood::bernoulli;
  int64_t count = 0, row = 1;
  Periodic<T> first, second, scale;  // logits and target; or x, mean and scale
  bool log_std = false;              // scale is ln std, not ln variance
  T half_bin = 0;                    // of a discretised Gaussian
  T* out = nullptr;                  // [count / row]
};

template <class T>
struct NllBackward {
  Nll<T> forward;
  const T* grad = nullptr;                                                 // [count / row]
  T *grad_first = nullptr, *grad_second = nullptr, *grad_scale = nullptr;  // null if not wanted
};

GENFUSE_DECLARE(template <class T> KernelOf<Nll<T>> nll_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<NllBackward<T>> nll_backward_kernel())

}  // namespace genfuse

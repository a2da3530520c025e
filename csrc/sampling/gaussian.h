// Samples of diagonal Gaussians and their KL divergence from a prior, in one pass (Kingma and Welling 2013). Plain
// data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"
#include "common/periodic.h"

namespace genfuse {

// Element e of row e / row. Backward: grad_z, grad_kl are given, and the gradients wanted are not null.
template <class T>
struct Gaussian {
  int64_t count = 0, row = 1;
  Periodic<T> mean, scale, prior_mean, prior_scale, eps;  // priors may be absent; eps too, where it is drawn
  uint64_t seed = 0, offset = 0;
  bool log_std = false;  // the scales are ln std, not ln variance
  T free_bits = 0, low = 0, high = 0;
  T *z = nullptr, *kl = nullptr;  // [count], [count / row]; null if not wanted
};

template <class T>
struct GaussianBackward {
  Gaussian<T> forward;
  const T *grad_z = nullptr, *grad_kl = nullptr;
  T *grad_mean = nullptr, *grad_scale = nullptr, *grad_prior_mean = nullptr, *grad_prior_scale = nullptr;
  T* grad_eps = nullptr;
};

GENFUSE_DECLARE(template <class T> KernelOf<Gaussian<T>> gaussian_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<GaussianBackward<T>> gaussian_backward_kernel())

}  // namespace genfuse

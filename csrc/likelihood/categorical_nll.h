// Negative log-likelihoods of levels under a softmax. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

// Logits of position (i0, i1, ...) and level l at data[i0 * stride[0] + i1 * stride[1] + ... + l * level]: positions in
// the order of the results, with dimensions that can be counted as one merged.
inline constexpr int kPositionDims = 16;
template <class T>
struct Levels {
  T* data = nullptr;
  int64_t level = 1;
  int dims = 0;  // none: one position
  int64_t size[kPositionDims] = {}, stride[kPositionDims] = {};
};

template <class T>
struct CategoricalNll {
  int64_t positions = 0, levels = 1, row = 1;  // `row` positions are an image
  Levels<const T> logits;
  const int64_t* target = nullptr;  // [positions], of [0, levels)
  bool by_position = false;
  T* out = nullptr;  // [positions] by position, else [positions / row]
  // [positions]: the largest logit, and ln sum e^(logit - top). Their sum would lose what the logits differ by where
  // they are large.
  T *top = nullptr, *log_sum = nullptr;
};

template <class T>
struct CategoricalNllBackward {
  CategoricalNll<T> forward;  // `top` and `log_sum` are read
  const T* grad = nullptr;    // as `out`
  T* grad_logits = nullptr;   // strides of logits
};

GENFUSE_DECLARE(template <class T> KernelOf<CategoricalNll<T>> categorical_nll_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<CategoricalNllBackward<T>> categorical_nll_backward_kernel())

}  // namespace genfuse

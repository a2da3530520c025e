// Vector quantisation (van den Oord, Vinyals and Kavukcuoglu 2017). Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

template <class T>
struct Quantize {
  int64_t count = 0, codes = 0, dim = 0;
  const T *x = nullptr, *codebook = nullptr;  // [count][dim], [codes][dim]
  T weight = 0;                               // of the squared distance, as loss
  T* quantized = nullptr;                     // [count][dim]
  int64_t* indices = nullptr;                 // [count]
  T* loss = nullptr;                          // [count]
};

template <class T>
struct QuantizeBackward {
  int64_t count = 0, codes = 0, dim = 0;
  const T *x = nullptr, *codebook = nullptr;
  const int64_t* indices = nullptr;                         // in [0, codes)
  const T *grad_quantized = nullptr, *grad_loss = nullptr;  // either may be absent
  T commitment_weight = 0, codebook_weight = 0;
  T *grad_x = nullptr, *grad_codebook = nullptr;  // null if not wanted
};

// counts[k] = how many took code k, sums[k] = their sum.
template <class T>
struct QuantizeStatistics {
  int64_t count = 0, codes = 0, dim = 0;
  const T* x = nullptr;
  const int64_t* indices = nullptr;  // in [0, codes)
  T *counts = nullptr, *sums = nullptr;
};

GENFUSE_DECLARE(template <class T> KernelOf<Quantize<T>> quantize_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<QuantizeBackward<T>> quantize_backward_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<QuantizeStatistics<T>> quantize_statistics_kernel())

}  // namespace genfuse

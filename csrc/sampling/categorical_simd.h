// Drawing a class by inversion, from the logits of a row: for the operator, and for the sampler of images. The weights
// of a row are summed in double, class by class, with the sum so far kept for every kRun classes. A sample is the first
// class at which the sum exceeds u times the total: found among the runs, then within one by the same additions. A
// class that adds nothing is never the first to exceed anything.
#pragma once

#include <limits>

#include "common/gemm.h"
#include "common/math_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {

inline constexpr int64_t kRun = 32;

template <class T>
inline int64_t weights_bytes(int64_t classes) {
  return round_up(classes * static_cast<int64_t>(sizeof(T)), 64);
}
// Of weights and sums.
template <class T>
inline int64_t inversion_bytes(int64_t classes) {
  return weights_bytes<T>(classes) + round_up(ceil_div(classes, kRun) * 8, 64);
}

// weights[] = e^(logit - largest), sums[r] = their sum before run r; returns the total, NaN if there is none.
template <class T>
inline double weigh(const T* logits, int64_t n, T* weights, double* sums) {
  constexpr int L = kLanes<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  Vec<T> best = broadcast(-infinity);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Vec<T> x = load(logits + i);
    best = x > best ? x : best;
  }
  T top = -infinity;
  for (int j = 0; j < L; ++j) top = best[j] > top ? best[j] : top;
  for (; i < n; ++i) top = logits[i] > top ? logits[i] : top;
  for (i = 0; i < n; i += L) store_upto(weights + i, exp_wide<T>(load_upto(logits + i, n - i) - top), n - i);
  double total = 0;
  for (i = 0; i < n; ++i) {
    if (i % kRun == 0) sums[i / kRun] = total;
    total += static_cast<double>(weights[i]);
  }
  return total;
}

template <class T>
inline int64_t invert(const T* weights, const double* sums, int64_t n, double threshold) {
  int64_t low = 0, high = ceil_div(n, kRun);  // the last run whose sum before it does not exceed the threshold
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (sums[middle] <= threshold ? low : high) = middle;
  }
  double sum = sums[low];
  for (int64_t i = low * kRun; i < n; ++i) {
    sum += static_cast<double>(weights[i]);
    if (sum > threshold) return i;
  }
  for (int64_t i = n; i-- > 0;) {
    if (weights[i] > 0) return i;  // u so near 1 that the product was rounded up to the total
  }
  return -1;
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// Monotone splines of elements, each with parameters of its own. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"
#include "common/periodic.h"

namespace genfuse {

enum class SplineKind : int64_t { rational_quadratic, linear, quadratic, cubic };
enum class SplineNormalizer : int64_t { softmax, identity, zuko, none };
enum class SplineEnds : int64_t { one, wrap, given };  // the slopes at both ends: 1; one for both; a parameter for each

inline constexpr int64_t kSplineMaxBins = 256;  // what the buffers of a group of elements are made for

// What all elements share.
template <class T>
struct SplineOptions {
  SplineKind kind = SplineKind::rational_quadratic;
  SplineNormalizer normalizer = SplineNormalizer::softmax;
  SplineEnds ends = SplineEnds::one;
  bool tails = true;  // outside of the interval y is x; else NaN
  bool inverse = false;
  T left = 0, right = 1, bottom = 0, top = 1;
  T min_width = 0, min_height = 0, min_derivative = 0;
  T logit_scale = 1;  // of widths and heights
  int bins = 1;

  int widths() const { return bins; }
  int heights() const {
    if (kind == SplineKind::linear) return 0;
    if (kind == SplineKind::quadratic) return ends == SplineEnds::one ? bins - 1 : bins + 1;
    return bins;
  }
  int derivatives() const {
    if (kind == SplineKind::linear || kind == SplineKind::quadratic) return 0;
    if (kind == SplineKind::cubic) return 2;
    return ends == SplineEnds::one ? bins - 1 : ends == SplineEnds::wrap ? bins : bins + 1;
  }
  int parameters() const { return widths() + heights() + derivatives(); }
};

// `count` parameters of every element: parameter p of element e (taken modulo `period`) is
// data[e / run * run_stride + e % run * stride + p * step].
template <class T>
struct SplineParameters {
  T* data = nullptr;
  int count = 0;
  int64_t period = 1, run = 1, run_stride = 0, stride = 0, step = 1;
  int64_t extent = 0;  // one past the last number that may be touched

  int64_t offset(int64_t e) const { return e / run * run_stride + e % run * stride; }
};

template <class T>
struct Spline {
  SplineOptions<T> options;
  int64_t count = 0, row = 1;
  Periodic<T> x;
  SplineParameters<const T> parameters[3];  // widths (or all of them), heights, derivatives
  T* y = nullptr;
  T* log_slope = nullptr;  // [count / row]
};

template <class T>
struct SplineBackward {
  Spline<T> forward;
  const T *grad_y = nullptr, *grad_log_slope = nullptr;  // null if there is none
  T* grad_x = nullptr;                                   // null if not wanted
  SplineParameters<T> grad_parameters[3];
};

GENFUSE_DECLARE(template <class T> KernelOf<Spline<T>> spline_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<SplineBackward<T>> spline_backward_kernel())

}  // namespace genfuse

// The activations of a network's units, and their derivatives, as torch has them.
#pragma once

#include <cmath>

#include "common/math_simd.h"
#include "flow/autoregressive.h"

namespace genfuse {
GENFUSE_NAMESPACE {

// The standard normal distribution function.
template <class T>
GENFUSE_HD Vec<T> normal_cdf(Vec<T> x) {
  Vec<T> r{};
  for (int i = 0; i < kLanes<T>; ++i) r[i] = T(0.5) * std::erfc(x[i] * T(-0.7071067811865476));
  return r;
}

template <class T>
inline Vec<T> activate(Activation activation, Vec<T> h) {
  switch (activation) {
    case Activation::relu:
      return h < 0 ? Vec<T>{} : h;
    case Activation::tanh:
      return genfuse::GENFUSE_ISA::tanh(h);
    case Activation::elu: {
      const WideExp<T> e(h);
      const Vec<T> below = e.near ? e.expm1 : e.value - T(1);
      return h > 0 ? h : below;
    }
    case Activation::leaky_relu:
      return h > 0 ? h : h * T(0.01);
    case Activation::sigmoid:
      return sigmoid(h);
    case Activation::silu:
      return h * sigmoid(h);
    case Activation::gelu:
      return h * normal_cdf<T>(h);
    default:
      return h;
  }
}

// The derivative at h.
template <class T>
inline Vec<T> activation_slope(Activation activation, Vec<T> h) {
  const Vec<T> one = broadcast(T(1));
  switch (activation) {
    case Activation::relu:
      return h <= 0 ? Vec<T>{} : one;
    case Activation::tanh: {
      const Vec<T> t = genfuse::GENFUSE_ISA::tanh(h);
      return one - t * t;
    }
    case Activation::elu:
      return h > 0 ? one : exp_wide<T>(h);
    case Activation::leaky_relu:
      return h > 0 ? one : broadcast(T(0.01));
    case Activation::sigmoid: {
      const Vec<T> s = sigmoid(h);
      return s * (one - s);
    }
    case Activation::silu: {
      const Vec<T> s = sigmoid(h);
      return s * (one + h * (one - s));
    }
    case Activation::gelu:
      return normal_cdf<T>(h) + h * (static_cast<T>(0.3989422804014327) * exp_wide<T>(T(-0.5) * h * h));
    default:
      return one;
  }
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

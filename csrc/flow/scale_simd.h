// The scale s of an affine transformation from the raw number r, for a vector: x s or x / s, ln s, and dln s / dr. The
// formulas are those of reference/flow/coupling.py: ln s comes from r, never from an s that may vanish.
#pragma once

#include <cmath>

#include "common/math_simd.h"
#include "flow/scale.h"

namespace genfuse {
GENFUSE_NAMESPACE {

template <class T>
GENFUSE_HD Vec<T> scale_log(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    constexpr float inf = std::numeric_limits<float>::infinity();
    const VecFloat r = log_positive(x);
    return x > 0 ? (x < inf ? r : x) : (x == 0 ? VecFloat{} - inf : x - x + VecFloat{} + NAN);
  } else {
    Vec<T> r{};
    for (int i = 0; i < kLanes<T>; ++i) r[i] = ::log(x[i]);
    return r;
  }
}

// x e^exponent, in two halves: right wherever the product is a number, also where x is 0 and the power is not.
template <class T>
GENFUSE_HD Vec<T> times_exp(Vec<T> x, Vec<T> exponent) {
  const Vec<T> half = finite_exp<T>(T(0.5) * exponent);
  return x * half * half;
}

// e^-|z|, from which everything of a sigmoid follows.
template <class T>
struct SigmoidAt {
  Vec<T> z, e, sigmoid, other;  // other: sigmoid(-z)

  GENFUSE_HD explicit SigmoidAt(Vec<T> at) : z(at) {
    e = exp_wide<T>(z < 0 ? z : -z);
    const Vec<T> large = T(1) / (T(1) + e), small = e * large;
    sigmoid = z < 0 ? small : large;
    other = z < 0 ? large : small;
  }
  GENFUSE_HD Vec<T> log() const {
    const Vec<T> r = (z < 0 ? z : Vec<T>{}) - log1p_unit(e);
    return z == z ? r : z;
  }
  // ln(1 + e^z)
  GENFUSE_HD Vec<T> softplus() const {
    const Vec<T> r = (z > 0 ? z : Vec<T>{}) + log1p_unit(e);
    return z == z ? r : z;
  }
};

template <class T>
struct ScaleAt {
  using V = Vec<T>;
  V product;  // x s, or x / s
  V log;      // ln s, or -ln s
  V rate;     // dln s / dr

  GENFUSE_HD ScaleAt(const ScaleOptions<T>& o, V x, V r, bool inverse) {
    V log_s;
    switch (o.kind) {
      case ScaleKind::sigmoid:
      case ScaleKind::inverse_sigmoid: {
        const SigmoidAt<T> at(r + o.offset);
        if (o.kind == ScaleKind::sigmoid && o.eps > 0) {
          const V s = at.sigmoid + o.eps;
          direct(x, s, at.sigmoid * at.other / s, inverse);
          return;
        }
        log_s = at.log();
        rate = at.other;
        const bool small = inverse == (o.kind == ScaleKind::inverse_sigmoid);
        product = small ? x * at.sigmoid : x + times_exp<T>(x, -at.z);  // 1 / sigmoid(z) = 1 + e^-z
        if (o.kind == ScaleKind::inverse_sigmoid) {
          log_s = -log_s;
          rate = -rate;
        }
        log = inverse ? -log_s : log_s;
        return;
      }
      case ScaleKind::softplus: {
        const SigmoidAt<T> at(r);
        const V s = at.softplus();
        if (o.eps > 0) {
          const V sum = s + o.eps, cut = sum > o.clamp ? broadcast(o.clamp) : sum;
          direct(x, cut, sum > o.clamp ? V{} : at.sigmoid / sum, inverse);
          return;
        }
        // ln softplus(r) = r - e^r / 2 + ..., also where softplus(r) is 0
        const auto small = r < T(-20);
        log_s = small ? r - T(0.5) * at.e : scale_log<T>(s);
        rate = small ? T(1) - T(0.5) * at.e : at.sigmoid / s;
        const T high = std::log(o.clamp);
        rate = log_s > high ? V{} : rate;
        log_s = log_s > high ? broadcast(high) : log_s;
        break;
      }
      case ScaleKind::tanh: {
        const V t = genfuse::GENFUSE_ISA::tanh(r);
        log_s = o.clamp * t;
        rate = o.clamp * (T(1) - t * t);
        break;
      }
      case ScaleKind::atan: {
        V t{};
        for (int i = 0; i < kLanes<T>; ++i) t[i] = std::atan(r[i]);
        log_s = (o.clamp * T(0.636)) * t;
        rate = (o.clamp * T(0.636)) / (T(1) + r * r);
        break;
      }
      case ScaleKind::sigmoid_clamp: {
        const V t = genfuse::GENFUSE_ISA::tanh(T(0.5) * r);
        log_s = o.clamp * t;
        rate = (T(0.5) * o.clamp) * (T(1) - t * t);
        break;
      }
      case ScaleKind::softclip: {
        const T limit = std::abs(std::log(o.clamp));
        const V soft = T(1) / (T(1) + (r < 0 ? -r : r) / limit);
        log_s = r * soft;
        rate = soft * soft;
        break;
      }
      case ScaleKind::clip:  // its gradient passes
        log_s = within(r, o.low, o.clamp);
        rate = broadcast(T(1));
        break;
      default:
        log_s = r;
        rate = broadcast(T(1));
    }
    log = inverse ? -log_s : log_s;
    product = times_exp<T>(x, log);
  }

 private:
  GENFUSE_HD void direct(V x, V s, V by_raw, bool inverse) {
    product = inverse ? x / s : x * s;
    log = inverse ? -scale_log<T>(s) : scale_log<T>(s);
    rate = by_raw;
  }
};

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// One spline for each lane of a vector. The parameters of a lane lie in an array of vectors: widths, then heights, then
// derivatives. `apply` evaluates a spline or its inverse; `differentiate` recomputes and turns the parameters into
// their gradients. The formulas are those of reference/flow/spline.py.
//
// Derivatives of an inverse go by the forward map at the solution: with x = f^-1(y) and the slope G of f at x, the
// gradient by y is A / G with A = g_x - g_log dlog G/dx, and those by the parameters are the forward map's for the
// gradients (-A / G, -g_log) of its value and log-slope.
#pragma once

#include <cmath>

#include "common/math_simd.h"
#include "flow/spline.h"

namespace genfuse {
GENFUSE_NAMESPACE {

inline constexpr double kZukoSlope = 6.907755278982137;  // ln 1000

template <class T>
GENFUSE_HD Vec<T> spline_log(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    const VecFloat r = log_positive(x);
    return x > 0 ? r : (x == 0 ? VecFloat{} - INFINITY : VecFloat{} + NAN);
  } else {
    Vec<T> r{};
    for (int i = 0; i < kLanes<T>; ++i) r[i] = ::log(x[i]);
    return r;
  }
}
template <class T>
GENFUSE_HD Vec<T> spline_sqrt(Vec<T> x) {
  if constexpr (sizeof(T) == 4) {
    return square_root(x);
  } else {
    Vec<T> r{};
    for (int i = 0; i < kLanes<T>; ++i) r[i] = ::sqrt(x[i]);
    return r;
  }
}
template <class T>
GENFUSE_HD Vec<T> spline_abs(Vec<T> x) {
  return x < 0 ? -x : x;
}
// e^x for x <= 0, as the logits of a softmax less their largest.
template <class T>
GENFUSE_HD Vec<T> exp_below(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    using C = ExpConstants<T>;
    x = reinterpret_cast<Vec<T>>(_mm512_maskz_max_ps(0xffff, _mm512_set1_ps(-150.0f), reinterpret_cast<__m512>(x)));
    const Vec<T> n = (x * 1.4426950408889634f + C::magic) - C::magic;
    const Vec<T> r = (x - n * C::ln2_high) - n * C::ln2_low;
    const Vec<T> m = 1.0f + (exp_tail(r) + r);
    return reinterpret_cast<Vec<T>>(
        _mm512_maskz_scalef_ps(0xffff, reinterpret_cast<__m512>(m), reinterpret_cast<__m512>(n)));
  }
#endif
  return exp_vector<T>(x);
}
// ln(1 + e^(beta u)) / beta
template <class T>
GENFUSE_HD Vec<T> softplus(Vec<T> u, T beta, T inverse_beta) {
  const Vec<T> z = u * beta, e = exp_below<T>(-spline_abs<T>(z));
  const Vec<T> r = ((z > 0 ? z : Vec<T>{}) + log1p_unit(e)) * inverse_beta;
  return u == u ? r : u;
}
// The larger; `a` where b is NaN.
GENFUSE_HD VecFloat larger(VecFloat a, VecFloat b) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecFloat>(
      _mm512_maskz_max_ps(0xffff, reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(a)));
#else
  return b > a ? b : a;
#endif
}
GENFUSE_HD Vec<double> larger(Vec<double> a, Vec<double> b) { return b > a ? b : a; }
template <class T>
GENFUSE_HD Vec<T> soft_clip(Vec<T> u, T limit) {
  return u / (T(1) + spline_abs<T>(u) * (T(1) / limit));
}
template <class T>
GENFUSE_HD Vec<T> soft_clip_slope(Vec<T> u, T limit) {
  const Vec<T> r = T(1) / (T(1) + spline_abs<T>(u) * (T(1) / limit));
  return r * r;
}

// A running sum that keeps what each addition rounds off: torch's cumsum adds float32 in float64, and the knots of many
// bins would be half as accurate without; few bins do without.
template <class V, bool Few>
struct RunningSum {
  V high{}, low{};
  GENFUSE_HD void add(V term) {
    const V next = high + term;
    if constexpr (!Few) low += term - (next - high);
    high = next;
  }
  GENFUSE_HD V value() const { return Few ? high : high + low; }
};

// The number of bins, known to the compiler if it is not 0.
template <int Bins>
struct SplineBins {
  static constexpr int K = Bins;
  explicit SplineBins(int) {}
};
template <>
struct SplineBins<0> {
  const int K;
  explicit SplineBins(int bins) : K(bins) {}
};

template <class T, int Bins = 0>
struct SplineMath : SplineBins<Bins> {
  using SplineBins<Bins>::K;
  using V = Vec<T>;
  using I = VecInt<T>;
  using S = typename VecTraits<T>::scalar_integer;
  using Sum = RunningSum<V, (Bins > 0)>;

  const SplineOptions<T>& o;
  T clip = T(0.5 * kZukoSlope), beta = 1, inverse_beta = 1;

  explicit SplineMath(const SplineOptions<T>& options) : SplineBins<Bins>(options.bins), o(options) {
    if (o.normalizer == SplineNormalizer::identity) {
      beta = static_cast<T>(0.6931471805599453) / (T(1) - o.min_derivative);
      inverse_beta = T(1) / beta;
    }
  }

  // With Bins > 0 the kind is rational_quadratic.

  // What a lane has in all kinds.
  struct At {
    V at;      // the input, put inside
    I inside;  // of the interval; not so for NaN
    I k;       // the bin
  };

  At enter(V x) const {
    const T low = o.inverse ? o.bottom : o.left, high = o.inverse ? o.top : o.right;
    At a{};
    a.inside = (x >= low) & (x <= high);
    a.at = a.inside ? x : broadcast(low);
    return a;
  }
  void leave(const At& a, V x, V& y, V& log_slope) const {
    const V nan = broadcast(static_cast<T>(NAN));
    // Not beyond the ends by rounding: a spline without tails that comes next would refuse it.
    y = within(y, o.inverse ? o.left : o.bottom, o.inverse ? o.right : o.top);
    y = a.inside ? y : o.tails ? x : nan;
    log_slope = a.inside ? log_slope : o.tails ? (x == x ? V{} : nan) : nan;
  }

  // p[j] in proportion to the probabilities of logits u[j]; returns what makes them sum to 1.
  V exponentials(const V* u, V* p, bool zuko) const {
    const T scale = o.logit_scale;
    V largest = broadcast(static_cast<T>(-INFINITY));
    for (int j = 0; j < K; ++j) {
      V z = u[j] * scale;
      if (zuko) z = soft_clip<T>(z, clip);
      p[j] = z;
      largest = larger(largest, z);
    }
    // Four sums: one would round as often as there are bins, which moves all knots.
    V total[4] = {};
    for (int j = 0; j < K; ++j) {
      p[j] = exp_below<T>(p[j] - largest);
      total[j % 4] += p[j];
    }
    return T(1) / ((total[0] + total[1]) + (total[2] + total[3]));
  }
  void softmax(const V* u, V* p) const {
    const V inverse = exponentials(u, p, false);
    for (int j = 0; j < K; ++j) p[j] *= inverse;
  }
  V sizes(const V* u, V* p) const {
    if (o.normalizer != SplineNormalizer::none) return exponentials(u, p, o.normalizer == SplineNormalizer::zuko);
    for (int j = 0; j < K; ++j) p[j] = u[j] * o.logit_scale;
    return broadcast(T(1));
  }
  static V one() { return broadcast(T(1)); }
  T least(T least) const { return o.normalizer == SplineNormalizer::zuko ? T(0) : least; }

  // u[j] <- the gradient of logit j, of those by the probabilities p[j] * whole.
  template <class Gradient>
  void softmax_gradient(V* u, const V* p, V whole, Gradient gradient) const {
    if (o.normalizer == SplineNormalizer::none) {
      for (int j = 0; j < K; ++j) u[j] = gradient(j) * o.logit_scale;
      return;
    }
    V mean{};
    for (int j = 0; j < K; ++j) mean += p[j] * gradient(j);
    softmax_gradient(u, p, whole, mean * whole, gradient);
  }
  // The same with the gradients' mean given, under the probabilities.
  template <class Gradient>
  void softmax_gradient(V* u, const V* p, V whole, V mean, Gradient gradient) const {
    const bool zuko = o.normalizer == SplineNormalizer::zuko;
    const V factor = whole * o.logit_scale;
    for (int j = 0; j < K; ++j) {
      V g = factor * p[j] * (gradient(j) - mean);
      if (zuko) g *= soft_clip_slope<T>(u[j] * o.logit_scale, clip);
      u[j] = g;
    }
  }
  GENFUSE_HD V before_or_at(I k, int j, V before, V at) const {
    const I index = I{} + static_cast<S>(j);
    return index < k ? before : (index == k ? at : V{});
  }

  // ---- rational quadratic ------------------------------------------------------------------------------------------

  struct Rational : At {
    V w_whole, h_whole;        // what makes the sizes sum to 1
    V w_sum, w_p, h_sum, h_p;  // the sizes before the bin, and the bin's own, for gradients
    V x_k, w, y_k, h, raw_0, raw_1, d_0, d_1, s, E, theta, between, D, M, ratio, G;
    I first, last;  // whether the slope at this end is the fixed one
  };

  V slope_of(V raw) const {
    switch (o.normalizer) {
      case SplineNormalizer::none:
        return o.min_derivative + raw;
      case SplineNormalizer::zuko:
        return exp_vector<T>(soft_clip<T>(raw, 2 * clip));
      default:
        return o.min_derivative + softplus<T>(raw, beta, inverse_beta);
    }
  }
  // d slope / d raw
  V slope_gradient(V raw, V slope) const {
    switch (o.normalizer) {
      case SplineNormalizer::none:
        return broadcast(T(1));
      case SplineNormalizer::zuko:
        return slope * soft_clip_slope<T>(raw, 2 * clip);
      default:
        return sigmoid(raw * beta);
    }
  }

  // Leaves sizes in p.
  GENFUSE_HD Rational rational(V x, const V* u, V* p) const {
    Rational r{};
    r.w_whole = sizes(u, p);
    r.h_whole = sizes(u + K, p + K);
    const V* derivatives = u + 2 * K;
    static_cast<At&>(r) = enter(x);
    const T min_w = least(o.min_width), min_h = least(o.min_height);
    const V w_factor = (T(1) - min_w * static_cast<T>(K)) * r.w_whole;
    const V h_factor = (T(1) - min_h * static_cast<T>(K)) * r.h_whole;
    const T across = o.right - o.left, up = o.top - o.bottom;
    V x_k = broadcast(o.left), y_k = broadcast(o.bottom), x_next = x_k, y_next = y_k;
    Sum cum_w, cum_h;
    const int shift = o.ends == SplineEnds::one ? 1 : 0;  // knot j has the derivative j - shift
    V raw_0{}, raw_1{};
    if (shift == 0) raw_0 = derivatives[0];
    r.w_p = p[0];
    r.h_p = p[K];
    I reached = r.k == 0;  // whether the knot before is at or before x
    for (int j = 1; j < K; ++j) {
      cum_w.add(min_w + w_factor * p[j - 1]);
      cum_h.add(min_h + h_factor * p[K + j - 1]);
      const V x_j = o.left + across * cum_w.value(), y_j = o.bottom + up * cum_h.value(), raw = derivatives[j - shift];
      x_next = reached ? x_j : x_next;
      y_next = reached ? y_j : y_next;
      raw_1 = reached ? raw : raw_1;
      reached = r.at >= (o.inverse ? y_j : x_j);
      x_k = reached ? x_j : x_k;
      y_k = reached ? y_j : y_k;
      raw_0 = reached ? raw : raw_0;
      r.k -= reached;
      r.w_sum += reached ? p[j - 1] : V{};
      r.h_sum += reached ? p[K + j - 1] : V{};
      r.w_p = reached ? p[j] : r.w_p;
      r.h_p = reached ? p[K + j] : r.h_p;
    }
    x_next = reached ? broadcast(o.right) : x_next;
    y_next = reached ? broadcast(o.top) : y_next;
    if (shift == 0) raw_1 = reached ? derivatives[o.ends == SplineEnds::wrap ? 0 : K] : raw_1;
    r.first = shift != 0 ? r.k == 0 : r.k < 0;
    r.last = shift != 0 ? r.k == static_cast<S>(K - 1) : r.k < 0;
    r.raw_0 = raw_0;
    r.raw_1 = raw_1;
    r.d_0 = r.first ? broadcast(T(1)) : slope_of(raw_0);
    r.d_1 = r.last ? broadcast(T(1)) : slope_of(raw_1);
    r.x_k = x_k;
    r.y_k = y_k;
    r.w = x_next - x_k;
    r.h = y_next - y_k;
    r.s = r.h / r.w;
    r.E = r.d_0 + r.d_1 - T(2) * r.s;
    if (o.inverse) {
      const V rise = r.at - y_k, above = rise * r.E;
      const V a = r.h * (r.s - r.d_0) + above, b = r.h * r.d_0 - above, c = -r.s * rise;
      V discriminant = b * b - T(4) * a * c;
      discriminant = discriminant < 0 ? V{} : discriminant;  // NaN stays
      // Not beyond the bin by rounding: there the slope of a steep one with flat ends would be negative.
      r.theta = within(T(2) * c / (-b - spline_sqrt<T>(discriminant)), T(0), T(1));
    } else {
      r.theta = (r.at - x_k) / r.w;
    }
    const V rest = T(1) - r.theta;
    r.between = r.theta * rest;
    r.D = r.s + r.E * r.between;
    r.M = r.d_1 * r.theta * r.theta + T(2) * r.s * r.between + r.d_0 * rest * rest;
    r.ratio = r.s / r.D;
    r.G = r.ratio * r.ratio * r.M;
    return r;
  }

  // Gradients by the input and, in place of the raw parameters u, by them. p: as left by `rational`.
  GENFUSE_HD V rational_gradient(const Rational& r, V grad_y, V grad_log, V* u, const V* p) const {
    const V one = broadcast(T(1)), theta = r.theta, rest = one - theta, inverse_D = one / r.D, inverse_M = one / r.M;
    const V twist = one - T(2) * r.between;
    const V log_theta =
        T(2) * ((r.d_1 * theta - r.d_0 * rest + r.s * (rest - theta)) * inverse_M - r.E * (rest - theta) * inverse_D);
    V gy = grad_y, gl = grad_log, grad_in{};
    const V inverse_w = one / r.w;
    if (o.inverse) {
      const V by_x = gy - gl * log_theta * inverse_w;
      grad_in = by_x / r.G;
      gy = -grad_in;
      gl = -gl;
    }
    gy = r.inside ? gy : V{};
    gl = r.inside ? gl : V{};
    const V N = r.s * theta * theta + r.d_0 * r.between, quotient = N * inverse_D;
    const V h_D = gy * r.h * inverse_D;  // common to the derivatives of y
    const V by_theta = gy * r.G * r.w + gl * log_theta;
    const V by_s =
        h_D * (theta * theta - quotient * twist) + gl * T(2) * (one / r.s + r.between * inverse_M - twist * inverse_D);
    const V common = gl * T(2) * r.between * inverse_D;
    const V by_d_0 = h_D * r.between * (one - quotient) + gl * rest * rest * inverse_M - common;
    const V by_d_1 = gl * theta * theta * inverse_M - h_D * quotient * r.between - common;
    const V by_x_k = -by_theta * inverse_w, by_w = by_x_k * theta - by_s * r.s * inverse_w;
    const V by_h = gy * quotient + by_s * inverse_w;
    if (!o.inverse) grad_in = by_theta * inverse_w;
    // The right end of the last bin is fixed: there w is right - x_k.
    const I last = r.k == static_cast<S>(K - 1);
    const T across = (o.right - o.left) * (T(1) - least(o.min_width) * static_cast<T>(K));
    const T up = (o.top - o.bottom) * (T(1) - least(o.min_height) * static_cast<T>(K));
    const V w_before = across * (last ? by_x_k - by_w : by_x_k), w_at = across * (last ? V{} : by_w);
    const V h_before = up * (last ? gy - by_h : gy), h_at = up * (last ? V{} : by_h);
    const auto by_w_j = [&](int j) { return before_or_at(r.k, j, w_before, w_at); };
    const auto by_h_j = [&](int j) { return before_or_at(r.k, j, h_before, h_at); };
    if (o.normalizer == SplineNormalizer::none) {
      softmax_gradient(u, p, r.w_whole, by_w_j);
      softmax_gradient(u + K, p + K, r.h_whole, by_h_j);
    } else {
      const V w_mean = (w_before * r.w_sum + w_at * r.w_p) * r.w_whole;
      const V h_mean = (h_before * r.h_sum + h_at * r.h_p) * r.h_whole;
      softmax_gradient(u, p, r.w_whole, w_mean, by_w_j);
      softmax_gradient(u + K, p + K, r.h_whole, h_mean, by_h_j);
    }
    const V by_raw_0 = r.first ? V{} : by_d_0 * slope_gradient(r.raw_0, r.d_0);
    const V by_raw_1 = r.last ? V{} : by_d_1 * slope_gradient(r.raw_1, r.d_1);
    const int shift = o.ends == SplineEnds::one ? 1 : 0, count = o.derivatives();
    V* d = u + 2 * K;
    for (int j = 0; j < count; ++j) {
      const I knot = I{} + static_cast<S>(j + shift);
      d[j] = knot == r.k ? by_raw_0 : (knot == r.k + 1 ? by_raw_1 : V{});
    }
    if (o.ends == SplineEnds::wrap) d[0] += last ? by_raw_1 : V{};
    return outer(r, grad_y, grad_in);
  }
  // The gradient by the input of what is outside.
  V outer(const At& a, V grad_y, V grad_in) const { return a.inside ? grad_in : o.tails ? grad_y : V{}; }

  // ---- linear, quadratic, cubic: on the unit square ---------------------------------------------------------------

  T low() const { return o.inverse ? o.bottom : o.left; }
  T span_in() const { return o.inverse ? o.top - o.bottom : o.right - o.left; }
  T span_out() const { return o.inverse ? o.right - o.left : o.top - o.bottom; }
  void from_unit(V& y, V& log_slope, V G) const {
    y = (o.inverse ? o.left : o.bottom) + span_out() * y;
    const T ratio = static_cast<T>(std::log(static_cast<double>((o.top - o.bottom) / (o.right - o.left))));
    log_slope = spline_log<T>(G) + ratio;
    if (o.inverse) log_slope = -log_slope;
  }

  // Everything in bin k that these kinds need. `t` is the place in the bin, G the slope there, log_t dlog G/dt.
  struct Piece : At {
    V x_k, w, y_k, h, d_0, d_1, t, G, value;
  };

  Piece linear(V x, const V* p) const {
    Piece r{};
    static_cast<At&>(r) = enter(x);
    const V unit = (r.at - low()) / span_in();
    Sum cum;
    V mass = p[0];
    if (o.inverse) {
      for (int j = 1; j < K; ++j) {
        cum.add(p[j - 1]);
        const V knot = cum.value();
        const I reached = unit >= knot;
        r.y_k = reached ? knot : r.y_k;
        mass = reached ? (j + 1 == K ? T(1) - knot : p[j]) : mass;
        r.k -= reached;
      }
      if (K == 1) mass = broadcast(T(1));
      r.t = (unit - r.y_k) / mass;
    } else {
      const V place = unit * static_cast<T>(K);
      for (int j = 1; j < K; ++j) {
        cum.add(p[j - 1]);
        const I reached = place >= static_cast<T>(j);
        r.y_k = reached ? cum.value() : r.y_k;
        mass = reached ? p[j] : mass;
        r.k -= reached;
      }
      r.t = place - __builtin_convertvector(r.k, V);
    }
    r.h = mass;
    r.G = mass * static_cast<T>(K);
    const V in_bins = __builtin_convertvector(r.k, V) + r.t;
    const V value = o.inverse ? in_bins * (T(1) / static_cast<T>(K)) : r.y_k + r.t * mass;
    r.value = clamp_unit(value);
    return r;
  }
  GENFUSE_HD V clamp_unit(V v) const { return within(v, T(0), T(1)); }

  V linear_gradient(const Piece& r, V grad_y, V grad_log, V* u, const V* p) const {
    V gy = grad_y * span_out(), gl = grad_log;
    V grad_in = gy * r.G;
    if (o.inverse) {
      grad_in = gy / r.G;
      gy = -grad_in;
      gl = -gl;
    }
    gy = r.inside ? gy : V{};
    gl = r.inside ? gl : V{};
    const V at = gy * r.t + gl / r.h;
    softmax_gradient(u, p, one(), [&](int j) { return before_or_at(r.k, j, gy, at); });
    return outer(r, grad_y, grad_in / span_in());
  }

  // w: widths [K]; v: densities at the knots [K + 1]; both normalised.
  Piece quadratic(V x, const V* w, const V* v) const {
    Piece r{};
    static_cast<At&>(r) = enter(x);
    const V unit = (r.at - low()) / span_in();
    Sum cum_w, cum_h;
    r.w = w[0];
    r.d_0 = v[0];
    r.d_1 = v[1];
    for (int j = 1; j < K; ++j) {
      cum_w.add(w[j - 1]);
      cum_h.add(T(0.5) * (v[j - 1] + v[j]) * w[j - 1]);
      const V x_j = cum_w.value(), y_j = cum_h.value();
      const I reached = unit >= (o.inverse ? y_j : x_j);
      r.x_k = reached ? x_j : r.x_k;
      r.y_k = reached ? y_j : r.y_k;
      r.w = reached ? w[j] : r.w;
      r.d_0 = reached ? v[j] : r.d_0;
      r.d_1 = reached ? v[j + 1] : r.d_1;
      r.k -= reached;
    }
    const V a = T(0.5) * (r.d_1 - r.d_0) * r.w, b = r.d_0 * r.w;
    if (o.inverse) {
      const V rise = unit - r.y_k;
      V discriminant = b * b + T(4) * a * rise;
      discriminant = discriminant < 0 ? V{} : discriminant;
      r.t = T(2) * rise / (b + spline_sqrt<T>(discriminant));
      r.value = clamp_unit(r.x_k + r.t * r.w);
    } else {
      r.t = (unit - r.x_k) / r.w;
      r.value = clamp_unit(r.y_k + r.t * (b + r.t * a));
    }
    r.G = r.d_0 + r.t * (r.d_1 - r.d_0);
    return r;
  }

  // The densities at all knots: v[0..K], from heights u; `raw` keeps them before they are normalised. Returns their
  // area, and the mass that the ends take part in.
  struct Area {
    V area, mass, room;
  };
  Area densities(const V* u, const V* w, V* raw, V* v) const {
    Area a{};
    const int count = o.heights(), shift = count == K - 1 ? 1 : 0;
    for (int j = 0; j < count; ++j) raw[j + shift] = softplus<T>(u[j] * o.logit_scale, T(1), T(1)) + T(1e-3);
    if (shift == 1) {
      const V first = T(0.5) * w[0], last = T(0.5) * w[K - 1];
      Sum mass;
      mass.add(T(0.5) * (first * raw[1] + last * raw[K - 1]));
      for (int j = 1; j < K - 1; ++j) mass.add(T(0.5) * (raw[j] + raw[j + 1]) * w[j]);
      a.mass = mass.value();
      a.room = T(1) - T(0.5) * (first + last);
      raw[0] = raw[K] = a.mass / a.room;
    }
    Sum area;
    for (int j = 0; j < K; ++j) area.add(T(0.5) * (raw[j] + raw[j + 1]) * w[j]);
    a.area = area.value();
    for (int j = 0; j <= K; ++j) v[j] = o.min_height + (T(1) - o.min_height) * (raw[j] / a.area);
    return a;
  }
  void widths(const V* p, V* w) const {
    for (int j = 0; j < K; ++j) w[j] = o.min_width + (T(1) - o.min_width * static_cast<T>(K)) * p[j];
  }

  // w, raw, v, p as of the forward pass; by_w, by_v: scratch of K and K + 1.
  V quadratic_gradient(const Piece& r, V grad_y, V grad_log, V* u, const V* p, const V* w, const V* raw, const V* v,
                       const Area& a, V* by_w, V* by_v) const {
    V gy = grad_y * span_out(), gl = grad_log, grad_in{};
    const V rise = r.d_1 - r.d_0, log_t = rise / r.G;
    if (o.inverse) {
      grad_in = (gy - gl * log_t / r.w) / r.G;
      gy = -grad_in;
      gl = -gl;
    }
    gy = r.inside ? gy : V{};
    gl = r.inside ? gl : V{};
    const V t = r.t, half_square = T(0.5) * t * t, slope = gl / r.G;
    const V by_t = gy * r.G * r.w + gl * log_t, by_x_k = -by_t / r.w;
    if (!o.inverse) grad_in = -by_x_k;
    const V at_w = gy * (t * r.d_0 + half_square * rise) + by_x_k * t;
    const V at_0 = gy * r.w * (t - half_square) + slope * (T(1) - t), at_1 = gy * r.w * half_square + slope * t;
    for (int j = 0; j <= K; ++j) by_v[j] = V{};
    for (int j = 0; j < K; ++j) {
      const V before = by_x_k + gy * T(0.5) * (v[j] + v[j + 1]);
      by_w[j] = before_or_at(r.k, j, before, at_w);
      const V area = T(0.5) * gy * w[j];
      by_v[j] += before_or_at(r.k, j, area, at_0);
      by_v[j + 1] += before_or_at(r.k, j, area, at_1);
    }
    // v = min + (1 - min) raw / area
    const T factor = T(1) - o.min_height;
    const V inverse_area = T(1) / a.area;
    V by_area{};
    for (int j = 0; j <= K; ++j) {
      by_v[j] *= factor * inverse_area;
      by_area -= by_v[j] * raw[j];
    }
    by_area *= inverse_area;
    for (int j = 0; j < K; ++j) {
      const V half = T(0.5) * by_area * w[j];
      by_v[j] += half;
      by_v[j + 1] += half;
      by_w[j] += by_area * T(0.5) * (raw[j] + raw[j + 1]);
    }
    const int count = o.heights(), shift = count == K - 1 ? 1 : 0;
    if (shift == 1) {
      const V by_mass = (by_v[0] + by_v[K]) / a.room;
      const V by_room = by_mass * raw[0];  // of 1 - room
      by_w[0] += T(0.25) * (by_mass * raw[1] + by_room);
      by_w[K - 1] += T(0.25) * (by_mass * raw[K - 1] + by_room);
      by_v[1] += by_mass * T(0.25) * w[0];
      by_v[K - 1] += by_mass * T(0.25) * w[K - 1];
      for (int j = 1; j < K - 1; ++j) {
        const V half = T(0.5) * by_mass * w[j];
        by_v[j] += half;
        by_v[j + 1] += half;
        by_w[j] += by_mass * T(0.5) * (raw[j] + raw[j + 1]);
      }
    }
    V* heights = u + K;
    for (int j = 0; j < count; ++j) {
      heights[j] = o.logit_scale * by_v[j + shift] * sigmoid(heights[j] * o.logit_scale);
    }
    const T spread = T(1) - o.min_width * static_cast<T>(K);
    softmax_gradient(u, p, one(), [&](int j) { return by_w[j] * spread; });
    return outer(r, grad_y, grad_in / span_in());
  }

  // The slope at knot j of a cubic spline, of the sizes of all bins, and which of three it is twice.
  struct Knot {
    V slope;
    I left, right;  // the slope of the bin on this side is the least; else it is their weighted mean
  };
  Knot inner_knot(const V* w, const V* h, int j) const {
    const V s_0 = h[j - 1] / w[j - 1], s_1 = h[j] / w[j];
    const V weighted = T(0.5) * (w[j] * s_0 + w[j - 1] * s_1) / (w[j - 1] + w[j]);
    Knot k{};
    k.left = (s_0 <= s_1) & (s_0 <= weighted);
    k.right = (s_1 < s_0) & (s_1 <= weighted);
    k.slope = T(2) * (k.left ? s_0 : k.right ? s_1 : weighted);
    return k;
  }
  // d: the raw derivatives at both ends.
  Piece cubic(V x, const V* w, const V* h, const V* d) const {
    Piece r{};
    static_cast<At&>(r) = enter(x);
    const V unit = (r.at - low()) / span_in();
    Sum cum_w, cum_h;
    r.w = w[0];
    r.h = h[0];
    r.d_0 = T(3) * sigmoid(d[0]) * (h[0] / w[0]);
    I reached = r.k == 0;
    for (int j = 1; j < K; ++j) {
      cum_w.add(w[j - 1]);
      cum_h.add(h[j - 1]);
      const V x_j = cum_w.value(), y_j = cum_h.value();
      const V slope = inner_knot(w, h, j).slope;
      r.d_1 = reached ? slope : r.d_1;
      reached = unit >= (o.inverse ? y_j : x_j);
      r.x_k = reached ? x_j : r.x_k;
      r.y_k = reached ? y_j : r.y_k;
      r.w = reached ? w[j] : r.w;
      r.h = reached ? h[j] : r.h;
      r.d_0 = reached ? slope : r.d_0;
      r.k -= reached;
    }
    r.d_1 = reached ? T(3) * sigmoid(d[1]) * (h[K - 1] / w[K - 1]) : r.d_1;
    const V s = r.h / r.w, c_2 = T(3) * s - T(2) * r.d_0 - r.d_1, c_3 = r.d_0 + r.d_1 - T(2) * s;
    const auto at = [&](V t) { return t * (r.d_0 + t * (c_2 + t * c_3)); };
    const auto slope_at = [&](V t) { return r.d_0 + t * (T(2) * c_2 + T(3) * t * c_3); };
    if (o.inverse) {
      // Bisection, which nothing can mislead, then Newton's steps for the last digits.
      const V target = (unit - r.y_k) / r.w;
      V below{}, above = broadcast(T(1));
      for (int i = 0; i < (sizeof(T) == 4 ? 14 : 28); ++i) {
        const V middle = T(0.5) * (below + above);
        const I less = at(middle) < target;
        below = less ? middle : below;
        above = less ? above : middle;
      }
      V t = T(0.5) * (below + above);
      for (int i = 0; i < 3; ++i) {
        const V slope = slope_at(t), next = t - (at(t) - target) / slope;
        // Outside of the bracket lies no root, but that may be its end; where the slope is 0, bisection goes on.
        const I less = at(t) < target;
        below = less ? t : below;
        above = less ? above : t;
        const V nearest = next < below ? below : (next > above ? above : next);
        t = nearest == nearest ? nearest : T(0.5) * (below + above);
      }
      const V sum = target + at(t);
      r.t = sum == sum ? t : sum;  // NaN of any coefficient
      r.value = r.x_k + r.t * r.w;
    } else {
      r.t = (unit - r.x_k) / r.w;
      r.value = r.y_k + r.w * at(r.t);
    }
    r.G = slope_at(r.t);
    return r;
  }

  // by_w, by_h: scratch of K.
  V cubic_gradient(const Piece& r, V grad_y, V grad_log, V* u, const V* p, const V* w, const V* h, V* by_w,
                   V* by_h) const {
    V gy = grad_y * span_out(), gl = grad_log, grad_in{};
    const V t = r.t, square = t * t, s = r.h / r.w;
    const V c_2 = T(3) * s - T(2) * r.d_0 - r.d_1, c_3 = r.d_0 + r.d_1 - T(2) * s;
    const V log_t = (T(2) * c_2 + T(6) * c_3 * t) / r.G;
    if (o.inverse) {
      grad_in = (gy - gl * log_t / r.w) / r.G;
      gy = -grad_in;
      gl = -gl;
    }
    gy = r.inside ? gy : V{};
    gl = r.inside ? gl : V{};
    const V slope = gl / r.G, gyw = gy * r.w;
    const V by_t = gyw * r.G + gl * log_t, by_x_k = -by_t / r.w;
    if (!o.inverse) grad_in = -by_x_k;
    const V by_d_0 = gyw * t * (T(1) - T(2) * t + square) + slope * (T(1) - T(4) * t + T(3) * square);
    const V by_d_1 = gyw * square * (t - T(1)) + slope * (T(3) * square - T(2) * t);
    const V by_s = gyw * square * (T(3) - T(2) * t) + slope * T(6) * (t - square);
    const V at_w = gy * t * (r.d_0 + t * (c_2 + t * c_3)) + by_x_k * t - by_s * s / r.w, at_h = by_s / r.w;
    for (int j = 0; j < K; ++j) {
      by_w[j] = before_or_at(r.k, j, by_x_k, at_w);
      by_h[j] = before_or_at(r.k, j, gy, at_h);
    }
    // A slope of a bin: s = h / w.
    const auto add_slope = [&](int j, V by) {
      by_h[j] += by / w[j];
      by_w[j] -= by * h[j] / (w[j] * w[j]);
    };
    for (int j = 1; j < K; ++j) {
      const I knot = I{} + static_cast<S>(j);
      const V by = T(2) * (knot == r.k ? by_d_0 : (knot == r.k + 1 ? by_d_1 : V{}));
      const Knot at = inner_knot(w, h, j);
      const V s_0 = h[j - 1] / w[j - 1], s_1 = h[j] / w[j], total = w[j - 1] + w[j];
      const V mean = at.left | at.right ? V{} : by;  // of weighted
      const V half = T(0.5) * mean / total, weighted = (w[j] * s_0 + w[j - 1] * s_1) / total;
      add_slope(j - 1, (at.left ? by : V{}) + half * w[j]);
      add_slope(j, (at.right ? by : V{}) + half * w[j - 1]);
      by_w[j - 1] += half * (s_1 - weighted);
      by_w[j] += half * (s_0 - weighted);
    }
    V* d = u + 2 * K;
    const V sig_0 = sigmoid(d[0]), sig_1 = sigmoid(d[1]);
    const V end_0 = r.k == 0 ? by_d_0 : V{}, end_1 = r.k == static_cast<S>(K - 1) ? by_d_1 : V{};
    add_slope(0, T(3) * sig_0 * end_0);
    add_slope(K - 1, T(3) * sig_1 * end_1);
    d[0] = T(3) * sig_0 * (T(1) - sig_0) * (h[0] / w[0]) * end_0;
    d[1] = T(3) * sig_1 * (T(1) - sig_1) * (h[K - 1] / w[K - 1]) * end_1;
    const T w_spread = T(1) - o.min_width * static_cast<T>(K), h_spread = T(1) - o.min_height * static_cast<T>(K);
    softmax_gradient(u, p, one(), [&](int j) { return by_w[j] * w_spread; });
    softmax_gradient(u + K, p + K, one(), [&](int j) { return by_h[j] * h_spread; });
    return outer(r, grad_y, grad_in / span_in());
  }

  // ---- what the kernels call ---------------------------------------------------------------------------------------

  // Scratch vectors: probabilities, and for the unit square the sizes, densities and their gradients.
  static constexpr int kScratch = 7 * (static_cast<int>(kSplineMaxBins) + 1);

  // u: [parameters] raw.
  void apply(V x, const V* u, V* scratch, V& y, V& log_slope) const {
    V* p = scratch;
    if (Bins > 0 || o.kind == SplineKind::rational_quadratic) {
      const Rational r = rational(x, u, p);
      if (o.inverse) {
        y = r.x_k + r.theta * r.w;
        log_slope = -spline_log<T>(r.G);
      } else {
        y = r.y_k + r.h * ((r.s * r.theta * r.theta + r.d_0 * r.between) / r.D);
        log_slope = spline_log<T>(r.G);
      }
      leave(r, x, y, log_slope);
      return;
    }
    const Piece r = piece(x, u, scratch, nullptr);
    y = r.value;
    from_unit(y, log_slope, r.G);
    leave(r, x, y, log_slope);
  }

  // u <- the gradients of the parameters; returns that of x.
  V differentiate(V x, V grad_y, V grad_log, V* u, V* scratch) const {
    V* p = scratch;
    if (Bins > 0 || o.kind == SplineKind::rational_quadratic) {
      const Rational r = rational(x, u, p);
      return rational_gradient(r, grad_y, grad_log, u, p);
    }
    Area area{};
    const Piece r = piece(x, u, scratch, &area);
    V *w = p + 2 * K, *h = w + K, *more = h + K;
    switch (o.kind) {
      case SplineKind::linear:
        return linear_gradient(r, grad_y, grad_log, u, p);
      case SplineKind::quadratic:  // h: raw densities [K + 1], then those at the knots [K + 1]
        return quadratic_gradient(r, grad_y, grad_log, u, p, w, h, h + K + 1, area, p + K, h + 2 * K + 2);
      default:
        return cubic_gradient(r, grad_y, grad_log, u, p, w, h, more, more + K);
    }
  }

 private:
  Piece piece(V x, const V* u, V* scratch, Area* area) const {
    V *p = scratch, *w = p + 2 * K, *h = w + K;
    softmax(u, p);
    if (o.kind == SplineKind::linear) return linear(x, p);
    widths(p, w);
    if (o.kind == SplineKind::quadratic) {
      const Area a = densities(u + K, w, h, h + K + 1);
      if (area != nullptr) *area = a;
      return quadratic(x, w, h + K + 1);
    }
    softmax(u + K, p + K);
    for (int j = 0; j < K; ++j) h[j] = o.min_height + (T(1) - o.min_height * static_cast<T>(K)) * p[K + j];
    return cubic(x, w, h, u + 2 * K);
  }
};

}  // namespace GENFUSE_ISA
}  // namespace genfuse

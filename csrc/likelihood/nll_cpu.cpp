// A block at a time: each element's term by vectors, then their sums over rows.
#include "likelihood/nll.h"

#include <cmath>
#include <limits>

#include "common/math_simd.h"
#include "common/rows.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr double kHalfLog2Pi = 0.9189385332046727;  // ln(2 pi) / 2

// ---- the normal distribution's tails
// -----------------------------------------------------------------------------------

// Mills' ratio Q(t) / phi(t) for t >= 0; Q is the mass above t, phi the density. For float32 a polynomial in s = 1 / (1
// + 0.3 t), fitted for the least relative error, which is 1.3e-7.
GENFUSE_HD VecFloat mills_ratio(VecFloat t) {
  const VecFloat s = 1.0f / (1.0f + 0.3f * t);
  VecFloat p = s * -0.026973307132720947f + 0.09727798402309418f;
  p = p * s - 0.0757317766547203f;
  p = p * s - 0.08256864547729492f;
  p = p * s + 0.05906851962208748f;
  p = p * s + 0.03887726739048958f;
  p = p * s + 0.15224967896938324f;
  p = p * s + 0.21805284917354584f;
  p = p * s + 0.27306312322616577f;
  p = p * s + 0.29999840259552f;
  p = p * s + 0.30000001192092896f;
  return p * s;
}
inline Vec<double> mills_ratio(Vec<double> t) {
  Vec<double> r{};
  for (int i = 0; i < kLanes<double>; ++i) {
    const double x = t[i];
    if (x < 37) {
      // The rounding of y^2, which e^(y^2) would magnify, is put back.
      const double y = x * 0.7071067811865476, square = y * y, rest = ::fma(y, y, -square);
      r[i] = 1.2533141373155003 * ::erfc(y) * ::exp(square) * (1 + rest);
    } else {
      const double w = 1 / (x * x);  // the asymptotic series
      r[i] = (1 - w * (1 - w * (3 - w * (15 - w * (105 - w * 945))))) / x;
    }
  }
  return r;
}

GENFUSE_HD VecFloat logarithm(VecFloat x) { return log_positive(x); }
inline Vec<double> logarithm(Vec<double> x) {
  Vec<double> r{};
  for (int i = 0; i < kLanes<double>; ++i) r[i] = ::log(x[i]);
  return r;
}
// ln(1 - y) for 0 <= y <= 0.75.
GENFUSE_HD VecFloat log_less(VecFloat y) {
  const VecInt32 large = y > 0.25f;
  return log_reduced(large ? VecFloat{} - 1.0f : VecFloat{}, large ? 1.0f - 2.0f * y : -y);
}
inline Vec<double> log_less(Vec<double> y) {
  Vec<double> r{};
  for (int i = 0; i < kLanes<double>; ++i) r[i] = ::log1p(-y[i]);
  return r;
}

template <class T>
GENFUSE_HD Vec<T> absolute(Vec<T> x) {
  return x < 0 ? -x : x;
}

// The mass above t: its logarithm, and the hazard phi(t) / Q(t).
template <class T>
struct Upper {
  Vec<T> log, hazard;

  explicit GENFUSE_HD Upper(Vec<T> t) {
    const Vec<T> distance = absolute<T>(t), ratio = mills_ratio(distance);
    const Vec<T> exponent = T(-0.5) * distance * distance;
    const Vec<T> density = static_cast<T>(0.3989422804014327) * exp_wide<T>(exponent);
    const Vec<T> below = density * ratio;  // for t < 0: the mass that is not above
    const VecInt<T> far = t > 0;
    const Vec<T> one = broadcast(T(1));
    log = far ? exponent - static_cast<T>(kHalfLog2Pi) + logarithm(ratio) : log_less(far ? Vec<T>{} : below);
    hazard = far ? one / ratio : density / (one - below);
    log = t == t ? log : t;
    hazard = t == t ? hazard : t;
  }
};

// ---- terms: the value, and the derivatives by which the gradients go
// ---------------------------------------------------

template <class T>
struct Term {
  Vec<T> value, by_first, by_second, by_scale;
};

// max(l, 0) + ln(1 + e^-|l|) - x l
template <class T, bool gradients>
GENFUSE_HD Term<T> bernoulli(Vec<T> logit, Vec<T> target) {
  const Vec<T> e = exp_wide<T>(-absolute<T>(logit));
  Term<T> t{};
  if constexpr (gradients) {
    const Vec<T> sigmoid = (logit < 0 ? e : broadcast(T(1))) / (T(1) + e);
    t.by_first = sigmoid - target;
    t.by_second = -logit;
  } else {
    const Vec<T> rest = log1p_unit(e);
    t.value = (logit < 0 ? Vec<T>{} : logit) - target * logit + (e == e ? rest : e);
  }
  return t;
}

template <class T, bool gradients>
GENFUSE_HD Term<T> gaussian(const Nll<T>& p, Vec<T> x, Vec<T> mean, Vec<T> scale) {
  const Vec<T> log_deviation = p.log_std ? scale : T(0.5) * scale;
  const Vec<T> inverse = finite_exp<T>(-log_deviation), distance = (x - mean) * inverse;
  Term<T> t{};
  if constexpr (gradients) {
    t.by_first = distance * inverse;
    t.by_second = -t.by_first;
    t.by_scale = (T(1) - distance * distance) * (p.log_std ? T(1) : T(0.5));
  } else {
    t.value = static_cast<T>(kHalfLog2Pi) + log_deviation + T(0.5) * distance * distance;
  }
  return t;
}

// Gauss and Legendre's rule on [-1, 1], one half of it: six points leave 1e-9, ten 1e-16.
template <class T>
struct Quadrature;
template <>
struct Quadrature<float> {
  static constexpr int points = 3;
  static constexpr float node[points] = {0.23861918f, 0.66120939f, 0.93246951f};
  static constexpr float weight[points] = {0.46791393f, 0.36076157f, 0.17132449f};
};
template <>
struct Quadrature<double> {
  static constexpr int points = 5;
  static constexpr double node[points] = {0.1488743389816312, 0.4333953941292472, 0.6794095682990244,
                                          0.8650633666889845, 0.9739065285171717};
  static constexpr double weight[points] = {0.2955242247147529, 0.2692667193099963, 0.2190863625159820,
                                            0.1494513491505806, 0.0666713443086881};
};

// cosh(y) and sinh(y) / y by Taylor's series, of y^2 <= 1.
template <class T>
GENFUSE_HD void hyperbolic(Vec<T> square, Vec<T>& cosh, Vec<T>& sinhc) {
  constexpr int terms = sizeof(T) == 4 ? 5 : 9;
  cosh = sinhc = broadcast(T(1));
#pragma GCC unroll 9
  for (int k = terms; k > 0; --k) {
    cosh = T(1) + cosh * square * (T(1) / static_cast<T>(2 * k * (2 * k - 1)));
    sinhc = T(1) + sinhc * square * (T(1) / static_cast<T>(2 * k * (2 * k + 1)));
  }
}

// -ln of the mass of the bin around x: c = (x - mean) / std, h = half_bin / std. Narrow bins: phi(c) h times the
// integral of e^(-c h t - h^2 t^2 / 2) over [-1, 1]. Wide ones: Q(c - h) (1 - Q(c + h) / Q(c - h)), on the side where c
// >= 0; the quotient is e^(-2 c h) times one of Mills' ratios. The bins at the ends are one tail.
template <class T, bool gradients>
inline Term<T> discretized(const Nll<T>& p, Vec<T> x, Vec<T> mean, Vec<T> scale) {
  using I = VecInt<T>;
  const T half = p.half_bin;
  const Vec<T> one = broadcast(T(1));
  const Vec<T> log_deviation = p.log_std ? scale : T(0.5) * scale;
  // Bounded so that a tail's argument is a number, and its square still infinite.
  const Vec<T> inverse = within(exp_wide<T>(-log_deviation), T(0), sizeof(T) == 4 ? T(1e30) : T(1e250));
  const Vec<T> center = (x - mean) * inverse, c = absolute<T>(center), h = half * inverse;
  const I lower = x<T(-1) + half, upper = x> T(1) - half, edge = lower | upper;
  const I narrow = (h * (T(1) + c) < T(1)) & ~edge, wide = ~narrow & ~edge;
  const bool any_narrow = any_lane(narrow), any_wide = any_lane(wide), any_edge = any_lane(edge);
  // ln mass, and its derivatives by c and, times h, by h.
  Vec<T> log{}, by_center{}, h_by_half{};
  if (any_narrow) {
    const Vec<T> width = narrow ? h : Vec<T>{}, at = narrow ? c : Vec<T>{};
    Vec<T> integral{}, cosh, sinhc;
#pragma GCC unroll 5
    for (int k = 0; k < Quadrature<T>::points; ++k) {
      const Vec<T> t = width * Quadrature<T>::node[k], y = at * t;
      hyperbolic<T>(y * y, cosh, sinhc);
      integral += (2 * Quadrature<T>::weight[k]) * exp(T(-0.5) * t * t) * cosh;
    }
    if constexpr (gradients) {
      const Vec<T> y = at * width, ends = T(2) * exp(T(-0.5) * width * width) / integral;
      hyperbolic<T>(y * y, cosh, sinhc);
      by_center = -at * ends * sinhc;
      h_by_half = ends * cosh;
    } else {
      log = static_cast<T>(std::log(static_cast<double>(half)) - kHalfLog2Pi) - log_deviation + logarithm(integral) -
            T(0.5) * c * c;
    }
  }
  if (any_wide) {
    const Vec<T> at = wide ? c : Vec<T>{}, width = wide ? h : one;
    const Upper<T> near(at - width), far(at + width);
    const Vec<T> product = T(-2) * at * width;
    // Q(far) / Q(near) = phi(far) / phi(near) hazard(near) / hazard(far)
    // It is below 0.2 where a bin is wide.
    const Vec<T> quotient = wide ? exp_wide<T>(product) * near.hazard / far.hazard : Vec<T>{}, rest = one - quotient;
    if constexpr (gradients) {
      const Vec<T> below = near.hazard, above = far.hazard * quotient;
      by_center = wide ? (above - below) / rest : by_center;
      h_by_half = wide ? width * (above + below) / rest : h_by_half;
    } else {
      log = wide ? near.log + log_less(quotient) : log;
    }
  }
  if constexpr (gradients) by_center = center < 0 ? -by_center : by_center;
  if (any_edge) {
    const Vec<T> t = lower ? -(center + h) : center - h;
    const Upper<T> tail(edge ? t : Vec<T>{});
    if constexpr (gradients) {
      by_center = edge ? (lower ? tail.hazard : -tail.hazard) : by_center;
      h_by_half = edge ? h * tail.hazard : h_by_half;
    } else {
      log = edge ? tail.log : log;
    }
  }
  Term<T> t{};
  const Vec<T> check = center + h;
  if constexpr (gradients) {
    t.by_first = -by_center * inverse;
    t.by_second = by_center * inverse;
    t.by_scale = (center * by_center + h_by_half) * (p.log_std ? T(1) : T(0.5));
    t.by_scale = check == check ? t.by_scale : check;
  } else {
    t.value = check == check ? -log : check;
  }
  return t;
}

template <class T, bool gradients>
GENFUSE_HD Term<T> term(const Nll<T>& p, Vec<T> first, Vec<T> second, Vec<T> scale) {
  switch (p.kind) {
    case Likelihood::bernoulli:
      return bernoulli<T, gradients>(first, second);
    case Likelihood::gaussian:
      return gaussian<T, gradients>(p, first, second, scale);
    default:
      return discretized<T, gradients>(p, first, second, scale);
  }
}

template <class T>
struct Buffers {
  T first[kBlock], second[kBlock], scale[kBlock], each[kBlock];
};
template <class T>
struct Blocks {
  const T *first, *second, *scale;
  Blocks(const Nll<T>& p, int64_t begin, int64_t n, Buffers<T>& b)
      : first(block_of(p.first, begin, n, b.first)),
        second(block_of(p.second, begin, n, b.second)),
        scale(block_of(p.scale, begin, n, b.scale)) {}
};

template <class T>
void forward(const Nll<T>& p, char* workspace, const Executor& executor) {
  const RowSums<T> sums{p.out, p.row, reinterpret_cast<double*>(workspace)};
  for_blocks(executor, p.count, [&](int64_t begin, int64_t n) {
    alignas(64) Buffers<T> buffer;
    const Blocks<T> in(p, begin, n, buffer);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> scale = in.scale != nullptr ? load_upto(in.scale + i, n - i) : Vec<T>{};
      store(buffer.each + i,
            term<T, false>(p, load_upto(in.first + i, n - i), load_upto(in.second + i, n - i), scale).value);
    }
    sums.put(begin, n, buffer.each);
  });
  sums.finish(p.count);
}

template <class T>
void backward(const NllBackward<T>& b, char*, const Executor& executor) {
  const Nll<T>& p = b.forward;
  for_blocks(executor, p.count, [&](int64_t begin, int64_t n) {
    alignas(64) Buffers<T> buffer;
    const Blocks<T> in(p, begin, n, buffer);
    const T* grad = spread_rows(b.grad, p.row, begin, n, buffer.each);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int64_t left = n - i;
      const Vec<T> scale = in.scale != nullptr ? load_upto(in.scale + i, left) : Vec<T>{};
      const Term<T> t = term<T, true>(p, load_upto(in.first + i, left), load_upto(in.second + i, left), scale);
      const Vec<T> g = load_upto(grad + i, left);
      if (b.grad_first != nullptr) store_upto(b.grad_first + begin + i, g * t.by_first, left);
      if (b.grad_second != nullptr) store_upto(b.grad_second + begin + i, g * t.by_second, left);
      if (b.grad_scale != nullptr) store_upto(b.grad_scale + begin + i, g * t.by_scale, left);
    }
  });
}

}  // namespace

template <class T>
KernelOf<Nll<T>> nll_kernel() {
  return {[](const Nll<T>& p, int) { return RowSums<T>::workspace(p.count); }, &forward<T>};
}
template <class T>
KernelOf<NllBackward<T>> nll_backward_kernel() {
  return {[](const NllBackward<T>&, int) { return size_t{0}; }, &backward<T>};
}
template KernelOf<Nll<float>> nll_kernel<float>();
template KernelOf<Nll<double>> nll_kernel<double>();
template KernelOf<NllBackward<float>> nll_backward_kernel<float>();
template KernelOf<NllBackward<double>> nll_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

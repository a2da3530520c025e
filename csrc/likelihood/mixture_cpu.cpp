// A vector of pixels at a time, wherever they lie: a lane is a pixel, and a parameter's numbers for all lanes come by
// one load where pixels are neighbours; where parameters are (channels last), or at the end of an image, they are
// brought into a buffer [parameter][lane] first.
//
// The mass of a bin needs two exponentials. With t = (x - mean) / scale, w = h / scale, T = |t| (the mass is even in
// t):
//     P = sigmoid(t + w) - sigmoid(t - w) = (1 - e^-2w) e^-max(T - w, 0) / ((1 + q) (1 + s)),
//     q = e^-|T - w|, s = e^-(T + w) = W q W where T >= w, W (W / q) elsewhere, W = e^-w.
// Nothing cancels: 1 - e^-2w is 2 w W sinh(w) / w where w is small, by a series. At the edges the mass is one sigmoid,
// of t + w or w - t: 1 / (1 + s) or e^-max(T - w, 0) / (1 + q), whichever side the mean is on. So a component's
// probability is pi e^l Q with a sum l of what may be large and a quotient Q that is moderate, and one sum of e^(l -
// largest l) Q over components replaces all logarithms but two for each pixel.
#include "likelihood/mixture.h"

#include <atomic>
#include <limits>

#include "common/math_simd.h"
#include "common/rows.h"
#include "likelihood/exp_simd.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

GENFUSE_HD VecFloat absolute_of(VecFloat x) { return as_float(as_int(x) & 0x7fffffff); }
GENFUSE_HD Vec<double> absolute_of(Vec<double> x) { return x < 0 ? -x : x; }
template <class T>
GENFUSE_HD Vec<T> absolute(Vec<T> x) {
  return absolute_of(x);
}

// sinh(w) / w for w^2 = y <= 0.1225.
template <class T>
GENFUSE_HD Vec<T> sinhc(Vec<T> y) {
  constexpr int terms = sizeof(T) == 4 ? 3 : 7;
  Vec<T> p = broadcast(T(1));
#pragma GCC unroll 8
  for (int k = terms; k > 0; --k) p = T(1) + p * y * (T(1) / static_cast<T>(2 * k * (2 * k + 1)));
  return p;
}

// What does not change from pixel to pixel.
template <class T>
struct Constants {
  MixtureSteps steps;
  int64_t components;
  T half, log_half, low_edge, high_edge, log_scale_min;
  bool openai, flax;

  explicit Constants(const Mixture<T>& p)
      : steps(mixture_steps(p.layout, p.components, p.channels)),
        components(p.components),
        half(static_cast<T>(1.0 / static_cast<double>((int64_t{1} << p.bits) - 1))),
        log_half(static_cast<T>(-std::log(static_cast<double>((int64_t{1} << p.bits) - 1)))),
        low_edge(p.openai ? T(-0.999) : T(-1) + half),
        high_edge(p.openai ? T(0.999) : T(1) - half),
        log_scale_min(p.log_scale_min),
        openai(p.openai),
        flax(p.layout == MixtureLayout::flax) {}

  int64_t parameter(int64_t m, int c, int kind) const {
    return components + m * steps.component + c * steps.channel + kind * steps.kind;
  }
};

template <class T>
struct Scale {
  Vec<T> inverse, log_inverse;
};
template <class T>
GENFUSE_HD Scale<T> scale_of(const Constants<T>& k, Vec<T> raw) {
  Scale<T> r;
  if (k.flax) {
    const Vec<T> softplus = (raw > 0 ? raw : Vec<T>{}) + log1p_unit(exp_wide<T>(-absolute<T>(raw)));
    r.inverse = softplus < T(kFlaxInverseScaleMin) ? broadcast(T(kFlaxInverseScaleMin)) : softplus;
    r.inverse = raw == raw ? r.inverse : raw;
    r.log_inverse = log_wide(r.inverse);
  } else {
    r.log_inverse = -(raw < k.log_scale_min ? broadcast(k.log_scale_min) : raw);
    r.inverse = exp_moderate(r.log_inverse);
  }
  return r;
}

// A channel under a component: the log-mass is `exponent` + ln(numerator / denominator).
template <class T, bool gradients>
struct Mass {
  Vec<T> exponent, numerator, denominator;
  Vec<T> by_position, by_scale;  // derivatives of the log-mass by t, and by ln scale

  GENFUSE_HD Mass(const Constants<T>& k, Vec<T> centered, const Scale<T>& scale, VecInt<T> lower, VecInt<T> upper) {
    using I = VecInt<T>;
    const Vec<T> one = broadcast(T(1)), zero{};
    const Vec<T> t = centered * scale.inverse, w = k.half * scale.inverse, distance = absolute<T>(t);
    const Vec<T> q = exp_moderate(-absolute<T>(distance - w)), W = exp_moderate(-w);
    const I outside = distance >= w, small = w < T(0.35), positive = t >= 0;
    const I edge = lower | upper;
    // At an edge: whether the mean is on its side, so that the mass is sigmoid(T + w).
    const I near = (lower & positive) | (upper & ~positive), far = edge & ~near;
    const Vec<T> s = W * (outside ? q * W : W / q);
    const Vec<T> plus_q = near ? one : one + q, plus_s = far ? one : one + s;
    const Vec<T> width = small ? T(2) * W * sinhc<T>(w * w) : one - W * W;  // 1 - e^-2w, over w if that is small
    const I linear = small & ~edge;
    exponent = (linear ? k.log_half + scale.log_inverse : zero) - ((distance > w) & ~near ? distance - w : zero);
    numerator = edge ? one : width;
    denominator = plus_q * plus_s;
    if constexpr (gradients) {
      // sigmoid(-(T + w)) and sigmoid(T - w); those of a bin's sides that are not at infinity.
      const Vec<T> over = one / (denominator * width);
      const Vec<T> a = far ? zero : s * plus_q * width * over;
      const Vec<T> b = near ? zero : (outside ? one : q) * plus_s * width * over;
      const Vec<T> c = edge ? zero : T(2) * W * W * (small ? one : w) * denominator * over;
      const Vec<T> by_distance = a - b;
      by_position = t < 0 ? -by_distance : by_distance;
      by_scale = -(distance * by_distance + w * (a + b) + c);
    }
    if (k.openai) {
      const Vec<T> mass = (small ? w : one) * width * (outside ? q : one) / denominator;
      const I thin = ~(edge | (mass > T(1e-5)));
      if (any_lane(thin)) {
        // The density in the middle times the bin's width, 2 w e^-T / (1 + e^-T)^2.
        const Vec<T> e = exp_moderate(-distance), plus_e = one + e;
        exponent = thin ? T(0.6931471805599453) + k.log_half + scale.log_inverse - distance : exponent;
        numerator = thin ? one : numerator;
        denominator = thin ? plus_e * plus_e : denominator;
        if constexpr (gradients) {
          const Vec<T> by_distance = (e - one) / plus_e;
          by_position = thin ? (t < 0 ? -by_distance : by_distance) : by_position;
          by_scale = thin ? -(one + distance * by_distance) : by_scale;
        }
      }
    }
    // Comparisons lose a NaN that no number is computed from.
    if constexpr (gradients) by_position = t == t ? by_position : t;
  }
};

// Where a vector of pixels lies: parameter i of lane j is data[i * step + j].
template <class T>
struct Lanes {
  T* data;
  int64_t step;
  int64_t ahead = 0;  // of what is worth fetching: no processor foresees hundreds of streams, a page or more apart
};
template <class T>
GENFUSE_HD Vec<T> load_ahead(const T* p, int64_t ahead) {
  __builtin_prefetch(p + ahead);
  return load(p);
}

// Per component, [components][lanes] each.
template <class T>
struct Terms {
  T *exponent, *quotient;
  T *mean, *scale, *coefficient, *x;  // derivatives of the log-mass; [channels * components]

  static int64_t count(int channels) { return 2 + (channels > 1 ? 4 : 3) * channels; }
  Terms(T* buffer, int64_t components, int channels) {
    const int64_t one = components * kLanes<T>, all = one * channels;
    exponent = buffer;
    quotient = exponent + one;
    mean = quotient + one;
    scale = mean + all;
    x = scale + all;
    coefficient = x + all;
  }
};

template <class T>
struct Evidence {
  Vec<T> nats;
  Vec<T> top, over_sum;               // the largest exponent of a component with its logit; 1 / sum
  Vec<T> top_logit, over_sum_logits;  // of the softmax of logits
};

// The terms of all components, and from them the nats of the pixels.
template <class T, int C, bool gradients>
inline Evidence<T> evidence(const Constants<T>& k, const Lanes<const T>& in, const Vec<T> (&x)[C],
                            const Terms<T>& terms, [[maybe_unused]] bool by_x = false) {
  using I = VecInt<T>;
  constexpr int L = kLanes<T>;
  const T infinity = std::numeric_limits<T>::infinity();
  const Vec<T> zero{}, one = broadcast(T(1));
  const int64_t step = in.step, M = k.components;
  I lower[C], upper[C];
  for (int c = 0; c < C; ++c) lower[c] = x[c]<k.low_edge, upper[c] = x[c]> k.high_edge;
  Evidence<T> r;
  r.top = r.top_logit = broadcast(-infinity);
  for (int64_t m = 0; m < M; ++m) {
    const Vec<T> logit = load_ahead(in.data + m * step, in.ahead);
    const T* of = in.data + k.parameter(m, 0, 0) * step;
    const int64_t channel = k.steps.channel * step, kind = k.steps.kind * step;
    Vec<T> coefficient[C], exponent = logit, numerator = one, denominator = one;
    if constexpr (C > 1) {
      for (int c = 0; c < C; ++c) coefficient[c] = tanh(load_ahead(of + c * channel + 2 * kind, in.ahead));
    }
    Vec<T> by_mean[C];
#pragma GCC unroll 3
    for (int c = 0; c < C; ++c) {
      Vec<T> mean = load_ahead(of + c * channel, in.ahead);
      if constexpr (C > 1) {
        if (c == 1) mean += coefficient[0] * x[0];
        if (c == 2) mean += coefficient[1] * x[0] + coefficient[2] * x[1];
      }
      const Vec<T> raw = load_ahead(of + c * channel + kind, in.ahead);
      const Scale<T> scale = scale_of(k, raw);
      const Mass<T, gradients> mass(k, x[c] - mean, scale, lower[c], upper[c]);
      exponent += mass.exponent;
      numerator *= mass.numerator;
      denominator *= mass.denominator;
      if constexpr (gradients) {
        by_mean[c] = -mass.by_position * scale.inverse;
        Vec<T> by_raw = raw < k.log_scale_min ? zero : mass.by_scale;
        if (k.flax) {  // ln scale is -ln softplus(raw)
          const Vec<T> e = exp(-absolute<T>(raw)), sigmoid = (raw < 0 ? e : one) / (one + e);
          by_raw = scale.inverse > T(kFlaxInverseScaleMin) ? -mass.by_scale * sigmoid / scale.inverse : zero;
        }
        by_raw = raw == raw ? by_raw : raw;
        store(terms.mean + (m * C + c) * L, by_mean[c]);
        store(terms.scale + (m * C + c) * L, by_raw);
      }
    }
    if constexpr (gradients) {
      if constexpr (C > 1) {
        const Vec<T> by_coefficient[3] = {by_mean[1] * x[0], by_mean[2] * x[0], by_mean[2] * x[1]};
        for (int c = 0; c < C; ++c) {
          store(terms.coefficient + (m * C + c) * L,
                by_coefficient[c] * ((one - coefficient[c]) * (one + coefficient[c])));
        }
      }
      if (by_x) {
        Vec<T> own[C];
        for (int c = 0; c < C; ++c) own[c] = -by_mean[c];
        if constexpr (C > 1) {
          own[0] += by_mean[1] * coefficient[0] + by_mean[2] * coefficient[1];
          own[1] += by_mean[2] * coefficient[2];
        }
        for (int c = 0; c < C; ++c) store(terms.x + (m * C + c) * L, own[c]);
      }
    }
    // A component that cannot be has no part, whatever its parameters.
    const I dead = logit == -infinity;
    exponent = dead ? logit : exponent;
    const Vec<T> quotient = dead ? one : numerator / denominator;
    store(terms.exponent + m * L, exponent);
    store(terms.quotient + m * L, quotient);
    r.top = exponent > r.top ? exponent : r.top;
    r.top_logit = logit > r.top_logit ? logit : r.top_logit;
  }
  const Vec<T> top = r.top == -infinity ? zero : r.top;  // so that a sum of nothing is 0, and its logarithm -infinity
  Vec<T> sum{}, sum_logits{};
  for (int64_t m = 0; m < M; ++m) {
    sum += load(terms.quotient + m * L) * exp_weight<T>(load(terms.exponent + m * L) - top);
    sum_logits += exp_weight<T>(load(in.data + m * step) - r.top_logit);
  }
  r.top = top;
  if constexpr (gradients) {
    r.over_sum = one / sum;
    r.over_sum_logits = one / sum_logits;
  } else {
    r.nats = (r.top_logit - top) + (log_wide(sum_logits) - log_wide(sum));
  }
  return r;
}

constexpr int64_t kAhead = 2;  // vectors

// ---- vectors of pixels, wherever they lie
// ----------------------------------------------------------------------------

template <class T, class U>
inline U* address(const Pixels<U>& p, int64_t space, int64_t pixel) {
  return p.data + pixel / space * p.batch + pixel % space * p.pixel;
}

// Pixels [first, first + n) of all images in a row, n <= lanes: in place, or brought to `buffer` [count][lanes].
template <class T>
inline Lanes<const T> gather(const Pixels<const T>& p, int64_t space, int64_t first, int64_t n, int64_t count,
                             T* buffer) {
  constexpr int L = kLanes<T>;
  if (n == L && p.pixel == 1 && first % space + L <= space) {
    return {address<T>(p, space, first), p.channel, kAhead * L};
  }
  const T* from[L];
  for (int j = 0; j < L; ++j) from[j] = address<T>(p, space, first + (j < n ? j : n - 1));
  int64_t i = 0;
  if (p.channel == 1) {
    for (; i + L <= count; i += L) {
      Vec<T> rows[L];
      for (int j = 0; j < L; ++j) rows[j] = load_ahead(from[j] + i, L * p.pixel);
      transpose<T>(rows);
      for (int j = 0; j < L; ++j) store(buffer + (i + j) * L, rows[j]);
    }
  }
  for (; i < count; ++i) {
    for (int j = 0; j < L; ++j) buffer[i * L + j] = from[j][i * p.channel];
  }
  return {buffer, L};
}

// The way back from a buffer [count][lanes], or nowhere to go if the results can be written in place.
template <class T>
inline bool in_place(const Pixels<T>& p, int64_t space, int64_t first, int64_t n) {
  return n == kLanes<T> && p.pixel == 1 && first % space + kLanes<T> <= space;
}
template <class T>
inline void scatter(const Pixels<T>& p, int64_t space, int64_t first, int64_t n, int64_t count, const T* buffer) {
  constexpr int L = kLanes<T>;
  T* to[L];
  for (int j = 0; j < n; ++j) to[j] = address<T>(p, space, first + j);
  int64_t i = 0;
  if (p.channel == 1) {
    for (; i + L <= count; i += L) {
      Vec<T> rows[L];
      for (int j = 0; j < L; ++j) rows[j] = load(buffer + (i + j) * L);
      transpose<T>(rows);
      for (int j = 0; j < n; ++j) store(to[j] + i, rows[j]);
    }
  }
  for (; i < count; ++i) {
    for (int j = 0; j < n; ++j) to[j][i * p.channel] = buffer[i * L + j];
  }
}

template <class T>
struct Buffers {
  T *params, *gradient, *terms;

  static int64_t floats(const Mixture<T>& p, bool gradients) {
    const int64_t parameters = mixture_parameters(p.components, p.channels);
    const int64_t terms = (gradients ? Terms<T>::count(p.channels) : 2) * p.components;
    return ((gradients ? 2 : 1) * parameters + terms) * kLanes<T>;
  }
  Buffers(const Mixture<T>& p, char* workspace, int64_t index, bool gradients) {
    const int64_t parameters = mixture_parameters(p.components, p.channels) * kLanes<T>;
    params = reinterpret_cast<T*>(workspace) + index * floats(p, gradients);
    gradient = params + parameters;
    terms = gradient + (gradients ? parameters : 0);
  }
};

template <class T, int C>
inline void load_x(const Mixture<T>& p, int64_t first, int64_t n, Vec<T> (&x)[C]) {
  T buffer[C * kLanes<T>];
  const Lanes<const T> in = gather<T>(p.x, p.space, first, n, C, buffer);
  for (int c = 0; c < C; ++c) x[c] = load(in.data + c * in.step);
}

template <class T>
int64_t sums_bytes(const Mixture<T>& p) {
  return round_up(static_cast<int64_t>(RowSums<T>::workspace(p.batch * p.space)), 64);
}

template <class T, int C>
void forward_of(const Mixture<T>& p, char* workspace, const Executor& executor) {
  const Constants<T> k(p);
  const int64_t count = p.batch * p.space, parameters = mixture_parameters(p.components, C);
  const RowSums<T> sums{p.out, p.by_pixel ? 1 : p.space, reinterpret_cast<double*>(workspace)};
  std::atomic<int64_t> taken{0};
  parallel_ranges(executor, ceil_div(count, kBlock), 1, [&](int64_t from, int64_t to) {
    const Buffers<T> buffers(p, workspace + sums_bytes(p), taken.fetch_add(1), false);
    const Terms<T> terms(buffers.terms, p.components, C);
    alignas(64) T each[kBlock];
    for (int64_t block = from; block < to; ++block) {
      const int64_t begin = block * kBlock, size = minimum(kBlock, count - begin);
      for (int64_t i = 0; i < size; i += kLanes<T>) {
        const int64_t n = minimum(kLanes<T>, size - i);
        Vec<T> x[C];
        load_x<T, C>(p, begin + i, n, x);
        const Lanes<const T> in = gather<T>(p.params, p.space, begin + i, n, parameters, buffers.params);
        store(each + i, evidence<T, C, false>(k, in, x, terms).nats);
      }
      sums.put(begin, size, each);
    }
  });
  sums.finish(count);
}

// The gradient is g (pi - r) by a component's logit and -g r times the log-mass's by its other parameters, with the
// component's probability r after the pixel is seen.
template <class T, int C>
void backward_of(const MixtureBackward<T>& b, char* workspace, const Executor& executor) {
  constexpr int L = kLanes<T>;
  const Mixture<T>& p = b.forward;
  const Constants<T> k(p);
  const int64_t count = p.batch * p.space, parameters = mixture_parameters(p.components, C), M = p.components;
  std::atomic<int64_t> taken{0};
  parallel_ranges(executor, ceil_div(count, kBlock), 1, [&](int64_t from, int64_t to) {
    const Buffers<T> buffers(p, workspace, taken.fetch_add(1), true);
    const Terms<T> terms(buffers.terms, M, C);
    for (int64_t first = from * kBlock; first < minimum(count, to * kBlock); first += L) {
      const int64_t n = minimum(L, minimum(count, to * kBlock) - first);
      Vec<T> x[C], g{};
      load_x<T, C>(p, first, n, x);
      if (p.by_pixel) {
        g = load_upto(b.grad + first, n);
      } else {
        for (int j = 0; j < n; ++j) g[j] = b.grad[(first + j) / p.space];
      }
      const Lanes<const T> in = gather<T>(p.params, p.space, first, n, parameters, buffers.params);
      const Evidence<T> e = evidence<T, C, true>(k, in, x, terms, b.grad_x.data != nullptr);
      const bool wanted = b.grad_params.data != nullptr, direct = wanted && in_place(b.grad_params, p.space, first, n);
      T* out = direct ? address<T>(b.grad_params, p.space, first) : buffers.gradient;
      const int64_t step = direct ? b.grad_params.channel : L;
      Vec<T> by_x[C] = {};
      for (int64_t m = 0; m < M; ++m) {
        const Vec<T> after =
            load(terms.quotient + m * L) * exp_weight<T>(load(terms.exponent + m * L) - e.top) * e.over_sum;
        // Not 0 times what may be no number.
        const VecInt<T> none = after == 0;
        const Vec<T> factor = -g * after;
        const auto times = [&](const T* derivative) { return none ? Vec<T>{} : factor * load(derivative); };
        if (wanted) {
          const Vec<T> before = exp_weight<T>(load(in.data + m * in.step) - e.top_logit) * e.over_sum_logits;
          store(out + m * step, g * (before - after));
          T* to_component = out + k.parameter(m, 0, 0) * step;
          for (int c = 0; c < C; ++c) {
            const int64_t at = (m * C + c) * L;
            T* to_channel = to_component + c * k.steps.channel * step;
            if (direct) {
              __builtin_prefetch(to_channel + kAhead * L, 1);
              __builtin_prefetch(to_channel + k.steps.kind * step + kAhead * L, 1);
              if constexpr (C > 1) __builtin_prefetch(to_channel + 2 * k.steps.kind * step + kAhead * L, 1);
            }
            store(to_channel, times(terms.mean + at));
            store(to_channel + k.steps.kind * step, times(terms.scale + at));
            if constexpr (C > 1) store(to_channel + 2 * k.steps.kind * step, times(terms.coefficient + at));
          }
        }
        if (b.grad_x.data == nullptr) continue;
        for (int c = 0; c < C; ++c) by_x[c] += times(terms.x + (m * C + c) * L);
      }
      if (wanted && !direct) scatter<T>(b.grad_params, p.space, first, n, parameters, buffers.gradient);
      if (b.grad_x.data != nullptr) {
        T buffer[C * L];
        for (int c = 0; c < C; ++c) store(buffer + c * L, by_x[c]);
        scatter<T>(b.grad_x, p.space, first, n, C, buffer);
      }
    }
  });
}

template <class T>
void forward(const Mixture<T>& p, char* workspace, const Executor& executor) {
  p.channels == 3 ? forward_of<T, 3>(p, workspace, executor) : forward_of<T, 1>(p, workspace, executor);
}
template <class T>
void backward(const MixtureBackward<T>& b, char* workspace, const Executor& executor) {
  b.forward.channels == 3 ? backward_of<T, 3>(b, workspace, executor) : backward_of<T, 1>(b, workspace, executor);
}

// ---- drawing
// ---------------------------------------------------------------------------------------------------------

constexpr int64_t kDrawn = 256;  // pixels of an image at a time

template <class T>
void draw(const MixtureDraw<T>& p, char*, const Executor& executor) {
  const int C = p.channels;
  const int64_t runs = ceil_div(p.space, kDrawn);
  parallel_ranges(executor, p.batch * runs, maximum(1, 1024 / minimum(p.space, kDrawn)), [&](int64_t from, int64_t to) {
    alignas(64) T uniforms[4][kDrawn + 4 + kNoiseDrawn];
    for (int64_t run = from; run < to; ++run) {
      const int64_t image = run / runs, begin = run % runs * kDrawn, n = minimum(kDrawn, p.space - begin);
      const T* u[4];
      for (int c = 0; c <= C; ++c) {
        const int64_t at = (image * (1 + C) + c) * p.space + begin, aligned = at / 4 * 4;
        if (p.u == nullptr) draw_noise<Noise::uniform>(p.seed, p.offset, aligned, n + (at - aligned), uniforms[c]);
        u[c] = p.u != nullptr ? p.u + at : uniforms[c] + (at - aligned);
      }
      for (int64_t i = 0; i < n; ++i) {
        T own[4], x[3];
        for (int c = 0; c <= C; ++c) own[c] = u[c][i];
        const T* params = p.params.data + image * p.params.batch + (begin + i) * p.params.pixel;
        draw_mixture(params, p.params.channel, p.components, C, p.layout, p.log_scale_min, p.bits, p.snap, own, x,
                     p.temperature);
        for (int c = 0; c < C; ++c) p.x[(image * C + c) * p.space + begin + i] = x[c];
      }
    }
  });
}

}  // namespace

template <class T>
KernelOf<Mixture<T>> mixture_kernel() {
  return {[](const Mixture<T>& p, int threads) {
            return static_cast<size_t>(sums_bytes(p) + threads * Buffers<T>::floats(p, false) * int64_t{sizeof(T)});
          },
          &forward<T>};
}
template <class T>
KernelOf<MixtureBackward<T>> mixture_backward_kernel() {
  return {[](const MixtureBackward<T>& b, int threads) {
            return static_cast<size_t>(threads * Buffers<T>::floats(b.forward, true) * int64_t{sizeof(T)});
          },
          &backward<T>};
}
template <class T>
KernelOf<MixtureDraw<T>> mixture_draw_kernel() {
  return {[](const MixtureDraw<T>&, int) { return size_t{0}; }, &draw<T>};
}
template KernelOf<Mixture<float>> mixture_kernel<float>();
template KernelOf<Mixture<double>> mixture_kernel<double>();
template KernelOf<MixtureBackward<float>> mixture_backward_kernel<float>();
template KernelOf<MixtureBackward<double>> mixture_backward_kernel<double>();
template KernelOf<MixtureDraw<float>> mixture_draw_kernel<float>();
template KernelOf<MixtureDraw<double>> mixture_draw_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// Mixtures of discretised logistics (Salimans et al. 2017, arXiv 1701.05517): the likelihood of pixels, and pixels
// drawn. Plain data: no torch, no Python. `draw_mixture` is one pixel's draw, for the operator and for the sampler's
// own loop.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"
#include "common/math.h"

namespace genfuse {

// How the parameters of a pixel lie: first the components' logits, then
//   openai        for each channel: means, log-scales, coefficients of all components
//   pixel_models  means, then log-scales, then coefficients, each [component][channel]
//   flax          [channel][component][mean, scale, coefficient]; softplus(scale) is the inverse scale
//   wavenet       as openai, of one channel: means, log-scales
// Of one channel there are no coefficients.
enum class MixtureLayout : int64_t { openai, pixel_models, flax, wavenet };

// Parameter `kind` (0 mean, 1 scale, 2 coefficient) of channel c and component m is number
// components + m * component + c * channel + kind * kind_step; logit m is number m.
struct MixtureSteps {
  int64_t component = 1, channel = 0, kind = 0;
};

// Pixel s of image b, channel c: data[b * batch + s * pixel + c * channel].
template <class T>
struct Pixels {
  T* data = nullptr;
  int64_t batch = 0, pixel = 1, channel = 1;
};

// Nats of pixels, or their sums over images.
template <class T>
struct Mixture {
  int64_t batch = 0, space = 1, components = 1;
  int channels = 1, bits = 8;
  bool openai = false;  // the published formula, with its approximation of masses below 1e-5
  MixtureLayout layout = MixtureLayout::openai;
  T log_scale_min = T(-7);
  Pixels<const T> x, params;
  bool by_pixel = false;
  T* out = nullptr;  // [batch][space] by pixel, else [batch]
};

template <class T>
struct MixtureBackward {
  Mixture<T> forward;
  const T* grad = nullptr;        // as `out`
  Pixels<T> grad_x, grad_params;  // null if not wanted
};

template <class T>
struct MixtureDraw {
  int64_t batch = 0, space = 1, components = 1;
  int channels = 1, bits = 8;
  bool snap = true;
  MixtureLayout layout = MixtureLayout::openai;
  T log_scale_min = T(-7), temperature = T(1);
  Pixels<const T> params;
  const T* u = nullptr;  // [batch][1 + channels][space], or null: drawn
  uint64_t seed = 0, offset = 0;
  T* x = nullptr;  // [batch][channels][space]
};

GENFUSE_NAMESPACE {
GENFUSE_HD MixtureSteps mixture_steps(MixtureLayout layout, int64_t components, int channels) {
  const int64_t kinds = channels > 1 ? 3 : 2;
  switch (layout) {
    case MixtureLayout::pixel_models:
      return {channels, 1, components * channels};
    case MixtureLayout::flax:
      return {kinds, components * kinds, 1};
    default:
      return {1, components * kinds, components};
  }
}
GENFUSE_HD int64_t mixture_parameters(int64_t components, int channels) {
  return components * (channels > 1 ? 1 + 3 * channels : 3);
}

// What a drawn scale's softplus may not fall below: https://github.com/google/flax has it so.
inline constexpr double kFlaxInverseScaleMin = 1e-7;

GENFUSE_HD float mixture_log(float x) { return ::logf(x); }
GENFUSE_HD double mixture_log(double x) { return ::log(x); }
GENFUSE_HD float mixture_log1p(float x) { return ::log1pf(x); }
GENFUSE_HD double mixture_log1p(double x) { return ::log1p(x); }
GENFUSE_HD float mixture_round(float x) { return ::rintf(x); }  // halves to even, as torch.round
GENFUSE_HD double mixture_round(double x) { return ::rint(x); }

// The value in [-1, 1] of a level of `last` + 1: rounded once.
template <class T>
GENFUSE_HD T mixture_value(T level, T last) {
  return (T(2) * level - last) / last;
}

// One pixel: x[channels] from params, whose parameter i is params[i * stride], and u[1 + channels].
//
// u[0] chooses the component by inversion in the order of the components, as categorical_sample does: weights in T,
// sums in double, the first component at which the sum exceeds u times the total. The others give the logistics, mean
// + scale (ln u - ln(1 - u)), with u within [1e-5, 1 - 1e-5]; the mean of a channel takes the channels before it as
// they were drawn, clamped to [-1, 1] and, with `snap`, rounded to the nearest of 2^bits levels. A temperature
// divides the logits and multiplies the scales. Parameters of components that are not chosen are not looked at; NaN
// in all channels if the logits are no distribution (NaN, +infinity, or nothing but -infinity).
template <class T>
GENFUSE_HD void draw_mixture(const T* params, int64_t stride, int64_t components, int channels, MixtureLayout layout,
                             T log_scale_min, int bits, bool snap, const T* u, T* x, T temperature = T(1)) {
  T top = params[0];
  for (int64_t m = 1; m < components; ++m) {
    const T logit = params[m * stride];
    top = logit > top || !(top == top) ? logit : top;
  }
  const auto weight_of = [&](int64_t m) { return exp((params[m * stride] - top) / temperature); };
  constexpr int64_t few = 32;  // whose weights are kept
  T kept[few];
  double total = 0;
  for (int64_t m = 0; m < components; ++m) {
    const T weight = weight_of(m);
    if (m < few) kept[m] = weight;
    total += static_cast<double>(weight);
  }
  int64_t chosen = -1;
  if (total - total == 0) {  // a number
    const double threshold = static_cast<double>(u[0]) * total;
    double sum = 0;
    for (int64_t m = 0; m < components; ++m) {
      const T weight = m < few ? kept[m] : weight_of(m);
      sum += static_cast<double>(weight);
      if (weight > 0) chosen = m;  // if none exceeds it, for u so near 1 that the product was rounded up to the total
      if (sum > threshold) break;
    }
  }
  const MixtureSteps steps = mixture_steps(layout, components, channels);
  const T last = static_cast<T>((int64_t{1} << bits) - 1);
  const T nan = static_cast<T>(::nan(""));
  for (int c = 0; c < channels; ++c) {
    if (chosen < 0) {
      x[c] = nan;
      continue;
    }
    const T* p = params + (components + chosen * steps.component + c * steps.channel) * stride;
    const auto coefficient = [&](int k) {
      return tanh(params[(components + chosen * steps.component + k * steps.channel + 2 * steps.kind) * stride]);
    };
    T scale;
    const T raw = p[steps.kind * stride];
    if (layout == MixtureLayout::flax) {
      T inverse = (raw > 0 ? raw : T(0)) + mixture_log1p(exp(raw > 0 ? -raw : raw));
      inverse = inverse < T(kFlaxInverseScaleMin) ? T(kFlaxInverseScaleMin) : inverse;
      scale = T(1) / inverse;
    } else {
      scale = exp(raw < log_scale_min ? log_scale_min : raw);
    }
    T mean = p[0];
    if (c == 1) mean += coefficient(0) * x[0];
    if (c == 2) mean += coefficient(1) * x[0] + coefficient(2) * x[1];
    T v = u[1 + c];
    v = v < T(1e-5) ? T(1e-5) : (v > T(1 - 1e-5) ? T(1 - 1e-5) : v);
    T value = mean + temperature * scale * (mixture_log(v) - mixture_log1p(-v));
    value = value < T(-1) ? T(-1) : (value > T(1) ? T(1) : value);
    x[c] = snap ? mixture_value(mixture_round((value + T(1)) * last * T(0.5)), last) : value;
  }
}

}  // namespace GENFUSE_ISA
GENFUSE_DECLARE(template <class T> KernelOf<Mixture<T>> mixture_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<MixtureBackward<T>> mixture_backward_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<MixtureDraw<T>> mixture_draw_kernel())

}  // namespace genfuse

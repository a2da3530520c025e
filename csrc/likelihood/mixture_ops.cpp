#include "likelihood/mixture.h"

#include <limits>

#include "common/torch_glue.h"

namespace genfuse {
namespace {

// A tensor [B, C, *S] whose positions S are evenly spaced, and whose channels or positions are neighbours: as it is, or
// copied. The caller keeps `held` alive while a kernel runs.
template <class T>
struct PixelTensor {
  Tensor held;
  Pixels<const T> pixels;

  PixelTensor(const Tensor& t) : held(to_type(t, kScalar<T>)) {
    if (!even(held)) held = torch::stable::contiguous(held);
    pixels.data = read<T>(held);
    strides(held, pixels);
  }

  // One stride for all positions: that of the last dimension that has several.
  static bool even(const Tensor& t) {
    int64_t next = 0;
    for (int64_t i = t.dim() - 1; i >= 2; --i) {
      if (t.size(i) == 1) continue;
      if (next != 0 && t.stride(i) != next) return false;
      next = t.stride(i) * t.size(i);
      if (t.stride(i) == 0) return false;
    }
    return true;
  }
  template <class P>
  static void strides(const Tensor& t, P& pixels) {
    pixels.batch = t.size(0) == 1 ? 0 : t.stride(0);
    pixels.channel = t.size(1) == 1 ? 1 : t.stride(1);
    pixels.pixel = 1;
    for (int64_t i = t.dim() - 1; i >= 2; --i) {
      if (t.size(i) == 1) continue;
      pixels.pixel = t.stride(i);
      break;
    }
  }
};

// A gradient of t, which comes as `read`, in the strides of an empty_like of t.
template <class T>
struct PixelGradient {
  Tensor result, held;  // the kernel writes `held`, which is the result itself where it can be
  Pixels<T> pixels;

  PixelGradient(const Tensor& t, const PixelTensor<T>& read, bool wanted, ScalarType otherwise)
      : result(nothing(otherwise)), held(result) {
    if (!wanted) return;
    result = torch::stable::empty_like(t);
    prefer_huge_pages(result);
    const bool same = t.scalar_type() == kScalar<T> && PixelTensor<T>::even(result);
    held = same ? result : torch::stable::empty_like(read.held);
    if (!PixelTensor<T>::even(held)) held = empty_like(t, kScalar<T>);
    pixels.data = data<T>(held);
    PixelTensor<T>::strides(held, pixels);
  }
  Tensor finish() {
    return held.const_data_ptr() == result.const_data_ptr() ? result : torch::stable::copy_(result, held);
  }
};

void check_layout(int64_t layout, int64_t channels) {
  STD_TORCH_CHECK(layout >= 0 && layout < 4, "layout must be a code in [0, 4), got ", layout);
  STD_TORCH_CHECK(channels == 1 || channels == 3, "there must be 1 or 3 channels, got ", channels);
}
void check_bits(int64_t bits) { STD_TORCH_CHECK(bits >= 1 && bits <= 24, "bits must be in [1, 24], got ", bits); }

int64_t components_of(const Tensor& params, int64_t channels) {
  const int64_t each = mixture_parameters(1, static_cast<int>(channels)), all = params.size(1);
  STD_TORCH_CHECK(all > 0 && all % each == 0, "params must have a multiple of ", each, " channels, got ",
                  shape_of(params));
  return all / each;
}
int64_t space_of(const Tensor& t) {
  int64_t space = 1;
  for (int64_t i = 2; i < t.dim(); ++i) space *= t.size(i);
  return space;
}

template <class T>
struct Inputs {
  PixelTensor<T> x, params;
  Mixture<T> p;

  Inputs(const Tensor& x_, const Tensor& params_, int64_t bits, bool openai, int64_t layout, double log_scale_min,
         bool by_pixel)
      : x(x_), params(params_) {
    p.batch = x_.size(0);
    p.space = space_of(x_);
    p.channels = static_cast<int>(x_.size(1));
    p.components = components_of(params_, p.channels);
    p.bits = static_cast<int>(bits);
    p.openai = openai;
    p.layout = static_cast<MixtureLayout>(layout);
    p.log_scale_min = static_cast<T>(log_scale_min);
    p.x = x.pixels;
    p.params = params.pixels;
    p.by_pixel = by_pixel;
  }
};

// Calls f with a double if one of both is float64.
template <class F>
auto checked(const Tensor& x, const Tensor& params, int64_t bits, int64_t layout, F&& f) {
  STD_TORCH_CHECK(x.dim() >= 2, "x must have at least 2 dimensions, [B, C, ...], got ", shape_of(x));
  STD_TORCH_CHECK(x.is_cpu() && params.is_cpu(), "x and params must be on the CPU");
  bool same = params.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = i == 1 || params.size(i) == x.size(i);
  STD_TORCH_CHECK(same, "params must have the shape of x, ", shape_of(x), ", but for the number of channels; got ",
                  shape_of(params));
  check_layout(layout, x.size(1));
  check_bits(bits);
  bool wide = compute_type("x", x) == ScalarType::Double;
  wide = compute_type("params", params) == ScalarType::Double || wide;
  return wide ? f(double{}) : f(float{});
}

Tensor discretized_logistic_mixture_nll(const Tensor& x, const Tensor& params, int64_t bits, bool openai,
                                        int64_t layout, double log_scale_min, bool by_pixel) {
  return checked(x, params, bits, layout, [&]<class T>(T) {
    Inputs<T> in(x, params, bits, openai, layout, log_scale_min, by_pixel);
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < (by_pixel ? x.dim() : 1); ++i) {
      if (i != 1) sizes.push_back(x.size(i));
    }
    Tensor out = torch::stable::empty({sizes.data(), sizes.size()}, kScalar<T>);
    in.p.out = data<T>(out);
    if (in.p.batch * in.p.space > 0) {
      run_kernel(GENFUSE_DISPATCH(mixture_kernel<T>)(), in.p);
    } else {
      torch::stable::zero_(out);
    }
    return out;
  });
}

std::tuple<Tensor, Tensor> discretized_logistic_mixture_nll_backward(const OptionalTensor& grad, const Tensor& x,
                                                                     const Tensor& params, int64_t bits, bool openai,
                                                                     int64_t layout, double log_scale_min,
                                                                     bool by_pixel, int64_t needs) {
  return checked(x, params, bits, layout, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(x, params, bits, openai, layout, log_scale_min, by_pixel);
    PixelGradient<T> to_x(x, in.x, (needs & 1) != 0, x.scalar_type());
    PixelGradient<T> to_params(params, in.params, (needs & 2) != 0, x.scalar_type());
    MixtureBackward<T> b;
    b.forward = in.p;
    b.grad_x = to_x.pixels;
    b.grad_params = to_params.pixels;
    if (grad.has_value()) {
      const int64_t count = by_pixel ? in.p.batch * in.p.space : in.p.batch;
      STD_TORCH_CHECK(grad->numel() == count, "grad must have ", count, " elements, as the result has, got ",
                      shape_of(*grad));
    }
    const OptionalTensor from = dense("grad", grad, kScalar<T>);
    b.grad = read<T>(from);
    if (b.grad != nullptr && in.p.batch * in.p.space > 0) {
      run_kernel(GENFUSE_DISPATCH(mixture_backward_kernel<T>)(), b);
    } else {
      torch::stable::zero_(to_x.held);
      torch::stable::zero_(to_params.held);
    }
    return {to_x.finish(), to_params.finish()};
  });
}

Tensor discretized_logistic_mixture_sample(const Tensor& params, const OptionalTensor& u, const OptionalTensor& rng,
                                           int64_t channels, int64_t bits, int64_t layout, double log_scale_min,
                                           double temperature, bool snap) {
  STD_TORCH_CHECK(params.dim() >= 2, "params must have at least 2 dimensions, [B, P, ...], got ", shape_of(params));
  STD_TORCH_CHECK(params.is_cpu(), "params must be on the CPU");
  STD_TORCH_CHECK(u.has_value() || rng.has_value(), "a sample needs u or rng");
  const double least = params.scalar_type() == ScalarType::Double ? std::numeric_limits<double>::min()
                                                                  : std::numeric_limits<float>::min();
  STD_TORCH_CHECK(temperature >= least, "temperature must be at least ", least, ", got ", temperature);
  check_layout(layout, channels);
  check_bits(bits);
  return with_compute_type("params", params, [&]<class T>(T) {
    const PixelTensor<T> from(params);
    const RandomPair pair = random_pair(rng);
    MixtureDraw<T> p;
    p.batch = params.size(0);
    p.space = space_of(params);
    p.channels = static_cast<int>(channels);
    p.components = components_of(params, channels);
    p.bits = static_cast<int>(bits);
    p.snap = snap;
    p.layout = static_cast<MixtureLayout>(layout);
    p.log_scale_min = static_cast<T>(log_scale_min);
    p.temperature = static_cast<T>(temperature);
    p.params = from.pixels;
    p.seed = pair.seed;
    p.offset = pair.offset;
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i < params.dim(); ++i) sizes.push_back(i == 1 ? channels : params.size(i));
    const Tensor x = torch::stable::empty({sizes.data(), sizes.size()}, kScalar<T>);
    const OptionalTensor uniforms = dense("u", u, kScalar<T>);
    STD_TORCH_CHECK(!u.has_value() || u->numel() == p.batch * (1 + channels) * p.space,
                    "u must have 1 + channels numbers for each pixel, got ", shape_of(*u));
    p.u = read<T>(uniforms);
    p.x = data<T>(x);
    if (x.numel() > 0) run_kernel(GENFUSE_DISPATCH(mixture_draw_kernel<T>)(), p);
    return x;
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("discretized_logistic_mixture_nll", TORCH_BOX(&genfuse::discretized_logistic_mixture_nll));
  m.impl("discretized_logistic_mixture_nll_backward", TORCH_BOX(&genfuse::discretized_logistic_mixture_nll_backward));
  m.impl("discretized_logistic_mixture_sample", TORCH_BOX(&genfuse::discretized_logistic_mixture_sample));
}

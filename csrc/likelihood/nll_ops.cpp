#include "likelihood/nll.h"

#include "common/torch_glue.h"

namespace genfuse {
namespace {

template <class T>
struct Inputs {
  Operand<T> first, second;
  OptionalOperand<T> scale;
  Rows rows;
  Nll<T> p;

  Inputs(Likelihood kind, const Tensor& first_, const Tensor& second_, const OptionalTensor& scale_, int64_t batch_dims,
         bool log_std, int64_t levels)
      : first(kind == Likelihood::bernoulli ? "logits" : "x", first_, first_, kScalar<T>),
        second(kind == Likelihood::bernoulli ? "target" : "mean", second_, first_, kScalar<T>),
        scale("scale", scale_, first_, kScalar<T>),
        rows("the first argument", first_, batch_dims) {
    STD_TORCH_CHECK(levels >= 2, "levels must be at least 2, got ", levels);
    p.kind = kind;
    p.count = rows.count * rows.row;
    p.row = rows.row > 0 ? rows.row : 1;
    p.first = first.read;
    p.second = second.read;
    p.scale = scale.read;
    p.log_std = log_std;
    p.half_bin = T(1) / static_cast<T>(levels - 1);
  }
};

Tensor nll(Likelihood kind, const Tensor& first, const Tensor& second, const OptionalTensor& scale, int64_t batch_dims,
           bool log_std, int64_t levels) {
  return with_compute_type("the first argument", first, [&]<class T>(T) {
    Inputs<T> in(kind, first, second, scale, batch_dims, log_std, levels);
    Tensor out = in.rows.new_sums(kScalar<T>);
    in.p.out = data<T>(out);
    if (in.rows.row == 0) torch::stable::zero_(out);
    if (in.p.count > 0) run_kernel(GENFUSE_DISPATCH(nll_kernel<T>)(), in.p);
    return out;
  });
}

std::tuple<Tensor, Tensor, Tensor> nll_backward(Likelihood kind, const OptionalTensor& grad, const Tensor& first,
                                                const Tensor& second, const OptionalTensor& scale, int64_t batch_dims,
                                                bool log_std, int64_t levels, int64_t needs) {
  return with_compute_type("the first argument", first, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Inputs<T> in(kind, first, second, scale, batch_dims, log_std, levels);
    NllBackward<T> b;
    b.forward = in.p;
    OptionalTensor from;
    if (grad.has_value()) {
      STD_TORCH_CHECK(grad->numel() == in.rows.count, "grad must have an element for each row, got ", shape_of(*grad));
      from = dense("grad", *grad, kScalar<T>);
    }
    b.grad = read<T>(from);
    const auto wanted = [&](int bit, T*& to) {
      if ((needs >> bit & 1) == 0) return nothing(kScalar<T>);
      Tensor t = empty_like(first, kScalar<T>);
      if (b.grad == nullptr) torch::stable::zero_(t);
      to = data<T>(t);
      return t;
    };
    const Tensor to_first = wanted(0, b.grad_first), to_second = wanted(1, b.grad_second);
    const Tensor to_scale = wanted(2, b.grad_scale);
    if (in.p.count > 0 && b.grad != nullptr) run_kernel(GENFUSE_DISPATCH(nll_backward_kernel<T>)(), b);
    const ScalarType dtype = first.scalar_type();
    return {to_type(to_first, dtype), to_type(to_second, dtype), to_type(to_scale, dtype)};
  });
}

Tensor bernoulli_nll(const Tensor& logits, const Tensor& target, int64_t batch_dims) {
  return nll(Likelihood::bernoulli, logits, target, std::nullopt, batch_dims, false, 2);
}
std::tuple<Tensor, Tensor> bernoulli_nll_backward(const OptionalTensor& grad, const Tensor& logits,
                                                  const Tensor& target, int64_t batch_dims, int64_t needs) {
  const auto [by_logits, by_target, none] =
      nll_backward(Likelihood::bernoulli, grad, logits, target, std::nullopt, batch_dims, false, 2, needs & 3);
  return {by_logits, by_target};
}
Tensor gaussian_nll(const Tensor& x, const Tensor& mean, const Tensor& scale, int64_t batch_dims, bool log_std) {
  return nll(Likelihood::gaussian, x, mean, scale, batch_dims, log_std, 2);
}
std::tuple<Tensor, Tensor, Tensor> gaussian_nll_backward(const OptionalTensor& grad, const Tensor& x,
                                                         const Tensor& mean, const Tensor& scale, int64_t batch_dims,
                                                         bool log_std, int64_t needs) {
  return nll_backward(Likelihood::gaussian, grad, x, mean, scale, batch_dims, log_std, 2, needs);
}
Tensor discretized_gaussian_nll(const Tensor& x, const Tensor& mean, const Tensor& scale, int64_t batch_dims,
                                bool log_std, int64_t levels) {
  return nll(Likelihood::discretized_gaussian, x, mean, scale, batch_dims, log_std, levels);
}
std::tuple<Tensor, Tensor, Tensor> discretized_gaussian_nll_backward(const OptionalTensor& grad, const Tensor& x,
                                                                     const Tensor& mean, const Tensor& scale,
                                                                     int64_t batch_dims, bool log_std, int64_t levels,
                                                                     int64_t needs) {
  return nll_backward(Likelihood::discretized_gaussian, grad, x, mean, scale, batch_dims, log_std, levels, needs);
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("bernoulli_nll", TORCH_BOX(&genfuse::bernoulli_nll));
  m.impl("bernoulli_nll_backward", TORCH_BOX(&genfuse::bernoulli_nll_backward));
  m.impl("gaussian_nll", TORCH_BOX(&genfuse::gaussian_nll));
  m.impl("gaussian_nll_backward", TORCH_BOX(&genfuse::gaussian_nll_backward));
  m.impl("discretized_gaussian_nll", TORCH_BOX(&genfuse::discretized_gaussian_nll));
  m.impl("discretized_gaussian_nll_backward", TORCH_BOX(&genfuse::discretized_gaussian_nll_backward));
}

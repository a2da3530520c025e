#include "sampling/relaxed.h"

#include <limits>

#include "common/torch_glue.h"

namespace genfuse {
namespace {

template <class T>
struct Inputs {
  Operand<T> logits;
  OptionalOperand<T> noise;
  Relaxed<T> p;

  Inputs(const Tensor& logits_, const OptionalTensor& noise_, const OptionalTensor& rng, double tau, bool hard)
      : logits("logits", logits_, logits_, kScalar<T>), noise("noise", noise_, logits_, kScalar<T>) {
    STD_TORCH_CHECK(noise_.has_value() || rng.has_value(), "a sample needs noise or rng");
    STD_TORCH_CHECK(tau > 0, "tau must be above 0, got ", tau);
    STD_TORCH_CHECK(logits_.dim() == 0 || logits_.size(logits_.dim() - 1) <= std::numeric_limits<int32_t>::max(),
                    "logits must have fewer than 2^31 classes, got ", shape_of(logits_));
    const RandomPair pair = random_pair(rng);
    p.classes = logits_.dim() > 0 ? logits_.size(logits_.dim() - 1) : 1;
    p.rows = p.classes > 0 ? logits_.numel() / p.classes : 0;
    p.logits = logits.read;
    p.noise = noise.read;
    p.seed = pair.seed;
    p.offset = pair.offset;
    const T smallest = std::numeric_limits<T>::min(), given = static_cast<T>(tau);
    p.tau = given < smallest ? smallest : given;
    p.hard = hard;
  }
};

template <bool gumbel>
Tensor relaxed(const Tensor& logits, const OptionalTensor& noise, const OptionalTensor& rng, double tau, bool hard) {
  return with_compute_type("logits", logits, [&]<class T>(T) {
    Inputs<T> in(logits, noise, rng, tau, hard);
    const Tensor y = empty_like(logits, kScalar<T>);
    in.p.y = data<T>(y);
    if (y.numel() > 0) {
      run_kernel(
          (gumbel ? GENFUSE_DISPATCH(gumbel_softmax_kernel<T>) : GENFUSE_DISPATCH(relaxed_bernoulli_kernel<T>))(),
          in.p);
    }
    return to_type(y, logits.scalar_type());
  });
}

template <bool gumbel>
std::tuple<Tensor, Tensor> relaxed_backward(const OptionalTensor& grad_y, const Tensor& logits,
                                            const OptionalTensor& noise, const OptionalTensor& rng, const Tensor& y,
                                            double tau, bool hard, int64_t needs) {
  return with_compute_type("logits", logits, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(logits, noise, rng, tau, hard);
    const Tensor grad = empty_like(logits, kScalar<T>);
    if (!grad_y.has_value()) {
      Tensor zero = grad;
      torch::stable::zero_(zero);
    } else if (grad.numel() > 0) {
      // A hard sample, or one that was rounded, is not enough.
      const bool recompute = hard || logits.scalar_type() != kScalar<T>;
      STD_TORCH_CHECK(grad_y->numel() == logits.numel() && (recompute || y.numel() == logits.numel()),
                      "grad_y and y must have the shape of logits, got ", shape_of(*grad_y), " and ", shape_of(y));
      const Tensor from = dense("grad_y", *grad_y, kScalar<T>), result = recompute ? grad : dense("y", y, kScalar<T>);
      RelaxedBackward<T> b;
      b.forward = in.p;
      b.recompute = recompute;
      b.y = read<T>(result);
      b.grad_y = read<T>(from);
      b.grad_logits = data<T>(grad);
      run_kernel((gumbel ? GENFUSE_DISPATCH(gumbel_softmax_backward_kernel<T>)
                         : GENFUSE_DISPATCH(relaxed_bernoulli_backward_kernel<T>))(),
                 b);
    }
    // Logits and noise are summed, so one gradient is both; each is a tensor of its own.
    const ScalarType dtype = logits.scalar_type();
    const Tensor result = to_type(grad, dtype);
    const bool by_logits = (needs & 1) != 0, by_noise = (needs & 2) != 0 && noise.has_value();
    return {by_logits ? result : nothing(dtype),
            by_noise ? (by_logits ? torch::stable::clone(result) : result) : nothing(dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("gumbel_softmax", TORCH_BOX(&genfuse::relaxed<true>));
  m.impl("gumbel_softmax_backward", TORCH_BOX(&genfuse::relaxed_backward<true>));
  m.impl("relaxed_bernoulli", TORCH_BOX(&genfuse::relaxed<false>));
  m.impl("relaxed_bernoulli_backward", TORCH_BOX(&genfuse::relaxed_backward<false>));
}

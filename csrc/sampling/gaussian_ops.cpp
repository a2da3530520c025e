#include "sampling/gaussian.h"

#include "common/torch_glue.h"

namespace genfuse {
namespace {

// The arguments, and the tensors that they point into.
template <class T>
struct Inputs {
  Operand<T> mean, scale;
  OptionalOperand<T> prior_mean, prior_scale, eps;
  Rows rows;
  Gaussian<T> p;

  Inputs(const Tensor& mean_, const Tensor& scale_, const OptionalTensor& prior_mean_,
         const OptionalTensor& prior_scale_, const OptionalTensor& eps_, const OptionalTensor& rng, int64_t batch_dims,
         bool log_std, double free_bits, double low, double high)
      : mean("mean", mean_, mean_, kScalar<T>),
        scale("scale", scale_, mean_, kScalar<T>),
        prior_mean("prior_mean", prior_mean_, mean_, kScalar<T>),
        prior_scale("prior_scale", prior_scale_, mean_, kScalar<T>),
        eps("eps", eps_, mean_, kScalar<T>),
        rows("mean", mean_, batch_dims) {
    const RandomPair pair = random_pair(rng);
    p.count = rows.count * rows.row;
    p.row = rows.row > 0 ? rows.row : 1;
    p.mean = mean.read;
    p.scale = scale.read;
    p.prior_mean = prior_mean.read;
    p.prior_scale = prior_scale.read;
    p.eps = eps.read;
    p.seed = pair.seed;
    p.offset = pair.offset;
    p.log_std = log_std;
    p.free_bits = static_cast<T>(free_bits);
    p.low = static_cast<T>(low);
    p.high = static_cast<T>(high);
  }
};

std::tuple<Tensor, Tensor> gaussian(const Tensor& mean, const Tensor& scale, const OptionalTensor& prior_mean,
                                    const OptionalTensor& prior_scale, const OptionalTensor& eps,
                                    const OptionalTensor& rng, int64_t batch_dims, bool log_std, double free_bits,
                                    double low, double high, bool sample, bool divergence) {
  STD_TORCH_CHECK(!sample || eps.has_value() || rng.has_value(), "a sample needs eps or rng");
  return with_compute_type("mean", mean, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(mean, scale, prior_mean, prior_scale, eps, rng, batch_dims, log_std, free_bits, low, high);
    const Tensor z = sample ? empty_like(mean, kScalar<T>) : nothing(kScalar<T>);
    Tensor kl = divergence ? in.rows.new_sums(kScalar<T>) : nothing(kScalar<T>);
    if (sample) in.p.z = data<T>(z);
    if (divergence) in.p.kl = data<T>(kl);
    if (divergence && in.rows.row == 0) torch::stable::zero_(kl);
    if (in.p.count > 0) run_kernel(GENFUSE_DISPATCH(gaussian_kernel<T>)(), in.p);
    return {to_type(z, mean.scalar_type()), kl};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gaussian_backward(
    const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Tensor& mean, const Tensor& scale,
    const OptionalTensor& prior_mean, const OptionalTensor& prior_scale, const OptionalTensor& eps,
    const OptionalTensor& rng, int64_t batch_dims, bool log_std, double free_bits, double low, double high, bool sample,
    bool divergence, int64_t needs) {
  return with_compute_type("mean", mean, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> {
    Inputs<T> in(mean, scale, prior_mean, prior_scale, eps, rng, batch_dims, log_std, free_bits, low, high);
    GaussianBackward<T> b;
    b.forward = in.p;
    OptionalTensor from_z, from_kl;
    if (sample && grad_z.has_value()) {
      STD_TORCH_CHECK(grad_z->numel() == in.p.count, "grad_z must have the shape of mean, got ", shape_of(*grad_z));
      STD_TORCH_CHECK(eps.has_value() || rng.has_value(), "a sample needs eps or rng");
      from_z = dense("grad_z", *grad_z, kScalar<T>);
    }
    if (divergence && grad_kl.has_value()) {
      STD_TORCH_CHECK(grad_kl->numel() == in.rows.count, "grad_kl must have an element for each row, got ",
                      shape_of(*grad_kl));
      from_kl = dense("grad_kl", *grad_kl, kScalar<T>);
    }
    b.grad_z = read<T>(from_z);
    b.grad_kl = read<T>(from_kl);
    const auto wanted = [&](int bit, bool there, T*& to, bool used = true) {
      if ((needs >> bit & 1) == 0 || !there) return nothing(kScalar<T>);
      const Tensor t = empty_like(mean, kScalar<T>);
      if (used) {
        to = data<T>(t);
      } else {
        Tensor zero = t;
        torch::stable::zero_(zero);
      }
      return t;
    };
    const bool by_kl = b.grad_kl != nullptr, by_z = b.grad_z != nullptr;
    const Tensor to_mean = wanted(0, true, b.grad_mean), to_scale = wanted(1, true, b.grad_scale);
    const Tensor to_prior_mean = wanted(2, prior_mean.has_value(), b.grad_prior_mean, by_kl);
    const Tensor to_prior_scale = wanted(3, prior_scale.has_value(), b.grad_prior_scale, by_kl);
    const Tensor to_eps = wanted(4, eps.has_value(), b.grad_eps, by_z);
    if (in.p.count > 0) run_kernel(GENFUSE_DISPATCH(gaussian_backward_kernel<T>)(), b);
    const ScalarType dtype = mean.scalar_type();
    return {to_type(to_mean, dtype), to_type(to_scale, dtype), to_type(to_prior_mean, dtype),
            to_type(to_prior_scale, dtype), to_type(to_eps, dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("gaussian", TORCH_BOX(&genfuse::gaussian));
  m.impl("gaussian_backward", TORCH_BOX(&genfuse::gaussian_backward));
}

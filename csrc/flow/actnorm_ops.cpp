#include "flow/actnorm.h"

#include "common/torch_glue.h"
#include "flow/flow_ops.h"

namespace genfuse {
namespace {

template <class T>
struct Inputs {
  RowTensor<T> x;
  Tensor log_scale, bias;
  Actnorm<T> p;

  Inputs(const Tensor& x_, const Tensor& log_scale_, const Tensor& bias_, bool inverse, bool add_first)
      : x("x", x_), log_scale(dense("log_scale", log_scale_, kScalar<T>)), bias(dense("bias", bias_, kScalar<T>)) {
    check_shape("log_scale", log_scale, {x_.size(1)});
    check_shape("bias", bias, {x_.size(1)});
    p.batch = x_.size(0);
    p.channels = x_.size(1);
    for (int64_t i = 2; i < x_.dim(); ++i) p.space *= x_.size(i);
    p.inverse = inverse;
    p.add_first = add_first;
    p.x = x.data;
    p.stride = p.batch == 1 ? p.channels * p.space : x.stride;
    p.log_scale = read<T>(log_scale);
    p.bias = read<T>(bias);
  }
};

std::tuple<Tensor, Tensor> actnorm(const Tensor& x, const Tensor& log_scale, const Tensor& bias, bool inverse,
                                   bool add_first) {
  check_rows("x", x);
  return with_widest_type(x, log_scale, bias, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(x, log_scale, bias, inverse, add_first);
    const Tensor y = empty_like(x, kScalar<T>);
    Tensor log_abs_det = empty({x.size(0)}, kScalar<T>);
    in.p.y = data<T>(y);
    in.p.log_abs_det = data<T>(log_abs_det);
    if (x.numel() > 0) {
      run_kernel(GENFUSE_DISPATCH(actnorm_kernel<T>)(), in.p);
    } else {
      torch::stable::zero_(log_abs_det);
    }
    return {to_type(y, x.scalar_type()), log_abs_det};
  });
}

std::tuple<Tensor, Tensor, Tensor> actnorm_backward(const OptionalTensor& grad_y,
                                                    const OptionalTensor& grad_log_abs_det, const Tensor& x,
                                                    const Tensor& log_scale, const Tensor& bias, bool inverse,
                                                    bool add_first, int64_t needs) {
  check_rows("x", x);
  return with_widest_type(x, log_scale, bias, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Inputs<T> in(x, log_scale, bias, inverse, add_first);
    ActnormBackward<T> b;
    b.forward = in.p;
    OptionalTensor from_y, from_log;
    if (grad_y.has_value()) {
      STD_TORCH_CHECK(grad_y->numel() == x.numel(), "grad_y must have the shape of x, got ", shape_of(*grad_y));
      from_y = dense("grad_y", *grad_y, kScalar<T>);
    }
    if (grad_log_abs_det.has_value()) {
      STD_TORCH_CHECK(grad_log_abs_det->numel() == x.size(0),
                      "grad_log_abs_det must have an element for each row, got ", shape_of(*grad_log_abs_det));
      from_log = dense("grad_log_abs_det", *grad_log_abs_det, kScalar<T>);
    }
    b.grad_y = read<T>(from_y);
    b.grad_log_abs_det = read<T>(from_log);
    const bool computed = x.numel() > 0;
    const auto wanted = [&](int bit, const Tensor& like, T*& to) {
      if ((needs >> bit & 1) == 0) return nothing(kScalar<T>);
      Tensor t = empty_like(like, kScalar<T>);
      if (!computed) torch::stable::zero_(t);
      to = data<T>(t);
      return t;
    };
    const Tensor to_x = wanted(0, x, b.grad_x), to_log_scale = wanted(1, log_scale, b.grad_log_scale);
    const Tensor to_bias = wanted(2, bias, b.grad_bias);
    if (computed) run_kernel(GENFUSE_DISPATCH(actnorm_backward_kernel<T>)(), b);
    const auto converted = [&](int bit, const Tensor& like, const Tensor& t) {  // what is empty: of x's dtype
      return to_type(t, ((needs >> bit & 1) != 0 ? like : x).scalar_type());
    };
    return {converted(0, x, to_x), converted(1, log_scale, to_log_scale), converted(2, bias, to_bias)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("actnorm", TORCH_BOX(&genfuse::actnorm));
  m.impl("actnorm_backward", TORCH_BOX(&genfuse::actnorm_backward));
}

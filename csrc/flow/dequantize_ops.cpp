#include "flow/dequantize.h"

#include "common/torch_glue.h"
#include "flow/flow_ops.h"

namespace genfuse {
namespace {

constexpr int64_t kMostLevels = int64_t{1} << 24;  // which float32 can count

void check_levels(int64_t levels, double alpha) {
  STD_TORCH_CHECK(levels >= 2 && levels <= kMostLevels, "levels must be in [2, 2^24], got ", levels);
  STD_TORCH_CHECK(alpha >= 0 && alpha < 0.5, "alpha must be in [0, 0.5), got ", alpha);
}

// float64 if x or u is, else float32. x may be bytes.
template <class F>
auto with_noise_type(const Tensor& x, const OptionalTensor& u, F&& f) {
  const bool bytes = x.scalar_type() == ScalarType::Byte;
  bool wide = !bytes && compute_type("x", x) == ScalarType::Double;
  wide = (u.has_value() && compute_type("u", *u) == ScalarType::Double) || wide;
  return wide ? f(double{}) : f(float{});
}

template <class T>
struct Inputs {
  Tensor x;
  OptionalTensor u;
  Rows rows;
  Dequantize<T> d;

  Inputs(const Tensor& x_, const OptionalTensor& u_, const OptionalTensor& rng, int64_t levels, double alpha)
      : x(x_), u(dense("u", u_, kScalar<T>)), rows("x", x_, 1) {
    STD_TORCH_CHECK(u_.has_value() || rng.has_value(), "noise must come as u or from rng");
    check_levels(levels, alpha);
    if (u_.has_value()) {
      bool same = u_->dim() == x_.dim();
      for (int64_t i = 0; same && i < x_.dim(); ++i) same = u_->size(i) == x_.size(i);
      STD_TORCH_CHECK(same, "u must have the shape of x, ", shape_of(x_), ", got ", shape_of(*u_));
    }
    const RandomPair pair = random_pair(rng);
    if (x.scalar_type() == ScalarType::Byte) {
      STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
      if (!x.is_contiguous()) x = torch::stable::contiguous(x);
      d.bytes = read<uint8_t>(x);
    } else {
      x = dense("x", x, kScalar<T>);
      d.x = {read<T>(x), whole_period()};
    }
    if (u.has_value()) d.u = {read<T>(u), whole_period()};
    d.count = rows.count * rows.row;
    d.row = rows.row > 0 ? rows.row : 1;
    d.seed = pair.seed;
    d.offset = pair.offset;
    d.levels = static_cast<T>(levels);
    d.alpha = static_cast<T>(alpha);
  }
  int64_t whole_period() const { return x.numel() > 0 ? x.numel() : 1; }
};

ScalarType dtype_of(const Tensor& x, const OptionalTensor& u) {
  if (x.scalar_type() != ScalarType::Byte) return x.scalar_type();
  return u.has_value() ? u->scalar_type() : ScalarType::Float;
}

std::tuple<Tensor, Tensor> dequantize_logit(const Tensor& x, const OptionalTensor& u, const OptionalTensor& rng,
                                            int64_t levels, double alpha) {
  return with_noise_type(x, u, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(x, u, rng, levels, alpha);
    const Tensor y = empty_like(x, kScalar<T>);
    Tensor log_abs_det = in.rows.new_sums(kScalar<T>);
    in.d.y = data<T>(y);
    in.d.log_abs_det = data<T>(log_abs_det);
    if (in.rows.row == 0) torch::stable::zero_(log_abs_det);
    if (in.d.count > 0) run_kernel(GENFUSE_DISPATCH(dequantize_kernel<T>)(), in.d);
    return {to_type(y, dtype_of(x, u)), log_abs_det};
  });
}

std::tuple<Tensor, Tensor> dequantize_logit_backward(const OptionalTensor& grad_y,
                                                     const OptionalTensor& grad_log_abs_det, const Tensor& x,
                                                     const OptionalTensor& u, const OptionalTensor& rng, int64_t levels,
                                                     double alpha, int64_t needs) {
  return with_noise_type(x, u, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(x, u, rng, levels, alpha);
    DequantizeBackward<T> b;
    b.forward = in.d;
    OptionalTensor from_y, from_log;
    if (grad_y.has_value()) {
      STD_TORCH_CHECK(grad_y->numel() == x.numel(), "grad_y must have the shape of x, got ", shape_of(*grad_y));
      from_y = dense("grad_y", *grad_y, kScalar<T>);
    }
    if (grad_log_abs_det.has_value()) {
      STD_TORCH_CHECK(grad_log_abs_det->numel() == in.rows.count,
                      "grad_log_abs_det must have an element for each row, got ", shape_of(*grad_log_abs_det));
      from_log = dense("grad_log_abs_det", *grad_log_abs_det, kScalar<T>);
    }
    b.grad_y = read<T>(from_y);
    b.grad_log_abs_det = read<T>(from_log);
    const Tensor grad = empty_like(x, kScalar<T>);
    b.grad = data<T>(grad);
    if (in.d.count > 0) run_kernel(GENFUSE_DISPATCH(dequantize_backward_kernel<T>)(), b);
    // x and u are summed, so one gradient is both; each is a tensor of its own.
    const bool by_x = (needs & 1) != 0 && x.scalar_type() != ScalarType::Byte, by_u = (needs & 2) != 0 && u.has_value();
    const ScalarType of_x = x.scalar_type(), of_u = by_u ? u->scalar_type() : of_x;
    const Tensor none = nothing(of_x), to_x = by_x ? to_type(grad, of_x) : none,
                 to_u = by_u ? to_type(grad, of_u) : none;
    return {to_x, by_x && by_u && of_x == of_u ? torch::stable::clone(to_u) : to_u};
  });
}

Tensor logit_quantize(const Tensor& y, int64_t levels, double alpha) {
  check_levels(levels, alpha);
  return with_compute_type("y", y, [&]<class T>(T) {
    const Tensor from = dense("y", y, kScalar<T>), x = empty_like(y, kScalar<T>);
    LogitQuantize<T> l;
    l.count = y.numel();
    l.y = read<T>(from);
    l.x = data<T>(x);
    l.levels = static_cast<T>(levels);
    l.alpha = static_cast<T>(alpha);
    if (l.count > 0) run_kernel(GENFUSE_DISPATCH(logit_quantize_kernel<T>)(), l);
    return to_type(x, y.scalar_type());
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("dequantize_logit", TORCH_BOX(&genfuse::dequantize_logit));
  m.impl("dequantize_logit_backward", TORCH_BOX(&genfuse::dequantize_logit_backward));
  m.impl("logit_quantize", TORCH_BOX(&genfuse::logit_quantize));
}

#include "flow/masked_linear.h"

#include "common/torch_glue.h"
#include "flow/degrees.h"

namespace genfuse {
namespace {

Tensor degrees_of(const char* name, const Tensor& t, int64_t count) {
  check_shape(name, t, {count});
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Long, name, " must be an int64 tensor on the CPU");
  return torch::stable::contiguous(t);
}

template <class T>
struct Inputs {
  Tensor x, weight, in_degrees, out_degrees;
  OptionalTensor bias;
  std::vector<int64_t> in_order, out_order;
  std::optional<Sight> sight;
  MaskedLinear<T> p;

  Inputs(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_, const Tensor& in_degrees_,
         const Tensor& out_degrees_, bool strict)
      : x(x_), weight(weight_), in_degrees(in_degrees_), out_degrees(out_degrees_) {
    STD_TORCH_CHECK(weight.dim() == 2, "weight must have shape [outputs, inputs], got ", shape_of(weight));
    p.outputs = weight.size(0);
    p.inputs = weight.size(1);
    STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == p.inputs, "x must have shape [..., ", p.inputs,
                    "], the inputs of weight, got ", shape_of(x));
    p.rows = 1;
    for (int64_t i = 0; i + 1 < x.dim(); ++i) p.rows *= x.size(i);
    const ScalarType dtype = x.scalar_type();
    weight = prepared("weight", weight, {p.outputs, p.inputs}, dtype, kScalar<T>);
    bias = prepared("bias", bias_, {p.outputs}, dtype, kScalar<T>);
    in_degrees = degrees_of("in_degrees", in_degrees, p.inputs);
    out_degrees = degrees_of("out_degrees", out_degrees, p.outputs);
    x = dense("x", x, kScalar<T>);
    const auto *in = read<int64_t>(in_degrees), *out = read<int64_t>(out_degrees);
    in_order = order_of_degrees(in, p.inputs);
    out_order = order_of_degrees(out, p.outputs);
    sight.emplace(in, in_order, out, out_order, strict);
    p.x = read<T>(x);
    p.weight = read<T>(weight);
    p.bias = read<T>(bias);
    p.in_order = in_order.data();
    p.out_order = out_order.data();
    p.in_sorted = std::is_sorted(in_order.begin(), in_order.end());
    p.out_sorted = std::is_sorted(out_order.begin(), out_order.end());
    p.live = sight->live.data();
    p.first = sight->first.data();
  }
};

std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  sizes.push_back(last);
  return sizes;
}

Tensor masked_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const Tensor& in_degrees,
                     const Tensor& out_degrees, bool strict) {
  return with_compute_type("x", x, [&]<class T>(T) {
    Inputs<T> in(x, weight, bias, in_degrees, out_degrees, strict);
    const std::vector<int64_t> sizes = with_last(x, in.p.outputs);
    const Tensor y = torch::stable::empty({sizes.data(), sizes.size()}, kScalar<T>);
    prefer_huge_pages(y);
    in.p.y = data<T>(y);
    if (y.numel() > 0) run_kernel(GENFUSE_DISPATCH(masked_linear_kernel<T>)(), in.p);
    return to_type(y, x.scalar_type());
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_linear_backward(const OptionalTensor& grad, const Tensor& x,
                                                          const Tensor& weight, const OptionalTensor& bias,
                                                          const Tensor& in_degrees, const Tensor& out_degrees,
                                                          bool strict, int64_t needs) {
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Inputs<T> in(x, weight, bias, in_degrees, out_degrees, strict);
    MaskedLinearBackward<T> b;
    b.forward = in.p;
    OptionalTensor from;
    if (grad.has_value()) {
      const std::vector<int64_t> sizes = with_last(x, in.p.outputs);
      bool same = grad->dim() == static_cast<int64_t>(sizes.size());
      for (int64_t i = 0; same && i < grad->dim(); ++i) same = grad->size(i) == sizes[static_cast<size_t>(i)];
      STD_TORCH_CHECK(same, "grad must have the shape of the output, got ", shape_of(*grad));
      from = dense("grad", *grad, kScalar<T>);
    }
    b.grad_y = read<T>(from);
    const auto wanted = [&](int bit, bool there, const Tensor& like, T*& to) {
      if ((needs >> bit & 1) == 0 || !there) return nothing(kScalar<T>);
      Tensor t = empty_like(like, kScalar<T>);
      if (b.grad_y == nullptr || in.p.rows == 0 || in.p.outputs == 0) torch::stable::zero_(t);
      to = data<T>(t);
      return t;
    };
    const Tensor by_x = wanted(0, true, x, b.grad_x), by_weight = wanted(1, true, weight, b.grad_weight);
    const Tensor by_bias = wanted(2, bias.has_value(), bias.has_value() ? *bias : x, b.grad_bias);
    if (b.grad_y != nullptr && in.p.rows > 0 && in.p.outputs > 0) {
      run_kernel(GENFUSE_DISPATCH(masked_linear_backward_kernel<T>)(), b);
    }
    const ScalarType dtype = x.scalar_type();
    return {to_type(by_x, dtype), to_type(by_weight, dtype), to_type(by_bias, dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("masked_linear", TORCH_BOX(&genfuse::masked_linear));
  m.impl("masked_linear_backward", TORCH_BOX(&genfuse::masked_linear_backward));
}

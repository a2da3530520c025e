#include "flow/conv1x1.h"

#include "common/torch_glue.h"

namespace genfuse {
namespace {

// The arguments, and the tensors that they point into.
template <class T>
struct Inputs {
  Tensor x, weight;
  OptionalTensor bias;
  Conv1x1<T> p;

  Inputs(const Tensor& x_, const Tensor& weight_, const OptionalTensor& bias_) : x(x_), weight(weight_), bias(bias_) {
    STD_TORCH_CHECK(x.dim() >= 2, "x must have shape [B, C, ...], got ", shape_of(x));
    STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == x.size(1), "weight must have shape [outputs, ", x.size(1),
                    "], the channels of x, got ", shape_of(weight));
    p.batch = x.size(0);
    p.inputs = weight.size(1);
    p.outputs = weight.size(0);
    for (int64_t i = 2; i < x.dim(); ++i) p.places *= x.size(i);
    const ScalarType dtype = x.scalar_type();
    weight = prepared("weight", weight, {p.outputs, p.inputs}, dtype, kScalar<T>);
    bias = prepared("bias", bias, {p.outputs}, dtype, kScalar<T>);
    x = dense("x", x, kScalar<T>);
    p.x = read<T>(x);
    p.weight = read<T>(weight);
    p.bias = read<T>(bias);
  }

  bool empty() const { return p.batch * p.places == 0 || p.outputs == 0; }
};

Tensor conv1x1(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  return with_compute_type("x", x, [&]<class T>(T) {
    Inputs<T> in(x, weight, bias);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes[1] = in.p.outputs;
    const Tensor y = torch::stable::empty({sizes.data(), sizes.size()}, kScalar<T>);
    prefer_huge_pages(y);
    in.p.y = data<T>(y);
    if (!in.empty()) run_kernel(GENFUSE_DISPATCH(conv1x1_kernel<T>)(), in.p);
    return to_type(y, x.scalar_type());
  });
}

std::tuple<Tensor, Tensor, Tensor> conv1x1_backward(const OptionalTensor& grad_y, const Tensor& x, const Tensor& weight,
                                                    const OptionalTensor& bias, int64_t needs) {
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Inputs<T> in(x, weight, bias);
    Conv1x1Backward<T> b;
    b.forward = in.p;
    const bool there = grad_y.has_value() && !in.empty();
    OptionalTensor from;
    if (grad_y.has_value()) {
      STD_TORCH_CHECK(grad_y->numel() == in.p.batch * in.p.outputs * in.p.places,
                      "grad_y must have the shape of the result, got ", shape_of(*grad_y));
      from = dense("grad_y", *grad_y, kScalar<T>);
    }
    b.grad_y = read<T>(from);
    const auto wanted = [&](int bit, const OptionalTensor& like, T*& to) {
      if ((needs >> bit & 1) == 0 || !like.has_value()) return nothing(kScalar<T>);
      Tensor t = empty_like(*like, kScalar<T>);
      if (!there) torch::stable::zero_(t);
      to = data<T>(t);
      return t;
    };
    const Tensor to_x = wanted(0, x, b.grad_x), to_weight = wanted(1, weight, b.grad_weight);
    const Tensor to_bias = wanted(2, bias, b.grad_bias);
    if (there) run_kernel(GENFUSE_DISPATCH(conv1x1_backward_kernel<T>)(), b);
    const ScalarType dtype = x.scalar_type();
    return {to_type(to_x, dtype), to_type(to_weight, dtype), to_type(to_bias, dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("conv1x1", TORCH_BOX(&genfuse::conv1x1));
  m.impl("conv1x1_backward", TORCH_BOX(&genfuse::conv1x1_backward));
}

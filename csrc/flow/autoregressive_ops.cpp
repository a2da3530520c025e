#include "flow/autoregressive.h"

#include "common/torch_glue.h"
#include "flow/autoregressive_plan.h"
#include "flow/masked_linear.h"

namespace genfuse {
namespace {

const Tensor& checked_degrees(const Tensor& degrees) {
  STD_TORCH_CHECK(degrees.dim() == 1 && degrees.is_cpu() && degrees.scalar_type() == ScalarType::Long,
                  "degrees must be an int64 tensor of one dimension on the CPU");
  return degrees;
}
const Tensor& checked_u(const Tensor& u) {
  STD_TORCH_CHECK(u.dim() == 2, "u must have shape [B, D], got ", shape_of(u));
  return u;
}

template <class T>
struct Call {
  Tensor u, parameters, degrees;
  OptionalTensor additions;
  AutoregressivePlan<T> plan;
  Autoregressive<T>& p;

  Call(const Tensor& u_, const Tensor& parameters_, const OptionalTensor& additions_, const Tensor& degrees_,
       const std::vector<int64_t>& program, const std::vector<double>& constants)
      : u(dense("u", checked_u(u_), kScalar<T>)),
        parameters(parameters_),
        degrees(torch::stable::contiguous(checked_degrees(degrees_))),
        plan(u.size(0), u.size(1), program, constants, read<int64_t>(degrees), degrees.numel()),
        p(plan.p) {
    const ScalarType dtype = u_.scalar_type();
    parameters = prepared("parameters", parameters_, {plan.parameters}, dtype, kScalar<T>);
    if (additions_.has_value()) {
      additions = prepared("additions", *additions_, {p.batch, plan.additions}, dtype, kScalar<T>);
    } else {
      STD_TORCH_CHECK(plan.additions == 0, "additions must be given: the program has ", plan.additions,
                      " columns of them");
    }
    p.u = read<T>(u);
    plan.place(read<T>(parameters), read<T>(additions));
  }
};

std::tuple<Tensor, Tensor> autoregressive_inverse(const Tensor& u, const Tensor& parameters,
                                                  const OptionalTensor& additions, const Tensor& degrees,
                                                  const std::vector<int64_t>& program,
                                                  const std::vector<double>& constants) {
  return with_compute_type("u", u, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Call<T> call(u, parameters, additions, degrees, program, constants);
    Tensor x = empty_like(u, kScalar<T>), log_abs_det = empty({call.p.batch}, kScalar<T>);
    call.p.x = data<T>(x);
    call.p.log_abs_det = data<T>(log_abs_det);
    if (call.p.groups == 0) torch::stable::zero_(log_abs_det);
    if (x.numel() > 0) run_kernel(GENFUSE_DISPATCH(autoregressive_kernel<T>)(), call.p);
    return {to_type(x, u.scalar_type()), log_abs_det};
  });
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_inverse_backward(
    const OptionalTensor& grad_x, const OptionalTensor& grad_log_abs_det, const Tensor& u, const Tensor& parameters,
    const OptionalTensor& additions, const Tensor& degrees, const Tensor& x, const std::vector<int64_t>& program,
    const std::vector<double>& constants, int64_t needs) {
  return with_compute_type("u", u, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Call<T> call(u, parameters, additions, degrees, program, constants);
    const int64_t B = call.p.batch, D = call.p.columns.count;
    const ScalarType compute = kScalar<T>, dtype = u.scalar_type();
    Tensor solution = prepared("x", x, {B, D}, dtype, compute);
    if (dtype != compute && B > 0 && D > 0) {  // the solution as it was before it was rounded
      solution = empty({B, D}, compute);
      const Tensor log_abs_det = empty({B}, compute);
      call.p.x = data<T>(solution);
      call.p.log_abs_det = data<T>(log_abs_det);
      run_kernel(GENFUSE_DISPATCH(autoregressive_kernel<T>)(), call.p);
    }
    call.p.x = data<T>(solution);
    AutoregressiveBackward<T> b;
    OptionalTensor by_x, by_log;
    if (grad_x.has_value()) by_x = prepared("grad_x", *grad_x, {B, D}, dtype, compute);
    if (grad_log_abs_det.has_value()) by_log = prepared("grad_log_abs_det", *grad_log_abs_det, {B}, compute, compute);
    b.grad_x = read<T>(by_x);
    b.grad_log_abs_det = read<T>(by_log);
    const auto wanted = [&](int bit, const OptionalTensor& like) {
      return (needs >> bit & 1) != 0 && like.has_value() ? empty_like(*like, compute) : nothing(compute);
    };
    const Tensor grad_u = wanted(0, u), grad_parameters = wanted(1, parameters), grad_additions = wanted(2, additions);
    const bool to_parameters = (needs & 2) != 0, to_additions = (needs & 4) != 0 && additions.has_value();
    if (B == 0 || D == 0) {
      for (Tensor t : {grad_u, grad_parameters, grad_additions}) torch::stable::zero_(t);
      return {to_type(grad_u, dtype), to_type(grad_parameters, dtype), to_type(grad_additions, dtype)};
    }
    const size_t L = call.plan.layers.size();
    std::vector<OptionalTensor> of_layers(L), of_views(call.plan.views.size());
    std::vector<T*> layers(L), views(call.plan.views.size());
    for (size_t l = 0; l < L; ++l) {
      if (!to_parameters && !(to_additions && call.plan.add_at[l] >= 0)) continue;
      of_layers[l] = empty({B, call.plan.layers[l].units.count}, compute);
      layers[l] = data<T>(*of_layers[l]);
    }
    for (size_t i = 0; i < views.size(); ++i) {
      if (!to_parameters) continue;
      of_views[i] = empty({B, call.p.order_of(call.plan.views[i].source).count}, compute);
      views[i] = data<T>(*of_views[i]);
    }
    b.forward = call.p;
    b.grad_u = (needs & 1) != 0 ? data<T>(grad_u) : nullptr;
    b.grad_layers = layers.data();
    b.values = views.data();
    run_kernel(GENFUSE_DISPATCH(autoregressive_backward_kernel<T>)(), b);
    for (size_t l = 0; l < L && to_parameters; ++l) {
      const AutoregressiveLayer<T>& layer = call.plan.layers[l];
      const AutoregressiveOrder& source = call.p.order_of(call.plan.views[static_cast<size_t>(layer.view)].source);
      MaskedLinearBackward<T> product;
      MaskedLinear<T>& m = product.forward;
      m.rows = B;
      m.inputs = source.count;
      m.outputs = layer.units.count;
      m.x = views[static_cast<size_t>(layer.view)];
      m.weight = layer.weight;
      m.in_order = source.order;
      m.out_order = layer.units.order;
      m.in_sorted = source.sorted;
      m.out_sorted = layer.units.sorted;
      m.live = layer.live;
      m.first = layer.first;
      product.grad_y = layers[l];
      product.grad_weight = data<T>(grad_parameters) + call.plan.weight_at[l];
      if (call.plan.bias_at[l] >= 0) product.grad_bias = data<T>(grad_parameters) + call.plan.bias_at[l];
      if (m.outputs > 0) run_kernel(GENFUSE_DISPATCH(masked_linear_backward_kernel<T>)(), product);
    }
    for (size_t l = 0; l < L && to_additions; ++l) {
      if (call.plan.add_at[l] < 0) continue;
      const int64_t units = call.plan.layers[l].units.count;
      for (int64_t r = 0; r < B; ++r) {
        std::copy(layers[l] + r * units, layers[l] + (r + 1) * units,
                  data<T>(grad_additions) + r * call.plan.additions + call.plan.add_at[l]);
      }
    }
    return {to_type(grad_u, dtype), to_type(grad_parameters, dtype), to_type(grad_additions, dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("autoregressive_inverse", TORCH_BOX(&genfuse::autoregressive_inverse));
  m.impl("autoregressive_inverse_backward", TORCH_BOX(&genfuse::autoregressive_inverse_backward));
}

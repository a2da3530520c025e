#include "recurrent/sequence_cuda_ops.h"

namespace genfuse {
namespace {

void check_plain(const OptionalTensor& weight_hr, const OptionalTensor& ln) {
  STD_TORCH_CHECK(!weight_hr.has_value(), "lstm: the persistent CUDA kernel takes no projection");
  STD_TORCH_CHECK(!ln.has_value(), "lstm: the persistent CUDA kernel takes no layer norm");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
    const OptionalTensor& ln_ih, const OptionalTensor& /*ln_hh*/, const OptionalTensor& /*ln_c_weight*/,
    const OptionalTensor& /*ln_c_bias*/, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const OptionalTensor& rng, double zoneout_h, double zoneout_c, double weight_drop, double input_dropout,
    double output_dropout, double /*eps*/, bool training, bool reverse, bool save) {
  check_plain(weight_hr, ln_ih);
  STD_TORCH_CHECK(on_device(x), "x must be on a CUDA device for this kernel");
  const OnDeviceOf guard(x);
  const CudaSequence in("lstm", x, h0, weight_ih, weight_hh, 4, batch_sizes, resets, rng, zoneout_h, zoneout_c,
                        weight_drop, input_dropout, output_dropout, training, reverse, false);
  const int64_t B = in.batch, H = in.hidden;
  const Tensor c0_float = on_cuda_float("c0", c0, {B, H}, x);
  const OptionalTensor b_ih = on_cuda_float("bias_ih", bias_ih, {4 * H}, x),
                       b_hh = on_cuda_float("bias_hh", bias_hh, {4 * H}, x);
  const Tensor xp = in.from_input();
  const Tensor y = empty_like_x(x, {in.steps, B, H}, x.scalar_type());
  const Tensor hidden =
      save && in.output_dropout > 0 ? empty_like_x(x, {in.rows, H}, ScalarType::Float) : in.nothing_float();
  const Tensor cells = save ? empty_like_x(x, {in.rows, H}, ScalarType::Float) : in.nothing_float();
  Tensor h_n, c_n;
  if (in.empty()) {
    h_n = torch::stable::clone(in.h0_float), c_n = torch::stable::clone(c0_float);
  } else {
    h_n = empty_like_x(x, {B, H}, ScalarType::Float), c_n = empty_like_x(x, {B, H}, ScalarType::Float);
    const Tensor exchange = empty_like_x(x, {2, B, H}, ScalarType::Float);
    for_type(x.scalar_type(), [&]<class T>(T) {
      PersistentForward<T> p;
      in.fill(p);
      p.xp = read<float>(xp);
      p.bias_ih = read<float>(b_ih);
      p.bias_hh = read<float>(b_hh);
      p.h0 = read<float>(in.h0_float);
      p.c0 = read<float>(c0_float);
      p.exchange = data<float>(exchange);
      p.y = data<T>(y);
      p.h_n = data<float>(h_n);
      p.c_n = data<float>(c_n);
      p.gates = save ? data<float>(xp) : nullptr;
      p.cells = save ? data<float>(cells) : nullptr;
      p.hidden_states = hidden.numel() > 0 ? data<float>(hidden) : nullptr;
      check_launch("lstm", launch_lstm_forward(p, current_stream(x)));
    });
  }
  return {y,
          in.in_x_type(h_n),
          in.in_x_type(c_n),
          hidden,
          cells,
          save ? xp : in.nothing_float(),
          in.nothing_float(),
          in.nothing_float()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const Tensor& x,
    const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
    const OptionalTensor& bias_hh, const OptionalTensor& weight_hr, const OptionalTensor& ln_ih,
    const OptionalTensor& /*ln_hh*/, const OptionalTensor& /*ln_c_weight*/, const OptionalTensor& /*ln_c_bias*/,
    const OptionalTensor& batch_sizes, const OptionalTensor& resets, const OptionalTensor& rng, const Tensor& y,
    const Tensor& hidden, const Tensor& cells, const Tensor& gates, const Tensor& /*recurrent*/,
    const Tensor& /*stats*/, double zoneout_h, double zoneout_c, double weight_drop, double input_dropout,
    double output_dropout, double /*eps*/, bool training, bool reverse, bool needs_x, bool needs_weights) {
  check_plain(weight_hr, ln_ih);
  STD_TORCH_CHECK(on_device(x), "x must be on a CUDA device for this kernel");
  const OnDeviceOf guard(x);
  const CudaSequence in("lstm_backward", x, h0, weight_ih, weight_hh, 4, batch_sizes, resets, rng, zoneout_h, zoneout_c,
                        weight_drop, input_dropout, output_dropout, training, reverse, true);
  const int64_t B = in.batch, H = in.hidden;
  const Tensor c0_float = on_cuda_float("c0", c0, {B, H}, x);
  const Tensor outputs = on_cuda("y", y, {in.steps, B, H}, x);
  check_shape("cells", cells, {in.rows, H});
  check_shape("gates", gates, {in.rows, 4 * H});
  const OptionalTensor g_h = on_cuda_float("grad_h_n", grad_h_n, {B, H}, x),
                       g_c = on_cuda_float("grad_c_n", grad_c_n, {B, H}, x);
  OptionalTensor g_y;
  if (grad_y.has_value()) g_y = on_cuda("grad_y", *grad_y, {in.steps, B, H}, x);
  const Tensor d = empty_like_x(x, {in.rows, 4 * H}, x.scalar_type());
  const Tensor grad_h0 = torch::stable::new_zeros(in.h0_float, {B, H}),
               grad_c0 = torch::stable::new_zeros(c0_float, {B, H});
  if (in.empty()) {
    if (g_h.has_value()) torch::stable::copy_(const_cast<Tensor&>(grad_h0), *g_h);
    if (g_c.has_value()) torch::stable::copy_(const_cast<Tensor&>(grad_c0), *g_c);
  } else {
    for_type(x.scalar_type(), [&]<class T>(T) {
      PersistentBackward<T> p;
      in.fill(p);
      p.grad_y = read<T>(g_y);
      p.grad_h_n = read<float>(g_h);
      p.grad_c_n = read<float>(g_c);
      p.gates = read<float>(gates);
      p.cells = read<float>(cells);
      p.c0 = read<float>(c0_float);
      p.h0 = read<float>(in.h0_float);
      p.grad_gates = data<T>(d);
      p.grad_h0 = data<float>(grad_h0);
      p.grad_c0 = data<float>(grad_c0);
      check_launch("lstm_backward", launch_lstm_backward(p, current_stream(x)));
    });
  }
  Tensor grad_x = in.nothing(), grad_w_ih = in.nothing(), grad_w_hh = in.nothing(), grad_bias = in.nothing();
  if (needs_x)
    grad_x = torch::stable::reshape(in.masked_rows(torch::stable::matmul(d, in.weight_ih)), {in.steps, B, in.input});
  if (needs_weights) {
    grad_w_ih = torch::stable::matmul(transposed(d), in.masked_rows(x));
    grad_w_hh = in.undropped(torch::stable::matmul(transposed(d), in.previous_states(outputs, hidden)));
    if (bias_ih.has_value() || bias_hh.has_value()) grad_bias = column_sums(d, x.scalar_type());
  }
  return {grad_x,       in.in_x_type(grad_h0), in.in_x_type(grad_c0), grad_w_ih,    grad_w_hh,   grad_bias,
          in.nothing(), in.nothing(),          in.nothing(),          in.nothing(), in.nothing()};
}

// Which sizes the persistent kernels serve, before a call is made: 0, or 1 (no cooperative launch), 2 (does not fit).
// Forward and backward together.
int64_t persistent_objection(int64_t device, int64_t hidden, int64_t batch, int64_t gates, int64_t bytes) {
  const DeviceLimits limits = device_limits(static_cast<int>(device));
  if (!limits.cooperative) return 1;
  for (bool backward : {false, true}) {
    if (persistent_plan(hidden, batch, static_cast<int>(gates), static_cast<int>(bytes), backward, limits).objection !=
        nullptr) {
      return 2;
    }
  }
  return 0;
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_FRAGMENT(GENFUSE_CUDA_LIBRARY, m) {
  m.def(
      "lstm(Tensor x, Tensor h0, Tensor c0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? weight_hr, Tensor? ln_ih_weight, Tensor? ln_hh_weight, Tensor? ln_c_weight, Tensor? ln_c_bias, "
      "Tensor? batch_sizes, Tensor? resets, Tensor? rng, float zoneout_h, float zoneout_c, float weight_drop, "
      "float input_dropout, float output_dropout, float eps, bool training, bool reverse, bool save) -> "
      "(Tensor y, Tensor h_n, Tensor c_n, Tensor hidden, Tensor cells, Tensor gates, Tensor recurrent, Tensor stats)");
  m.def(
      "lstm_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor? grad_c_n, Tensor x, Tensor h0, Tensor c0, "
      "Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, Tensor? weight_hr, Tensor? ln_ih_weight, "
      "Tensor? ln_hh_weight, Tensor? ln_c_weight, Tensor? ln_c_bias, Tensor? batch_sizes, Tensor? resets, Tensor? rng, "
      "Tensor y, Tensor hidden, Tensor cells, Tensor gates, Tensor recurrent, Tensor stats, float zoneout_h, "
      "float zoneout_c, float weight_drop, float input_dropout, float output_dropout, float eps, bool training, "
      "bool reverse, bool needs_x, bool needs_weights) -> (Tensor grad_x, Tensor grad_h0, Tensor grad_c0, "
      "Tensor grad_weight_ih, Tensor grad_weight_hh, Tensor grad_bias, Tensor grad_weight_hr, Tensor grad_ln_ih, "
      "Tensor grad_ln_hh, Tensor grad_ln_c_weight, Tensor grad_ln_c_bias)");
  m.def("persistent_objection(int device, int hidden, int batch, int gates, int bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(GENFUSE_CUDA_LIBRARY, GENFUSE_CUDA_KEY, m) {
  m.impl("lstm", TORCH_BOX(&genfuse::lstm));
  m.impl("lstm_backward", TORCH_BOX(&genfuse::lstm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(GENFUSE_CUDA_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("persistent_objection", TORCH_BOX(&genfuse::persistent_objection));
}

#include "recurrent/sequence_cuda_ops.h"

namespace genfuse {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> gru(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                               const OptionalTensor& bias_hh, const OptionalTensor& batch_sizes,
                                               const OptionalTensor& resets, const OptionalTensor& rng,
                                               double zoneout_h, double weight_drop, double input_dropout,
                                               double output_dropout, bool training, bool reverse, bool save) {
  STD_TORCH_CHECK(on_device(x), "x must be on a CUDA device for this kernel");
  const OnDeviceOf guard(x);
  const CudaSequence in("gru", x, h0, weight_ih, weight_hh, 3, batch_sizes, resets, rng, zoneout_h, 0, weight_drop,
                        input_dropout, output_dropout, training, reverse, false);
  const int64_t B = in.batch, H = in.hidden;
  const OptionalTensor b_ih = on_cuda_float("bias_ih", bias_ih, {3 * H}, x),
                       b_hh = on_cuda_float("bias_hh", bias_hh, {3 * H}, x);
  const Tensor xp = in.from_input();
  const Tensor y = empty_like_x(x, {in.steps, B, H}, x.scalar_type());
  const Tensor hidden =
      save && in.output_dropout > 0 ? empty_like_x(x, {in.rows, H}, ScalarType::Float) : in.nothing_float();
  const Tensor gates = save ? empty_like_x(x, {in.rows, 4 * H}, ScalarType::Float) : in.nothing_float();
  Tensor h_n;
  if (in.empty()) {
    h_n = torch::stable::clone(in.h0_float);
  } else {
    h_n = empty_like_x(x, {B, H}, ScalarType::Float);
    const Tensor exchange = empty_like_x(x, {2, B, H}, ScalarType::Float);
    for_type(x.scalar_type(), [&]<class T>(T) {
      PersistentForward<T> p;
      in.fill(p);
      p.xp = read<float>(xp);
      p.bias_ih = read<float>(b_ih);
      p.bias_hh = read<float>(b_hh);
      p.h0 = read<float>(in.h0_float);
      p.exchange = data<float>(exchange);
      p.y = data<T>(y);
      p.h_n = data<float>(h_n);
      p.gates = save ? data<float>(gates) : nullptr;
      p.hidden_states = hidden.numel() > 0 ? data<float>(hidden) : nullptr;
      check_launch("gru", launch_gru_forward(p, current_stream(x)));
    });
  }
  return {y, in.in_x_type(h_n), hidden, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const Tensor& x, const Tensor& h0,
    const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
    const OptionalTensor& batch_sizes, const OptionalTensor& resets, const OptionalTensor& rng, const Tensor& y,
    const Tensor& hidden, const Tensor& gates, double zoneout_h, double weight_drop, double input_dropout,
    double output_dropout, bool training, bool reverse, bool needs_x, bool needs_weights) {
  STD_TORCH_CHECK(on_device(x), "x must be on a CUDA device for this kernel");
  const OnDeviceOf guard(x);
  const CudaSequence in("gru_backward", x, h0, weight_ih, weight_hh, 3, batch_sizes, resets, rng, zoneout_h, 0,
                        weight_drop, input_dropout, output_dropout, training, reverse, true);
  const int64_t B = in.batch, H = in.hidden;
  const Tensor outputs = on_cuda("y", y, {in.steps, B, H}, x);
  check_shape("gates", gates, {in.rows, 4 * H});
  const OptionalTensor g_h = on_cuda_float("grad_h_n", grad_h_n, {B, H}, x);
  OptionalTensor g_y;
  if (grad_y.has_value()) g_y = on_cuda("grad_y", *grad_y, {in.steps, B, H}, x);
  const Tensor d = empty_like_x(x, {in.rows, 4 * H}, x.scalar_type());
  const Tensor grad_h0 = torch::stable::new_zeros(in.h0_float, {B, H});
  if (in.empty()) {
    if (g_h.has_value()) torch::stable::copy_(const_cast<Tensor&>(grad_h0), *g_h);
  } else {
    for_type(x.scalar_type(), [&]<class T>(T) {
      PersistentBackward<T> p;
      in.fill(p);
      p.grad_y = read<T>(g_y);
      p.grad_h_n = read<float>(g_h);
      p.gates = read<float>(gates);
      p.hidden_states = hidden.numel() > 0 ? read<float>(hidden) : nullptr;
      p.y = read<T>(outputs);
      p.h0 = read<float>(in.h0_float);
      p.grad_gates = data<T>(d);
      p.grad_h0 = data<float>(grad_h0);
      check_launch("gru_backward", launch_gru_backward(p, current_stream(x)));
    });
  }
  // Columns r, z, n (of W_ih x) and, in the place of n, hn (of W_hh h).
  const Tensor of_input = torch::stable::narrow(const_cast<Tensor&>(d), 1, 0, 3 * H);
  Tensor grad_x = in.nothing(), grad_w_ih = in.nothing(), grad_w_hh = in.nothing();
  Tensor grad_b_ih = in.nothing(), grad_b_hh = in.nothing();
  if (needs_x) {
    grad_x =
        torch::stable::reshape(in.masked_rows(torch::stable::matmul(of_input, in.weight_ih)), {in.steps, B, in.input});
  }
  if (needs_weights) {
    const auto joined = [&](const Tensor& t, int64_t features) {
      std::initializer_list<int64_t> sizes{3 * H, features};
      Tensor out = empty_like_x(x, sizes, x.scalar_type());
      Tensor first = torch::stable::narrow(out, 0, 0, 2 * H), last = torch::stable::narrow(out, 0, 2 * H, H);
      torch::stable::copy_(first, torch::stable::narrow(const_cast<Tensor&>(t), 0, 0, 2 * H));
      torch::stable::copy_(last, torch::stable::narrow(const_cast<Tensor&>(t), 0, 3 * H, H));
      return out;
    };
    grad_w_ih = torch::stable::matmul(transposed(of_input), in.masked_rows(x));
    grad_w_hh = in.undropped(joined(torch::stable::matmul(transposed(d), in.previous_states(outputs, hidden)), H));
    const Tensor sums = torch::stable::reshape(column_sums(d, x.scalar_type()), {4 * H, 1});
    if (bias_ih.has_value()) {
      grad_b_ih = torch::stable::clone(
          torch::stable::reshape(torch::stable::narrow(const_cast<Tensor&>(sums), 0, 0, 3 * H), {3 * H}));
    }
    if (bias_hh.has_value()) grad_b_hh = torch::stable::reshape(joined(sums, 1), {3 * H});
  }
  return {grad_x, in.in_x_type(grad_h0), grad_w_ih, grad_w_hh, grad_b_ih, grad_b_hh};
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_FRAGMENT(GENFUSE_CUDA_LIBRARY, m) {
  m.def(
      "gru(Tensor x, Tensor h0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? batch_sizes, Tensor? resets, Tensor? rng, float zoneout_h, float weight_drop, float input_dropout, "
      "float output_dropout, bool training, bool reverse, bool save) -> "
      "(Tensor y, Tensor h_n, Tensor hidden, Tensor gates)");
  m.def(
      "gru_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor h0, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih, Tensor? bias_hh, Tensor? batch_sizes, Tensor? resets, Tensor? rng, Tensor y, Tensor hidden, "
      "Tensor gates, float zoneout_h, float weight_drop, float input_dropout, float output_dropout, bool training, "
      "bool reverse, bool needs_x, bool needs_weights) -> (Tensor grad_x, Tensor grad_h0, Tensor grad_weight_ih, "
      "Tensor grad_weight_hh, Tensor grad_bias_ih, Tensor grad_bias_hh)");
}

STABLE_TORCH_LIBRARY_IMPL(GENFUSE_CUDA_LIBRARY, GENFUSE_CUDA_KEY, m) {
  m.impl("gru", TORCH_BOX(&genfuse::gru));
  m.impl("gru_backward", TORCH_BOX(&genfuse::gru_backward));
}

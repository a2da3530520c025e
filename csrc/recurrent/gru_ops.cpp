#include "recurrent/gru.h"

#include "recurrent/sequence_ops.h"

namespace genfuse {
namespace {

// The inputs that forward and backward share: checked, converted, and held while a kernel reads them.
struct GruTensors : SequenceTensors {
  Tensor h0, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh;
  Regularizers reg;

  GruTensors(const Tensor& x, const Tensor& h0_in, const Tensor& w_ih, const Tensor& w_hh, const OptionalTensor& b_ih,
             const OptionalTensor& b_hh, const OptionalTensor& sizes, const OptionalTensor& resets,
             const Regularizers& regularizers, bool reverse)
      : SequenceTensors(x, h0_in, h0_in.dim() == 2 ? h0_in.size(1) : -1, sizes, resets, reverse), reg(regularizers) {
    const int64_t B = seq.batch, H = seq.hidden;
    STD_TORCH_CHECK(H > 0, "hidden size must be positive, got ", H);
    h0 = prepared("h0", h0_in, {B, H}, dtype, compute);
    weight_ih = prepared("weight_ih", w_ih, {3 * H, seq.input}, dtype, compute);
    weight_hh = prepared("weight_hh", w_hh, {3 * H, H}, dtype, compute);
    bias_ih = prepared("bias_ih", b_ih, {3 * H}, dtype, compute);
    bias_hh = prepared("bias_hh", b_hh, {3 * H}, dtype, compute);
  }

  template <class T>
  void fill(GruInputs<T>& in) const {
    in.seq = seq;
    in.reg = reg;
    in.x = read<T>(x);
    in.h0 = read<T>(h0);
    in.w_ih = read<T>(weight_ih);
    in.w_hh = read<T>(weight_hh);
    in.b_ih = read<T>(bias_ih);
    in.b_hh = read<T>(bias_hh);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> gru(const Tensor& x, const Tensor& h0, const Tensor& weight_ih,
                                               const Tensor& weight_hh, const OptionalTensor& bias_ih,
                                               const OptionalTensor& bias_hh, const OptionalTensor& batch_sizes,
                                               const OptionalTensor& resets, const OptionalTensor& rng,
                                               double zoneout_h, double weight_drop, double input_dropout,
                                               double output_dropout, bool training, bool reverse, bool save) {
  const GruTensors in(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets,
                      make_regularizers(zoneout_h, 0, weight_drop, input_dropout, output_dropout, training, rng),
                      reverse);
  const Sequence& s = in.seq;
  const ScalarType type = in.compute;
  const Tensor y = in.empty_rows(s.hidden, type), h_n = empty({s.batch, s.hidden}, type);
  const Tensor hidden = save && in.reg.masks_output() ? empty({s.rows, s.hidden}, type) : absent(type);
  const Tensor gates = save ? empty({s.rows, 4 * s.hidden}, type) : absent(type);
  const auto run = [&]<class T>(T) {
    GruForward<T> args;
    in.fill(args);
    args.hidden = hidden.numel() > 0 ? data<T>(hidden) : nullptr;
    args.gates = save ? data<T>(gates) : nullptr;
    args.y = data<T>(y);
    args.h_n = data<T>(h_n);
    run_kernel(GENFUSE_DISPATCH(gru_kernels<T>)().forward, args);
  };
  type == ScalarType::Double ? run(double{}) : run(float{});
  return {to_type(y, in.dtype), to_type(h_n, in.dtype), hidden, gates};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> gru_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const Tensor& x, const Tensor& h0,
    const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih, const OptionalTensor& bias_hh,
    const OptionalTensor& batch_sizes, const OptionalTensor& resets, const OptionalTensor& rng, const Tensor& y,
    const Tensor& hidden, const Tensor& gates, double zoneout_h, double weight_drop, double input_dropout,
    double output_dropout, bool training, bool reverse, bool needs_x, bool needs_weights) {
  const GruTensors in(x, h0, weight_ih, weight_hh, bias_ih, bias_hh, batch_sizes, resets,
                      make_regularizers(zoneout_h, 0, weight_drop, input_dropout, output_dropout, training, rng),
                      reverse);
  const Sequence& s = in.seq;
  const ScalarType type = in.compute;
  const int64_t B = s.batch, H = s.hidden, N = s.rows;
  const Tensor y_rows = in.rows("y", y, H);
  const OptionalTensor of_y = grad_y.has_value() ? OptionalTensor(in.rows("grad_y", *grad_y, H)) : std::nullopt;
  const OptionalTensor of_h = prepared("grad_h_n", grad_h_n, {B, H}, in.dtype, type);
  const Tensor saved_gates = saved("gates", gates, N, 4 * H, type);
  const Tensor saved_hidden = in.reg.masks_output() ? saved("hidden", hidden, N, H, type) : absent(type);
  const bool w = needs_weights;
  const Tensor grad_x = needs_x ? in.empty_rows(s.input, type) : absent(type), grad_h0 = empty({B, H}, type);
  const auto wanted = [&](bool condition, std::initializer_list<int64_t> sizes) {
    return condition ? empty(sizes, type) : absent(type);
  };
  const Tensor grad_w_ih = wanted(w, {3 * H, s.input}), grad_w_hh = wanted(w, {3 * H, H});
  const Tensor grad_b_ih = wanted(w && bias_ih.has_value(), {3 * H});
  const Tensor grad_b_hh = wanted(w && bias_hh.has_value(), {3 * H});
  const auto run = [&]<class T>(T) {
    GruBackward<T> args;
    in.fill(args);
    const auto out = [](const Tensor& t) { return t.numel() > 0 ? data<T>(t) : nullptr; };
    args.hidden = saved_hidden.numel() > 0 ? read<T>(saved_hidden) : nullptr;
    args.gates = read<T>(saved_gates);
    args.y = read<T>(y_rows);
    args.grad_y = read<T>(of_y);
    args.grad_h_n = read<T>(of_h);
    args.needs_x = needs_x;
    args.needs_weights = w;
    args.grad_x = out(grad_x);
    args.grad_h0 = out(grad_h0);
    args.grad_w_ih = out(grad_w_ih);
    args.grad_w_hh = out(grad_w_hh);
    args.grad_b_ih = out(grad_b_ih);
    args.grad_b_hh = out(grad_b_hh);
    run_kernel(GENFUSE_DISPATCH(gru_kernels<T>)().backward, args);
  };
  type == ScalarType::Double ? run(double{}) : run(float{});
  const auto cast = [&](const Tensor& t) { return to_type(t, in.dtype); };
  return {cast(grad_x), cast(grad_h0), cast(grad_w_ih), cast(grad_w_hh), cast(grad_b_ih), cast(grad_b_hh)};
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("gru", TORCH_BOX(&genfuse::gru));
  m.impl("gru_backward", TORCH_BOX(&genfuse::gru_backward));
}

#include "recurrent/lstm.h"

#include "recurrent/sequence_ops.h"

namespace genfuse {
namespace {

// The inputs that forward and backward share: checked, converted, and held while a kernel reads them.
struct LstmTensors : SequenceTensors {
  Tensor h0, c0, weight_ih, weight_hh;
  OptionalTensor bias_ih, bias_hh, weight_hr, ln_ih, ln_hh, ln_c_weight, ln_c_bias;
  Regularizers reg;
  double eps;

  LstmTensors(const Tensor& x, const Tensor& h0_in, const Tensor& c0_in, const Tensor& w_ih, const Tensor& w_hh,
              const OptionalTensor& b_ih, const OptionalTensor& b_hh, const OptionalTensor& w_hr,
              const OptionalTensor& ln_ih_in, const OptionalTensor& ln_hh_in, const OptionalTensor& ln_cw,
              const OptionalTensor& ln_cb, const OptionalTensor& sizes, const OptionalTensor& resets,
              const Regularizers& regularizers, double epsilon, bool reverse)
      : SequenceTensors(x, h0_in, c0_in.dim() == 2 ? c0_in.size(1) : -1, sizes, resets, reverse),
        reg(regularizers),
        eps(epsilon) {
    const int64_t B = seq.batch, H = seq.hidden, S = seq.state;
    STD_TORCH_CHECK(c0_in.dim() == 2, "c0 must have 2 dimensions ([B, H]), got shape ", shape_of(c0_in));
    STD_TORCH_CHECK(H > 0 && S > 0, "hidden size must be positive, got ", H);
    STD_TORCH_CHECK(w_hr.has_value() || S == H, "h0 must have c0's ", H, " features, got ", S);
    h0 = prepared("h0", h0_in, {B, S}, dtype, compute);
    c0 = prepared("c0", c0_in, {B, H}, dtype, compute);
    weight_ih = prepared("weight_ih", w_ih, {4 * H, seq.input}, dtype, compute);
    weight_hh = prepared("weight_hh", w_hh, {4 * H, S}, dtype, compute);
    bias_ih = prepared("bias_ih", b_ih, {4 * H}, dtype, compute);
    bias_hh = prepared("bias_hh", b_hh, {4 * H}, dtype, compute);
    weight_hr = prepared("weight_hr", w_hr, {S, H}, dtype, compute);
    ln_ih = prepared("ln_ih_weight", ln_ih_in, {4 * H}, dtype, compute);
    ln_hh = prepared("ln_hh_weight", ln_hh_in, {4 * H}, dtype, compute);
    ln_c_weight = prepared("ln_c_weight", ln_cw, {H}, dtype, compute);
    ln_c_bias = prepared("ln_c_bias", ln_cb, {H}, dtype, compute);
    const bool ln = ln_ih.has_value();
    STD_TORCH_CHECK(ln == ln_hh.has_value() && ln == ln_c_weight.has_value() && ln == ln_c_bias.has_value(),
                    "ln_ih_weight, ln_hh_weight, ln_c_weight and ln_c_bias must be given together");
  }

  template <class T>
  void fill(LstmInputs<T>& in) const {
    in.seq = seq;
    in.reg = reg;
    in.eps = eps;
    in.x = read<T>(x);
    in.h0 = read<T>(h0);
    in.c0 = read<T>(c0);
    in.w_ih = read<T>(weight_ih);
    in.w_hh = read<T>(weight_hh);
    in.b_ih = read<T>(bias_ih);
    in.b_hh = read<T>(bias_hh);
    in.w_hr = read<T>(weight_hr);
    in.ln_ih = read<T>(ln_ih);
    in.ln_hh = read<T>(ln_hh);
    in.ln_c_weight = read<T>(ln_c_weight);
    in.ln_c_bias = read<T>(ln_c_bias);
  }
};

struct Reserve {
  Tensor hidden, cells, gates, recurrent, stats;

  template <class T>
  void fill(LstmReserve<T>& r, bool save) const {
    if (!save) return;
    r.cells = data<T>(cells);
    r.gates = data<T>(gates);
    if (hidden.numel() > 0) r.hidden = data<T>(hidden);
    if (recurrent.numel() > 0) r.recurrent = data<T>(recurrent);
    if (stats.numel() > 0) r.stats = data<T>(stats);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm(
    const Tensor& x, const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh,
    const OptionalTensor& bias_ih, const OptionalTensor& bias_hh, const OptionalTensor& weight_hr,
    const OptionalTensor& ln_ih, const OptionalTensor& ln_hh, const OptionalTensor& ln_c_weight,
    const OptionalTensor& ln_c_bias, const OptionalTensor& batch_sizes, const OptionalTensor& resets,
    const OptionalTensor& rng, double zoneout_h, double zoneout_c, double weight_drop, double input_dropout,
    double output_dropout, double eps, bool training, bool reverse, bool save) {
  const LstmTensors in(
      x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, ln_ih, ln_hh, ln_c_weight, ln_c_bias, batch_sizes,
      resets, make_regularizers(zoneout_h, zoneout_c, weight_drop, input_dropout, output_dropout, training, rng), eps,
      reverse);
  const Sequence& s = in.seq;
  const ScalarType type = in.compute;
  const bool ln = in.ln_ih.has_value();
  const Tensor y = in.empty_rows(s.state, type), h_n = empty({s.batch, s.state}, type),
               c_n = empty({s.batch, s.hidden}, type);
  const Reserve reserve{save && in.reg.masks_output() ? empty({s.rows, s.state}, type) : absent(type),
                        save ? empty({s.rows, s.hidden}, type) : absent(type),
                        save ? empty({s.rows, 4 * s.hidden}, type) : absent(type),
                        save && ln ? empty({s.rows, 4 * s.hidden}, type) : absent(type),
                        save && ln ? empty({s.rows, 6}, type) : absent(type)};
  const auto run = [&]<class T>(T) {
    LstmForward<T> args;
    in.fill(args);
    reserve.fill(args.reserve, save);
    args.y = data<T>(y);
    args.h_n = data<T>(h_n);
    args.c_n = data<T>(c_n);
    run_kernel(GENFUSE_DISPATCH(lstm_kernels<T>)().forward, args);
  };
  type == ScalarType::Double ? run(double{}) : run(float{});
  return {to_type(y, in.dtype), to_type(h_n, in.dtype), to_type(c_n, in.dtype), reserve.hidden,
          reserve.cells,        reserve.gates,          reserve.recurrent,      reserve.stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> lstm_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n, const Tensor& x,
    const Tensor& h0, const Tensor& c0, const Tensor& weight_ih, const Tensor& weight_hh, const OptionalTensor& bias_ih,
    const OptionalTensor& bias_hh, const OptionalTensor& weight_hr, const OptionalTensor& ln_ih,
    const OptionalTensor& ln_hh, const OptionalTensor& ln_c_weight, const OptionalTensor& ln_c_bias,
    const OptionalTensor& batch_sizes, const OptionalTensor& resets, const OptionalTensor& rng, const Tensor& y,
    const Tensor& hidden, const Tensor& cells, const Tensor& gates, const Tensor& recurrent, const Tensor& stats,
    double zoneout_h, double zoneout_c, double weight_drop, double input_dropout, double output_dropout, double eps,
    bool training, bool reverse, bool needs_x, bool needs_weights) {
  const LstmTensors in(
      x, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, ln_ih, ln_hh, ln_c_weight, ln_c_bias, batch_sizes,
      resets, make_regularizers(zoneout_h, zoneout_c, weight_drop, input_dropout, output_dropout, training, rng), eps,
      reverse);
  const Sequence& s = in.seq;
  const ScalarType type = in.compute;
  const int64_t B = s.batch, H = s.hidden, S = s.state, N = s.rows;
  const bool ln = in.ln_ih.has_value(), projected = in.weight_hr.has_value();
  const Tensor y_rows = in.rows("y", y, S);
  const OptionalTensor of_y = grad_y.has_value() ? OptionalTensor(in.rows("grad_y", *grad_y, S)) : std::nullopt;
  const OptionalTensor of_h = prepared("grad_h_n", grad_h_n, {B, S}, in.dtype, type);
  const OptionalTensor of_c = prepared("grad_c_n", grad_c_n, {B, H}, in.dtype, type);
  const Reserve reserve{in.reg.masks_output() ? saved("hidden", hidden, N, S, type) : absent(type),
                        saved("cells", cells, N, H, type), saved("gates", gates, N, 4 * H, type),
                        ln ? saved("recurrent", recurrent, N, 4 * H, type) : absent(type),
                        ln ? saved("stats", stats, N, 6, type) : absent(type)};
  const auto wanted = [&](bool condition, std::initializer_list<int64_t> sizes) {
    return condition ? empty(sizes, type) : absent(type);
  };
  const bool w = needs_weights;
  const Tensor grad_x = needs_x ? in.empty_rows(s.input, type) : absent(type);
  const Tensor grad_h0 = empty({B, S}, type), grad_c0 = empty({B, H}, type);
  const Tensor grad_w_ih = wanted(w, {4 * H, s.input}), grad_w_hh = wanted(w, {4 * H, S});
  const Tensor grad_bias = wanted(w && (bias_ih.has_value() || bias_hh.has_value()), {4 * H});
  const Tensor grad_w_hr = wanted(w && projected, {S, H});
  const Tensor grad_ln_ih = wanted(w && ln, {4 * H}), grad_ln_hh = wanted(w && ln, {4 * H});
  const Tensor grad_ln_cw = wanted(w && ln, {H}), grad_ln_cb = wanted(w && ln, {H});
  const auto run = [&]<class T>(T) {
    LstmBackward<T> args;
    in.fill(args);
    reserve.fill(args.reserve, true);
    const auto out = [](const Tensor& t) { return t.numel() > 0 ? data<T>(t) : nullptr; };
    args.y = read<T>(y_rows);
    args.grad_y = read<T>(of_y);
    args.grad_h_n = read<T>(of_h);
    args.grad_c_n = read<T>(of_c);
    args.needs_x = needs_x;
    args.needs_weights = w;
    args.grad_x = out(grad_x);
    args.grad_h0 = data<T>(grad_h0);
    args.grad_c0 = data<T>(grad_c0);
    args.grad_w_ih = out(grad_w_ih);
    args.grad_w_hh = out(grad_w_hh);
    args.grad_bias = out(grad_bias);
    args.grad_w_hr = out(grad_w_hr);
    args.grad_ln_ih = out(grad_ln_ih);
    args.grad_ln_hh = out(grad_ln_hh);
    args.grad_ln_c_weight = out(grad_ln_cw);
    args.grad_ln_c_bias = out(grad_ln_cb);
    run_kernel(GENFUSE_DISPATCH(lstm_kernels<T>)().backward, args);
  };
  type == ScalarType::Double ? run(double{}) : run(float{});
  const auto cast = [&](const Tensor& t) { return to_type(t, in.dtype); };
  return {cast(grad_x),    cast(grad_h0),    cast(grad_c0),    cast(grad_w_ih),  cast(grad_w_hh), cast(grad_bias),
          cast(grad_w_hr), cast(grad_ln_ih), cast(grad_ln_hh), cast(grad_ln_cw), cast(grad_ln_cb)};
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("lstm", TORCH_BOX(&genfuse::lstm));
  m.impl("lstm_backward", TORCH_BOX(&genfuse::lstm_backward));
}

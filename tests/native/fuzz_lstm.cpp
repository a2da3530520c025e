#include "recurrent/lstm.h"
#include "sequence.h"

namespace fuzz {
namespace {

template <class T>
void one_case(Random& random, SequenceCase& c, std::string& description) {
  genfuse::Sequence& s = c.seq;
  const bool layer_norm = random.chance(0.35), projected = random.chance(0.25);
  if (projected) s.state = random.size();
  const bool b_ih = random.chance(0.8), b_hh = random.chance(0.8);
  const bool of_y = random.chance(0.8), of_h = random.chance(0.6), of_c = random.chance(0.6);
  const bool needs_x = random.chance(0.8), needs_weights = random.chance(0.8);
  description = c.text() + (sizeof(T) == 8 ? " float64" : " float32") + (layer_norm ? " layer norm" : "") +
                (projected ? " projected" : "") + (needs_x ? "" : " no grad_x") + (needs_weights ? "" : " no grad_w");
  const int64_t B = s.batch, I = s.input, H = s.hidden, S = s.state, N = s.rows;
  const bool masked = c.reg.masks_output();

  Buffer<T> x(c.x_count, random), h0(B * S, random), c0(B * H, random), w_ih(4 * H * I, random),
      w_hh(4 * H * S, random);
  Buffer<T> bias_ih(4 * H, random), bias_hh(4 * H, random), w_hr(S * H, random);
  Buffer<T> ln_ih(4 * H, random), ln_hh(4 * H, random), ln_c_weight(H, random), ln_c_bias(H, random);
  Buffer<T> grad_y(N * S, random), grad_h_n(B * S, random), grad_c_n(B * H, random);

  const auto inputs = [&](genfuse::LstmInputs<T>& in) {
    in.seq = s;
    in.reg = c.reg;
    in.x = x.data();
    in.h0 = h0.data();
    in.c0 = c0.data();
    in.w_ih = w_ih.data();
    in.w_hh = w_hh.data();
    in.b_ih = optional(b_ih, bias_ih);
    in.b_hh = optional(b_hh, bias_hh);
    in.w_hr = optional(projected, w_hr);
    in.ln_ih = optional(layer_norm, ln_ih);
    in.ln_hh = optional(layer_norm, ln_hh);
    in.ln_c_weight = optional(layer_norm, ln_c_weight);
    in.ln_c_bias = optional(layer_norm, ln_c_bias);
  };
  const auto forward = [&](size_t isa, const Pool& pool, bool save) {
    Results<T> results;
    genfuse::LstmForward<T> forward;
    inputs(forward);
    forward.y = results.add("y", N * S);
    forward.h_n = results.add("h_n", B * S);
    forward.c_n = results.add("c_n", B * H);
    if (save) {
      forward.reserve.cells = results.add("cells", N * H);
      forward.reserve.gates = results.add("gates", N * 4 * H);
      if (layer_norm) forward.reserve.recurrent = results.add("recurrent", N * 4 * H);
      if (layer_norm) forward.reserve.stats = results.add("stats", N * 6);
      if (masked) forward.reserve.hidden = results.add("hidden", N * S);
    }
    run(FUZZ_VERSION(isa, lstm_kernels<T>)().forward, forward, pool.executor);
    return results;
  };
  run_everywhere<T>([&](size_t isa, const Pool& pool) { return forward(isa, pool, false); });

  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results = forward(isa, pool, true);
    size_t next = 3;
    const auto saved = [&] { return results.entries[next++].buffer.data(); };
    genfuse::LstmBackward<T> backward;
    inputs(backward);
    backward.y = results.entries[0].buffer.data();
    backward.reserve.cells = saved();
    backward.reserve.gates = saved();
    if (layer_norm) backward.reserve.recurrent = saved();
    if (layer_norm) backward.reserve.stats = saved();
    if (masked) backward.reserve.hidden = saved();
    backward.grad_y = optional(of_y, grad_y);
    backward.grad_h_n = optional(of_h, grad_h_n);
    backward.grad_c_n = optional(of_c, grad_c_n);
    backward.needs_x = needs_x;
    backward.needs_weights = needs_weights;
    if (needs_x) backward.grad_x = results.add("grad_x", N * I);
    backward.grad_h0 = results.add("grad_h0", B * S);
    backward.grad_c0 = results.add("grad_c0", B * H);
    if (needs_weights) {
      backward.grad_w_ih = results.add("grad_w_ih", 4 * H * I);
      backward.grad_w_hh = results.add("grad_w_hh", 4 * H * S);
      if (b_ih || b_hh) backward.grad_bias = results.add("grad_bias", 4 * H);
      if (projected) backward.grad_w_hr = results.add("grad_w_hr", S * H);
      if (layer_norm) {
        backward.grad_ln_ih = results.add("grad_ln_ih", 4 * H);
        backward.grad_ln_hh = results.add("grad_ln_hh", 4 * H);
        backward.grad_ln_c_weight = results.add("grad_ln_c_weight", H);
        backward.grad_ln_c_bias = results.add("grad_ln_c_bias", H);
      }
    }
    run(FUZZ_VERSION(isa, lstm_kernels<T>)().backward, backward, pool.executor);
    return results;
  });
}

}  // namespace

void lstm_case(Random& random, std::string& description) {
  SequenceCase c(random);
  if (random.chance(0.5)) {
    one_case<float>(random, c, description);
  } else {
    one_case<double>(random, c, description);
  }
}

}  // namespace fuzz

#include "recurrent/gru.h"
#include "sequence.h"

namespace fuzz {
namespace {

template <class T>
void one_case(Random& random, SequenceCase& c, std::string& description) {
  genfuse::Sequence& s = c.seq;
  c.reg.zoneout_c = 0;
  const bool b_ih = random.chance(0.8), b_hh = random.chance(0.8);
  const bool of_y = random.chance(0.8), of_h = random.chance(0.6);
  const bool needs_x = random.chance(0.8), needs_weights = random.chance(0.8);
  description = c.text() + (sizeof(T) == 8 ? " float64" : " float32") + (needs_x ? "" : " no grad_x") +
                (needs_weights ? "" : " no grad_w");
  const int64_t B = s.batch, I = s.input, H = s.hidden, N = s.rows;
  const bool masked = c.reg.masks_output();

  Buffer<T> x(c.x_count, random), h0(B * H, random), w_ih(3 * H * I, random), w_hh(3 * H * H, random);
  Buffer<T> bias_ih(3 * H, random), bias_hh(3 * H, random), grad_y(N * H, random), grad_h_n(B * H, random);

  const auto inputs = [&](genfuse::GruInputs<T>& in) {
    in.seq = s;
    in.reg = c.reg;
    in.x = x.data();
    in.h0 = h0.data();
    in.w_ih = w_ih.data();
    in.w_hh = w_hh.data();
    in.b_ih = optional(b_ih, bias_ih);
    in.b_hh = optional(b_hh, bias_hh);
  };
  const auto forward = [&](size_t isa, const Pool& pool, bool save) {
    Results<T> results;
    genfuse::GruForward<T> forward;
    inputs(forward);
    forward.y = results.add("y", N * H);
    forward.h_n = results.add("h_n", B * H);
    if (save) forward.gates = results.add("gates", N * 4 * H);
    if (save && masked) forward.hidden = results.add("hidden", N * H);
    run(FUZZ_VERSION(isa, gru_kernels<T>)().forward, forward, pool.executor);
    return results;
  };
  run_everywhere<T>([&](size_t isa, const Pool& pool) { return forward(isa, pool, false); });

  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results = forward(isa, pool, true);
    genfuse::GruBackward<T> backward;
    inputs(backward);
    backward.y = results.entries[0].buffer.data();
    backward.gates = results.entries[2].buffer.data();
    if (masked) backward.hidden = results.entries[3].buffer.data();
    backward.grad_y = optional(of_y, grad_y);
    backward.grad_h_n = optional(of_h, grad_h_n);
    backward.needs_x = needs_x;
    backward.needs_weights = needs_weights;
    if (needs_x) backward.grad_x = results.add("grad_x", N * I);
    backward.grad_h0 = results.add("grad_h0", B * H);
    if (needs_weights) {
      backward.grad_w_ih = results.add("grad_w_ih", 3 * H * I);
      backward.grad_w_hh = results.add("grad_w_hh", 3 * H * H);
      if (b_ih) backward.grad_b_ih = results.add("grad_b_ih", 3 * H);
      if (b_hh) backward.grad_b_hh = results.add("grad_b_hh", 3 * H);
    }
    run(FUZZ_VERSION(isa, gru_kernels<T>)().backward, backward, pool.executor);
    return results;
  });
}

}  // namespace

void gru_case(Random& random, std::string& description) {
  SequenceCase c(random);
  if (random.chance(0.5)) {
    one_case<float>(random, c, description);
  } else {
    one_case<double>(random, c, description);
  }
}

}  // namespace fuzz

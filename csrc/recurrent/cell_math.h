// The cells' equations, once, for a scalar on host or device and for a SIMD vector: V is float, double or Vec<T>.
// The caller has included common/simd.h before this file if V is a vector.
//
// LSTM: Hochreiter and Schmidhuber 1997 with forget gate (Gers et al. 2000), torch's gate order i, f, g, o.
// GRU: Cho et al. 2014 in torch's form, the reset gate applied after the recurrent product; gate order r, z, n.
#pragma once

#include "common/math.h"

namespace genfuse {
GENFUSE_NAMESPACE {

template <class V>
struct LstmGates {
  V i, f, g, o;
};

// A gate's pre-activation with layer norm: gain_h norm(U h) + gain_x norm(W x) + b. Backward computes it again, too
// (see lstm_cell).
template <class V, class S>
GENFUSE_HD V normalized_gate(V gain_h, V of_h, S mean_h, S rstd_h, V gain_x, V of_x, S mean_x, S rstd_x, V bias) {
  return fma(gain_h, (of_h - mean_h) * rstd_h, fma(gain_x, (of_x - mean_x) * rstd_x, bias));
}

// Activations of the pre-activations a = W x + U h + b.
template <class V>
GENFUSE_HD LstmGates<V> lstm_gates(V ai, V af, V ag, V ao) {
  return {sigmoid(ai), sigmoid(af), tanh(ag), sigmoid(ao)};
}

// c~ = f c_{t-1} + i g. Backward computes it again, and layer norm's statistics are those of forward's: the same bits.
template <class V>
GENFUSE_HD V lstm_cell(const LstmGates<V>& a, V c_prev) {
  return fma(a.f, c_prev, a.i * a.g);
}

// d loss / d c~ through h~ = o tanh(c~), and d loss / d a_o. `tanh_c` is tanh of what the output gate sees
// (c~, or its layer norm, in which case the first result is the gradient of the norm's output).
template <class V>
GENFUSE_HD V lstm_output_backward(V grad_h, V o, V tanh_c, V& grad_ao) {
  grad_ao = grad_h * tanh_c * o * (V{} + 1 - o);
  return grad_h * o * (V{} + 1 - tanh_c * tanh_c);
}

// Gradients of a_i, a_f, a_g and of c_{t-1}, given the whole gradient of c~.
template <class V>
GENFUSE_HD V lstm_cell_backward(V grad_c, const LstmGates<V>& a, V c_prev, V& grad_ai, V& grad_af, V& grad_ag) {
  grad_ai = grad_c * a.g * a.i * (V{} + 1 - a.i);
  grad_af = grad_c * c_prev * a.f * (V{} + 1 - a.f);
  grad_ag = grad_c * a.i * (V{} + 1 - a.g * a.g);
  return grad_c * a.f;
}

template <class V>
struct GruGates {
  V r, z, n;
};

// hn = U_n h + b_hn, the recurrent part of the candidate.
template <class V>
GENFUSE_HD GruGates<V> gru_gates(V ar, V az, V xn, V hn) {
  V r = sigmoid(ar);
  return {r, sigmoid(az), tanh(xn + r * hn)};
}

// h~ = (1 - z) n + z h_{t-1}, written so that z = 1 keeps h exactly.
template <class V>
GENFUSE_HD V gru_output(const GruGates<V>& a, V h_prev) {
  return a.n + a.z * (h_prev - a.n);
}

// Gradients of a_r, a_z, of the candidate's input part a_n and of hn, given that of h~;
// returns the direct part of the gradient of h_{t-1}.
template <class V>
GENFUSE_HD V gru_backward(V grad_h, const GruGates<V>& a, V hn, V h_prev, V& grad_ar, V& grad_az, V& grad_an,
                          V& grad_hn) {
  grad_an = grad_h * (V{} + 1 - a.z) * (V{} + 1 - a.n * a.n);
  grad_az = grad_h * (h_prev - a.n) * a.z * (V{} + 1 - a.z);
  grad_hn = grad_an * a.r;
  grad_ar = grad_an * hn * a.r * (V{} + 1 - a.r);
  return grad_h * a.z;
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

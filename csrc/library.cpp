// The contents page: every operator's schema. Implementations are registered in <family>/*_ops.cpp; fake kernels,
// autograd, autocast and vmap in python/genfuse/ops.
#include "common/torch_glue.h"

STABLE_TORCH_LIBRARY(genfuse, m) {
  // recurrent: one layer in one direction over a whole sequence
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
  // recurrent: the whole decoding loop of a language model
  m.def(
      "lstm_generate(Tensor prompt, int length, Tensor embedding, Tensor[] weights, Tensor head_weight, "
      "Tensor? head_bias, Tensor h0, Tensor c0, Tensor? u, Tensor? rng, float temperature, int top_k, float top_p, "
      "bool layer_norm, float eps, "
      "float zoneout_h, float zoneout_c, bool bf16_weights) -> (Tensor tokens, Tensor log_probs, Tensor h_n, Tensor "
      "c_n)");
  m.def(
      "gru_generate(Tensor prompt, int length, Tensor embedding, Tensor[] weights, Tensor head_weight, "
      "Tensor? head_bias, Tensor h0, Tensor? u, Tensor? rng, float temperature, int top_k, float top_p, "
      "float zoneout_h, bool bf16_weights) -> (Tensor tokens, Tensor log_probs, Tensor h_n)");
  // sampling: random numbers by address
  m.def("philox_(Tensor(a!) out, Tensor rng, int noise) -> ()");
  // Below, bit i of `needs` asks for the gradient of tensor i; one not asked for is empty.
  m.def(
      "gaussian(Tensor mean, Tensor scale, Tensor? prior_mean, Tensor? prior_scale, Tensor? eps, Tensor? rng, "
      "int batch_dims, bool log_std, float free_bits, float low, float high, bool sample, bool divergence) -> "
      "(Tensor z, Tensor kl)");
  m.def(
      "gaussian_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mean, Tensor scale, Tensor? prior_mean, "
      "Tensor? prior_scale, Tensor? eps, Tensor? rng, int batch_dims, bool log_std, float free_bits, float low, "
      "float high, bool sample, bool divergence, int needs) -> (Tensor grad_mean, Tensor grad_scale, "
      "Tensor grad_prior_mean, Tensor grad_prior_scale, Tensor grad_eps)");
  m.def("gumbel_softmax(Tensor logits, Tensor? noise, Tensor? rng, float tau, bool hard) -> Tensor");
  m.def(
      "gumbel_softmax_backward(Tensor? grad_y, Tensor logits, Tensor? noise, Tensor? rng, Tensor y, float tau, "
      "bool hard, int needs) -> (Tensor grad_logits, Tensor grad_noise)");
  m.def("relaxed_bernoulli(Tensor logits, Tensor? noise, Tensor? rng, float tau, bool hard) -> Tensor");
  m.def(
      "relaxed_bernoulli_backward(Tensor? grad_y, Tensor logits, Tensor? noise, Tensor? rng, Tensor y, float tau, "
      "bool hard, int needs) -> (Tensor grad_logits, Tensor grad_noise)");
  m.def("categorical_sample(Tensor logits, Tensor? u, Tensor? rng, int num_samples) -> Tensor");
  m.def(
      "vector_quantize(Tensor x, Tensor codebook, float commitment_weight, float codebook_weight) -> "
      "(Tensor quantized, Tensor indices, Tensor loss)");
  m.def(
      "vector_quantize_backward(Tensor? grad_quantized, Tensor? grad_loss, Tensor x, Tensor codebook, Tensor indices, "
      "float commitment_weight, float codebook_weight, int needs) -> (Tensor grad_x, Tensor grad_codebook)");
  m.def("vector_quantize_statistics(Tensor x, Tensor indices, int num_codes) -> (Tensor counts, Tensor sums)");
  // likelihood
  m.def("bernoulli_nll(Tensor logits, Tensor target, int batch_dims) -> Tensor");
  m.def(
      "bernoulli_nll_backward(Tensor? grad, Tensor logits, Tensor target, int batch_dims, int needs) -> "
      "(Tensor grad_logits, Tensor grad_target)");
  m.def("gaussian_nll(Tensor x, Tensor mean, Tensor scale, int batch_dims, bool log_std) -> Tensor");
  m.def(
      "gaussian_nll_backward(Tensor? grad, Tensor x, Tensor mean, Tensor scale, int batch_dims, bool log_std, "
      "int needs) -> (Tensor grad_x, Tensor grad_mean, Tensor grad_scale)");
  m.def(
      "discretized_gaussian_nll(Tensor x, Tensor mean, Tensor scale, int batch_dims, bool log_std, int levels) -> "
      "Tensor");
  m.def(
      "discretized_gaussian_nll_backward(Tensor? grad, Tensor x, Tensor mean, Tensor scale, int batch_dims, "
      "bool log_std, int levels, int needs) -> (Tensor grad_x, Tensor grad_mean, Tensor grad_scale)");
  // likelihood of pixels; codes of layout: csrc/likelihood/mixture.h
  m.def(
      "categorical_nll(Tensor logits, Tensor target, int dim, bool by_position) -> (Tensor nll, Tensor top, "
      "Tensor log_sum)");
  m.def(
      "categorical_nll_backward(Tensor? grad, Tensor logits, Tensor target, Tensor top, Tensor log_sum, int dim, "
      "bool by_position, int needs) -> Tensor");
  m.def(
      "discretized_logistic_mixture_nll(Tensor x, Tensor params, int bits, bool openai, int layout, "
      "float log_scale_min, bool by_pixel) -> Tensor");
  m.def(
      "discretized_logistic_mixture_nll_backward(Tensor? grad, Tensor x, Tensor params, int bits, bool openai, "
      "int layout, float log_scale_min, bool by_pixel, int needs) -> (Tensor grad_x, Tensor grad_params)");
  m.def(
      "discretized_logistic_mixture_sample(Tensor params, Tensor? u, Tensor? rng, int channels, int bits, int layout, "
      "float log_scale_min, float temperature, bool snap) -> Tensor");
  // flow: splines, an element each
  m.def(
      "spline(Tensor x, Tensor params, Tensor? heights, Tensor? derivatives, "
      "int kind, int normalizer, int ends, bool tails, bool inverse, float left, float right, float bottom, float top, "
      "float min_width, float min_height, float min_derivative, float logit_scale, int bins, int batch_dims) -> "
      "(Tensor y, Tensor log_abs_det)");
  m.def(
      "spline_backward(Tensor? grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor params, Tensor? heights, "
      "Tensor? derivatives, int kind, int normalizer, int ends, bool tails, bool inverse, float left, float right, "
      "float bottom, float top, "
      "float min_width, float min_height, float min_derivative, float logit_scale, int bins, int batch_dims, "
      "int needs) -> (Tensor grad_x, Tensor grad_params, Tensor grad_heights, Tensor grad_derivatives)");
  // flow: masked networks; `program` and `constants` are laid out in python/genfuse/reference/flow/autoregressive.py
  m.def(
      "masked_linear(Tensor x, Tensor weight, Tensor? bias, Tensor in_degrees, Tensor out_degrees, bool strict) -> "
      "Tensor");
  m.def(
      "masked_linear_backward(Tensor? grad, Tensor x, Tensor weight, Tensor? bias, Tensor in_degrees, "
      "Tensor out_degrees, bool strict, int needs) -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  m.def(
      "autoregressive_inverse(Tensor u, Tensor parameters, Tensor? additions, Tensor degrees, int[] program, "
      "float[] constants) -> (Tensor x, Tensor log_abs_det)");
  m.def(
      "autoregressive_inverse_backward(Tensor? grad_x, Tensor? grad_log_abs_det, Tensor u, Tensor parameters, "
      "Tensor? additions, Tensor degrees, Tensor x, int[] program, float[] constants, int needs) -> "
      "(Tensor grad_u, Tensor grad_parameters, Tensor grad_additions)");
  // flow: couplings and pointwise transforms. Codes of scale, layout and split: python/genfuse/ops/flow/coupling.py
  m.def(
      "affine_coupling(Tensor x, Tensor params, Tensor? shift, Tensor? channels, int scale, int layout, int split, "
      "bool add_first, bool inverse, float offset, float eps, float low, float clamp, bool reduce) -> "
      "(Tensor y, Tensor log_abs_det)");
  m.def(
      "affine_coupling_backward(Tensor? grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor params, Tensor? shift, "
      "Tensor? channels, int scale, int layout, int split, bool add_first, bool inverse, float offset, float eps, "
      "float low, float clamp, bool reduce, int needs) -> (Tensor grad_x, Tensor grad_params, Tensor grad_shift)");
  m.def("additive_coupling(Tensor x, Tensor shift, Tensor? channels, int split, bool inverse) -> Tensor");
  m.def(
      "additive_coupling_backward(Tensor? grad_y, Tensor x, Tensor shift, Tensor? channels, int split, bool inverse, "
      "int needs) -> (Tensor grad_x, Tensor grad_shift)");
  m.def(
      "actnorm(Tensor x, Tensor log_scale, Tensor bias, bool inverse, bool add_first) -> "
      "(Tensor y, Tensor log_abs_det)");
  m.def(
      "actnorm_backward(Tensor? grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor log_scale, Tensor bias, "
      "bool inverse, bool add_first, int needs) -> (Tensor grad_x, Tensor grad_log_scale, Tensor grad_bias)");
  m.def(
      "dequantize_logit(Tensor x, Tensor? u, Tensor? rng, int levels, float alpha) -> (Tensor y, Tensor log_abs_det)");
  m.def(
      "dequantize_logit_backward(Tensor? grad_y, Tensor? grad_log_abs_det, Tensor x, Tensor? u, Tensor? rng, "
      "int levels, float alpha, int needs) -> (Tensor grad_x, Tensor grad_u)");
  m.def("logit_quantize(Tensor y, int levels, float alpha) -> Tensor");
  // flow: a matrix over channels
  m.def("conv1x1(Tensor x, Tensor weight, Tensor? bias) -> Tensor");
  m.def(
      "conv1x1_backward(Tensor? grad_y, Tensor x, Tensor weight, Tensor? bias, int needs) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // masked_conv: convolutions over the pixels before their own. Codes of masks: python/genfuse/ops/masked_conv/conv.py
  m.def(
      "masked_conv2d(Tensor x, Tensor weight, Tensor? bias, int mask, int channel_groups, bool interleaved, "
      "int padding_h, int padding_w, int dilation_h, int dilation_w, int groups) -> Tensor");
  m.def(
      "masked_conv2d_backward(Tensor? grad_y, Tensor x, Tensor weight, Tensor? bias, int mask, int channel_groups, "
      "bool interleaved, int padding_h, int padding_w, int dilation_h, int dilation_w, int groups, int needs) -> "
      "(Tensor grad_x, Tensor grad_weight, Tensor grad_bias)");
  // masked_conv: pointwise. `activation` is tanh (0) or linear (1)
  m.def(
      "gated_activation(Tensor x, Tensor? bias, Tensor? conditional, Tensor? residual, int dim, int activation) -> "
      "Tensor");
  m.def(
      "gated_activation_backward(Tensor? grad_y, Tensor x, Tensor? bias, Tensor? conditional, Tensor? residual, "
      "int dim, int activation, int needs) -> (Tensor grad_x, Tensor grad_bias, Tensor grad_conditional, "
      "Tensor grad_residual)");
  m.def("concat_elu(Tensor x, int dim) -> Tensor");
  m.def("concat_elu_backward(Tensor? grad_y, Tensor x, int dim, int needs) -> Tensor");
  // masked_conv: the whole loop over an image's pixels; `program` and `constants` are laid out in
  // python/genfuse/reference/masked_conv/ancestral.py
  m.def(
      "ancestral_sample(Tensor[] tensors, Tensor u, Tensor? given, int[] program, float[] constants, bool record) -> "
      "(Tensor levels, Tensor outputs)");
}

#include "recurrent/generate.h"

#include "recurrent/sequence_ops.h"

namespace genfuse {
namespace {

struct Result {
  Tensor tokens, log_probs, h_n, c_n;
};

// A tensor of any floating type as contiguous float32, which is what the loop computes in.
Tensor as_float(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  compute_type(name, t);
  return prepared(name, to_type(t, ScalarType::Float), sizes, ScalarType::Float, ScalarType::Float);
}

Result generate(Cell cell, const Tensor& prompt, int64_t length, const Tensor& embedding,
                const std::vector<Tensor>& weights, const Tensor& head_weight, const OptionalTensor& head_bias,
                const Tensor& h0, const OptionalTensor& c0, const OptionalTensor& u, const OptionalTensor& rng,
                double temperature, int64_t top_k, double top_p, double eps, double zoneout_h, double zoneout_c,
                bool bf16_weights) {
  STD_TORCH_CHECK(
      prompt.is_cpu() && prompt.dim() == 2 && prompt.scalar_type() == ScalarType::Long && prompt.size(1) > 0,
      "prompt must be an int64 tensor [B, P] on the CPU with P > 0, got shape ", shape_of(prompt));
  STD_TORCH_CHECK(length >= 0, "length must not be negative, got ", length);
  STD_TORCH_CHECK(temperature >= 0, "temperature must not be negative, got ", temperature);
  STD_TORCH_CHECK(top_k >= 0, "top_k must not be negative, got ", top_k);
  STD_TORCH_CHECK(top_p > 0 && top_p <= 1, "top_p must lie in (0, 1], got ", top_p);
  STD_TORCH_CHECK(embedding.dim() == 2 && embedding.size(0) > 0, "embedding must have shape [V, E], got ",
                  shape_of(embedding));
  Generate args;
  args.cell = cell;
  args.batch = prompt.size(0);
  args.prompt_length = prompt.size(1);
  args.length = length;
  args.vocab = embedding.size(0);
  const int64_t B = args.batch, gates = cell == Cell::gru ? 3 : 4;
  const int64_t each = cell == Cell::layer_norm_lstm ? 8 : 4;
  STD_TORCH_CHECK(!weights.empty() && static_cast<int64_t>(weights.size()) % each == 0, "weights must hold ", each,
                  " tensors a layer, got ", weights.size());
  std::vector<Tensor> held;
  const auto hold = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    held.push_back(as_float(name, t, sizes));
    return read<float>(held.back());
  };
  const Tensor tokens_in = torch::stable::contiguous(prompt);
  args.prompt = read<int64_t>(tokens_in);
  for (int64_t i = 0; i < tokens_in.numel(); ++i) {
    STD_TORCH_CHECK(args.prompt[i] >= 0 && args.prompt[i] < args.vocab, "prompt holds token ", args.prompt[i],
                    ", outside the vocabulary of ", args.vocab);
  }
  args.embedding = hold("embedding", embedding, {args.vocab, embedding.size(1)});
  std::vector<GenerateLayer> layers;
  int64_t input = embedding.size(1);
  for (size_t i = 0; i < weights.size(); i += static_cast<size_t>(each)) {
    const Tensor* w = &weights[i];
    STD_TORCH_CHECK(w[1].dim() == 2 && w[1].size(1) > 0, "weight_hh must have shape [", gates, " H, H], got ",
                    shape_of(w[1]));
    GenerateLayer layer;
    layer.input = input;
    layer.hidden = w[1].size(1);
    const int64_t H = layer.hidden, G = gates * H;
    layer.w_ih = hold("weight_ih", w[0], {G, input});
    layer.w_hh = hold("weight_hh", w[1], {G, H});
    layer.b_ih = hold("bias_ih", w[2], {G});
    layer.b_hh = hold("bias_hh", w[3], {G});
    if (cell == Cell::layer_norm_lstm) {
      layer.ln_ih = hold("ln_ih_weight", w[4], {G});
      layer.ln_hh = hold("ln_hh_weight", w[5], {G});
      layer.ln_c_weight = hold("ln_c_weight", w[6], {H});
      layer.ln_c_bias = hold("ln_c_bias", w[7], {H});
    }
    layers.push_back(layer);
    input = H;
  }
  args.layers = layers.data();
  args.layer_count = static_cast<int64_t>(layers.size());
  args.head_weight = hold("head_weight", head_weight, {args.vocab, input});
  if (head_bias.has_value()) args.head_bias = hold("head_bias", *head_bias, {args.vocab});
  const int64_t state = args.state_size();
  args.h0 = hold("h0", h0, {B, state});
  if (c0.has_value()) args.c0 = hold("c0", *c0, {B, state});
  if (u.has_value()) {
    args.u = hold("u", *u, {B, length});
  } else if (temperature > 0) {
    STD_TORCH_CHECK(rng.has_value(), "u or rng must be given");
    check_shape("rng", *rng, {2});
    STD_TORCH_CHECK(rng->is_cpu() && rng->scalar_type() == ScalarType::Long && rng->is_contiguous(),
                    "rng must be a contiguous int64 tensor (seed, offset) on the CPU");
    args.seed = static_cast<uint64_t>(read<int64_t>(*rng)[0]);
    args.offset = static_cast<uint64_t>(read<int64_t>(*rng)[1]);
  }
  args.temperature = temperature;
  args.top_k = top_k;
  args.top_p = top_p;
  args.eps = eps;
  args.zoneout_h = probability("zoneout_h", zoneout_h);
  args.zoneout_c = probability("zoneout_c", zoneout_c);
  args.bf16_weights = bf16_weights;
  const Result out{empty({B, length}, ScalarType::Long), empty({B, length}, ScalarType::Float),
                   empty({B, state}, ScalarType::Float),
                   c0.has_value() ? empty({B, state}, ScalarType::Float) : absent(ScalarType::Float)};
  args.tokens = data<int64_t>(out.tokens);
  args.log_probs = data<float>(out.log_probs);
  args.h_n = data<float>(out.h_n);
  args.c_n = c0.has_value() ? data<float>(out.c_n) : nullptr;
  run_kernel(GENFUSE_DISPATCH(generate_kernel)(), args);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_generate(const Tensor& prompt, int64_t length, const Tensor& embedding,
                                                         const std::vector<Tensor>& weights, const Tensor& head_weight,
                                                         const OptionalTensor& head_bias, const Tensor& h0,
                                                         const Tensor& c0, const OptionalTensor& u,
                                                         const OptionalTensor& rng, double temperature, int64_t top_k,
                                                         double top_p, bool layer_norm, double eps, double zoneout_h,
                                                         double zoneout_c, bool bf16_weights) {
  const Result r =
      generate(layer_norm ? Cell::layer_norm_lstm : Cell::lstm, prompt, length, embedding, weights, head_weight,
               head_bias, h0, c0, u, rng, temperature, top_k, top_p, eps, zoneout_h, zoneout_c, bf16_weights);
  return {r.tokens, r.log_probs, r.h_n, r.c_n};
}

std::tuple<Tensor, Tensor, Tensor> gru_generate(const Tensor& prompt, int64_t length, const Tensor& embedding,
                                                const std::vector<Tensor>& weights, const Tensor& head_weight,
                                                const OptionalTensor& head_bias, const Tensor& h0,
                                                const OptionalTensor& u, const OptionalTensor& rng, double temperature,
                                                int64_t top_k, double top_p, double zoneout_h, bool bf16_weights) {
  const Result r = generate(Cell::gru, prompt, length, embedding, weights, head_weight, head_bias, h0, std::nullopt, u,
                            rng, temperature, top_k, top_p, 1e-5, zoneout_h, 0, bf16_weights);
  return {r.tokens, r.log_probs, r.h_n};
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("lstm_generate", TORCH_BOX(&genfuse::lstm_generate));
  m.impl("gru_generate", TORCH_BOX(&genfuse::gru_generate));
}

#include "recurrent/generate_cuda.h"

#include "recurrent/sequence_cuda_ops.h"

namespace genfuse {
namespace {

struct Result {
  Tensor tokens, log_probs, h_n, c_n;
};

template <class W>
Result generate(CudaCell cell, const Tensor& prompt, int64_t length, const Tensor& embedding,
                const std::vector<Tensor>& weights, const Tensor& head_weight, const OptionalTensor& head_bias,
                const Tensor& h0, const OptionalTensor& c0, const OptionalTensor& u, const OptionalTensor& rng,
                double temperature, int64_t top_k, double top_p, double eps, double zoneout_h, double zoneout_c) {
  const OnDeviceOf guard(prompt);
  const ScalarType weight_type = sizeof(W) == 2 ? ScalarType::BFloat16 : ScalarType::Float;
  const int64_t gates = cell == CudaCell::gru ? 3 : 4;
  const bool norm = cell == CudaCell::layer_norm_lstm;
  const size_t each = norm ? 8 : 4;
  STD_TORCH_CHECK(!weights.empty() && weights.size() % each == 0, "weights must hold ", each, " tensors a layer, got ",
                  weights.size());
  const int64_t layers = static_cast<int64_t>(weights.size() / each);
  std::vector<Tensor> held;
  const auto hold = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType type) {
    compute_type(name, t);
    check_shape(name, t, sizes);
    STD_TORCH_CHECK(on_device(t) && t.get_device_index() == prompt.get_device_index(), name,
                    " must be on prompt's device");
    held.push_back(torch::stable::contiguous(to_type(t, type)));
    return held.back();
  };
  const auto vector = [&](const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
    return read<float>(hold(name, t, sizes, ScalarType::Float));
  };

  CudaGenerate<W> p;
  p.cell = cell;
  p.batch = prompt.size(0), p.prompt_length = prompt.size(1), p.length = length, p.vocab = embedding.size(0);
  const Tensor tokens_in = torch::stable::contiguous(prompt);
  p.prompt = read<int64_t>(tokens_in);
  p.embedding = vector("embedding", embedding, {p.vocab, embedding.size(1)});
  const DeviceLimits limits = device_limits(prompt.get_device_index());
  int64_t input = embedding.size(1), largest = 0;
  STD_TORCH_CHECK(layers <= kMaxGenerateLayers, generate_objection(0, layers, norm, limits));
  p.layer_count = static_cast<int>(layers);
  for (int64_t l = 0; l < layers; ++l) {
    const Tensor* w = &weights[static_cast<size_t>(l) * each];
    CudaGenerateLayer<W>& layer = p.layers[l];
    STD_TORCH_CHECK(w[1].dim() == 2 && w[1].size(1) > 0, "weight_hh must have shape [", gates, " H, H], got ",
                    shape_of(w[1]));
    const int64_t H = w[1].size(1);
    layer.input = input, layer.hidden = H, layer.offset = p.state;
    layer.w_ih = read<W>(hold("weight_ih", w[0], {gates * H, input}, weight_type));
    layer.w_hh = read<W>(hold("weight_hh", w[1], {gates * H, H}, weight_type));
    layer.b_ih = vector("bias_ih", w[2], {gates * H});
    layer.b_hh = vector("bias_hh", w[3], {gates * H});
    if (norm) {
      layer.ln_ih = vector("ln_ih_weight", w[4], {4 * H});
      layer.ln_hh = vector("ln_hh_weight", w[5], {4 * H});
      layer.ln_c_weight = vector("ln_c_weight", w[6], {H});
      layer.ln_c_bias = vector("ln_c_bias", w[7], {H});
    }
    p.state += H;
    input = H;
    largest = H > largest ? H : largest;
  }
  const char* objection = generate_objection(largest, layers, norm, limits);
  STD_TORCH_CHECK(objection == nullptr, "generate: ", objection);
  p.head_weight = read<W>(hold("head_weight", head_weight, {p.vocab, input}, weight_type));
  if (head_bias.has_value()) p.head_bias = vector("head_bias", *head_bias, {p.vocab});
  p.h0 = vector("h0", h0, {p.batch, p.state});
  if (c0.has_value()) p.c0 = vector("c0", *c0, {p.batch, p.state});
  Tensor numbers;
  if (u.has_value()) {
    p.u = vector("u", *u, {p.batch, length});
  } else if (temperature > 0) {
    STD_TORCH_CHECK(rng.has_value(), "u or rng must be given");
    check_shape("rng", *rng, {2});
    STD_TORCH_CHECK(on_device(*rng) && rng->scalar_type() == ScalarType::Long,
                    "rng must be an int64 tensor (seed, offset) on prompt's device");
    numbers = torch::stable::contiguous(*rng);
    p.rng = read<int64_t>(numbers);
  }
  p.temperature = static_cast<float>(temperature);
  p.top_k = top_k, p.top_p = top_p;
  p.eps = static_cast<float>(eps), p.zoneout_h = static_cast<float>(zoneout_h),
  p.zoneout_c = static_cast<float>(zoneout_c);

  const auto make = [&](std::initializer_list<int64_t> sizes, ScalarType type) {
    return empty_like_x(prompt, sizes, type);
  };
  const Tensor h = make({2, p.batch, p.state}, ScalarType::Float), logits = make({p.batch, p.vocab}, ScalarType::Float);
  const Tensor raw = make({norm ? 2 * p.batch * 4 * largest : 0}, ScalarType::Float);
  const Result out{make({p.batch, length}, ScalarType::Long), make({p.batch, length}, ScalarType::Float),
                   make({p.batch, p.state}, ScalarType::Float),
                   c0.has_value() ? make({p.batch, p.state}, ScalarType::Float) : make({0}, ScalarType::Float)};
  p.h = data<float>(h), p.logits = data<float>(logits), p.raw = data<float>(raw);
  p.tokens = data<int64_t>(out.tokens), p.log_probs = data<float>(out.log_probs), p.h_n = data<float>(out.h_n);
  p.c_n = c0.has_value() ? data<float>(out.c_n) : nullptr;
  if (p.batch > 0)
    check_launch("generate", launch_generate(p, largest, limits.multiprocessors, current_stream(prompt)));
  return out;
}

Result generate_of(CudaCell cell, const Tensor& prompt, int64_t length, const Tensor& embedding,
                   const std::vector<Tensor>& weights, const Tensor& head_weight, const OptionalTensor& head_bias,
                   const Tensor& h0, const OptionalTensor& c0, const OptionalTensor& u, const OptionalTensor& rng,
                   double temperature, int64_t top_k, double top_p, double eps, double zoneout_h, double zoneout_c,
                   bool bf16_weights) {
  STD_TORCH_CHECK(
      on_device(prompt) && prompt.dim() == 2 && prompt.scalar_type() == ScalarType::Long && prompt.size(1) > 0,
      "prompt must be an int64 tensor [B, P] on a CUDA device with P > 0, got shape ", shape_of(prompt));
  STD_TORCH_CHECK(length >= 0, "length must not be negative, got ", length);
  STD_TORCH_CHECK(temperature >= 0, "temperature must not be negative, got ", temperature);
  STD_TORCH_CHECK(top_k >= 0, "top_k must not be negative, got ", top_k);
  STD_TORCH_CHECK(top_p > 0 && top_p <= 1, "top_p must lie in (0, 1], got ", top_p);
  STD_TORCH_CHECK(embedding.dim() == 2 && embedding.size(0) > 0, "embedding must have shape [V, E], got ",
                  shape_of(embedding));
  const auto run = bf16_weights ? &generate<BFloat16> : &generate<float>;
  return run(cell, prompt, length, embedding, weights, head_weight, head_bias, h0, c0, u, rng, temperature, top_k,
             top_p, eps, zoneout_h, zoneout_c);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> lstm_generate(const Tensor& prompt, int64_t length, const Tensor& embedding,
                                                         const std::vector<Tensor>& weights, const Tensor& head_weight,
                                                         const OptionalTensor& head_bias, const Tensor& h0,
                                                         const Tensor& c0, const OptionalTensor& u,
                                                         const OptionalTensor& rng, double temperature, int64_t top_k,
                                                         double top_p, bool layer_norm, double eps, double zoneout_h,
                                                         double zoneout_c, bool bf16_weights) {
  const Result r = generate_of(layer_norm ? CudaCell::layer_norm_lstm : CudaCell::lstm, prompt, length, embedding,
                               weights, head_weight, head_bias, h0, c0, u, rng, temperature, top_k, top_p, eps,
                               zoneout_h, zoneout_c, bf16_weights);
  return {r.tokens, r.log_probs, r.h_n, r.c_n};
}

std::tuple<Tensor, Tensor, Tensor> gru_generate(const Tensor& prompt, int64_t length, const Tensor& embedding,
                                                const std::vector<Tensor>& weights, const Tensor& head_weight,
                                                const OptionalTensor& head_bias, const Tensor& h0,
                                                const OptionalTensor& u, const OptionalTensor& rng, double temperature,
                                                int64_t top_k, double top_p, double zoneout_h, bool bf16_weights) {
  const Result r = generate_of(CudaCell::gru, prompt, length, embedding, weights, head_weight, head_bias, h0,
                               std::nullopt, u, rng, temperature, top_k, top_p, 1e-5, zoneout_h, 0, bf16_weights);
  return {r.tokens, r.log_probs, r.h_n};
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_FRAGMENT(GENFUSE_CUDA_LIBRARY, m) {
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
}

STABLE_TORCH_LIBRARY_IMPL(GENFUSE_CUDA_LIBRARY, GENFUSE_CUDA_KEY, m) {
  m.impl("lstm_generate", TORCH_BOX(&genfuse::lstm_generate));
  m.impl("gru_generate", TORCH_BOX(&genfuse::gru_generate));
}

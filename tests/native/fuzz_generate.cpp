#include "fuzz.h"
#include "recurrent/generate.h"

namespace fuzz {

void generate_case(Random& random, std::string& description) {
  const auto cell = random.pick({genfuse::Cell::lstm, genfuse::Cell::layer_norm_lstm, genfuse::Cell::gru});
  const bool gru = cell == genfuse::Cell::gru, layer_norm = cell == genfuse::Cell::layer_norm_lstm;
  const int64_t gates = gru ? 3 : 4;
  genfuse::Generate g;
  g.cell = cell;
  g.batch = random.chance(0.05) ? 0 : 1 + random.below(random.chance(0.1) ? 40 : 6);
  g.prompt_length = 1 + random.below(6);
  g.length = random.chance(0.05) ? 0 : 1 + random.below(8);
  g.vocab = random.chance(0.1) ? 1 + random.below(400) : random.size();
  g.seed = random.bits();
  g.offset = random.bits();
  g.temperature = random.chance(0.2) ? 0 : random.pick({0.01, 0.5, 1.0, 3.0});
  g.top_k = random.chance(0.5) ? 0 : 1 + random.below(2 * g.vocab);
  g.top_p = random.chance(0.5) ? 1 : random.pick({1e-6, 0.3, 0.9, 0.999});
  g.zoneout_h = random.probability();
  g.zoneout_c = gru ? 0 : random.probability();
  g.bf16_weights = random.chance(0.4);

  const int64_t embedding_size = random.size();
  std::vector<Buffer<float>> weights;
  const auto weight = [&](int64_t count) { return weights.emplace_back(count, random).data(); };
  std::vector<genfuse::GenerateLayer> layers(static_cast<size_t>(1 + random.below(3)));
  int64_t input = embedding_size;
  for (genfuse::GenerateLayer& layer : layers) {
    layer.input = input;
    layer.hidden = input = random.size();
    const int64_t G = gates * layer.hidden;
    layer.w_ih = weight(G * layer.input);
    layer.w_hh = weight(G * layer.hidden);
    layer.b_ih = weight(G);
    layer.b_hh = weight(G);
    if (layer_norm) {
      layer.ln_ih = weight(G);
      layer.ln_hh = weight(G);
      layer.ln_c_weight = weight(layer.hidden);
      layer.ln_c_bias = weight(layer.hidden);
    }
  }
  g.layers = layers.data();
  g.layer_count = static_cast<int64_t>(layers.size());
  g.embedding = weight(g.vocab * embedding_size);
  g.head_weight = weight(g.vocab * input);
  if (random.chance(0.7)) g.head_bias = weight(g.vocab);
  const int64_t state = g.batch * g.state_size();
  g.h0 = weight(state);
  if (!gru) g.c0 = weight(state);
  Buffer<float> u(g.batch * g.length);
  for (int64_t i = 0; i < u.count; ++i) {
    // The ends of [0, 1) are where a draw can fall off the table.
    u.data()[i] = random.chance(0.1)   ? 0.0f
                  : random.chance(0.1) ? 0x1.fffffep-1f
                                       : static_cast<float>(random.bits() >> 40) * 0x1p-24f;
  }
  if (random.chance(0.5)) g.u = u.data();
  Buffer<int64_t> prompt(g.batch * g.prompt_length);
  for (int64_t i = 0; i < prompt.count; ++i) prompt.data()[i] = random.below(g.vocab);
  g.prompt = prompt.data();

  char text[300];
  std::snprintf(text, sizeof text,
                "cell %d B=%lld P=%lld length=%lld V=%lld E=%lld layers=%zu temperature %g top_k %lld top_p %g%s%s",
                static_cast<int>(cell), static_cast<long long>(g.batch), static_cast<long long>(g.prompt_length),
                static_cast<long long>(g.length), static_cast<long long>(g.vocab),
                static_cast<long long>(embedding_size), layers.size(), g.temperature, static_cast<long long>(g.top_k),
                g.top_p, g.u ? " u given" : "", g.bf16_weights ? " bf16" : "");
  description = text;

  run_everywhere<float>([&](size_t isa, const Pool& pool) {
    Results<float> results;
    Buffer<int64_t> tokens(g.batch * g.length);
    genfuse::Generate arguments = g;
    arguments.tokens = tokens.data();
    arguments.log_probs = results.add("log_probs", tokens.count);
    arguments.h_n = results.add("h_n", state);
    if (!gru) arguments.c_n = results.add("c_n", state);
    run(FUZZ_VERSION(isa, generate_kernel)(), arguments, pool.executor);
    float* copies = results.add("tokens", tokens.count);  // exact in float32: there are fewer than 2^24
    for (int64_t i = 0; i < tokens.count; ++i) {
      const int64_t token = tokens.data()[i];
      if (token < 0 || token >= g.vocab) throw Failure{"token " + std::to_string(token) + " is not in the vocabulary"};
      copies[i] = static_cast<float>(token);
    }
    return results;
  });
}

}  // namespace fuzz

// The recurrent CUDA kernels on host threads (cuda_on_host.h) against plain loops in float64.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "recurrent/generate_cuda.cu"
#include "recurrent/gru_cuda.cu"
#include "recurrent/lstm_cuda.cu"

using namespace genfuse;

namespace {

int failures = 0;

void expect(bool ok, const std::string& what) {
  if (ok) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

std::mt19937_64 engine;

template <class T>
T rounded(double x) {
  return from_float<T>(static_cast<float>(x));
}

template <class T>
std::vector<T> random_vector(int64_t n, double scale) {
  std::normal_distribution<double> normal(0, scale);
  std::vector<T> v(static_cast<size_t>(n));
  for (T& x : v) x = rounded<T>(normal(engine));
  return v;
}

// Every buffer that a kernel writes starts out as NaN.
template <class T>
std::vector<T> poison(int64_t n) {
  return std::vector<T>(static_cast<size_t>(n), rounded<T>(std::numeric_limits<double>::quiet_NaN()));
}

template <class A>
void compare(const std::vector<A>& found, const std::vector<double>& exact, double tolerance, const std::string& what) {
  double error = 0, norm = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    const double x = static_cast<double>(to_float(found[i]));
    if (std::isnan(x)) {
      expect(false, what + ": NaN at " + std::to_string(i));
      return;
    }
    error += (x - exact[i]) * (x - exact[i]);
    norm += exact[i] * exact[i];
  }
  error = std::sqrt(error) / std::fmax(std::sqrt(norm), 1e-30);
  expect(found.size() == exact.size() && error <= tolerance, what + ": relative error " + std::to_string(error));
}

double logistic(double x) { return 1 / (1 + std::exp(-x)); }

struct Case {
  bool lstm = true;
  int64_t steps = 4, batch = 3, hidden = 5;
  bool reverse = false, resets = false, mask = false, training = true;
  double zoneout_h = 0, zoneout_c = 0;
  int blocks = 2;
  bool bias = true;
  int64_t shared_limit = 200 << 10;
};

// Draws where the kernel should, from the same generator: that is compared with the reference elsewhere.
struct Zone {
  double p;
  bool training;
  uint64_t seed, offset;
  double keep(int64_t element) const {
    if (p == 0) return 0;
    if (!training) return p;
    return static_cast<double>(philox_uniform(seed, offset, static_cast<uint64_t>(element))) < p ? 1 : 0;
  }
};

template <class T>
void run(const Case& c, const std::string& name) {
  const int64_t S = c.steps, B = c.batch, H = c.hidden, G = c.lstm ? 4 : 3, N = S * B;
  const double tolerance = sizeof(T) == 4 ? 1e-5 : 2e-2;
  const auto xp = random_vector<float>(N * G * H, 0.8), h0 = random_vector<float>(B * H, 0.7);
  const auto c0 = random_vector<float>(B * H, 0.7);
  const auto w = random_vector<T>(G * H * H, 0.8 / std::sqrt(static_cast<double>(H)));
  const auto b_ih = random_vector<float>(G * H, 0.3), b_hh = random_vector<float>(G * H, 0.3);
  const auto grad_y = random_vector<T>(N * H, 1), mask = random_vector<float>(B * H, 1);
  const auto grad_h_n = random_vector<float>(B * H, 1), grad_c_n = random_vector<float>(B * H, 1);
  std::unique_ptr<bool[]> resets(new bool[static_cast<size_t>(N)]);
  for (int64_t i = 0; i < N; ++i) resets[static_cast<size_t>(i)] = engine() % 4 == 0;
  const int64_t rng[2] = {0x123456789abcdef, (int64_t{1} << 40) + 7};
  const Zone zone_h{c.zoneout_h, c.training, static_cast<uint64_t>(rng[0]), static_cast<uint64_t>(rng[1])};
  const Zone zone_c{c.zoneout_c, c.training, zone_h.seed, zone_h.offset + 1};
  const auto is_reset = [&](int64_t t, int64_t b) { return c.resets && resets[static_cast<size_t>(t * B + b)]; };
  const auto W = [&](int64_t g, int64_t n, int64_t k) {
    return static_cast<double>(to_float(w[static_cast<size_t>((g * H + n) * H + k)]));
  };
  const auto at = [](const auto& v, int64_t i) { return static_cast<double>(to_float(v[static_cast<size_t>(i)])); };

  // Forward.
  const size_t n_states = static_cast<size_t>(N * H), n_gates = static_cast<size_t>(N * 4 * H),
               n_batch = static_cast<size_t>(B * H);
  std::vector<double> y(n_states), states(n_states), cells(n_states), gates(n_gates), old_h(n_states), old_c(n_states);
  std::vector<double> h(n_batch), cell(n_batch);
  for (int64_t i = 0; i < B * H; ++i) h[static_cast<size_t>(i)] = at(h0, i), cell[static_cast<size_t>(i)] = at(c0, i);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t t = c.reverse ? S - 1 - s : s;
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> before(h.begin() + b * H, h.begin() + (b + 1) * H);
      if (is_reset(t, b)) std::fill(before.begin(), before.end(), 0.0);
      for (int64_t n = 0; n < H; ++n) {
        const auto i = static_cast<size_t>((t * B + b) * H + n), state = static_cast<size_t>(b * H + n);
        double x[4], r[4];
        for (int64_t g = 0; g < G; ++g) {
          x[g] = at(xp, ((t * B + b) * G + g) * H + n) + (c.bias ? at(b_ih, g * H + n) : 0);
          r[g] = c.bias ? at(b_hh, g * H + n) : 0;
          for (int64_t k = 0; k < H; ++k) r[g] += W(g, n, k) * before[static_cast<size_t>(k)];
        }
        double* out = &gates[static_cast<size_t>((t * B + b) * 4 * H + n)];
        old_h[i] = before[static_cast<size_t>(n)];
        double h_tilde;
        if (c.lstm) {
          old_c[i] = is_reset(t, b) ? 0 : cell[state];
          out[0] = logistic(x[0] + r[0]), out[H] = logistic(x[1] + r[1]);
          out[2 * H] = std::tanh(x[2] + r[2]), out[3 * H] = logistic(x[3] + r[3]);
          const double c_tilde = out[H] * old_c[i] + out[0] * out[2 * H], keep = zone_c.keep(static_cast<int64_t>(i));
          h_tilde = out[3 * H] * std::tanh(c_tilde);
          cells[i] = cell[state] = keep * old_c[i] + (1 - keep) * c_tilde;
        } else {
          out[0] = logistic(x[0] + r[0]), out[H] = logistic(x[1] + r[1]), out[3 * H] = r[2];
          out[2 * H] = std::tanh(x[2] + out[0] * r[2]);
          h_tilde = (1 - out[H]) * out[2 * H] + out[H] * old_h[i];
        }
        const double keep = zone_h.keep(static_cast<int64_t>(i));
        states[i] = h[state] = keep * old_h[i] + (1 - keep) * h_tilde;
        y[i] = states[i] * (c.mask ? at(mask, b * H + n) : 1);
      }
    }
  }

  const DeviceLimits device{c.blocks, c.shared_limit, true};
  PersistentForward<T> f;
  f.plan = persistent_plan(H, B, static_cast<int>(G), sizeof(T), false, device);
  if (f.plan.objection != nullptr) return expect(false, name + ": " + f.plan.objection);
  auto exchange = poison<float>(2 * B * H), h_n = poison<float>(B * H), c_n = poison<float>(B * H);
  auto k_gates = poison<float>(N * 4 * H), k_cells = poison<float>(N * H), k_states = poison<float>(N * H);
  auto k_y = poison<T>(N * H);
  const auto common = [&](auto& p) {
    p.steps = S, p.batch = B, p.hidden = H, p.reverse = c.reverse;
    p.resets = c.resets ? resets.get() : nullptr;
    p.rng = rng, p.zoneout_h = c.zoneout_h, p.zoneout_c = c.zoneout_c, p.training = c.training;
    p.output_mask = c.mask ? mask.data() : nullptr;
    p.w_hh = w.data();
    p.h0 = h0.data(), p.c0 = c0.data();
  };
  common(f);
  f.xp = xp.data();
  if (c.lstm) {  // as in use: the gates replace their pre-activations
    k_gates = xp;
    f.xp = k_gates.data();
  }
  f.bias_ih = c.bias ? b_ih.data() : nullptr, f.bias_hh = c.bias ? b_hh.data() : nullptr;
  f.exchange = exchange.data(), f.y = k_y.data(), f.h_n = h_n.data(), f.c_n = c_n.data();
  f.gates = k_gates.data(), f.cells = c.lstm ? k_cells.data() : nullptr, f.hidden_states = k_states.data();
  c.lstm ? launch_lstm_forward(f, nullptr) : launch_gru_forward(f, nullptr);
  compare(k_y, y, tolerance, name + " y");
  compare(h_n, h, tolerance, name + " h_n");
  compare(k_states, states, tolerance, name + " hidden");
  compare(k_gates, gates, tolerance, name + " gates");
  if (c.lstm) compare(c_n, cell, tolerance, name + " c_n"), compare(k_cells, cells, tolerance, name + " cells");

  // Backward, from the exact forward pass rounded to what is saved.
  const auto as_float = [](const std::vector<double>& v) { return std::vector<float>(v.begin(), v.end()); };
  k_gates = as_float(gates), k_cells = as_float(cells), k_states = as_float(states);
  std::vector<double> dh(n_batch), dc(n_batch), grad_gates(n_gates);
  for (int64_t i = 0; i < B * H; ++i)
    dh[static_cast<size_t>(i)] = at(grad_h_n, i), dc[static_cast<size_t>(i)] = at(grad_c_n, i);
  for (int64_t s = 0; s < S; ++s) {
    const int64_t t = c.reverse ? s : S - 1 - s;
    for (int64_t b = 0; b < B; ++b) {
      std::vector<double> before(static_cast<size_t>(H), 0.0), before_c(static_cast<size_t>(H), 0.0);
      for (int64_t n = 0; n < H; ++n) {
        const auto i = static_cast<size_t>((t * B + b) * H + n), state = static_cast<size_t>(b * H + n);
        const double* g = &gates[static_cast<size_t>((t * B + b) * 4 * H + n)];
        double* d = &grad_gates[static_cast<size_t>((t * B + b) * 4 * H + n)];
        const double total = dh[state] + at(grad_y, static_cast<int64_t>(i)) * (c.mask ? at(mask, b * H + n) : 1);
        const double keep = zone_h.keep(static_cast<int64_t>(i)), grad = (1 - keep) * total;
        double direct = keep * total;
        if (c.lstm) {
          const double keep_c = zone_c.keep(static_cast<int64_t>(i)), c_tilde = g[H] * old_c[i] + g[0] * g[2 * H];
          const double tc = std::tanh(c_tilde), gc = (1 - keep_c) * dc[state] + grad * g[3 * H] * (1 - tc * tc);
          d[0] = gc * g[2 * H] * g[0] * (1 - g[0]), d[H] = gc * old_c[i] * g[H] * (1 - g[H]);
          d[2 * H] = gc * g[0] * (1 - g[2 * H] * g[2 * H]), d[3 * H] = grad * tc * g[3 * H] * (1 - g[3 * H]);
          before_c[static_cast<size_t>(n)] = keep_c * dc[state] + gc * g[H];
        } else {
          d[2 * H] = grad * (1 - g[H]) * (1 - g[2 * H] * g[2 * H]);
          d[H] = grad * (old_h[i] - g[2 * H]) * g[H] * (1 - g[H]);
          d[3 * H] = d[2 * H] * g[0];
          d[0] = d[2 * H] * g[3 * H] * g[0] * (1 - g[0]);
          direct += grad * g[H];
        }
        before[static_cast<size_t>(n)] += direct;
        for (int64_t q = 0; q < G; ++q) {
          const double da = d[(c.lstm || q < 2 ? q : 3) * H];
          for (int64_t k = 0; k < H; ++k) before[static_cast<size_t>(k)] += da * W(q, n, k);
        }
      }
      for (int64_t n = 0; n < H; ++n) {
        dh[static_cast<size_t>(b * H + n)] = is_reset(t, b) ? 0 : before[static_cast<size_t>(n)];
        dc[static_cast<size_t>(b * H + n)] = is_reset(t, b) ? 0 : before_c[static_cast<size_t>(n)];
      }
    }
  }
  PersistentBackward<T> p;
  p.plan = persistent_plan(H, B, static_cast<int>(G), sizeof(T), true, device);
  if (p.plan.objection != nullptr) return expect(false, name + " backward: " + p.plan.objection);
  common(p);
  auto k_grad = poison<T>(N * 4 * H);
  auto grad_h0 = poison<float>(B * H), grad_c0 = poison<float>(B * H);
  p.grad_y = grad_y.data(), p.grad_h_n = grad_h_n.data(), p.grad_c_n = grad_c_n.data();
  p.gates = k_gates.data(), p.cells = k_cells.data(), p.hidden_states = k_states.data();
  p.grad_gates = k_grad.data(), p.grad_h0 = grad_h0.data(), p.grad_c0 = grad_c0.data();
  c.lstm ? launch_lstm_backward(p, nullptr) : launch_gru_backward(p, nullptr);
  compare(k_grad, grad_gates, tolerance, name + " grad_gates");
  compare(grad_h0, dh, tolerance, name + " grad_h0");
  if (c.lstm) compare(grad_c0, dc, tolerance, name + " grad_c0");

  // The states that the weights' gradient is a product with.
  auto previous = poison<T>(N * H);
  PreviousStates<T> q;
  q.kept = k_states.data(), q.h0 = h0.data(), q.resets = c.resets ? resets.get() : nullptr, q.out = previous.data();
  q.steps = S, q.batch = B, q.hidden = H, q.reverse = c.reverse;
  launch_previous_states(q, nullptr);
  compare(previous, old_h, sizeof(T) == 4 ? 1e-6 : 1e-2, name + " previous states");
}

// ---- the decoding loop
// ------------------------------------------------------------------------------------------------

struct Draw {
  int64_t token;
  double log_prob;
};

// The sampling rule, by sorting.
Draw draw(std::vector<double> logits, double u, double temperature, int64_t top_k, double top_p) {
  const int64_t V = static_cast<int64_t>(logits.size());
  if (temperature == 0) {
    int64_t best = 0;
    for (int64_t v = 1; v < V; ++v)
      best = logits[static_cast<size_t>(v)] > logits[static_cast<size_t>(best)] ? v : best;
    return {best, 0};
  }
  std::vector<int64_t> order;
  for (int64_t v = 0; v < V; ++v) order.push_back(v);
  for (double& l : logits) l = static_cast<double>(static_cast<float>(l) / static_cast<float>(temperature));
  const auto value = [&](int64_t v) { return logits[static_cast<size_t>(v)]; };
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return value(a) > value(b); });
  std::vector<double> p(static_cast<size_t>(V));
  double total = 0;
  for (int64_t v = 0; v < V; ++v) {
    const bool kept = top_k == 0 || value(v) >= value(order[static_cast<size_t>(std::min(top_k, V) - 1)]);
    p[static_cast<size_t>(v)] = kept ? std::exp(value(v) - value(order[0])) : 0;
    total += p[static_cast<size_t>(v)];
  }
  if (top_p < 1) {
    double before = 0, kept = 0;
    for (int64_t i = 0; i < V; ++i) {
      double& mine = p[static_cast<size_t>(order[static_cast<size_t>(i)])];
      const double share = mine / total;
      if (i > 0 && before >= top_p) mine = 0;
      before += share;
      kept += mine;
    }
    total = kept;
  }
  double sum = 0;
  int64_t token = V - 1;
  for (int64_t v = 0; v < V; ++v) {
    if (p[static_cast<size_t>(v)] == 0) continue;
    token = v;
    sum += p[static_cast<size_t>(v)];
    if (sum > u * total) break;
  }
  return {token, std::log(p[static_cast<size_t>(token)] / total)};
}

struct GenerateCase {
  CudaCell cell = CudaCell::lstm;
  int64_t batch = 3, prompt = 2, length = 4, vocab = 11, input = 3;
  std::vector<int64_t> hidden = {5, 6};
  double temperature = 0.9, top_p = 1;
  int64_t top_k = 0;
  int blocks = 2;
  bool with_u = true;
  double zoneout = 0;
};

template <class W>
void run_generate(const GenerateCase& c, const std::string& name) {
  const int64_t G = c.cell == CudaCell::gru ? 3 : 4, B = c.batch, V = c.vocab;
  const bool norm = c.cell == CudaCell::layer_norm_lstm;
  int64_t state = 0, largest = 0;
  for (int64_t H : c.hidden) state += H, largest = std::max(largest, H);
  struct Layer {
    std::vector<W> w_ih, w_hh;
    std::vector<float> b_ih, b_hh, ln_ih, ln_hh, ln_cw, ln_cb;
  };
  std::vector<Layer> layers;
  CudaGenerate<W> p;
  int64_t input = c.input, offset = 0;
  for (int64_t H : c.hidden) {
    layers.push_back({random_vector<W>(G * H * input, 0.8), random_vector<W>(G * H * H, 0.6),
                      random_vector<float>(G * H, 0.3), random_vector<float>(G * H, 0.3),
                      random_vector<float>(G * H, 1), random_vector<float>(G * H, 1), random_vector<float>(H, 1),
                      random_vector<float>(H, 1)});
    input = H;
  }
  input = c.input;
  for (size_t l = 0; l < layers.size(); ++l) {
    const Layer& in = layers[l];
    CudaGenerateLayer<W>& out = p.layers[l];
    out.input = input, out.hidden = c.hidden[l], out.offset = offset;
    out.w_ih = in.w_ih.data(), out.w_hh = in.w_hh.data(), out.b_ih = in.b_ih.data(), out.b_hh = in.b_hh.data();
    out.ln_ih = in.ln_ih.data(), out.ln_hh = in.ln_hh.data(), out.ln_c_weight = in.ln_cw.data(),
    out.ln_c_bias = in.ln_cb.data();
    input = c.hidden[l], offset += c.hidden[l];
  }
  const auto embedding = random_vector<float>(V * c.input, 1), head_bias = random_vector<float>(V, 0.5);
  const auto head = random_vector<W>(V * input, 1);
  const auto h0 = random_vector<float>(B * state, 0.5), c0 = random_vector<float>(B * state, 0.5);
  std::vector<int64_t> prompt(static_cast<size_t>(B * c.prompt));
  for (int64_t& token : prompt) token = static_cast<int64_t>(engine() % static_cast<uint64_t>(V));
  std::vector<float> u(static_cast<size_t>(B * c.length));
  const int64_t rng[2] = {42, 3};
  for (int64_t b = 0; b < B; ++b) {
    for (int64_t s = 0; s < c.length; ++s) {
      float& mine = u[static_cast<size_t>(b * c.length + s)];
      mine = c.with_u ? static_cast<float>(engine() >> 40) * 0x1p-24f
                      : philox_uniform(42, 3, (static_cast<uint64_t>(b) << 32) + static_cast<uint64_t>(s));
    }
  }
  auto h = poison<float>(2 * B * state), logits = poison<float>(B * V), raw = poison<float>(2 * B * 4 * largest);
  auto log_probs = poison<float>(B * c.length), h_n = poison<float>(B * state), c_n = poison<float>(B * state);
  std::vector<int64_t> tokens(static_cast<size_t>(B * c.length), -1);
  p.cell = c.cell, p.batch = B, p.prompt_length = c.prompt, p.length = c.length, p.vocab = V, p.state = state;
  p.layer_count = static_cast<int>(layers.size());
  p.embedding = embedding.data(), p.head_weight = head.data(), p.head_bias = head_bias.data(), p.prompt = prompt.data();
  p.h0 = h0.data(), p.c0 = c.cell == CudaCell::gru ? nullptr : c0.data();
  p.u = c.with_u ? u.data() : nullptr, p.rng = c.with_u ? nullptr : rng;
  p.temperature = static_cast<float>(c.temperature), p.top_p = c.top_p, p.top_k = c.top_k;
  p.zoneout_h = p.zoneout_c = static_cast<float>(c.zoneout);
  p.h = h.data(), p.logits = logits.data(), p.raw = raw.data();
  p.tokens = tokens.data(), p.log_probs = log_probs.data(), p.h_n = h_n.data();
  p.c_n = c.cell == CudaCell::gru ? nullptr : c_n.data();
  launch_generate(p, largest, c.blocks, nullptr);

  const auto at = [](const auto& v, int64_t i) { return static_cast<double>(to_float(v[static_cast<size_t>(i)])); };
  const auto normalise = [](std::vector<double>& v) {
    double mean = 0, variance = 0;
    for (double x : v) mean += x / static_cast<double>(v.size());
    for (double x : v) variance += (x - mean) * (x - mean) / static_cast<double>(v.size());
    for (double& x : v) x = (x - mean) / std::sqrt(variance + 1e-5);
  };
  std::vector<double> exact_h(h0.begin(), h0.end()), exact_c(c0.begin(), c0.end());
  for (int64_t b = 0; b < B; ++b) {
    int64_t token = 0;
    for (int64_t s = 0; s < c.prompt + std::max<int64_t>(c.length, 1) - 1; ++s) {
      if (s < c.prompt) token = prompt[static_cast<size_t>(b * c.prompt + s)];
      std::vector<double> x;
      for (int64_t j = 0; j < c.input; ++j) x.push_back(at(embedding, token * c.input + j));
      int64_t base = b * state;
      for (size_t l = 0; l < layers.size(); ++l) {
        const int64_t H = c.hidden[l], I = static_cast<int64_t>(x.size());
        std::vector<double> from_x(static_cast<size_t>(G * H), 0.0), from_h(static_cast<size_t>(G * H), 0.0),
            cell(static_cast<size_t>(H)), o;
        for (int64_t r = 0; r < G * H; ++r) {
          for (int64_t k = 0; k < I; ++k)
            from_x[static_cast<size_t>(r)] += at(layers[l].w_ih, r * I + k) * x[static_cast<size_t>(k)];
          for (int64_t k = 0; k < H; ++k)
            from_h[static_cast<size_t>(r)] += at(layers[l].w_hh, r * H + k) * exact_h[static_cast<size_t>(base + k)];
        }
        if (norm) {
          normalise(from_x), normalise(from_h);
          for (int64_t r = 0; r < G * H; ++r) {
            from_x[static_cast<size_t>(r)] *= at(layers[l].ln_ih, r),
                from_h[static_cast<size_t>(r)] *= at(layers[l].ln_hh, r);
          }
        }
        for (int64_t r = 0; r < G * H; ++r) {
          from_x[static_cast<size_t>(r)] += at(layers[l].b_ih, r),
              from_h[static_cast<size_t>(r)] += at(layers[l].b_hh, r);
        }
        const auto both = [&](int64_t r) { return from_x[static_cast<size_t>(r)] + from_h[static_cast<size_t>(r)]; };
        x.assign(static_cast<size_t>(H), 0.0);
        for (int64_t n = 0; n < H; ++n) {
          const auto i = static_cast<size_t>(base + n);
          if (c.cell == CudaCell::gru) {
            const double r = logistic(both(n)), z = logistic(both(H + n));
            const double candidate =
                std::tanh(from_x[static_cast<size_t>(2 * H + n)] + r * from_h[static_cast<size_t>(2 * H + n)]);
            x[static_cast<size_t>(n)] = (1 - z) * candidate + z * exact_h[i];
          } else {
            const double old = exact_c[i];
            cell[static_cast<size_t>(n)] = logistic(both(H + n)) * old + logistic(both(n)) * std::tanh(both(2 * H + n));
            o.push_back(logistic(both(3 * H + n)));
            exact_c[i] = c.zoneout * old + (1 - c.zoneout) * cell[static_cast<size_t>(n)];
          }
        }
        if (norm) {
          normalise(cell);
          for (int64_t n = 0; n < H; ++n) {
            cell[static_cast<size_t>(n)] =
                cell[static_cast<size_t>(n)] * at(layers[l].ln_cw, n) + at(layers[l].ln_cb, n);
          }
        }
        for (int64_t n = 0; n < H; ++n) {
          double& mine = x[static_cast<size_t>(n)];
          if (c.cell != CudaCell::gru) mine = o[static_cast<size_t>(n)] * std::tanh(cell[static_cast<size_t>(n)]);
          double& kept = exact_h[static_cast<size_t>(base + n)];
          mine = kept = c.zoneout * kept + (1 - c.zoneout) * mine;
        }
        base += H;
      }
      const int64_t drawn = s - (c.prompt - 1);
      if (drawn < 0 || drawn >= c.length) continue;
      std::vector<double> exact_logits;
      for (int64_t v = 0; v < V; ++v) {
        double sum = at(head_bias, v);
        for (size_t k = 0; k < x.size(); ++k) sum += at(head, v * input + static_cast<int64_t>(k)) * x[k];
        exact_logits.push_back(sum);
      }
      const auto i = static_cast<size_t>(b * c.length + drawn);
      const Draw wanted = draw(exact_logits, static_cast<double>(u[i]), c.temperature, c.top_k, c.top_p);
      if (tokens[i] != wanted.token) {
        return expect(false, name + ": row " + std::to_string(b) + " token " + std::to_string(drawn) + " is " +
                                 std::to_string(tokens[i]) + ", want " + std::to_string(wanted.token));
      }
      expect(std::fabs(static_cast<double>(log_probs[i]) - wanted.log_prob) < 1e-4,
             name + ": log_prob " + std::to_string(log_probs[i]));
      token = tokens[i];
    }
  }
  compare(h_n, exact_h, 1e-5, name + " h_n");
  if (c.cell != CudaCell::gru) compare(c_n, exact_c, 1e-5, name + " c_n");
}

// The draw alone, on logits with ties and extremes, against sorting.
void run_sampler() {
  const std::vector<std::vector<float>> rows = {{0, 0, 0, 0}, {1, 2, 3, 2, 1, 2}, {-1e30f, 0, 1e30f},
                                                {5},          {0, -0.0f, 1, 1},   {-3, -3, -3, -200, 7, 7, 7}};
  for (const auto& row : rows) {
    for (double temperature : {0.0, 0.7}) {
      for (int64_t k : {0, 1, 2}) {
        for (double top_p : {0.1, 0.5, 0.75, 1.0}) {
          if (temperature == 0.0 && (k > 0 || top_p > 0.1)) continue;
          for (float u : {0.0f, 0.5f, 0.999f}) {
            const int64_t V = static_cast<int64_t>(row.size());
            const int64_t top_k = k > V ? V : k;
            const Draw wanted = draw({row.begin(), row.end()}, static_cast<double>(u), temperature, top_k, top_p);
            CudaGenerate<float> p;
            p.vocab = V, p.temperature = static_cast<float>(temperature), p.top_p = top_p, p.top_k = top_k;
            std::vector<float> logits = row;
            int64_t token = -1;
            float log_prob = 0;
            cuda_host::launch(1, kGenerateThreads, static_cast<size_t>(generate_shared_bytes(1, false)), [&] {
              float mine = 0;
              auto& scratch = *reinterpret_cast<BlockScratch*>(shared_memory());
              const int64_t found = block_sample(p, logits.data(), u, mine, scratch);
              if (threadIdx.x == 0) token = found, log_prob = mine;
            });
            expect(token == wanted.token && std::fabs(static_cast<double>(log_prob) - wanted.log_prob) < 1e-5,
                   "sampler: V " + std::to_string(V) + " temperature " + std::to_string(temperature) + " k " +
                       std::to_string(top_k) + " p " + std::to_string(top_p) + " u " + std::to_string(u) + ": token " +
                       std::to_string(token) + ", want " + std::to_string(wanted.token));
          }
        }
      }
    }
  }
}

void run_dropout() {
  const int64_t rng[2] = {7, 9};
  const auto x = random_vector<float>(10, 1);
  auto out = poison<float>(10);
  Dropout<float> p;
  p.x = x.data(), p.out = out.data(), p.count = 10, p.period = 5, p.p = 0.5, p.rng = rng, p.stream = 3;
  launch_dropout(p, nullptr);
  for (int64_t i = 0; i < 10; ++i) {
    const bool kept = philox_uniform(7, 12, static_cast<uint64_t>(i % 5)) >= 0.5f;
    expect(out[static_cast<size_t>(i)] == (kept ? 2 * x[static_cast<size_t>(i)] : 0), "dropout " + std::to_string(i));
  }
}

void check_plans() {
  const DeviceLimits h100{132, 227 << 10, true};
  for (int64_t hidden : {1, 64, 256, 512, 650, 768, 1024, 1536, 2048}) {
    for (int64_t batch : {1, 16, 64, 256}) {
      for (int gates : {3, 4}) {
        for (int bytes : {2, 4}) {
          for (bool backward : {false, true}) {
            const PersistentPlan plan = persistent_plan(hidden, batch, gates, bytes, backward, h100);
            const std::string what = "plan " + std::to_string(hidden) + " " + std::to_string(batch);
            if (plan.objection != nullptr) {
              expect(hidden >= 768 || batch >= 256, what + " should fit");
              continue;
            }
            expect(plan.shared_bytes <= h100.shared_per_block && plan.blocks <= h100.multiprocessors,
                   what + " is too large");
            expect(int64_t{plan.blocks} * plan.units >= hidden && int64_t{plan.blocks - 1} * plan.units < hidden,
                   what + " cover");
          }
        }
      }
    }
  }
  expect(persistent_plan(64, 1, 4, 4, false, {132, 227 << 10, false}).objection != nullptr, "no cooperative launch");
}

void run_everything(bool quick) {
  check_plans();
  run_dropout();
  for (bool lstm : {true, false}) {
    const std::string cell = lstm ? "lstm" : "gru";
    Case plain;
    plain.lstm = lstm;
    if (!quick) run<float>(plain, cell + " plain");
    Case all = plain;
    all.reverse = all.resets = all.mask = true;
    all.zoneout_h = 0.3, all.zoneout_c = 0.4, all.batch = 9, all.blocks = 3, all.hidden = 7, all.steps = 3;
    run<float>(all, cell + " all options, two row tiles, an uneven last block");
    Case tight = all;
    tight.hidden = 5, tight.batch = 17, tight.blocks = 2, tight.steps = 2;
    tight.shared_limit = 13400;  // eight rows and one gate at a time
    run<float>(tight, cell + " tight shared memory");
    if (quick) continue;
    Case eval = plain;
    eval.training = eval.bias = false;
    eval.zoneout_h = 0.3, eval.zoneout_c = 0.2, eval.blocks = 1;
    run<float>(eval, cell + " eval, one block");
    Case deep = plain;
    deep.hidden = 130, deep.steps = 2, deep.batch = 2;  // beyond the 128 that one pass of a warp covers
    deep.blocks = 10;
    run<float>(deep, cell + " two passes over the depth");
    Case single = plain;
    single.steps = single.batch = single.hidden = 1;
    run<float>(single, cell + " smallest");
    run<BFloat16>(all, cell + " bfloat16");
  }
  for (CudaCell cell : {CudaCell::lstm, CudaCell::gru, CudaCell::layer_norm_lstm}) {
    const std::string name = "generate " + std::to_string(static_cast<int>(cell));
    GenerateCase c;
    c.cell = cell;
    if (quick) c.length = 2;
    if (!quick || cell == CudaCell::layer_norm_lstm) run_generate<float>(c, name);
    if (quick) continue;
    GenerateCase one = c;
    one.batch = 1, one.with_u = false, one.top_k = 3, one.prompt = 1, one.hidden = {4};
    run_generate<float>(one, name + " one row, rng, top-k");
    GenerateCase wide = c;
    wide.batch = 9, wide.length = 2, wide.top_p = 0.6, wide.vocab = 70, wide.zoneout = 0.2, wide.blocks = 3;
    run_generate<float>(wide, name + " nine rows, top-p, zoneout");
    GenerateCase greedy = c;
    greedy.temperature = 0;
    run_generate<BFloat16>(greedy, name + " greedy, bfloat16 weights");
    GenerateCase none = c;
    none.length = 0;
    run_generate<float>(none, name + " nothing to draw");
  }
  if (!quick) run_sampler();
}

}  // namespace

// With the argument "quick", a few cases: for sanitizers that make threads slow.
int main(int argc, char** argv) {
  const bool quick = argc > 1 && std::string(argv[1]) == "quick";
  run_everything(quick);
#ifndef GENFUSE_HOST_THREADS
  cuda_host::order = cuda_host::Order::backward;
  run_everything(true);
#endif
  std::printf(failures == 0 ? "ok\n" : "%d failed\n", failures);
  return failures == 0 ? 0 : 1;
}

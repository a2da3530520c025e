// The decoding loop on CPU: one team of threads for the whole text. Weights are packed once; a step reads them once,
// which is what it costs at small batches (0.1 ms for 10 MB from the shared cache), so bfloat16 weights halve it.
//
// Rows never influence each other: every product is a chain over its own row, in an order that depends on neither the
// batch nor the threads, so row b's text depends on its prompt, the seed and b alone.
#include "recurrent/generate.h"

#include <algorithm>

#include "common/gemm.h"
#include "recurrent/cell_math.h"
#include "recurrent/sequence_cpu.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

using V = Vec<float>;
constexpr int L = kLanes<float>;
constexpr int64_t kTableBytes = 16 << 20;

// Draws by the library's rule (reference/recurrent.py, sample_token) from one row of logits; `weight` and `order` are
// scratch for `vocab` values each.
struct Sampler {
  int64_t vocab;
  float temperature;
  int64_t top_k;
  double top_p;

  int64_t draw(float* logits, float u, double* weight, int64_t* order, float* log_prob) const {
    if (temperature == 0) {
      *log_prob = 0;
      int64_t best = 0;
      for (int64_t v = 1; v < vocab; ++v) {
        const bool better = logits[v] > logits[best] || (std::isnan(logits[v]) && !std::isnan(logits[best]));
        if (better) best = v;
      }
      return best;
    }
    for (int64_t v = 0; v < vocab; ++v) logits[v] /= temperature;
    float largest = logits[0];
    for (int64_t v = 1; v < vocab; ++v) largest = logits[v] > largest ? logits[v] : largest;
    double total = weigh(logits, largest, weight);
    if (std::isnan(total)) {  // NaN in, NaN out, and a token that exists; nothing below could order the logits
      *log_prob = static_cast<float>(total);
      return vocab - 1;
    }
    if (top_k > 0 && top_k < vocab) total = keep_top_k(logits, weight);
    if (top_p < 1) total = keep_nucleus(weight, order, total);
    const double target = static_cast<double>(u) * total;
    double sum = 0;
    int64_t token = vocab - 1;
    for (int64_t v = 0; v < vocab; ++v) {
      if (!(weight[v] > 0)) continue;
      token = v;
      sum += weight[v];
      if (sum > target) break;
    }
    *log_prob = static_cast<float>(static_cast<double>(logits[token]) - static_cast<double>(largest) - std::log(total));
    return token;
  }

 private:
  // exp(logit - largest) in float64, and their sum in index order.
  double weigh(const float* logits, float largest, double* weight) const {
    constexpr int lanes = kLanes<double>;
    for (int64_t v = 0; v < vocab; v += lanes) {
      const int64_t n = minimum(lanes, vocab - v);
      Vec<double> x{};
      for (int64_t i = 0; i < n; ++i) x[i] = static_cast<double>(logits[v + i]) - static_cast<double>(largest);
      // exp saturates instead of underflowing: below the smallest float64 the probability is 0.
      x = x < -708.0 ? Vec<double>{} : exp(x);
      for (int64_t i = 0; i < n; ++i) weight[v + i] = x[i];
    }
    double total = 0;
    for (int64_t v = 0; v < vocab; ++v) total += weight[v];
    return total;
  }

  double keep_top_k(const float* logits, double* weight) const {
    // The k-th largest weight belongs to the k-th largest logit; equal logits have equal weights, but not the reverse.
    double total = 0;
    float* sorted = scratch_logits;
    std::copy(logits, logits + vocab, sorted);
    std::nth_element(sorted, sorted + top_k - 1, sorted + vocab, [](float a, float b) { return a > b; });
    const float threshold = sorted[top_k - 1];
    for (int64_t v = 0; v < vocab; ++v) {
      if (logits[v] < threshold) weight[v] = 0;
      total += weight[v];
    }
    return total;
  }

  // The most probable first, the lower index first among equals, popped off a heap until their mass is reached.
  double keep_nucleus(double* weight, int64_t* order, double total) const {
    if (!(total > 0)) return total;
    for (int64_t v = 0; v < vocab; ++v) order[v] = v;
    const auto after = [&](int64_t a, int64_t b) { return weight[a] < weight[b] || (weight[a] == weight[b] && a > b); };
    std::make_heap(order, order + vocab, after);
    double before = 0, kept = 0;
    int64_t left = vocab;
    while (left > 0 && (left == vocab || before < top_p)) {
      std::pop_heap(order, order + left, after);
      --left;
      const double p = weight[order[left]] / total;
      before += p;
    }
    for (int64_t i = 0; i < left; ++i) weight[order[i]] = 0;
    for (int64_t v = 0; v < vocab; ++v) kept += weight[v];
    return kept;
  }

 public:
  float* scratch_logits = nullptr;
};

template <class P>
struct PackedWeights {
  P* data = nullptr;
  int64_t depth = 0;
  P* panel(int64_t vector) const { return data + vector * L * depth; }
};

template <class P>
struct LayerState {
  int64_t hidden = 0, ld = 0, vectors = 0;
  PackedWeights<P> w_ih, w_hh;
  float* bias = nullptr;   // [vectors][4][L]
  float* h[2] = {};        // [batch, ld], read and written in turn
  float* c = nullptr;      // [batch, ld]
  float* raw_x = nullptr;  // layer norm: W_ih x and W_hh h, [batch, 4 hidden], c~ and o, [batch, hidden]
  float* raw_h = nullptr;
  float* cell = nullptr;
  float* out_gate = nullptr;
};

template <class P>
class GenerateCpu {
  const Generate& p;
  int gates;
  int64_t steps, head_vectors;
  Grid grid;
  Barrier* barriers;
  LayerState<P>* layers;
  PackedWeights<P> head;
  float* table = nullptr;  // W_ih of the first layer times every embedding: [vocab][vectors][gates][L]
  float* logits;           // [batch, head_vectors * L]
  double* weight;          // [batch, vocab]
  int64_t* order;
  float* sorted;
  const float** x_rows;  // [batch]: the first layer's input
  int64_t* current;      // [batch]: the token being read

 public:
  GenerateCpu(const Generate& args, Arena& arena, int threads) : p(args) {
    gates = p.cell == Cell::gru ? 3 : 4;
    steps = p.prompt_length + maximum(p.length, 1) - 1;
    head_vectors = ceil_div(p.vocab, L);
    layers = arena.take<LayerState<P>>(p.layer_count);
    double macs = 0;
    int64_t weights = head_vectors * L * p.layers[p.layer_count - 1].hidden, narrowest = head_vectors;
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const GenerateLayer& in = p.layers[l];
      LayerState<P> s;
      s.hidden = in.hidden;
      s.vectors = ceil_div(in.hidden, L);
      s.ld = s.vectors * L;
      s.bias = arena.take<float>(4 * s.ld);
      s.h[0] = arena.take<float>(p.batch * s.ld);
      s.h[1] = arena.take<float>(p.batch * s.ld);
      s.c = arena.take<float>(p.batch * s.ld);
      if (p.cell == Cell::layer_norm_lstm) {
        s.raw_x = arena.take<float>(p.batch * 4 * s.hidden);
        s.raw_h = arena.take<float>(p.batch * 4 * s.hidden);
        s.cell = arena.take<float>(p.batch * s.hidden);
        s.out_gate = arena.take<float>(p.batch * s.hidden);
      }
      s.w_hh = {arena.take<P>(gates * s.ld * in.hidden), in.hidden};
      // Enough rows read each token's product off a table; the head's cost is the same either way.
      const int64_t entry = gates * s.ld;
      if (l == 0 && 2 * p.vocab <= p.batch * steps && p.vocab * entry * 4 <= kTableBytes) {
        table = arena.take<float>(p.vocab * entry);
      }
      s.w_ih = {arena.take<P>(gates * s.ld * in.input), in.input};
      weights += gates * s.ld * (in.hidden + (l == 0 && table != nullptr ? 0 : in.input));
      narrowest = minimum(narrowest, s.vectors);
      if (arena.base != nullptr) layers[l] = s;
    }
    macs = static_cast<double>(weights) / L;
    grid = choose_grid(threads, p.batch, maximum(narrowest, 1), macs, static_cast<double>(weights) * sizeof(P),
                       static_cast<int>(p.layer_count) + 2);
    barriers = arena.take<Barrier>(grid.groups);
    if (arena.base != nullptr) {
      for (int i = 0; i < grid.groups; ++i) new (barriers + i) Barrier;
    }
    head = {arena.take<P>(head_vectors * L * p.layers[p.layer_count - 1].hidden), p.layers[p.layer_count - 1].hidden};
    logits = arena.take<float>(p.batch * head_vectors * L);
    weight = arena.take<double>(p.batch * p.vocab);
    order = p.top_p < 1 ? arena.take<int64_t>(p.batch * p.vocab) : nullptr;
    sorted = p.top_k > 0 ? arena.take<float>(p.batch * p.vocab) : nullptr;
    x_rows = arena.take<const float*>(p.batch);
    current = arena.take<int64_t>(p.batch);
  }

  static double work(const Generate& a) {
    double weights = static_cast<double>(a.vocab * a.layers[a.layer_count - 1].hidden);
    for (int64_t l = 0; l < a.layer_count; ++l) {
      weights += 4.0 * static_cast<double>(a.layers[l].hidden * (a.layers[l].hidden + a.layers[l].input));
    }
    return weights * static_cast<double>(a.batch * (a.prompt_length + a.length));
  }

  void run(const Executor& executor, int threads) {
    run_team(executor, threads, [&](const Member& m) { member(m); });
  }

 private:
  void member(const Member& m) {
    Grid mine = grid;
    if (m.size < grid.groups * grid.lanes) {
      mine = m.size < grid.groups ? Grid{m.size, 1} : Grid{grid.groups, m.size / grid.groups};
    }
    pack(m, mine);
    m.wait();
    if (table != nullptr) {
      fill_table(m);
      m.wait();
    }
    const Place place(m, mine, p.batch, barriers);
    if (!place.works) return;
    for (int64_t s = 0; s < steps; ++s) {
      read_tokens(place, s);
      for (int64_t l = 0; l < p.layer_count; ++l) step(place, l, s);
      const int64_t drawn = s - (p.prompt_length - 1);
      if (drawn >= 0 && drawn < p.length) {
        project(place, s);
        sample(place, drawn);
      }
    }
    put_state(place);
  }

  const float* gate_row(const float* w, int64_t hidden, int64_t depth, int64_t v, int64_t column) const {
    const int64_t unit = v * L + column % L;
    return unit < hidden ? w + (column / L * hidden + unit) * depth : nullptr;
  }

  void pack(const Member& m, Grid used) {
    int64_t offset = 0;
    const int64_t total = p.state_size();
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const GenerateLayer& in = p.layers[l];
      const LayerState<P>& s = layers[l];
      const Range units = m.share(s.vectors);
      for (int64_t v = units.begin; v < units.end; ++v) {
        pack_columns<float>(
            gates * L, in.input, [&](int64_t j) { return gate_row(in.w_ih, s.hidden, in.input, v, j); },
            s.w_ih.panel(gates * v));
        pack_columns<float>(
            gates * L, s.hidden, [&](int64_t j) { return gate_row(in.w_hh, s.hidden, s.hidden, v, j); },
            s.w_hh.panel(gates * v));
        for (int64_t i = 0; i < L; ++i) {
          const int64_t unit = v * L + i;
          const auto of = [&](const float* b, int gate) {
            return b != nullptr && unit < s.hidden ? b[gate * s.hidden + unit] : 0.0f;
          };
          float* to = s.bias + v * 4 * L + i;
          for (int gate = 0; gate < 4; ++gate) {
            if (p.cell != Cell::gru) {
              to[gate * L] = of(in.b_ih, gate) + of(in.b_hh, gate);
            } else {
              to[gate * L] = gate < 2 ? of(in.b_ih, gate) + of(in.b_hh, gate) : of(gate == 2 ? in.b_ih : in.b_hh, 2);
            }
          }
        }
      }
      const Range rows = m.share(p.batch);
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        for (int64_t j = 0; j < s.ld; ++j) {
          const bool real = j < s.hidden;
          s.h[0][b * s.ld + j] = s.h[1][b * s.ld + j] = real ? p.h0[b * total + offset + j] : 0;
          s.c[b * s.ld + j] = real && p.c0 != nullptr ? p.c0[b * total + offset + j] : 0;
        }
      }
      offset += s.hidden;
    }
    int64_t turn = 0;
    for (int lane = 0; lane < used.lanes; ++lane) {
      Panels<float>::for_panels(split(head_vectors, used.lanes, lane), [&](int64_t v, int width) {
        if (turn++ % m.size != m.rank) return;
        pack_columns<float>(
            width * L, head.depth,
            [&](int64_t j) {
              const int64_t token = v * L + j;
              return token < p.vocab ? p.head_weight + token * head.depth : nullptr;
            },
            head.panel(v));
      });
    }
  }

  void fill_table(const Member& m) {
    const LayerState<P>& s = layers[0];
    const Range units = m.share(s.vectors);
    alignas(64) float tile[kTileRows * 4 * L];
    for (int64_t v = units.begin; v < units.end; ++v) {
      for_tiles(0, p.vocab, [&](int64_t first, int count) {
        const float* from[kTileRows];
        for (int r = 0; r < count; ++r) from[r] = p.embedding + (first + r) * s.w_ih.depth;
        multiply(count, gates, s.w_ih.depth, from, 1, s.w_ih.panel(gates * v), tile);
        for (int r = 0; r < count; ++r) {
          for (int i = 0; i < gates; ++i) {
            store(table + ((first + r) * s.vectors + v) * gates * L + i * L, load(tile + (r * gates + i) * L));
          }
        }
      });
    }
  }

  // Every lane of a group notes its rows' tokens for itself: the same values, written before they are read.
  void read_tokens(const Place& place, int64_t s) {
    if (place.lane == 0) {
      for (int64_t b = place.rows.begin; b < place.rows.end; ++b) {
        current[b] =
            s < p.prompt_length ? p.prompt[b * p.prompt_length + s] : p.tokens[b * p.length + s - p.prompt_length];
        x_rows[b] = p.embedding + current[b] * layers[0].w_ih.depth;
      }
    }
    place.wait();
  }

  void step(const Place& place, int64_t l, int64_t s) {
    const LayerState<P>& layer = layers[l];
    const Range units = split(layer.vectors, place.lanes, place.lane);
    const float* h_old = layer.h[s & 1];
    const float* below = l > 0 ? layers[l - 1].h[1 - (s & 1)] : nullptr;
    alignas(64) float tile_h[kTileRows * 4 * L], tile_x[kTileRows * 4 * L];
    for (int64_t i = units.begin; i < units.end; ++i) {
      const int64_t v = to_and_fro(i, units, s);
      for_tiles(place.rows.begin, place.rows.end, [&](int64_t first, int count) {
        const float *from[kTileRows], *x_part[kTileRows];
        for (int r = 0; r < count; ++r) from[r] = h_old + (first + r) * layer.ld;
        multiply(count, gates, layer.hidden, from, 1, layer.w_hh.panel(gates * v), tile_h);
        if (l == 0 && table != nullptr) {
          for (int r = 0; r < count; ++r) x_part[r] = table + (current[first + r] * layer.vectors + v) * gates * L;
        } else {
          for (int r = 0; r < count; ++r) {
            from[r] = l == 0 ? x_rows[first + r] : below + (first + r) * layers[l - 1].ld;
            x_part[r] = tile_x + r * gates * L;
          }
          multiply(count, gates, layer.w_ih.depth, from, 1, layer.w_ih.panel(gates * v), tile_x);
        }
        for (int r = 0; r < count; ++r) {
          const float* h_part = tile_h + r * gates * L;
          switch (p.cell) {
            case Cell::lstm:
              lstm_cell_of(layer, s, first + r, v, x_part[r], h_part);
              break;
            case Cell::gru:
              gru_cell_of(layer, s, first + r, v, x_part[r], h_part);
              break;
            case Cell::layer_norm_lstm:
              keep_raw(layer, first + r, v, x_part[r], h_part);
              break;
          }
        }
      });
    }
    if (p.cell == Cell::layer_norm_lstm) layer_norm_cell(place, l, s, units);
    place.wait();
  }

  static V mixed(double keep, V old_state, V new_state) {
    if (keep == 0) return new_state;
    const float w = static_cast<float>(keep);
    return w * old_state + (1 - w) * new_state;
  }

  void put_h(const LayerState<P>& layer, int64_t s, int64_t b, int64_t v, V h_new) {
    const int64_t at = b * layer.ld + v * L;
    store(layer.h[1 - (s & 1)] + at, mixed(p.zoneout_h, load(layer.h[s & 1] + at), h_new));
  }

  void lstm_cell_of(const LayerState<P>& layer, int64_t s, int64_t b, int64_t v, const float* x_part,
                    const float* h_part) {
    const float* beta = layer.bias + v * 4 * L;
    V a[4];
    for (int gate = 0; gate < 4; ++gate)
      a[gate] = load(h_part + gate * L) + load(x_part + gate * L) + load(beta + gate * L);
    const auto act = lstm_gates(a[0], a[1], a[2], a[3]);
    float* c = layer.c + b * layer.ld + v * L;
    const V c_new = lstm_cell(act, load(c));
    store(c, mixed(p.zoneout_c, load(c), c_new));
    put_h(layer, s, b, v, act.o * tanh(c_new));
  }

  void gru_cell_of(const LayerState<P>& layer, int64_t s, int64_t b, int64_t v, const float* x_part,
                   const float* h_part) {
    const float* beta = layer.bias + v * 4 * L;
    const auto act =
        gru_gates(load(h_part) + load(x_part) + load(beta), load(h_part + L) + load(x_part + L) + load(beta + L),
                  load(x_part + 2 * L) + load(beta + 2 * L), load(h_part + 2 * L) + load(beta + 3 * L));
    put_h(layer, s, b, v, gru_output(act, load(layer.h[s & 1] + b * layer.ld + v * L)));
  }

  void keep_raw(const LayerState<P>& layer, int64_t b, int64_t v, const float* x_part, const float* h_part) {
    const int64_t n = layer.hidden - v * L;
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = b * 4 * layer.hidden + gate * layer.hidden + v * L;
      store_upto(layer.raw_x + at, load(x_part + gate * L), n);
      store_upto(layer.raw_h + at, load(h_part + gate * L), n);
    }
  }

  // Statistics are over whole rows; each lane computes those of its group's rows for itself.
  void layer_norm_cell(const Place& place, int64_t l, int64_t s, Range units) {
    const LayerState<P>& layer = layers[l];
    const GenerateLayer& in = p.layers[l];
    const int64_t H = layer.hidden;
    place.wait();
    for (int64_t b = place.rows.begin; b < place.rows.end; ++b) {
      const float *x_raw = layer.raw_x + b * 4 * H, *h_raw = layer.raw_h + b * 4 * H;
      const auto of_x = row_moments(x_raw, 4 * H), of_h = row_moments(h_raw, 4 * H);
      const float rstd_x = of_x.rstd(p.eps), rstd_h = of_h.rstd(p.eps);
      for (int64_t v = units.begin; v < units.end; ++v) {
        const int64_t n = H - v * L;
        V a[4];
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t at = gate * H + v * L;
          a[gate] = load_upto(in.ln_hh + at, n) * ((load_upto(h_raw + at, n) - of_h.mean) * rstd_h) +
                    load_upto(in.ln_ih + at, n) * ((load_upto(x_raw + at, n) - of_x.mean) * rstd_x) +
                    load(layer.bias + (v * 4 + gate) * L);
        }
        const auto act = lstm_gates(a[0], a[1], a[2], a[3]);
        float* c = layer.c + b * layer.ld + v * L;
        const V c_new = lstm_cell(act, load(c));
        store_upto(layer.cell + b * H + v * L, c_new, n);
        store_upto(layer.out_gate + b * H + v * L, act.o, n);
        store(c, mixed(p.zoneout_c, load(c), c_new));
      }
    }
    place.wait();
    for (int64_t b = place.rows.begin; b < place.rows.end; ++b) {
      const auto moments = row_moments(layer.cell + b * H, H);
      const float rstd = moments.rstd(p.eps);
      for (int64_t v = units.begin; v < units.end; ++v) {
        const int64_t n = H - v * L;
        const V normal =
            load_upto(in.ln_c_weight + v * L, n) * ((load_upto(layer.cell + b * H + v * L, n) - moments.mean) * rstd) +
            load_upto(in.ln_c_bias + v * L, n);
        put_h(layer, s, b, v, load_upto(layer.out_gate + b * H + v * L, n) * tanh(normal));
      }
    }
  }

  void project(const Place& place, int64_t s) {
    const LayerState<P>& top = layers[p.layer_count - 1];
    const float* h = top.h[1 - (s & 1)];
    alignas(64) float tile[kTileRows * kPanel<float>];
    Panels<float>::for_panels(split(head_vectors, place.lanes, place.lane), [&](int64_t v, int width) {
      for_tiles(place.rows.begin, place.rows.end, [&](int64_t first, int count) {
        const float* from[kTileRows];
        for (int r = 0; r < count; ++r) from[r] = h + (first + r) * top.ld;
        multiply(count, width, head.depth, from, 1, head.panel(v), tile);
        for (int r = 0; r < count; ++r) {
          for (int i = 0; i < width; ++i) {
            const int64_t at = (v + i) * L;
            V value = load(tile + (r * width + i) * L);
            if (p.head_bias != nullptr) value += load_upto(p.head_bias + at, p.vocab - at);
            store(logits + (first + r) * head_vectors * L + at, value);
          }
        }
      });
    });
    place.wait();
  }

  void sample(const Place& place, int64_t drawn) {
    Sampler sampler{p.vocab, static_cast<float>(p.temperature), p.top_k, p.top_p};
    const Range mine = split(place.rows.end - place.rows.begin, place.lanes, place.lane);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const int64_t b = place.rows.begin + i, at = b * p.length + drawn;
      float u = 0;
      if (p.u != nullptr) {
        u = p.u[at];
      } else if (p.temperature > 0) {
        u = philox_uniform(p.seed, p.offset, (static_cast<uint64_t>(b) << 32) + static_cast<uint64_t>(drawn));
      }
      sampler.scratch_logits = sorted + (sorted != nullptr ? b * p.vocab : 0);
      p.tokens[at] = sampler.draw(logits + b * head_vectors * L, u, weight + b * p.vocab,
                                  order + (order != nullptr ? b * p.vocab : 0), p.log_probs + at);
    }
    place.wait();
  }

  void put_state(const Place& place) {
    const int64_t total = p.state_size();
    int64_t offset = 0;
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const LayerState<P>& s = layers[l];
      if (place.lane == 0) {
        for (int64_t b = place.rows.begin; b < place.rows.end; ++b) {
          for (int64_t j = 0; j < s.hidden; ++j) {
            p.h_n[b * total + offset + j] = s.h[steps & 1][b * s.ld + j];
            if (p.c_n != nullptr) p.c_n[b * total + offset + j] = s.c[b * s.ld + j];
          }
        }
      }
      offset += s.hidden;
    }
  }
};

}  // namespace

KernelOf<Generate> generate_kernel() {
  constexpr auto f32 = kernel_of<GenerateCpu<float>, Generate>;
  constexpr auto bf16 = kernel_of<GenerateCpu<uint16_t>, Generate>;
  (void)f32, (void)bf16;
  return {[](const Generate& a, int threads) { return (a.bf16_weights ? bf16() : f32()).workspace(a, threads); },
          [](const Generate& a, char* workspace, const Executor& executor) {
            (a.bf16_weights ? bf16() : f32()).run(a, workspace, executor);
          }};
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// The LSTM on CPU. Both passes go through the sequence in chunks of steps. Within a chunk the products that do not
// depend on the recurrence are done for all rows at once by all threads; the steps are then done by a grid of threads
// (sequence_cpu.h). A thread owns whole units, that is, all four gates of them, so the activations follow the product
// while it is in L1, and a step needs one barrier: the next one reads every unit's h.
//
// Layer norm adds barriers, because a row's statistics are over all units: each thread leaves moments of its units, in
// blocks of one vector, and everyone combines all blocks in the same order, whoever computed them.
#include "recurrent/lstm.h"

#include "common/gemm.h"
#include "recurrent/cell_math.h"
#include "recurrent/sequence_cpu.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

// Which a layer norm's and a projection's exchanges add to.
template <class T>
int barriers_per_step(const LstmInputs<T>& in) {
  return 1 + (in.projected() ? 1 : 0) + (in.layer_norm() ? 3 : 0);
}

// ---- forward ----

template <class T>
class LstmForwardCpu : RecurrentCpu<T, 4> {
  using Base = RecurrentCpu<T, 4>;
  using Base::g, Base::G, Base::H, Base::keep_c, Base::L, Base::ld_h, Base::ld_s, Base::S, Base::seq;
  using V = Vec<T>;

  const LstmForward<T>& p;
  const LstmInputs<T>& in = p;
  bool few_rows;  // W_ih is used where it lies, and x is packed
  int64_t chunk;
  Panels<T> w_ih, w_hh, w_hr;
  T* bias;   // [h_vectors][4][L]
  T* h[2];   // [batch, ld_s], read and written in turn
  T* c;      // [batch, ld_h]
  T* raw_h;  // projection: o tanh(c), [batch, ld_h]
  const T** x_rows;
  T* x_masked;
  T* gates;      // without a reserve: one chunk of W_ih x
  T* recurrent;  // layer norm without a reserve: one step of W_hh h, [batch, 4 H]
  T* stats;      // layer norm without a reserve: one chunk
  T* cell;       // layer norm: c~ and o of this step, [batch, ld_h]
  T* out_gate;
  T* parts;  // layer norm: moments of each block, [batch][h_vectors][2]

 public:
  using Base::work;
  LstmForwardCpu(const LstmForward<T>& args, Arena& arena, int threads)
      : Base(args, arena, threads, barriers_per_step(args)), p(args) {
    const bool once = seq.rows <= kUnpackedRows;
    few_rows = !once && seq.rows <= kUnpackedProjectionRows;
    chunk = chunk_steps(seq);
    const int64_t rows = minimum(chunk * seq.batch, seq.rows);
    const bool ln = in.layer_norm(), save = p.reserve.cells != nullptr;
    const int64_t input_size = few_rows ? Panels<T>::size(seq.input, rows) : 4 * ld_h * seq.input;
    w_ih = {once ? nullptr : arena.take<T>(input_size), seq.input, 4 * ld_h};
    w_hh = {once || seq.batch == 1 ? nullptr : arena.take<T>(4 * ld_h * S), S, 4 * ld_h};
    w_hr = {in.projected() && !once ? arena.take<T>(ld_s * H) : nullptr, H, S};
    bias = arena.take<T>(4 * ld_h);
    h[0] = arena.take<T>(seq.batch * ld_s);
    h[1] = arena.take<T>(seq.batch * ld_s);
    c = arena.take<T>(seq.batch * ld_h);
    raw_h = in.projected() ? arena.take<T>(seq.batch * ld_h) : nullptr;
    x_rows = arena.take<const T*>(rows);
    x_masked = in.reg.masks_input() ? arena.take<T>(rows * seq.input) : nullptr;
    gates = save ? nullptr : arena.take<T>(rows * G);
    recurrent = ln && !save ? arena.take<T>(seq.batch * G) : nullptr;
    stats = ln && !save ? arena.take<T>(rows * 6) : nullptr;
    cell = ln ? arena.take<T>(seq.batch * ld_h) : nullptr;
    out_gate = ln ? arena.take<T>(seq.batch * ld_h) : nullptr;
    parts = ln ? arena.take<T>(seq.batch * this->h_vectors * 2) : nullptr;
  }

  void run(const Executor& executor, int threads) {
    run_team(executor, threads, [&](const Member& m) { member(m); });
  }

 private:
  void member(const Member& m) {
    const Grid mine = this->grid_for(m.size);
    this->prepare(m);
    if (this->dropped != nullptr) m.wait();
    prepare_forward(m);
    m.wait();
    const Place place(m, mine, seq.batch, this->barriers);
    for (int64_t begin = 0; begin < seq.steps; begin += chunk) {
      const Chunk part(g, begin, minimum(begin + chunk, seq.steps));
      this->gather_input(m, part, x_rows, x_masked);
      m.wait();
      project_input(m, part);
      m.wait();
      if (in.layer_norm()) {
        input_stats(m, part);
        m.wait();
      }
      if (place.works) {
        for (int64_t s = part.begin; s < part.end; ++s) step(place, part, s);
      }
      m.wait();
    }
  }

  void prepare_forward(const Member& m) {
    const Range units = m.share(this->h_vectors);
    for (int64_t v = units.begin; v < units.end; ++v) {
      for (int gate = 0; gate < 4; ++gate) {
        for (int64_t l = 0; l < L; ++l) {
          const int64_t unit = v * L + l, at = gate * H + unit;
          T sum = 0;
          if (unit < H && in.b_ih != nullptr) sum += in.b_ih[at];
          if (unit < H && in.b_hh != nullptr) sum += in.b_hh[at];
          bias[(v * 4 + gate) * L + l] = sum;
        }
      }
      if (w_ih.data != nullptr && !few_rows) {
        pack_columns<T>(
            4 * L, seq.input, [&](int64_t j) { return this->column(in.w_ih, seq.input, v, j); }, w_ih.panel(4 * v));
      }
      if (w_hh.data != nullptr) {
        pack_columns<T>(
            4 * L, S, [&](int64_t j) { return this->column(this->recurrent_weights(), S, v, j); }, w_hh.panel(4 * v));
      }
    }
    if (w_hr.data != nullptr) {
      Panels<T>::for_panels({0, this->s_vectors}, [&](int64_t v, int width) {
        if ((v / kPanelVectors) % m.size != m.rank) return;
        for (int i = 0; i < width; ++i) {
          pack_columns<T>(
              L, H, [&](int64_t j) { return (v + i) * L + j < S ? in.w_hr + ((v + i) * L + j) * H : nullptr; },
              w_hr.panel(v + i));
        }
      });
    }
    const Range rows = m.share(seq.batch);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      this->enter_state(in, b, h[0], h[1]);
      const bool reset = seq.steps > 0 && g.is_reset(g.time(0), b);
      for (int64_t j = 0; j < ld_h; ++j) c[b * ld_h + j] = j < H && !reset ? in.c0[b * H + j] : T{0};
      if (seq.steps == 0) {
        for (int64_t j = 0; j < S; ++j) p.h_n[b * S + j] = in.h0[b * S + j];
        for (int64_t j = 0; j < H; ++j) p.c_n[b * H + j] = in.c0[b * H + j];
      }
    }
  }

  // tile[row][4 gates][L] = rows . the unit block's four gates
  void gate_product(int64_t v, int count, const T* const* rows, const Panels<T>& panels, const T* w, T* tile) const {
    if (panels.data != nullptr) {
      multiply(count, 4, panels.depth, rows, 1, panels.panel(4 * v), tile);
    } else {
      multiply_unpacked(
          count, 4 * L, panels.depth, rows, [&](int64_t j) { return this->column(w, panels.depth, v, j); }, tile);
    }
  }

  T* gates_row(const Chunk& part, int64_t row) const {
    return gates != nullptr ? gates + (row - part.first_row) * G : p.reserve.gates + row * G;
  }
  T* stats_row(const Chunk& part, int64_t row) const {
    return stats != nullptr ? stats + (row - part.first_row) * 6 : p.reserve.stats + row * 6;
  }
  T* recurrent_row(int64_t row, int64_t b) const {
    return recurrent != nullptr ? recurrent + b * G : p.reserve.recurrent + row * G;
  }

  void project_input(const Member& m, const Chunk& part) {
    if (few_rows) {
      project_few<T>(m, part.rows, x_rows, in.w_ih, G, seq.input, w_ih.data,
                     [&](int64_t row) { return gates_row(part, part.first_row + row); });
      return;
    }
    alignas(64) T tile[kTileRows * 4 * L];
    const Range units = m.share(this->h_vectors);
    for (int64_t v = units.begin; v < units.end; ++v) {
      for_tiles(0, part.rows, [&](int64_t first, int count) {
        gate_product(v, count, x_rows + first, w_ih, in.w_ih, tile);
        for (int r = 0; r < count; ++r) {
          T* to = gates_row(part, part.first_row + first + r) + v * L;
          for (int gate = 0; gate < 4; ++gate) {
            store_upto(to + gate * H, load(tile + (r * 4 + gate) * L), this->unit_count(v));
          }
        }
      });
    }
  }

  void input_stats(const Member& m, const Chunk& part) {
    const Range mine = m.share(part.rows);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const auto moments = row_moments(gates_row(part, part.first_row + i), G);
      T* to = stats_row(part, part.first_row + i);
      to[0] = moments.mean;
      to[1] = moments.rstd(in.eps);
    }
  }

  void step(const Place& place, const Chunk& part, int64_t s) {
    const int64_t t = g.time(s);
    const Range rows{place.rows.begin, minimum(place.rows.end, g.active(t))};
    const Range units = split(this->h_vectors, place.lanes, place.lane);
    const Range states = split(this->s_vectors, place.lanes, place.lane);
    this->draw_zoneout(t, rows, units, states);
    const T* h_prev = h[s & 1];
    alignas(64) T tile[kTileRows * 4 * L];
    for (int64_t i = units.begin; i < units.end; ++i) {
      const int64_t v = to_and_fro(i, units, s);
      for_tiles(rows.begin, rows.end, [&](int64_t first, int count) {
        const T* from[kTileRows];
        for (int r = 0; r < count; ++r) from[r] = h_prev + (first + r) * ld_s;
        gate_product(v, count, from, w_hh, this->recurrent_weights(), tile);
        if (in.layer_norm()) {
          for (int r = 0; r < count; ++r) keep_recurrent(t, first + r, v, tile + r * 4 * L);
        } else {
          plain_cells(part, s, t, first, count, v, tile);
        }
      });
    }
    if (in.layer_norm()) normalized_cell(place, part, s, t, rows, units);
    if (in.projected()) {
      place.wait();
      Panels<T>::for_panels(states, [&](int64_t v, int width) {
        for_tiles(rows.begin, rows.end, [&](int64_t first, int count) {
          const T* from[kTileRows];
          for (int r = 0; r < count; ++r) from[r] = raw_h + (first + r) * ld_h;
          for (int i = 0; i < width; ++i) {
            project_state(v + i, count, from, tile);
            for (int r = 0; r < count; ++r) finish_h(s, t, first + r, v + i, load(tile + r * L));
          }
        });
      });
    }
    place.wait();
  }

  void project_state(int64_t v, int count, const T* const* rows, T* tile) const {
    if (w_hr.data != nullptr) {
      multiply(count, 1, H, rows, 1, w_hr.panel(v), tile);
    } else {
      multiply_unpacked(
          count, L, H, rows, [&](int64_t j) { return v * L + j < S ? in.w_hr + (v * L + j) * H : nullptr; }, tile);
    }
  }

  // A tile's cells. First all rows' gates, then all rows' states: each is a long chain of dependent instructions, and
  // rows that follow each other closely are computed side by side.
  void plain_cells(const Chunk& part, int64_t s, int64_t t, int64_t first, int count, int64_t v, const T* tile) {
    const int64_t n = this->unit_count(v);
    const T* beta = bias + v * 4 * L;
    V c_new[kTileRows], o[kTileRows];
    for (int r = 0; r < count; ++r) {
      const int64_t b = first + r;
      T* at = gates_row(part, g.first_row(t) + b) + v * L;
      const T* product = tile + r * 4 * L;
      V a[4];
      for (int gate = 0; gate < 4; ++gate) {
        a[gate] = load(product + gate * L) + load_upto(at + gate * H, n) + load(beta + gate * L);
      }
      const auto act = lstm_gates(a[0], a[1], a[2], a[3]);
      c_new[r] = lstm_cell(act, load(c + b * ld_h + v * L));
      o[r] = act.o;
      if (gates == nullptr) {
        store_upto(at, act.i, n);
        store_upto(at + H, act.f, n);
        store_upto(at + 2 * H, act.g, n);
        store_upto(at + 3 * H, act.o, n);
      }
    }
    for (int r = 0; r < count; ++r) {
      finish_c(s, t, first + r, v, c_new[r]);
      put_h(s, t, first + r, v, o[r] * tanh(c_new[r]));
    }
  }

  // c_t from c~: zoneout, the reserve, the final state, the next step's state.
  void finish_c(int64_t s, int64_t t, int64_t b, int64_t v, V c_new) {
    const int64_t n = this->unit_count(v);
    T* state = c + b * ld_h + v * L;
    if (keep_c != nullptr) c_new = zoneout<T>(keep_first<T>(load(keep_c + b * ld_h + v * L), n), load(state), c_new);
    if (p.reserve.cells != nullptr) store_upto(p.reserve.cells + (g.first_row(t) + b) * H + v * L, c_new, n);
    if (g.is_last(t, b)) store_upto(p.c_n + b * H + v * L, c_new, n);
    store(state, g.resets_after(s, b) ? V{} : c_new);
  }

  void put_h(int64_t s, int64_t t, int64_t b, int64_t v, V h_new) {
    if (in.projected()) {
      store(raw_h + b * ld_h + v * L, h_new);
    } else {
      finish_h(s, t, b, v, h_new);
    }
  }

  void finish_h(int64_t s, int64_t t, int64_t b, int64_t v, V h_new) {
    Base::finish_h(p, p.reserve.hidden, h[s & 1], h[1 - (s & 1)], s, t, b, v, h_new);
  }

  // Layer norm, first part: W_hh h as it is, and the moments of this block's 4 x L values.
  void keep_recurrent(int64_t t, int64_t b, int64_t v, const T* product) {
    const int64_t n = this->unit_count(v);
    T* to = recurrent_row(g.first_row(t) + b, b) + v * L;
    V total{}, squares{};
    for (int gate = 0; gate < 4; ++gate) {
      const V a = load(product + gate * L);
      store_upto(to + gate * H, a, n);
      total += a;
    }
    const T mean = sum<T>(total) / static_cast<T>(4 * minimum(n, L));
    for (int gate = 0; gate < 4; ++gate) {
      const V e = keep_first<T>(load(product + gate * L) - mean, n);
      squares += e * e;
    }
    T* moments = parts + (b * this->h_vectors + v) * 2;
    moments[0] = mean;
    moments[1] = sum<T>(squares);
  }

  Moments<T> combine(int64_t b, int64_t values_per_unit) const {
    return combine_moments<T>(this->h_vectors, [&](int64_t v) {
      const T* of_v = parts + (b * this->h_vectors + v) * 2;
      return Moments<T>{static_cast<T>(values_per_unit * minimum(this->unit_count(v), L)), of_v[0], of_v[1]};
    });
  }

  void normalized_cell(const Place& place, const Chunk& part, int64_t s, int64_t t, Range rows, Range units) {
    place.wait();
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t row = g.first_row(t) + b;
      const auto moments = combine(b, 4);
      const T mean_h = moments.mean, rstd_h = moments.rstd(in.eps);
      T* stat = stats_row(part, row);
      const T mean_x = stat[0], rstd_x = stat[1];
      if (place.lane == 0) {
        stat[2] = mean_h;
        stat[3] = rstd_h;
      }
      for (int64_t v = units.begin; v < units.end; ++v) {
        const int64_t n = this->unit_count(v);
        const T* x_part = gates_row(part, row) + v * L;
        const T* h_part = recurrent_row(row, b) + v * L;
        V a[4];
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t at = gate * H;
          a[gate] = normalized_gate(load_upto(in.ln_hh + at + v * L, n), load_upto(h_part + at, n), mean_h, rstd_h,
                                    load_upto(in.ln_ih + at + v * L, n), load_upto(x_part + at, n), mean_x, rstd_x,
                                    load(bias + (v * 4 + gate) * L));
        }
        const auto act = lstm_gates(a[0], a[1], a[2], a[3]);
        const V c_new = lstm_cell(act, load(c + b * ld_h + v * L));
        store(cell + b * ld_h + v * L, c_new);
        store(out_gate + b * ld_h + v * L, act.o);
      }
    }
    place.wait();  // everyone has read the first moments
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      for (int64_t v = units.begin; v < units.end; ++v) {
        const int64_t n = this->unit_count(v);
        const V c_new = keep_first<T>(load(cell + b * ld_h + v * L), n);
        const T mean = sum<T>(c_new) / static_cast<T>(minimum(n, L));
        const V e = keep_first<T>(c_new - mean, n);
        T* moments = parts + (b * this->h_vectors + v) * 2;
        moments[0] = mean;
        moments[1] = sum<T>(e * e);
      }
    }
    place.wait();
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const auto moments = combine(b, 1);
      const T mean = moments.mean, rstd = moments.rstd(in.eps);
      if (place.lane == 0) {
        T* stat = stats_row(part, g.first_row(t) + b);
        stat[4] = mean;
        stat[5] = rstd;
      }
      for (int64_t v = units.begin; v < units.end; ++v) {
        const int64_t n = this->unit_count(v);
        const V c_new = load(cell + b * ld_h + v * L);
        const V normal =
            load_upto(in.ln_c_weight + v * L, n) * ((c_new - mean) * rstd) + load_upto(in.ln_c_bias + v * L, n);
        const V h_new = load(out_gate + b * ld_h + v * L) * tanh(normal);
        finish_c(s, t, b, v, c_new);
        put_h(s, t, b, v, h_new);
      }
    }
    // The next step's first moments overwrite these: its product begins only after the step's last barrier.
  }
};

// ---- backward ----

template <class T>
class LstmBackwardCpu : RecurrentCpu<T, 4> {
  using Base = RecurrentCpu<T, 4>;
  using Base::g, Base::G, Base::H, Base::keep_c, Base::L, Base::ld_h, Base::ld_s, Base::S, Base::seq;
  using V = Vec<T>;

  const LstmBackward<T>& p;
  const LstmInputs<T>& in = p;
  int64_t chunk;
  Panels<T> w_ih, w_hh, w_hr;
  T* dh;  // gradient of the state that leaves a step, [batch, ld_s] and [batch, ld_h]
  T* dc;
  T* grad_gates;  // one chunk, [rows, 4 H], of the pre-activations
  T* grad_rec;    // layer norm: of W_hh h, one chunk
  T* grad_norm;   // layer norm: of the norm's output at c~, one chunk, [rows, ld_h]
  T* normal_c;    // layer norm: the normalised c~, one chunk
  T* scaled;      // layer norm: grad_norm times the norm's weight, one step, [batch, ld_h]
  T* grad_proj;   // projection: of W_hr's output, one chunk, [rows, S]
  T* raw_h;       // projection: o tanh(c), one chunk, [rows, H]
  T* from_proj;   // projection: gradient of o tanh(c), [batch, ld_h]
  T* parts;       // layer norm: two sums of each block, [batch][h_vectors][2], twice
  T* parts_gates;
  const T** x_rows;
  const T** h_rows;
  T* x_masked;
  T* b_panels;
  T* a_tiles;  // one piece for each thread
  int64_t tile_size;

 public:
  using Base::work;
  LstmBackwardCpu(const LstmBackward<T>& args, Arena& arena, int threads)
      : Base(args, arena, threads, barriers_per_step(args)), p(args) {
    chunk = chunk_steps(seq);
    const int64_t rows = minimum(chunk * seq.batch, seq.rows);
    const bool ln = in.layer_norm(), projected = in.projected();
    w_ih = {p.needs_x ? arena.take<T>(Panels<T>::size(G, seq.input)) : nullptr, G, seq.input};
    w_hh = {arena.take<T>(Panels<T>::size(G, S)), G, S};
    w_hr = {projected ? arena.take<T>(Panels<T>::size(S, H)) : nullptr, S, H};
    dh = arena.take<T>(seq.batch * ld_s);
    dc = arena.take<T>(seq.batch * ld_h);
    grad_gates = arena.take<T>(rows * G);
    grad_rec = ln ? arena.take<T>(rows * G) : grad_gates;
    grad_norm = ln ? arena.take<T>(rows * ld_h) : nullptr;
    normal_c = ln ? arena.take<T>(rows * ld_h) : nullptr;
    scaled = ln ? arena.take<T>(seq.batch * ld_h) : nullptr;
    grad_proj = projected ? arena.take<T>(rows * S) : nullptr;
    raw_h = projected ? arena.take<T>(rows * H) : nullptr;
    from_proj = projected ? arena.take<T>(seq.batch * ld_h) : nullptr;
    parts = ln ? arena.take<T>(seq.batch * this->h_vectors * 2) : nullptr;
    parts_gates = ln ? arena.take<T>(seq.batch * this->h_vectors * 2) : nullptr;
    x_rows = arena.take<const T*>(rows);
    h_rows = arena.take<const T*>(rows);
    x_masked = in.reg.masks_input() ? arena.take<T>(rows * seq.input) : nullptr;
    const auto panels = [&](int64_t columns) { return Panels<T>::size(rows, columns); };
    const int64_t both = ln ? maximum(panels(seq.input), panels(S)) : panels(seq.input) + panels(S);
    b_panels = p.needs_weights ? arena.take<T>(maximum(both, projected ? panels(H) : 0)) : nullptr;
    tile_size = weight_gradient_tiles<T>(rows);
    a_tiles = p.needs_weights ? arena.take<T>(tile_size * threads) : nullptr;
  }

  void run(const Executor& executor, int threads) {
    run_team(executor, threads, [&](const Member& m) { member(m); });
  }

 private:
  void member(const Member& m) {
    const Grid mine = this->grid_for(m.size);
    this->prepare(m);
    if (this->dropped != nullptr) m.wait();
    prepare_backward(m, mine);
    m.wait();
    const Place place(m, mine, seq.batch, this->barriers);
    const int64_t chunks = ceil_div(seq.steps, chunk);
    for (int64_t i = chunks - 1; i >= 0; --i) {
      const Chunk part(g, i * chunk, minimum((i + 1) * chunk, seq.steps));
      if (p.needs_weights) this->gather_rows(m, part, in.h0, h_source(), x_rows, x_masked, h_rows);
      if (place.works) {
        for (int64_t s = part.end - 1; s >= part.begin; --s) step(place, part, s);
      }
      m.wait();
      chunk_gradients(m, part, i == chunks - 1);
      m.wait();
    }
    finish(m, chunks == 0);
  }

  void prepare_backward(const Member& m, Grid used) {
    // Panels follow the runs of vectors that lanes own.
    Base::pack_runs(m, used.lanes, w_hh, [&](int64_t k) { return this->recurrent_weights() + k * S; });
    if (in.projected()) Base::pack_runs(m, used.lanes, w_hr, [&](int64_t k) { return in.w_hr + k * H; });
    if (p.needs_x) Base::pack_runs(m, 1, w_ih, [&](int64_t k) { return in.w_ih + k * seq.input; });
    const Range rows = m.share(seq.batch);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      for (int64_t j = 0; j < ld_s; ++j) {
        dh[b * ld_s + j] = p.grad_h_n != nullptr && j < S ? p.grad_h_n[b * S + j] : T{0};
      }
      for (int64_t j = 0; j < ld_h; ++j) {
        dc[b * ld_h + j] = p.grad_c_n != nullptr && j < H ? p.grad_c_n[b * H + j] : T{0};
      }
    }
  }

  const T* h_source() const { return p.reserve.hidden != nullptr ? p.reserve.hidden : p.y; }

  void step(const Place& place, const Chunk& part, int64_t s) {
    const int64_t t = g.time(s);
    const Range rows{place.rows.begin, minimum(place.rows.end, g.active(t))};
    const Range units = split(this->h_vectors, place.lanes, place.lane);
    const Range states = split(this->s_vectors, place.lanes, place.lane);
    this->draw_zoneout(t, rows, units, states);
    alignas(64) T tile[kTileRows * kPanel<T>];
    if (in.projected()) {
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        for (int64_t v = states.begin; v < states.end; ++v) {
          const V grad = enter_h(t, b, v);
          store_upto(grad_proj + (g.first_row(t) + b - part.first_row) * S + v * L, grad, S - v * L);
        }
      }
      place.wait();
      Panels<T>::for_panels(units, [&](int64_t v, int width) {
        for_tiles(rows.begin, rows.end, [&](int64_t first, int count) {
          const T* from[kTileRows];
          T* to[kTileRows];
          for (int r = 0; r < count; ++r) {
            from[r] = grad_proj + (g.first_row(t) + first + r - part.first_row) * S;
            to[r] = from_proj + (first + r) * ld_h;
          }
          multiply(count, width, S, from, 1, w_hr.panel(v), tile);
          put_tile(tile, count, width, to, v * L, ld_h, false);
        });
      });
    }
    if (in.layer_norm()) {
      normalized_cell(place, part, t, rows, units);
    } else {
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        for (int64_t v = units.begin; v < units.end; ++v) plain_cell(part, t, b, v);
      }
    }
    place.wait();
    this->state_gradient(
        s, t, rows, states, [&](int64_t b) { return grad_rec + (g.first_row(t) + b - part.first_row) * G; }, w_hh, dh);
  }

  V enter_h(int64_t t, int64_t b, int64_t v) { return Base::enter_h(p.grad_y, dh, t, b, v); }

  V grad_of_raw_h(int64_t t, int64_t b, int64_t v) {
    return in.projected() ? load(from_proj + b * ld_h + v * L) : enter_h(t, b, v);
  }

  V previous_c(int64_t t, int64_t b, int64_t v) const {
    const int64_t n = this->unit_count(v);
    if (g.is_reset(t, b)) return V{};
    if (g.is_first(t, b)) return load_upto(in.c0 + b * H + v * L, n);
    return load_upto(p.reserve.cells + (g.first_row(g.previous(t)) + b) * H + v * L, n);
  }

  // The part of c_t's gradient that reaches c~; `direct` is what zoneout passes to c_{t-1}.
  V enter_c(int64_t b, int64_t v, V& direct) const {
    const V grad = load(dc + b * ld_h + v * L);
    direct = V{};
    if (keep_c == nullptr) return grad;
    const V keep = keep_first<T>(load(keep_c + b * ld_h + v * L), this->unit_count(v));
    direct = keep * grad;
    return (1 - keep) * grad;
  }

  void plain_cell(const Chunk& part, int64_t t, int64_t b, int64_t v) {
    const int64_t row = g.first_row(t) + b, n = this->unit_count(v);
    const T* at = p.reserve.gates + row * G + v * L;
    const LstmGates<V> act{load_upto(at, n), load_upto(at + H, n), load_upto(at + 2 * H, n), load_upto(at + 3 * H, n)};
    const V c_prev = previous_c(t, b, v);
    const V tanh_c = tanh(lstm_cell(act, c_prev));
    if (raw_h != nullptr) store_upto(raw_h + (row - part.first_row) * H + v * L, act.o * tanh_c, n);
    V di, df, dg, dout, direct;
    V grad_c = enter_c(b, v, direct);
    grad_c += lstm_output_backward(grad_of_raw_h(t, b, v), act.o, tanh_c, dout);
    const V grad_prev = lstm_cell_backward(grad_c, act, c_prev, di, df, dg) + direct;
    store(dc + b * ld_h + v * L, g.is_reset(t, b) ? V{} : grad_prev);
    T* to = grad_gates + (row - part.first_row) * G + v * L;
    store_upto(to, di, n);
    store_upto(to + H, df, n);
    store_upto(to + 2 * H, dg, n);
    store_upto(to + 3 * H, dout, n);
  }

  // Sums of a row's blocks, in order.
  void combine(const T* from, int64_t b, T& first, T& second) const {
    first = second = 0;
    for (int64_t v = 0; v < this->h_vectors; ++v) {
      first += from[(b * this->h_vectors + v) * 2];
      second += from[(b * this->h_vectors + v) * 2 + 1];
    }
  }

  // With x^ = (x - mean) rstd, y = gamma x^ + beta: dx = rstd (dx^ - mean(dx^) - x^ mean(dx^ x^)), dx^ = gamma dy.
  void normalized_cell(const Place& place, const Chunk& part, int64_t t, Range rows, Range units) {
    // To the norm of c~; the activations and d a_o are left where the gradients of the gates will be.
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t row = g.first_row(t) + b, local = row - part.first_row;
      const T* stat = p.reserve.stats + row * 6;
      for (int64_t v = units.begin; v < units.end; ++v) {
        const int64_t n = this->unit_count(v);
        V a[4];
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t at = gate * H + v * L;
          V bias{};
          if (in.b_ih != nullptr) bias += load_upto(in.b_ih + at, n);
          if (in.b_hh != nullptr) bias += load_upto(in.b_hh + at, n);
          a[gate] = normalized_gate(load_upto(in.ln_hh + at, n), load_upto(p.reserve.recurrent + row * G + at, n),
                                    stat[2], stat[3], load_upto(in.ln_ih + at, n),
                                    load_upto(p.reserve.gates + row * G + at, n), stat[0], stat[1], bias);
        }
        const auto act = lstm_gates(a[0], a[1], a[2], a[3]);
        const V c_new = lstm_cell(act, previous_c(t, b, v));
        const V normal = keep_first<T>((c_new - stat[4]) * stat[5], n);
        const V gamma = load_upto(in.ln_c_weight + v * L, n);
        const V tanh_c = tanh(gamma * normal + load_upto(in.ln_c_bias + v * L, n));
        if (raw_h != nullptr) store_upto(raw_h + local * H + v * L, act.o * tanh_c, n);
        V dout;
        const V grad = keep_first<T>(lstm_output_backward(grad_of_raw_h(t, b, v), act.o, tanh_c, dout), n);
        store(grad_norm + local * ld_h + v * L, grad);
        store(normal_c + local * ld_h + v * L, normal);
        T* to = grad_gates + local * G + v * L;
        store_upto(to, act.i, n);
        store_upto(to + H, act.f, n);
        store_upto(to + 2 * H, act.g, n);
        store_upto(to + 3 * H, dout, n);
        // Stored, because a product in a register may be contracted with what follows, and would then not cancel with
        // its own mean: for one unit the gradient is 0, and the factor before it 1 / sqrt(eps).
        const V product = grad * gamma;
        store(scaled + b * ld_h + v * L, product);
        T* sums = parts + (b * this->h_vectors + v) * 2;
        sums[0] = sum<T>(product);
        sums[1] = sum<T>(product * normal);
      }
    }
    place.wait();
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t row = g.first_row(t) + b, local = row - part.first_row;
      const T* stat = p.reserve.stats + row * 6;
      T sum_grad, sum_product;
      combine(parts, b, sum_grad, sum_product);
      const T mean_grad = sum_grad / static_cast<T>(H), mean_product = sum_product / static_cast<T>(H);
      for (int64_t v = units.begin; v < units.end; ++v) {
        const int64_t n = this->unit_count(v);
        T* to = grad_gates + local * G + v * L;
        const LstmGates<V> act{load_upto(to, n), load_upto(to + H, n), load_upto(to + 2 * H, n), V{}};
        V direct;
        V grad_c = enter_c(b, v, direct);
        grad_c += stat[5] *
                  (load(scaled + b * ld_h + v * L) - mean_grad - load(normal_c + local * ld_h + v * L) * mean_product);
        V d[4];
        const V grad_prev = lstm_cell_backward(grad_c, act, previous_c(t, b, v), d[0], d[1], d[2]) + direct;
        d[3] = load_upto(to + 3 * H, n);
        store(dc + b * ld_h + v * L, g.is_reset(t, b) ? V{} : keep_first<T>(grad_prev, n));
        V sum_grads{}, sum_products{};
        for (int gate = 0; gate < 4; ++gate) {
          const int64_t at = gate * H + v * L;
          store_upto(to + gate * H, d[gate], n);
          const V scaled = keep_first<T>(d[gate], n) * load_upto(in.ln_hh + at, n);
          sum_grads += scaled;
          sum_products += scaled * ((load_upto(p.reserve.recurrent + row * G + at, n) - stat[2]) * stat[3]);
        }
        T* sums = parts_gates + (b * this->h_vectors + v) * 2;
        sums[0] = sum<T>(sum_grads);
        sums[1] = sum<T>(sum_products);
      }
    }
    place.wait();
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const int64_t row = g.first_row(t) + b, local = row - part.first_row;
      T sum_grad, sum_product;
      combine(parts_gates, b, sum_grad, sum_product);
      for (int64_t v = units.begin; v < units.end; ++v) {
        for (int gate = 0; gate < 4; ++gate) {
          norm_backward(grad_gates + local * G, p.reserve.recurrent + row * G, in.ln_hh, p.reserve.stats + row * 6 + 2,
                        sum_grad, sum_product, gate * H + v * L, this->unit_count(v), grad_rec + local * G);
        }
      }
    }
  }

  // One vector of the gradient of a normalised row of 4 H values.
  void norm_backward(const T* grad, const T* raw, const T* gamma, const T* stat, T sum_grad, T sum_product, int64_t at,
                     int64_t n, T* out) const {
    const V normal = (load_upto(raw + at, n) - stat[0]) * stat[1];
    const V scaled = load_upto(grad + at, n) * load_upto(gamma + at, n);
    store_upto(out + at, stat[1] * (scaled - sum_grad / static_cast<T>(G) - normal * (sum_product / static_cast<T>(G))),
               n);
  }

  void chunk_gradients(const Member& m, const Chunk& part, bool first) {
    if (p.needs_weights) {
      column_sums(m, part, first);
      m.wait();
    }
    if (in.layer_norm()) {
      input_norm_backward(m, part);
      m.wait();
    }
    if (p.needs_weights) {
      T* tiles = a_tiles + m.rank * tile_size;
      const bool add = !first;
      const auto of_w_ih = gradient_of([&](int64_t k) { return x_rows[k]; }, seq.input, p.grad_w_ih);
      const auto of_w_hh = gradient_of([&](int64_t k) { return h_rows[k]; }, S, p.grad_w_hh);
      if (grad_rec == grad_gates) {
        weight_gradient<T>(m, part.rows, grad_gates, G, 0, G, add, b_panels, tiles, of_w_ih, of_w_hh);
      } else {
        weight_gradient<T>(m, part.rows, grad_gates, G, 0, G, add, b_panels, tiles, of_w_ih);
        weight_gradient<T>(m, part.rows, grad_rec, G, 0, G, add, b_panels, tiles, of_w_hh);
      }
      if (in.projected()) {
        weight_gradient<T>(m, part.rows, grad_proj, S, 0, S, add, b_panels, tiles,
                           gradient_of([&](int64_t k) { return raw_h + k * H; }, H, p.grad_w_hr));
      }
    }
    if (p.needs_x) this->input_gradient(m, part, grad_gates, G, w_ih, p.grad_x);
  }

  // Gradients that are sums over rows. Members own columns, so the order of a sum does not depend on their number; four
  // vectors of columns are read at a time, so that what a row gives is a few whole lines one after the other.
  void column_sums(const Member& m, const Chunk& part, bool first) {
    constexpr int width = 4;
    const bool ln = in.layer_norm();
    const Range mine = m.share(ceil_div(G, width * L));
    for (int64_t block = mine.begin; block < mine.end; ++block) {
      V bias[width]{}, gain_h[width]{}, gain_x[width]{};
      for (int64_t i = 0; i < part.rows; ++i) {
        for (int j = 0; j < width; ++j) {
          const int64_t at = (block * width + j) * L, n = G - at;
          if (n <= 0) break;
          const V d = load_upto(grad_gates + i * G + at, n);
          bias[j] += d;
          if (ln) {
            const T* stat = p.reserve.stats + (part.first_row + i) * 6;
            const int64_t raw = (part.first_row + i) * G + at;
            gain_h[j] += d * ((load_upto(p.reserve.recurrent + raw, n) - stat[2]) * stat[3]);
            gain_x[j] += d * ((load_upto(p.reserve.gates + raw, n) - stat[0]) * stat[1]);
          }
        }
      }
      for (int j = 0; j < width && (block * width + j) * L < G; ++j) {
        const int64_t at = (block * width + j) * L;
        add_to(p.grad_bias, at, G - at, bias[j], first);
        if (ln) {
          add_to(p.grad_ln_hh, at, G - at, gain_h[j], first);
          add_to(p.grad_ln_ih, at, G - at, gain_x[j], first);
        }
      }
    }
    if (!ln) return;
    const Range units = m.share(this->h_vectors);
    for (int64_t v = units.begin; v < units.end; ++v) {
      V bias{}, gain{};
      for (int64_t i = 0; i < part.rows; ++i) {
        const V d = load(grad_norm + i * ld_h + v * L);
        bias += d;
        gain += d * load(normal_c + i * ld_h + v * L);
      }
      add_to(p.grad_ln_c_bias, v * L, this->unit_count(v), bias, first);
      add_to(p.grad_ln_c_weight, v * L, this->unit_count(v), gain, first);
    }
  }
  static void add_to(T* sums, int64_t at, int64_t n, V value, bool first) {
    if (sums == nullptr) return;
    store_upto(sums + at, first ? value : value + load_upto(sums + at, n), n);
  }

  // From the gates' gradient to that of W_ih x, in place.
  void input_norm_backward(const Member& m, const Chunk& part) {
    const Range mine = m.share(part.rows);
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      T* grad = grad_gates + i * G;
      const T* raw = p.reserve.gates + (part.first_row + i) * G;
      const T* stat = p.reserve.stats + (part.first_row + i) * 6;
      V sum_grads{}, sum_products{};
      for (int64_t at = 0; at < G; at += L) {
        const V scaled = load_upto(grad + at, G - at) * load_upto(in.ln_ih + at, G - at);
        sum_grads += scaled;
        sum_products += scaled * ((load_upto(raw + at, G - at) - stat[0]) * stat[1]);
      }
      const T sum_grad = sum<T>(sum_grads), sum_product = sum<T>(sum_products);
      for (int64_t at = 0; at < G; at += L) {
        norm_backward(grad, raw, in.ln_ih, stat, sum_grad, sum_product, at, G - at, grad);
      }
    }
  }

  void finish(const Member& m, bool nothing) {
    const Range rows = m.share(seq.batch);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      for (int64_t j = 0; j < S; ++j) p.grad_h0[b * S + j] = dh[b * ld_s + j];
      for (int64_t j = 0; j < H; ++j) p.grad_c0[b * H + j] = dc[b * ld_h + j];
    }
    if (!p.needs_weights) return;
    if (!nothing) {
      this->mask_weight_gradient(m.share(G), p.grad_w_hh);
      return;
    }
    if (m.rank != 0) return;
    clear(p.grad_w_ih, G * seq.input);
    clear(p.grad_w_hh, G * S);
    clear(p.grad_bias, G);
    clear(p.grad_w_hr, S * H);
    clear(p.grad_ln_ih, G);
    clear(p.grad_ln_hh, G);
    clear(p.grad_ln_c_weight, H);
    clear(p.grad_ln_c_bias, H);
  }
};

}  // namespace

template <class T>
LstmKernels<T> lstm_kernels() {
  return {kernel_of<LstmForwardCpu<T>, LstmForward<T>>(), kernel_of<LstmBackwardCpu<T>, LstmBackward<T>>()};
}
template LstmKernels<float> lstm_kernels<float>();
template LstmKernels<double> lstm_kernels<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// The GRU on CPU: the plan of lstm_cpu.cpp with three gates to a unit.
//
// The candidate's recurrent part hn enters behind the reset gate, so input and recurrent products have different
// gradients. Backward keeps four rows of blocks, (n, r, z, hn): the first three are the gradient of W_ih x with its
// gates in the order n, r, z, the last three that of W_hh h in torch's order, and neither is stored twice.
#include "recurrent/gru.h"

#include "common/gemm.h"
#include "recurrent/cell_math.h"
#include "recurrent/sequence_cpu.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

template <class T>
class GruForwardCpu : RecurrentCpu<T, 3> {
  using Base = RecurrentCpu<T, 3>;
  using Base::g, Base::G, Base::H, Base::L, Base::ld_h, Base::seq;
  using V = Vec<T>;

  const GruForward<T>& p;
  bool few_rows;  // W_ih is used where it lies, and x is packed
  int64_t chunk;
  Panels<T> w_ih, w_hh;
  T* bias;  // [h_vectors][4][L]: r, z, and the candidate's two
  T* h[2];  // [batch, ld_h], read and written in turn
  const T** x_rows;
  T* x_masked;
  T* gates;  // without a reserve: one chunk of W_ih x

 public:
  using Base::work;
  GruForwardCpu(const GruForward<T>& args, Arena& arena, int threads) : Base(args, arena, threads, 1), p(args) {
    const bool once = seq.rows <= kUnpackedRows;
    few_rows = !once && seq.rows <= kUnpackedProjectionRows;
    chunk = chunk_steps(seq);
    const int64_t rows = minimum(chunk * seq.batch, seq.rows);
    const int64_t input_size = few_rows ? Panels<T>::size(seq.input, rows) : 3 * ld_h * seq.input;
    w_ih = {once ? nullptr : arena.take<T>(input_size), seq.input, 3 * ld_h};
    w_hh = {once || seq.batch == 1 ? nullptr : arena.take<T>(3 * ld_h * H), H, 3 * ld_h};
    bias = arena.take<T>(4 * ld_h);
    h[0] = arena.take<T>(seq.batch * ld_h);
    h[1] = arena.take<T>(seq.batch * ld_h);
    x_rows = arena.take<const T*>(rows);
    x_masked = this->reg.masks_input() ? arena.take<T>(rows * seq.input) : nullptr;
    gates = p.gates == nullptr ? arena.take<T>(rows * 4 * H) : nullptr;
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
      if (place.works) {
        for (int64_t s = part.begin; s < part.end; ++s) step(place, part, s);
      }
      m.wait();
    }
  }

  void prepare_forward(const Member& m) {
    const Range units = m.share(this->h_vectors);
    for (int64_t v = units.begin; v < units.end; ++v) {
      for (int64_t l = 0; l < L; ++l) {
        const int64_t unit = v * L + l;
        const auto of = [&](const T* b, int gate) { return b != nullptr && unit < H ? b[gate * H + unit] : T{0}; };
        T* to = bias + v * 4 * L + l;
        to[0] = of(p.b_ih, 0) + of(p.b_hh, 0);
        to[L] = of(p.b_ih, 1) + of(p.b_hh, 1);
        to[2 * L] = of(p.b_ih, 2);
        to[3 * L] = of(p.b_hh, 2);
      }
      if (w_ih.data != nullptr && !few_rows) {
        pack_columns<T>(
            3 * L, seq.input, [&](int64_t j) { return this->column(p.w_ih, seq.input, v, j); }, w_ih.panel(3 * v));
      }
      if (w_hh.data != nullptr) {
        pack_columns<T>(
            3 * L, H, [&](int64_t j) { return this->column(this->recurrent_weights(), H, v, j); }, w_hh.panel(3 * v));
      }
    }
    const Range rows = m.share(seq.batch);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      this->enter_state(p, b, h[0], h[1]);
      for (int64_t j = 0; seq.steps == 0 && j < H; ++j) p.h_n[b * H + j] = p.h0[b * H + j];
    }
  }

  // tile[row][3 gates][L] = rows . the unit block's three gates
  void gate_product(int64_t v, int count, const T* const* rows, const Panels<T>& panels, const T* w, T* tile) const {
    if (panels.data != nullptr) {
      multiply(count, 3, panels.depth, rows, 1, panels.panel(3 * v), tile);
    } else {
      multiply_unpacked(
          count, 3 * L, panels.depth, rows, [&](int64_t j) { return this->column(w, panels.depth, v, j); }, tile);
    }
  }

  T* gates_row(const Chunk& part, int64_t row) const {
    return gates != nullptr ? gates + (row - part.first_row) * 4 * H : p.gates + row * 4 * H;
  }

  void project_input(const Member& m, const Chunk& part) {
    if (few_rows) {
      project_few<T>(m, part.rows, x_rows, p.w_ih, G, seq.input, w_ih.data,
                     [&](int64_t row) { return gates_row(part, part.first_row + row); });
      return;
    }
    alignas(64) T tile[kTileRows * 4 * L];
    const Range units = m.share(this->h_vectors);
    for (int64_t v = units.begin; v < units.end; ++v) {
      for_tiles(0, part.rows, [&](int64_t first, int count) {
        gate_product(v, count, x_rows + first, w_ih, p.w_ih, tile);
        for (int r = 0; r < count; ++r) {
          T* to = gates_row(part, part.first_row + first + r) + v * L;
          for (int gate = 0; gate < 3; ++gate) {
            store_upto(to + gate * H, load(tile + (r * 3 + gate) * L), this->unit_count(v));
          }
        }
      });
    }
  }

  void step(const Place& place, const Chunk& part, int64_t s) {
    const int64_t t = g.time(s);
    const Range rows{place.rows.begin, minimum(place.rows.end, g.active(t))};
    const Range units = split(this->h_vectors, place.lanes, place.lane);
    this->draw_zoneout(t, rows, units, units);
    alignas(64) T tile[kTileRows * 4 * L];
    for (int64_t i = units.begin; i < units.end; ++i) {
      const int64_t v = to_and_fro(i, units, s);
      for_tiles(rows.begin, rows.end, [&](int64_t first, int count) {
        const T* from[kTileRows];
        for (int r = 0; r < count; ++r) from[r] = h[s & 1] + (first + r) * ld_h;
        gate_product(v, count, from, w_hh, this->recurrent_weights(), tile);
        for (int r = 0; r < count; ++r) cell(part, s, t, first + r, v, tile + r * 3 * L);
      });
    }
    place.wait();
  }

  void cell(const Chunk& part, int64_t s, int64_t t, int64_t b, int64_t v, const T* product) {
    const int64_t n = this->unit_count(v);
    T* at = gates_row(part, g.first_row(t) + b) + v * L;
    const T* beta = bias + v * 4 * L;
    const V hn = load(product + 2 * L) + load(beta + 3 * L);
    const auto act = gru_gates(load(product) + load_upto(at, n) + load(beta),
                               load(product + L) + load_upto(at + H, n) + load(beta + L),
                               load_upto(at + 2 * H, n) + load(beta + 2 * L), hn);
    if (gates == nullptr) {
      store_upto(at, act.r, n);
      store_upto(at + H, act.z, n);
      store_upto(at + 2 * H, act.n, n);
      store_upto(at + 3 * H, hn, n);
    }
    const T* h_old = h[s & 1];
    this->finish_h(p, p.hidden, h_old, h[1 - (s & 1)], s, t, b, v, gru_output(act, load(h_old + b * ld_h + v * L)));
  }
};

template <class T>
class GruBackwardCpu : RecurrentCpu<T, 3> {
  using Base = RecurrentCpu<T, 3>;
  using Base::g, Base::G, Base::H, Base::L, Base::ld_h, Base::seq;
  using V = Vec<T>;

  const GruBackward<T>& p;
  int64_t chunk;
  Panels<T> w_ih, w_hh;
  T* dh;          // gradient of the state that leaves a step, [batch, ld_h]
  T* grad_gates;  // one chunk, [rows, 4 H]: n, r, z, hn
  const T** x_rows;
  const T** h_rows;
  T* x_masked;
  T* b_panels;
  T* a_tiles;  // one piece for each thread
  int64_t tile_size;

 public:
  using Base::work;
  GruBackwardCpu(const GruBackward<T>& args, Arena& arena, int threads) : Base(args, arena, threads, 1), p(args) {
    chunk = chunk_steps(seq);
    const int64_t rows = minimum(chunk * seq.batch, seq.rows);
    w_ih = {p.needs_x ? arena.take<T>(Panels<T>::size(G, seq.input)) : nullptr, G, seq.input};
    w_hh = {arena.take<T>(Panels<T>::size(G, H)), G, H};
    dh = arena.take<T>(seq.batch * ld_h);
    grad_gates = arena.take<T>(rows * 4 * H);
    x_rows = arena.take<const T*>(rows);
    h_rows = arena.take<const T*>(rows);
    x_masked = this->reg.masks_input() ? arena.take<T>(rows * seq.input) : nullptr;
    b_panels = p.needs_weights ? arena.take<T>(Panels<T>::size(rows, maximum(seq.input, H))) : nullptr;
    tile_size = weight_gradient_tiles<T>(rows);
    a_tiles = p.needs_weights ? arena.take<T>(tile_size * threads) : nullptr;
  }

  void run(const Executor& executor, int threads) {
    run_team(executor, threads, [&](const Member& m) { member(m); });
  }

 private:
  const T* h_all() const { return p.hidden != nullptr ? p.hidden : p.y; }

  void member(const Member& m) {
    const Grid mine = this->grid_for(m.size);
    this->prepare(m);
    if (this->dropped != nullptr) m.wait();
    Base::pack_runs(m, mine.lanes, w_hh, [&](int64_t k) { return this->recurrent_weights() + k * H; });
    if (p.needs_x) {
      Base::pack_runs(m, 1, w_ih, [&](int64_t k) { return p.w_ih + (k < H ? k + 2 * H : k - H) * seq.input; });
    }
    const Range batch = m.share(seq.batch);
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      for (int64_t j = 0; j < ld_h; ++j) {
        dh[b * ld_h + j] = p.grad_h_n != nullptr && j < H ? p.grad_h_n[b * H + j] : T{0};
      }
    }
    m.wait();
    const Place place(m, mine, seq.batch, this->barriers);
    const int64_t chunks = ceil_div(seq.steps, chunk);
    for (int64_t i = chunks - 1; i >= 0; --i) {
      const Chunk part(g, i * chunk, minimum((i + 1) * chunk, seq.steps));
      if (p.needs_weights) this->gather_rows(m, part, p.h0, h_all(), x_rows, x_masked, h_rows);
      if (place.works) {
        for (int64_t s = part.end - 1; s >= part.begin; --s) step(place, part, s);
      }
      m.wait();
      chunk_gradients(m, part, i == chunks - 1);
      m.wait();
    }
    for (int64_t b = batch.begin; b < batch.end; ++b) {
      for (int64_t j = 0; j < H; ++j) p.grad_h0[b * H + j] = dh[b * ld_h + j];
    }
    if (!p.needs_weights) return;
    if (chunks > 0) {
      this->mask_weight_gradient(m.share(G), p.grad_w_hh);
    } else if (m.rank == 0) {
      clear(p.grad_w_ih, G * seq.input);
      clear(p.grad_w_hh, G * H);
      clear(p.grad_b_ih, G);
      clear(p.grad_b_hh, G);
    }
  }

  void step(const Place& place, const Chunk& part, int64_t s) {
    const int64_t t = g.time(s);
    const Range rows{place.rows.begin, minimum(place.rows.end, g.active(t))};
    const Range units = split(this->h_vectors, place.lanes, place.lane);
    this->draw_zoneout(t, rows, units, units);
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      for (int64_t v = units.begin; v < units.end; ++v) cell(part, t, b, v);
    }
    place.wait();
    this->state_gradient(
        s, t, rows, units, [&](int64_t b) { return grad_gates + (g.first_row(t) + b - part.first_row) * 4 * H + H; },
        w_hh, dh);
  }

  void cell(const Chunk& part, int64_t t, int64_t b, int64_t v) {
    const int64_t row = g.first_row(t) + b, n = this->unit_count(v);
    const T* at = p.gates + row * 4 * H + v * L;
    const GruGates<V> act{load_upto(at, n), load_upto(at + H, n), load_upto(at + 2 * H, n)};
    const T* before = this->previous_h(p.h0, h_all(), t, b);
    const V h_prev = before == nullptr ? V{} : load_upto(before + v * L, n);
    V dr, dz, dn, dhn;
    const V grad = this->enter_h(p.grad_y, dh, t, b, v);
    const V direct = gru_backward(grad, act, load_upto(at + 3 * H, n), h_prev, dr, dz, dn, dhn);
    T* state = dh + b * ld_h + v * L;
    store(state, load(state) + direct);
    T* to = grad_gates + (row - part.first_row) * 4 * H + v * L;
    store_upto(to, dn, n);
    store_upto(to + H, dr, n);
    store_upto(to + 2 * H, dz, n);
    store_upto(to + 3 * H, dhn, n);
  }

  void chunk_gradients(const Member& m, const Chunk& part, bool first) {
    if (p.needs_weights) {
      bias_gradient(m, part, first);
      T* tiles = a_tiles + m.rank * tile_size;
      const int64_t I = seq.input, ld = 4 * H;
      // n, r, z, hn: the first three are the gradient of W_ih x, the last three that of W_hh h.
      const auto x_row = [&](int64_t k) { return x_rows[k]; };
      const auto h_row = [&](int64_t k) { return h_rows[k]; };
      const auto product = [&](int64_t first_column, int64_t count, const auto& of) {
        weight_gradient<T>(m, part.rows, grad_gates, ld, first_column, count, !first, b_panels, tiles, of);
      };
      product(0, H, gradient_of(x_row, I, p.grad_w_ih + 2 * H * I));
      product(H, 2 * H, gradient_of(x_row, I, p.grad_w_ih));
      product(H, G, gradient_of(h_row, H, p.grad_w_hh));
    }
    if (p.needs_x) this->input_gradient(m, part, grad_gates, 4 * H, w_ih, p.grad_x);
  }

  void bias_gradient(const Member& m, const Chunk& part, bool first) {
    const Range units = m.share(this->h_vectors);
    for (int64_t v = units.begin; v < units.end; ++v) {
      const int64_t n = this->unit_count(v);
      V sums[4]{};
      for (int64_t i = 0; i < part.rows; ++i) {
        for (int block = 0; block < 4; ++block) sums[block] += load_upto(grad_gates + (i * 4 + block) * H + v * L, n);
      }
      const auto add = [&](T* bias, int gate, V value) {
        if (bias == nullptr) return;
        T* to = bias + gate * H + v * L;
        store_upto(to, first ? value : value + load_upto(to, n), n);
      };
      for (T* bias : {p.grad_b_ih, p.grad_b_hh}) {
        add(bias, 0, sums[1]);
        add(bias, 1, sums[2]);
      }
      add(p.grad_b_ih, 2, sums[0]);
      add(p.grad_b_hh, 2, sums[3]);
    }
  }
};

}  // namespace

template <class T>
GruKernels<T> gru_kernels() {
  return {kernel_of<GruForwardCpu<T>, GruForward<T>>(), kernel_of<GruBackwardCpu<T>, GruBackward<T>>()};
}
template GruKernels<float> gru_kernels<float>();
template GruKernels<double> gru_kernels<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

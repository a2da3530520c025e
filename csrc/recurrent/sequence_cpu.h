// What the LSTM and GRU kernels share on CPU: the geometry of a sequence in processing order, the division of a batch
// among threads, masks, and the three products outside the recurrence (input projection, input gradient, weight
// gradients), which run over chunks of steps so that their operands stay in cache and no [T, B, 4H] temporary exists.
#pragma once

#include <cmath>
#include <cstring>
#include <new>

#include "common/gemm.h"
#include "common/kernel.h"
#include "common/philox_simd.h"
#include "recurrent/sequence.h"

namespace genfuse {
GENFUSE_NAMESPACE {

// Hands out aligned pieces of the caller's workspace; with a null base it only measures.
struct Arena {
  char* base;
  size_t used = 0;
  template <class T>
  T* take(int64_t count) {
    used = (used + 63) / 64 * 64;
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(count > 0 ? count : 0) * sizeof(T);
    return p;
  }
};

// About how many rows a chunk of steps has: enough to amortise reading the weight gradients back, few enough that a
// chunk of gates stays near the caches, and takes little memory. Depends on the shape only, never on the threads.
inline int64_t chunk_steps(const Sequence& s) {
  constexpr int64_t least = 256, most = 384, values = 768 << 10;
  const int64_t rows = maximum(least, minimum(most, values / (4 * maximum(s.hidden, 1))));
  return maximum(1, minimum(s.steps, rows / maximum(s.batch, 1)));
}

struct Geometry {
  Sequence seq;
  int64_t* offsets;  // [steps + 1], packed only: first row of each step

  Geometry(const Sequence& s, Arena& arena) : seq(s) {
    offsets = s.batch_sizes == nullptr ? nullptr : arena.take<int64_t>(s.steps + 1);
    if (offsets != nullptr && arena.base != nullptr) {
      offsets[0] = 0;
      for (int64_t t = 0; t < s.steps; ++t) offsets[t + 1] = offsets[t] + s.batch_sizes[t];
    }
  }
  // The s-th step to be processed.
  int64_t time(int64_t s) const { return seq.reverse ? seq.steps - 1 - s : s; }
  int64_t first_row(int64_t t) const { return offsets == nullptr ? t * seq.batch : offsets[t]; }
  int64_t active(int64_t t) const { return seq.active(t); }
  bool is_reset(int64_t t, int64_t b) const { return seq.resets != nullptr && seq.resets[t * seq.batch + b]; }
  // Whether nothing follows row (t, b) in processing order, or nothing precedes it.
  bool is_last(int64_t t, int64_t b) const { return seq.reverse ? t == 0 : ends_at(t, b); }
  bool is_first(int64_t t, int64_t b) const { return seq.reverse ? ends_at(t, b) : t == 0; }
  int64_t previous(int64_t t) const { return seq.reverse ? t + 1 : t - 1; }
  template <class T>
  const T* x_row(const T* x, int64_t t, int64_t b) const {
    return offsets == nullptr ? x + t * seq.x_step + b * seq.x_batch : x + (offsets[t] + b) * seq.x_batch;
  }
  // Whether the state that row b carries into the step after processing step s is cleared first.
  bool resets_after(int64_t s, int64_t b) const { return s + 1 < seq.steps && is_reset(time(s + 1), b); }

 private:
  bool ends_at(int64_t t, int64_t b) const { return t + 1 == seq.steps || b >= active(t + 1); }
};

// Every other step goes through the weights backwards: of a share larger than the private cache, the part that was read
// last is still there when the next step begins.
GENFUSE_HD int64_t to_and_fro(int64_t i, Range range, int64_t step) {
  return step % 2 == 0 ? i : range.end - 1 - (i - range.begin);
}

// A range of steps [begin, end) in processing order; its rows are contiguous.
struct Chunk {
  int64_t begin, end, first_row, rows;
  Chunk(const Geometry& g, int64_t b, int64_t e) : begin(b), end(e) {
    const int64_t low = g.seq.reverse ? g.time(e - 1) : b, high = g.seq.reverse ? g.time(b) : e - 1;
    first_row = g.first_row(low);
    rows = g.first_row(high) + g.active(high) - first_row;
  }
};

// Calls row(index within the chunk, t, b) for the chunk's rows in memory order.
template <class F>
inline void for_chunk_rows(const Geometry& g, const Chunk& c, F row) {
  const int64_t low = g.seq.reverse ? g.time(c.end - 1) : c.begin;
  int64_t index = 0;
  for (int64_t t = low; t < low + (c.end - c.begin); ++t) {
    for (int64_t b = 0; b < g.active(t); ++b) row(index++, t, b);
  }
}

// Threads form `groups` x `lanes`: a group owns rows of the batch and never waits for the others; within a group each
// lane owns a slice of the units and meets the rest at a barrier every step.
struct Grid {
  int groups, lanes;
};

// `row_cost` is the cycles one row costs per step for all units, `weight_bytes` the recurrent weights read per step.
inline Grid choose_grid(int threads, int64_t batch, int64_t unit_blocks, double row_cost, double weight_bytes,
                        int barriers) {
  Grid best{1, 1};
  double best_cost = -1;
  for (int groups = 1; groups <= threads && groups <= maximum(batch, 1); ++groups) {
    const int lanes = static_cast<int>(minimum(threads / groups, unit_blocks));
    const double share = static_cast<double>(ceil_div(unit_blocks, lanes)) / static_cast<double>(unit_blocks);
    const double bytes = weight_bytes * share;
    // Weights beyond a private cache come from the shared one at about 12 bytes a cycle, half hidden by arithmetic.
    const double streaming = bytes > 768.0 * 1024 ? bytes / 24 : 0;
    const double waiting = lanes > 1 ? 1500.0 * barriers : 0;
    const double cost = static_cast<double>(ceil_div(batch, groups)) * row_cost * share + streaming + waiting;
    if (best_cost < 0 || cost < best_cost) {
      best_cost = cost;
      best = {groups, lanes};
    }
  }
  return best;
}

// A member's place in the grid; those left over take part in the chunk-wide work only.
struct Place {
  bool works;
  int lane, lanes;
  Range rows;
  Barrier* barrier;
  void wait() const { barrier->wait(lanes); }

  Place(const Member& m, Grid grid, int64_t batch, Barrier* barriers) {
    const int group = m.rank / grid.lanes;
    works = group < grid.groups;
    lane = m.rank % grid.lanes;
    lanes = grid.lanes;
    rows = works ? split(batch, grid.groups, group) : Range{0, 0};
    barrier = barriers + (works ? group : 0);
  }
};

// ---- random masks ----

// u < p for a real p, on the grid of 2^-24 where u lies; p itself may be none of its points.
inline float mask_threshold(double p) { return static_cast<float>(std::ceil(p * 0x1p24)) * 0x1p-24f; }

// Inverted dropout's factors: 1 / (1 - p) where kept, else 0.
template <class T>
inline void dropout_scale(const Regularizers& r, uint64_t stream, double p, uint64_t first, int64_t count, T* out) {
  const T keep = p < 1 ? static_cast<T>(1.0 / (1.0 - p)) : T{0};
  const float threshold = mask_threshold(p);
  constexpr int64_t block = 256;
  float u[block];
  for (int64_t i = 0; i < count; i += block) {
    const int64_t n = minimum(block, count - i);
    philox_fill(r.seed, r.offset + stream, first + static_cast<uint64_t>(i), n, u);
    for (int64_t j = 0; j < n; ++j) out[i + j] = u[j] >= threshold ? keep : T{0};
  }
}

// Zoneout: the weight of the old state. In training 1 or 0 at random, otherwise p everywhere.
template <class T>
inline void zoneout_weights(const Regularizers& r, uint64_t stream, double p, uint64_t first, int64_t count, T* out) {
  const float threshold = mask_threshold(p);
  constexpr int64_t block = 256;
  float u[block];
  for (int64_t i = 0; i < count; i += block) {
    const int64_t n = minimum(block, count - i);
    philox_fill(r.seed, r.offset + stream, first + static_cast<uint64_t>(i), n, u);
    for (int64_t j = 0; j < n; ++j) out[i + j] = u[j] < threshold ? T{1} : T{0};
  }
}

// old where w = 1, new where w = 0, without rounding at either end, and no NaN from the state that is not taken.
template <class T>
GENFUSE_HD Vec<T> zoneout(Vec<T> w, Vec<T> old_state, Vec<T> new_state) {
  const Vec<T> mix = w * old_state + (1 - w) * new_state;
  return w == 1 ? old_state : (w == 0 ? new_state : mix);
}

// ---- layer normalisation, in parts ----

// Mean and sum of squared deviations of `count` values. Both are taken about a first estimate of the mean and then
// corrected, so that neither suffers where the mean is large beside the deviations.
template <class T>
struct Moments {
  T count, mean, deviation;
  // From the sums of values less `estimate` and of their squares.
  static Moments about(T estimate, T count, T sum, T squares) {
    const T correction = sum / count, deviation = squares - sum * correction;
    return {count, estimate + correction, deviation < 0 ? T{0} : deviation};  // NaN stays
  }
  T rstd(double eps) const { return static_cast<T>(1.0 / std::sqrt(static_cast<double>(deviation / count) + eps)); }
};

template <class T>
inline Moments<T> row_moments(const T* row, int64_t n) {
  Vec<T> total{}, sums{}, squares{};
  for (int64_t i = 0; i < n; i += kLanes<T>) total += load_upto(row + i, n - i);
  const T count = static_cast<T>(n), estimate = sum<T>(total) / count;
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> e = keep_first<T>(load_upto(row + i, n - i) - estimate, n - i);
    sums += e;
    squares += e * e;
  }
  return Moments<T>::about(estimate, count, sum<T>(sums), sum<T>(squares));
}

// Of all parts together, in their order; part(i) gives the moments of one.
template <class T, class Part>
inline Moments<T> combine_moments(int64_t parts, Part part) {
  T count = 0, total = 0, sums = 0, squares = 0;
  for (int64_t i = 0; i < parts; ++i) {
    const Moments<T> m = part(i);
    count += m.count;
    total += m.count * m.mean;
  }
  const T estimate = total / count;
  for (int64_t i = 0; i < parts; ++i) {
    const Moments<T> m = part(i);
    const T e = m.mean - estimate;
    sums += m.count * e;
    squares += m.deviation + m.count * e * e;
  }
  return Moments<T>::about(estimate, count, sums, squares);
}

// ---- packed operands ----

// A matrix cut into panels of at most four vectors of columns. Lanes of a grid own runs of whole vectors, and a panel
// never crosses from one lane's run into the next, so that a lane's share is even to a vector.
template <class T>
struct Panels {
  T* data = nullptr;
  int64_t depth = 0, columns = 0;
  int64_t vectors() const { return ceil_div(columns, kLanes<T>); }
  // A panel begins at any vector: the packed order is [vector run][depth][vectors of the run].
  T* panel(int64_t vector) const { return data + vector * kLanes<T> * depth; }
  static int64_t size(int64_t depth, int64_t columns) { return ceil_div(columns, kLanes<T>) * kLanes<T> * depth; }

  // Calls f(first vector, width in vectors) for the panels of a run of vectors, in the order of to_and_fro.
  template <class F>
  static void for_panels(Range run, F f, int64_t step = 0) {
    const Range panels{0, ceil_div(run.end - run.begin, kPanelVectors)};
    for (int64_t i = 0; i < panels.end; ++i) {
      const int64_t v = run.begin + to_and_fro(i, panels, step) * kPanelVectors;
      f(v, static_cast<int>(minimum(kPanelVectors, run.end - v)));
    }
  }
};

// Adds the tile's [count][vectors] buffer to, or writes it over, rows of C.
template <class T>
inline void put_tile(const T* tile, int count, int vectors, T* const* rows, int64_t column, int64_t columns,
                     bool accumulate) {
  constexpr int lanes = kLanes<T>;
  for (int r = 0; r < count; ++r) {
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = column + v * lanes, left = columns - at;
      Vec<T> value = load(tile + (r * vectors + v) * lanes);
      if (accumulate) value += load_upto(rows[r] + at, left);
      store_upto(rows[r] + at, value, left);
    }
  }
}

// One operand B of a weight gradient, given by its rows, and where its product goes: C [.., columns], contiguous.
template <class T, class Row>
struct GradientOf {
  Row row;
  int64_t columns;
  T* c;
};
template <class T, class Row>
GradientOf<T, Row> gradient_of(Row row, int64_t columns, T* c) {
  return {row, columns, c};
}

inline constexpr int kGradientTiles = 16;

// From one packed tile of A to the next: not a multiple of 4 KB, or the tiles that are written side by side would meet
// in a few sets of the first cache.
template <class T>
inline int64_t gradient_tile(int64_t depth) {
  constexpr int64_t line = 64 / sizeof(T);
  return round_up(depth * kTileRows, 64 * line) + 5 * line;
}
template <class T>
inline int64_t weight_gradient_tiles(int64_t depth) {
  return kGradientTiles * gradient_tile<T>(depth);
}

// C[m, :] (+)= sum over k of A[k][m] * B[k, :], the weight gradients of one chunk, for every B in `products`: A is the
// gradient of the gates (`a`, row stride lda, columns [a_first, a_first + count)). Members share out C's rows; the Bs
// are packed by all of them first, into `b_panels`; `a_tiles` is this member's own buffer.
template <class T, class... Products>
inline void weight_gradient(const Member& m, int64_t depth, const T* a, int64_t lda, int64_t a_first, int64_t count,
                            bool accumulate, T* b_panels, T* a_tiles, const Products&... products) {
  constexpr int lanes = kLanes<T>;
  // Calls f(product, its panels, its columns in vectors) for each.
  const auto each = [&](auto f) {
    T* panels = b_panels;
    const auto one = [&](const auto& product) {
      f(product, Panels<T>{panels, depth, product.columns}, Range{0, ceil_div(product.columns, lanes)});
      panels += Panels<T>::size(depth, product.columns);
    };
    (one(products), ...);
  };
  m.wait();
  each([&](const auto& product, const Panels<T>& b, Range vectors) {
    Panels<T>::for_panels(vectors, [&](int64_t v, int width) {
      if ((v / kPanelVectors) % m.size != m.rank) return;
      pack_rows<T>(width * lanes, product.columns - v * lanes, depth, product.row, v * lanes, b.panel(v));
    });
  });
  m.wait();
  // A block of A's columns at a time, so that its packed tiles stay in L2 while every panel of B passes.
  constexpr int64_t block = kGradientTiles * kTileRows;
  const int64_t blocks = ceil_div(count, block), tile_size = gradient_tile<T>(depth);
  alignas(64) T tile[kTileRows * kPanel<T>];
  for (int64_t i = m.rank; i < blocks; i += m.size) {
    const int64_t begin = i * block, end = minimum(begin + block, count);
    for (int64_t k = 0; k < depth; ++k) {
      const T* from = a + k * lda + a_first;
      T* to = a_tiles + k * kTileRows;
      for (int64_t first = begin; first < end; first += kTileRows, to += tile_size) {
        if (first + kTileRows <= end) {
          std::memcpy(to, from + first, kTileRows * sizeof(T));
        } else {
          for (int64_t j = 0; j < end - first; ++j) to[j] = from[first + j];
        }
      }
    }
    each([&](const auto& product, const Panels<T>& b, Range vectors) {
      Panels<T>::for_panels(vectors, [&](int64_t v, int width) {
        const T* packed = a_tiles;
        for (int64_t first = begin; first < end; first += kTileRows, packed += tile_size) {
          const int n = static_cast<int>(minimum(kTileRows, end - first));
          const T* rows[kTileRows];
          T* out[kTileRows];
          for (int r = 0; r < n; ++r) {
            rows[r] = packed + r;
            out[r] = product.c + (first + r) * product.columns;
          }
          multiply(n, width, depth, rows, kTileRows, b.panel(v), tile);
          put_tile(tile, n, width, out, v * lanes, product.columns, accumulate);
        }
      });
    });
  }
}

// C[row, :] = sum over k of A[row, k] B[k, :] for all rows of a chunk: A row-major (a, lda), B packed.
template <class T, class CRow>
inline void multiply_chunk(const Member& m, int64_t rows, const T* a, int64_t lda, const Panels<T>& b, CRow c_row) {
  const Range mine = m.share(rows);
  Panels<T>::for_panels({0, b.vectors()}, [&](int64_t v, int width) {
    multiply_blocked<T>(
        mine, width, b.depth, [&](int64_t row) { return a + row * lda; }, b.panel(v),
        [&](int64_t first, int count, const T* tile, bool later) {
          T* to[kTileRows];
          for (int r = 0; r < count; ++r) to[r] = c_row(first + r);
          put_tile(tile, count, width, to, v * kLanes<T>, b.columns, later);
        });
  });
}

// ---- what every cell's two passes share ----

// Up to this many rows, the weights are used where they lie: packing would read and write them for a single use. W_hh
// of a batch of one is used so at every step, too: the shared cache's speed is the limit then, and a copy in it only
// takes room.
inline constexpr int64_t kUnpackedRows = 4;

// Sizes in vectors, the grid, masked weights, locked masks, zoneout's decisions. `Gates` rows of W_hh to a unit.
template <class T, int Gates>
struct RecurrentCpu {
  static constexpr int L = kLanes<T>;
  using V = Vec<T>;

  const Sequence& seq;
  const Regularizers& reg;
  const T* x;
  const T* weights;  // W_hh
  Geometry g;
  int64_t H, S, G;  // units, features of h, Gates * H
  int64_t h_vectors, s_vectors;
  int64_t ld_h, ld_s;  // row strides of padded buffers
  Grid grid;
  Barrier* barriers;
  T* dropped = nullptr;      // W_hh with its mask
  T* input_mask = nullptr;   // [batch, input]
  T* output_mask = nullptr;  // [batch, ld_s]
  T* keep_h = nullptr;       // zoneout's weights of the old state in this step, [batch, ld_s] and [batch, ld_h]
  T* keep_c = nullptr;

  template <class Inputs>
  RecurrentCpu(const Inputs& in, Arena& arena, int threads, int barriers_per_step)
      : seq(in.seq), reg(in.reg), x(in.x), weights(in.w_hh), g(in.seq, arena) {
    H = seq.hidden;
    S = seq.state;
    G = Gates * H;
    h_vectors = ceil_div(H, L);
    s_vectors = ceil_div(S, L);
    ld_h = h_vectors * L;
    ld_s = s_vectors * L;
    const double row_cost = static_cast<double>(S) * static_cast<double>(h_vectors) * Gates;
    grid =
        choose_grid(threads, seq.batch, h_vectors, row_cost, static_cast<double>(G * S) * sizeof(T), barriers_per_step);
    barriers = arena.take<Barrier>(grid.groups);
    if (arena.base != nullptr) {
      for (int i = 0; i < grid.groups; ++i) new (barriers + i) Barrier;
    }
    if (reg.drops_weights()) dropped = arena.take<T>(G * S);
    if (reg.masks_input()) input_mask = arena.take<T>(seq.batch * seq.input);
    if (reg.masks_output()) output_mask = arena.take<T>(seq.batch * ld_s);
    if (reg.zoneout_h > 0) keep_h = arena.take<T>(seq.batch * ld_s);
    if (reg.zoneout_c > 0) keep_c = arena.take<T>(seq.batch * ld_h);
  }

  template <class Inputs>
  static double work(const Inputs& in) {
    const Sequence& s = in.seq;
    return static_cast<double>(s.rows) * Gates * static_cast<double>(s.hidden) * static_cast<double>(s.input + s.state);
  }

  const T* recurrent_weights() const { return dropped != nullptr ? dropped : weights; }
  int64_t unit_count(int64_t vector) const { return H - vector * L; }

  // Fewer threads may come than the grid was made for: rows are divided among them first.
  Grid grid_for(int size) const {
    if (size >= grid.groups * grid.lanes) return grid;
    return size < grid.groups ? Grid{size, 1} : Grid{grid.groups, size / grid.groups};
  }

  // Element of a panel's column: [Gates][L units] of unit block v; a row of W, or null past the last unit.
  const T* column(const T* w, int64_t depth, int64_t v, int64_t j) const {
    const int64_t unit = v * L + j % L;
    return unit < H ? w + (j / L * H + unit) * depth : nullptr;
  }

  // The masks and constants of the whole sequence; the caller waits afterwards.
  void prepare(const Member& m) {
    const Regularizers& r = reg;
    if (dropped != nullptr) {
      const Range mine = m.share(G);
      for (int64_t i = mine.begin; i < mine.end; ++i) {
        T* to = dropped + i * S;
        dropout_scale<T>(r, kStreamWeight, r.weight_drop, static_cast<uint64_t>(i * S), S, to);
        for (int64_t j = 0; j < S; ++j) to[j] *= weights[i * S + j];
      }
    }
    const Range mine = m.share(seq.batch);
    for (int64_t b = mine.begin; b < mine.end; ++b) {
      if (input_mask != nullptr) {
        dropout_scale<T>(r, kStreamInput, r.input_dropout, static_cast<uint64_t>(b * seq.input), seq.input,
                         input_mask + b * seq.input);
      }
      if (output_mask != nullptr) {
        dropout_scale<T>(r, kStreamOutput, r.output_dropout, static_cast<uint64_t>(b * S), S, output_mask + b * ld_s);
        for (int64_t j = S; j < ld_s; ++j) output_mask[b * ld_s + j] = 0;
      }
      if (!r.training) {  // zoneout's expectation, the same at every step
        for (int64_t j = 0; keep_h != nullptr && j < ld_s; ++j) keep_h[b * ld_s + j] = static_cast<T>(r.zoneout_h);
        for (int64_t j = 0; keep_c != nullptr && j < ld_h; ++j) keep_c[b * ld_h + j] = static_cast<T>(r.zoneout_c);
      }
    }
  }

  // This step's zoneout decisions for the units (vectors) that a lane owns.
  void draw_zoneout(int64_t t, Range rows, Range h_run, Range s_run) {
    const Regularizers& r = reg;
    if (!r.training) return;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      const uint64_t row = static_cast<uint64_t>(t * seq.batch + b);
      if (keep_h != nullptr) {
        const int64_t first = s_run.begin * L, end = minimum(s_run.end * L, S);
        zoneout_weights<T>(r, kStreamZoneoutH, r.zoneout_h,
                           row * static_cast<uint64_t>(S) + static_cast<uint64_t>(first), end - first,
                           keep_h + b * ld_s + first);
      }
      if (keep_c != nullptr) {
        const int64_t first = h_run.begin * L, end = minimum(h_run.end * L, H);
        zoneout_weights<T>(r, kStreamZoneoutC, r.zoneout_c,
                           row * static_cast<uint64_t>(H) + static_cast<uint64_t>(first), end - first,
                           keep_c + b * ld_h + first);
      }
    }
  }

  // x of a chunk's rows after the input mask: pointers, and, masked, the rows themselves.
  void gather_input(const Member& m, const Chunk& c, const T** rows, T* masked) const {
    const Range mine = m.share(c.rows);
    for_chunk_rows(g, c, [&](int64_t i, int64_t t, int64_t b) {
      if (i < mine.begin || i >= mine.end) return;
      rows[i] = g.x_row(x, t, b);
      if (input_mask != nullptr) {
        T* to = masked + i * seq.input;
        for (int64_t k = 0; k < seq.input; ++k) to[k] = rows[i][k] * input_mask[b * seq.input + k];
        rows[i] = to;
      }
    });
  }

  // The state that enters the first step, in both buffers (a packed row of a reversed sequence enters late).
  template <class Inputs>
  void enter_state(const Inputs& in, int64_t b, T* h_even, T* h_odd) const {
    const bool reset = seq.steps > 0 && g.is_reset(g.time(0), b);
    for (int64_t j = 0; j < ld_s; ++j) {
      h_even[b * ld_s + j] = h_odd[b * ld_s + j] = j < S && !reset ? in.h0[b * S + j] : T{0};
    }
  }

  // h_t from h~: zoneout, the reserve, the output and its mask, the final state, the next step's state.
  template <class Arguments>
  void finish_h(const Arguments& p, T* hidden, const T* h_old, T* h_next, int64_t s, int64_t t, int64_t b, int64_t v,
                V h_new) const {
    const int64_t at = b * ld_s + v * L, n = S - v * L, row = g.first_row(t) + b;
    if (keep_h != nullptr) h_new = zoneout<T>(keep_first<T>(load(keep_h + at), n), load(h_old + at), h_new);
    if (hidden != nullptr) store_upto(hidden + row * S + v * L, h_new, n);
    store_upto(p.y + row * S + v * L, output_mask != nullptr ? h_new * load(output_mask + at) : h_new, n);
    if (g.is_last(t, b)) store_upto(p.h_n + b * S + v * L, h_new, n);
    store(h_next + at, g.resets_after(s, b) ? V{} : h_new);
  }

  // Backward: the gradient of h~ at a vector of h; what zoneout passes straight to h_{t-1} is left in dh.
  V enter_h(const T* grad_y, T* dh, int64_t t, int64_t b, int64_t v) const {
    const int64_t at = b * ld_s + v * L, n = S - v * L;
    V grad = load(dh + at);
    if (grad_y != nullptr) {
      const V of_y = load_upto(grad_y + (g.first_row(t) + b) * S + v * L, n);
      grad += output_mask != nullptr ? of_y * load(output_mask + at) : of_y;
    }
    if (keep_h == nullptr) {
      store(dh + at, V{});
      return grad;
    }
    const V keep = keep_first<T>(load(keep_h + at), n);
    store(dh + at, keep * grad);
    return (1 - keep) * grad;
  }

  // The h that entered step t at row b; null: zeros.
  const T* previous_h(const T* h0, const T* h_all, int64_t t, int64_t b) const {
    if (g.is_reset(t, b)) return nullptr;
    if (g.is_first(t, b)) return h0 + b * S;
    return h_all + (g.first_row(g.previous(t)) + b) * S;
  }

  // Row pointers for a chunk's weight gradients: x after its mask, and the h that entered each step.
  void gather_rows(const Member& m, const Chunk& c, const T* h0, const T* h_all, const T** x_rows, T* x_masked,
                   const T** h_rows) const {
    gather_input(m, c, x_rows, x_masked);
    const Range mine = m.share(c.rows);
    for_chunk_rows(g, c, [&](int64_t i, int64_t t, int64_t b) {
      if (i >= mine.begin && i < mine.end) h_rows[i] = previous_h(h0, h_all, t, b);
    });
  }

  // W_hh's gradient, once complete, is that of the dropped weights: the mask takes it to the weights given.
  void mask_weight_gradient(Range gate_rows, T* grad) const {
    if (dropped == nullptr) return;
    T scale[256];
    for (int64_t i = gate_rows.begin * S; i < gate_rows.end * S; i += 256) {
      const int64_t n = minimum(256, gate_rows.end * S - i);
      dropout_scale<T>(reg, kStreamWeight, reg.weight_drop, static_cast<uint64_t>(i), n, scale);
      for (int64_t j = 0; j < n; ++j) grad[i + j] *= scale[j];
    }
  }

  // Packs this member's share of a matrix with contiguous rows source(k), cut into panels within each lane's run.
  template <class Source>
  static void pack_runs(const Member& m, int lanes, const Panels<T>& to, Source source) {
    for (int lane = 0; lane < lanes; ++lane) {
      Panels<T>::for_panels(split(to.vectors(), lanes, lane), [&](int64_t v, int width) {
        if ((v / kPanelVectors) % m.size != m.rank) return;
        pack_rows<T>(width * L, to.columns - v * L, to.depth, source, v * L, to.panel(v));
      });
    }
  }

  // dh += gradient of W_hh h times W_hh, for a lane's columns; grad_row(b) is row b's. Nothing passes a reset.
  template <class Row>
  void state_gradient(int64_t s, int64_t t, Range rows, Range run, Row grad_row, const Panels<T>& w_hh, T* dh) const {
    Panels<T>::for_panels(
        run,
        [&](int64_t v, int width) {
          multiply_blocked<T>(rows, width, G, grad_row, w_hh.panel(v),
                              [&](int64_t first, int count, const T* tile, bool) {
                                for (int r = 0; r < count; ++r) {
                                  T* to = dh + (first + r) * ld_s + v * L;
                                  for (int i = 0; i < width; ++i) {
                                    store(to + i * L, load(to + i * L) + load(tile + (r * width + i) * L));
                                  }
                                }
                              });
        },
        s);
    if (seq.resets == nullptr) return;
    for (int64_t b = rows.begin; b < rows.end; ++b) {
      for (int64_t v = run.begin; v < run.end && g.is_reset(t, b); ++v) store(dh + b * ld_s + v * L, V{});
    }
  }

  // x's gradient from that of W_ih x, for a chunk.
  void input_gradient(const Member& m, const Chunk& c, const T* grad_gates, int64_t ld, const Panels<T>& w_ih,
                      T* grad_x) const {
    multiply_chunk(m, c.rows, grad_gates, ld, w_ih, [&](int64_t i) { return grad_x + (c.first_row + i) * seq.input; });
    if (input_mask == nullptr) return;
    const Range mine = m.share(c.rows);
    for_chunk_rows(g, c, [&](int64_t i, int64_t, int64_t b) {
      if (i < mine.begin || i >= mine.end) return;
      T* row = grad_x + (c.first_row + i) * seq.input;
      for (int64_t k = 0; k < seq.input; ++k) row[k] *= input_mask[b * seq.input + k];
    });
  }
};

// Up to this many rows in all, W_ih is read where it lies: it becomes the operand that needs no packing, and the few
// rows of x are packed instead.
inline constexpr int64_t kUnpackedProjectionRows = 128;

// out(row)[0 .. count) = W x_rows[row] for a few rows. `panels` holds Panels<T>::size(depth, rows).
template <class T, class Out>
inline void project_few(const Member& m, int64_t rows, const T* const* x_rows, const T* w, int64_t count, int64_t depth,
                        T* panels, Out out) {
  constexpr int L = kLanes<T>;
  const Panels<T> x{panels, depth, rows};
  const auto x_row = [&](int64_t row) { return row < rows ? x_rows[row] : nullptr; };
  const Range mine = m.share(x.vectors());
  // Whole panels are packed by their first member; a panel is at most four vectors wide.
  Panels<T>::for_panels({0, x.vectors()}, [&](int64_t v, int width) {
    if (v < mine.begin || v >= mine.end) return;
    pack_columns<T>(width * L, depth, [&](int64_t j) { return x_row(v * L + j); }, x.panel(v));
  });
  m.wait();
  alignas(64) T tile[kTileRows * kPanel<T>], block[L * kPanel<T>];
  const Range blocks = m.share(ceil_div(count, L));
  Panels<T>::for_panels({0, x.vectors()}, [&](int64_t v, int width) {
    for (int64_t n0 = blocks.begin * L; n0 < minimum(blocks.end * L, count); n0 += L) {
      const int64_t n = minimum(L, count - n0);
      for_tiles(0, n, [&](int64_t first, int rows_here) {
        const T* from[kTileRows];
        for (int r = 0; r < rows_here; ++r) from[r] = w + (n0 + first + r) * depth;
        multiply(rows_here, width, depth, from, 1, x.panel(v), tile);
        std::memcpy(block + first * width * L, tile, static_cast<size_t>(rows_here * width * L) * sizeof(T));
      });
      for (int i = 0; i < width; ++i) {
        Vec<T> square[L];
        for (int r = 0; r < L; ++r) square[r] = r < n ? load(block + (r * width + i) * L) : Vec<T>{};
        transpose<T>(square);
        const int64_t row0 = (v + i) * L;
        for (int64_t r = 0; r < minimum(L, rows - row0); ++r) store_upto(out(row0 + r) + n0, square[r], n);
      }
    }
  });
}

template <class T>
inline void clear(T* at, int64_t count) {
  for (int64_t i = 0; at != nullptr && i < count; ++i) at[i] = 0;
}

// Below this many multiply-adds a thread, waking it costs more than it saves.
inline constexpr double kThreadWork = 100e3;

inline int useful_threads(double multiply_adds, int threads) {
  const double wanted = multiply_adds / kThreadWork;
  return wanted < threads ? static_cast<int>(maximum(1, static_cast<int64_t>(wanted))) : threads;
}

// Run is a kernel's class: Run(arguments, arena, threads), Run::work(arguments), run(executor, threads).
template <class Run, class Arguments>
KernelOf<Arguments> kernel_of() {
  return {[](const Arguments& arguments, int threads) {
            Arena arena{nullptr};
            const Run run(arguments, arena, useful_threads(Run::work(arguments), threads));
            return arena.used;
          },
          [](const Arguments& arguments, char* workspace, const Executor& executor) {
            Arena arena{workspace};
            const int threads = useful_threads(Run::work(arguments), executor.threads);
            Run run(arguments, arena, threads);
            run.run(executor, threads);
          }};
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

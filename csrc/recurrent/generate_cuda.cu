// The decoding loop in one cooperative kernel (generate_cuda.h). Every phase of a token (a layer, the head, the draw)
// is spread over the whole grid and ends at a grid barrier. Weights are read from the second-level cache each time:
// the 4 to 30 MB of a language model of this kind stay there.
//
// Rows never influence each other: each product is one chain of additions per lane and one tree over the lanes,
// in an order that depends on neither the batch nor the grid.
#include "recurrent/generate_cuda.h"

#include "recurrent/cell_math.h"
#include "recurrent/persistent_cuda.cuh"

namespace genfuse {
namespace {

constexpr int kWarps = kGenerateThreads / kWarp;

// sum[i * kRows + b] += row i of the weights times vector b, this lane's part. Weights and vectors are in global
// memory; rows beyond `rows` count as zeros, vectors beyond `vectors` are skipped.
template <int kRows, class W>
__device__ inline void add_products(const W* const (&w)[4], int rows, const float* const (&v)[kRows], int vectors,
                                    int64_t depth, bool fresh, float (&sum)[4 * kRows]) {
  for (int64_t k = lane_index(); k < depth; k += kWarp) {
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) weight[i] = i < rows ? to_float(w[i][k]) : 0.0f;
#pragma unroll
    for (int b = 0; b < kRows; ++b) {
      if (b >= vectors) continue;
      const float value = fresh ? load_fresh(v[b] + k) : v[b][k];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (i < rows) sum[i * kRows + b] = fmaf(weight[i], value, sum[i * kRows + b]);
      }
    }
  }
}

// Sums each of 4 * kRows values over the warp; lane i gets the sum of value i. Both sizes add in the same tree.
__device__ inline float warp_sums(float (&v)[32]) { return reduce_scatter(v); }
__device__ inline float warp_sums(float (&v)[4]) {
  float mine = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float x = v[i];
#pragma unroll
    for (int offset = kWarp / 2; offset >= 1; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
    if (lane_index() == i) mine = x;
  }
  return mine;
}

__device__ inline double warp_total(double x) {
#pragma unroll
  for (int offset = kWarp / 2; offset >= 1; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}
__device__ inline float warp_total(float x) {
#pragma unroll
  for (int offset = kWarp / 2; offset >= 1; offset /= 2) x += __shfl_xor_sync(kFullWarp, x, offset);
  return x;
}

struct BlockScratch {
  double chunk[kGenerateThreads];
  double total[kWarps];
  float value[kWarps];
  int64_t index[kWarps];
  int64_t chosen;
};
static_assert(sizeof(BlockScratch) <= kGenerateScratchBytes);

// The block's sum, in every thread, always added in the same order.
template <class X>
__device__ inline X block_total(X x, X* parts) {
  x = warp_total(x);
  __syncthreads();  // what the parts held before has been read
  if (lane_index() == 0) parts[warp_index()] = x;
  __syncthreads();
  X sum = 0;
  for (int w = 0; w < kWarps; ++w) sum += parts[w];
  return sum;
}

__device__ inline bool is_nan(float x) { return x != x; }

// Orders like the number: larger key, larger number. NaN is not asked for.
__device__ inline uint32_t order_key(float x) {
  FloatBits u;
  u.value = x == 0.0f ? 0.0f : x;  // -0 and 0 are equal
  return (u.bits & 0x80000000u) != 0 ? ~u.bits : u.bits | 0x80000000u;
}

// exp(x - largest) in float64; below the smallest float64 the probability is 0.
__device__ inline double weight_of(float x, float largest) {
  const double d = static_cast<double>(x) - static_cast<double>(largest);
  return d < -708.0 ? 0.0 : exp(d);
}

// The first index of the largest value (a NaN is larger than any number), in every thread.
__device__ inline int64_t block_argmax(const float* x, int64_t n, BlockScratch& scratch) {
  float best = 0.0f;
  int64_t at = -1;
  const auto take = [&](float value, int64_t index) {
    if (index < 0) return;
    const bool same = value == best || (is_nan(value) && is_nan(best));
    const bool larger = value > best || (is_nan(value) && !is_nan(best));
    if (at < 0 || larger || (same && index < at)) best = value, at = index;
  };
  for (int64_t v = threadIdx.x; v < n; v += kGenerateThreads) take(load_fresh(x + v), v);
  for (int offset = kWarp / 2; offset >= 1; offset /= 2) {
    const float value = __shfl_xor_sync(kFullWarp, best, offset);
    const int64_t index = __shfl_xor_sync(kFullWarp, at, offset);
    take(value, index);
  }
  __syncthreads();
  if (lane_index() == 0) scratch.value[warp_index()] = best, scratch.index[warp_index()] = at;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) take(scratch.value[w], scratch.index[w]);
  return at;
}

// Draws by the library's rule (reference/recurrent.py, sample_token) from one row of logits, with a whole block.
// Order statistics are found by bisecting the 32 bits of the ordered keys, which needs no sorting and no memory.
template <class W>
__device__ inline int64_t block_sample(const CudaGenerate<W>& p, float* logits, float u, float& log_prob,
                                       BlockScratch& scratch) {
  const int64_t n = p.vocab;
  if (p.temperature == 0.0f) {
    log_prob = 0.0f;
    return block_argmax(logits, n, scratch);
  }
  for (int64_t v = threadIdx.x; v < n; v += kGenerateThreads) logits[v] = load_fresh(logits + v) / p.temperature;
  __syncthreads();
  const float largest = load_fresh(logits + block_argmax(logits, n, scratch));

  // Each thread's own stretch of the vocabulary, for what depends on the order of indices.
  const int64_t size = (n + kGenerateThreads - 1) / kGenerateThreads;
  const int64_t begin = size * threadIdx.x < n ? size * threadIdx.x : n;
  const int64_t end = begin + size < n ? begin + size : n;
  const auto total_from = [&](uint32_t least) {
    double sum = 0.0;
    for (int64_t v = begin; v < end; ++v) {
      const float x = load_fresh(logits + v);
      if (order_key(x) >= least) sum += weight_of(x, largest);
    }
    return block_total(sum, scratch.total);
  };

  uint32_t least = 0;
  double total = total_from(0);
  if (is_nan(largest) || total != total) {  // NaN in, NaN out, and a token that exists
    log_prob = static_cast<float>(total + static_cast<double>(largest));
    return n - 1;
  }
  if (p.top_k > 0 && p.top_k < n) {
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t tried = least | (1u << bit);
      double count = 0.0;
      for (int64_t v = threadIdx.x; v < n; v += kGenerateThreads) count += order_key(load_fresh(logits + v)) >= tried;
      if (block_total(count, scratch.total) >= static_cast<double>(p.top_k)) least = tried;
    }
    total = total_from(least);
  }
  // Of the logits whose key is exactly `edge`, the first `ties` are kept; of those above, all.
  uint32_t edge = least;
  int64_t ties = n;
  if (p.top_p < 1.0) {
    // The largest key whose logits and those above hold the mass; their total is the whole, so there is one.
    edge = 0;
    for (int bit = 31; bit >= 0; --bit) {
      const uint32_t tried = edge | (1u << bit);
      if (tried <= least || total_from(tried) / total >= p.top_p) edge = tried;
    }
    double above = 0.0, equal = 0.0, each = 0.0;
    for (int64_t v = begin; v < end; ++v) {
      const float x = load_fresh(logits + v);
      const uint32_t key = order_key(x);
      if (key > edge) above += weight_of(x, largest);
      if (key == edge) equal += 1.0, each = weight_of(x, largest);
    }
    above = block_total(above, scratch.total);
    each = block_total(equal * each, scratch.total);
    equal = block_total(equal, scratch.total);
    each = equal > 0.0 ? each / equal : 0.0;
    for (ties = 1; ties < static_cast<int64_t>(equal); ++ties) {
      if ((above + static_cast<double>(ties) * each) / total >= p.top_p) break;
    }
  }

  // Ties before this thread's stretch, then its kept mass and what lies before that.
  int64_t rank = 0;
  if (ties < n) {
    double mine = 0.0;
    for (int64_t v = begin; v < end; ++v) mine += order_key(load_fresh(logits + v)) == edge;
    __syncthreads();
    scratch.chunk[threadIdx.x] = mine;
    __syncthreads();
    for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) rank += static_cast<int64_t>(scratch.chunk[i]);
  }
  const auto kept_weight = [&](int64_t v, int64_t& tie) {
    const float x = load_fresh(logits + v);
    const uint32_t key = order_key(x);
    if (key < edge || (key == edge && tie++ >= ties)) return 0.0;
    return weight_of(x, largest);
  };
  double mine = 0.0;
  int64_t tie = rank;
  for (int64_t v = begin; v < end; ++v) mine += kept_weight(v, tie);
  __syncthreads();
  scratch.chunk[threadIdx.x] = mine;
  if (threadIdx.x == 0) scratch.chosen = -1;
  __syncthreads();
  double before = 0.0, kept = 0.0;
  int last = 0;
  for (int i = 0; i < kGenerateThreads; ++i) {
    if (i < static_cast<int>(threadIdx.x)) before += scratch.chunk[i];
    kept += scratch.chunk[i];
    if (scratch.chunk[i] > 0.0) last = i;
  }
  // The first stretch whose end passes the target holds the token; if rounding leaves none, the last with any mass.
  const double target = static_cast<double>(u) * kept;
  const bool passes = before + mine > target && mine > 0.0;
  const bool earlier = before > target;
  if ((passes && !earlier) || (static_cast<int>(threadIdx.x) == last && !passes && !earlier)) {
    double sum = before;
    int64_t token = n - 1;
    tie = rank;
    for (int64_t v = begin; v < end; ++v) {
      const double w = kept_weight(v, tie);
      if (!(w > 0.0)) continue;
      token = v;
      sum += w;
      if (sum > target) break;
    }
    scratch.chosen = token;
  }
  __syncthreads();
  const int64_t token = scratch.chosen;
  log_prob =
      static_cast<float>(static_cast<double>(load_fresh(logits + token)) - static_cast<double>(largest) - log(kept));
  return token;
}

template <class W>
__device__ inline int64_t token_at(const CudaGenerate<W>& p, int64_t row, int64_t s) {
  const int64_t token = s < p.prompt_length ? p.prompt[row * p.prompt_length + s]
                                            : load_fresh(p.tokens + row * p.length + s - p.prompt_length);
  return token < 0 ? 0 : token < p.vocab ? token : p.vocab - 1;
}

__device__ inline float zoned(float fresh, float old, float p) {
  return p == 0.0f ? fresh : p * old + (1.0f - p) * fresh;
}

// One layer of one step, products and cell: a warp takes one unit (its gates) and kRows rows.
template <int kRows, class W>
__device__ inline void layer_step(const CudaGenerate<W>& p, int l, int64_t s, int64_t largest) {
  const CudaGenerateLayer<W>& layer = p.layers[l];
  const int64_t H = layer.hidden, half = p.batch * p.state;
  const float* h_old = p.h + (s & 1) * half;
  float* h_new = p.h + (1 - (s & 1)) * half;
  const int gates = p.cell == CudaCell::gru ? 3 : 4;
  const int lane = lane_index(), gate = lane / kRows, b = lane % kRows;
  const int64_t tiles = (p.batch + kRows - 1) / kRows, warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(); task < H * tiles; task += warps) {
    const int64_t unit = task % H, row0 = task / H * kRows;
    const int rows = static_cast<int>(p.batch - row0 < kRows ? p.batch - row0 : kRows);
    const W *w_x[4], *w_h[4];
    const float *x[kRows], *h[kRows];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      w_x[i] = layer.w_ih + ((i < gates ? i : 0) * H + unit) * layer.input;
      w_h[i] = layer.w_hh + ((i < gates ? i : 0) * H + unit) * H;
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = row0 + (r < rows ? r : 0);
      x[r] = l == 0 ? p.embedding + token_at(p, row, s) * layer.input : h_new + row * p.state + p.layers[l - 1].offset;
      h[r] = h_old + row * p.state + layer.offset;
    }
    float from_x[4 * kRows], from_h[4 * kRows];
#pragma unroll
    for (int i = 0; i < 4 * kRows; ++i) from_x[i] = from_h[i] = 0.0f;
    add_products(w_x, gates, x, rows, layer.input, l > 0, from_x);
    add_products(w_h, gates, h, rows, H, true, from_h);
    float a_x = warp_sums(from_x), a_h = warp_sums(from_h);
    const bool live = gate < gates && b < rows;
    const int64_t row = row0 + b;
    if (p.cell == CudaCell::layer_norm_lstm) {
      if (live) {
        float* raw = p.raw + row * 4 * largest + gate * H + unit;
        raw[0] = a_x;
        raw[p.batch * 4 * largest] = a_h;
      }
      continue;
    }
    if (live) {
      a_x += layer.b_ih[gate * H + unit];
      a_h += layer.b_hh[gate * H + unit];
    }
    const bool separate = p.cell == CudaCell::gru;
    const float a = a_x + a_h;
    const float a1 = __shfl_sync(kFullWarp, a, kRows + b), a2 = __shfl_sync(kFullWarp, a, 2 * kRows + b);
    const float a3 = __shfl_sync(kFullWarp, a, 3 * kRows + b);
    const float x2 = __shfl_sync(kFullWarp, a_x, 2 * kRows + b), h2 = __shfl_sync(kFullWarp, a_h, 2 * kRows + b);
    if (!live || gate != 0) continue;
    const int64_t at = row * p.state + layer.offset + unit;
    const float old = load_fresh(h_old + at);
    if (separate) {
      h_new[at] = zoned(gru_output(gru_gates(a, a1, x2, h2), old), old, p.zoneout_h);
    } else {
      const LstmGates<float> g = lstm_gates(a, a1, a2, a3);
      const float c_old = load_fresh(p.c_n + at), c_tilde = lstm_cell(g, c_old);
      p.c_n[at] = zoned(c_tilde, c_old, p.zoneout_c);
      h_new[at] = zoned(g.o * tanh(c_tilde), old, p.zoneout_h);
    }
  }
}

// The layer-normalised cell of one row, with a whole block: Ba, Kiros, Hinton 2016, eq. 20-22.
template <class W>
__device__ inline void normalised_cell(const CudaGenerate<W>& p, int l, int64_t s, int64_t row, int64_t largest,
                                       BlockScratch& scratch) {
  const CudaGenerateLayer<W>& layer = p.layers[l];
  const int64_t H = layer.hidden, half = p.batch * p.state;
  const float* x = p.raw + row * 4 * largest;
  const float* h = x + p.batch * 4 * largest;
  float* cell = reinterpret_cast<float*>(shared_memory() + kGenerateScratchBytes);
  float* out = cell + largest;
  const auto moments = [&](const auto& at, int64_t n, float& mean, float& rstd) {
    float sum = 0.0f;
    for (int64_t j = threadIdx.x; j < n; j += kGenerateThreads) sum += at(j);
    mean = block_total(sum, scratch.value) / static_cast<float>(n);
    float squares = 0.0f;
    for (int64_t j = threadIdx.x; j < n; j += kGenerateThreads) squares += (at(j) - mean) * (at(j) - mean);
    rstd = 1.0f / sqrtf(block_total(squares, scratch.value) / static_cast<float>(n) + p.eps);
  };
  float mean_x, rstd_x, mean_h, rstd_h, mean_c, rstd_c;
  moments([&](int64_t j) { return load_fresh(x + j); }, 4 * H, mean_x, rstd_x);
  moments([&](int64_t j) { return load_fresh(h + j); }, 4 * H, mean_h, rstd_h);
  const auto gate = [&](int64_t j) {
    return layer.ln_ih[j] * ((load_fresh(x + j) - mean_x) * rstd_x) + layer.b_ih[j] +
           layer.ln_hh[j] * ((load_fresh(h + j) - mean_h) * rstd_h) + layer.b_hh[j];
  };
  const int64_t base = row * p.state + layer.offset;
  for (int64_t j = threadIdx.x; j < H; j += kGenerateThreads) {
    const LstmGates<float> g = lstm_gates(gate(j), gate(H + j), gate(2 * H + j), gate(3 * H + j));
    const float c_old = load_fresh(p.c_n + base + j);
    cell[j] = lstm_cell(g, c_old);
    out[j] = g.o;
    p.c_n[base + j] = zoned(cell[j], c_old, p.zoneout_c);
  }
  moments([&](int64_t j) { return cell[j]; }, H, mean_c, rstd_c);
  for (int64_t j = threadIdx.x; j < H; j += kGenerateThreads) {
    const float seen = layer.ln_c_weight[j] * ((cell[j] - mean_c) * rstd_c) + layer.ln_c_bias[j];
    p.h[(1 - (s & 1)) * half + base + j] =
        zoned(out[j] * tanh(seen), load_fresh(p.h + (s & 1) * half + base + j), p.zoneout_h);
  }
}

// Logits of the step: a warp takes four tokens and kRows rows.
template <int kRows, class W>
__device__ inline void head_step(const CudaGenerate<W>& p, int64_t s) {
  const CudaGenerateLayer<W>& top = p.layers[p.layer_count - 1];
  const float* states = p.h + (1 - (s & 1)) * p.batch * p.state + top.offset;
  const int lane = lane_index(), i_of = lane / kRows, b = lane % kRows;
  const int64_t quads = (p.vocab + 3) / 4, tiles = (p.batch + kRows - 1) / kRows;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kWarps;
  for (int64_t task = static_cast<int64_t>(blockIdx.x) * kWarps + warp_index(); task < quads * tiles; task += warps) {
    const int64_t token0 = task % quads * 4, row0 = task / quads * kRows;
    const int rows = static_cast<int>(p.batch - row0 < kRows ? p.batch - row0 : kRows);
    const int tokens = static_cast<int>(p.vocab - token0 < 4 ? p.vocab - token0 : 4);
    const W* w[4];
    const float* h[kRows];
#pragma unroll
    for (int i = 0; i < 4; ++i) w[i] = p.head_weight + (token0 + (i < tokens ? i : 0)) * top.hidden;
#pragma unroll
    for (int r = 0; r < kRows; ++r) h[r] = states + (row0 + (r < rows ? r : 0)) * p.state;
    float sum[4 * kRows];
#pragma unroll
    for (int i = 0; i < 4 * kRows; ++i) sum[i] = 0.0f;
    add_products(w, tokens, h, rows, top.hidden, true, sum);
    float logit = warp_sums(sum);
    if (i_of >= tokens || b >= rows) continue;
    if (p.head_bias != nullptr) logit += p.head_bias[token0 + i_of];
    p.logits[(row0 + b) * p.vocab + token0 + i_of] = logit;
  }
}

template <int kRows, class W>
__global__ void __launch_bounds__(kGenerateThreads, 1) generate(CudaGenerate<W> p, int64_t largest) {
  BlockScratch& scratch = *reinterpret_cast<BlockScratch*>(shared_memory());
  const int64_t everyone = static_cast<int64_t>(gridDim.x) * kGenerateThreads;
  const int64_t me = static_cast<int64_t>(blockIdx.x) * kGenerateThreads + threadIdx.x;
  for (int64_t i = me; i < p.batch * p.state; i += everyone) {
    p.h[i] = p.h0[i];
    if (p.c_n != nullptr) p.c_n[i] = p.c0[i];
  }
  uint64_t seed = 0, offset = 0;
  if (p.u == nullptr && p.rng != nullptr) {
    seed = static_cast<uint64_t>(p.rng[0]);
    offset = static_cast<uint64_t>(p.rng[1]);
  }
  grid_barrier();
  const int64_t steps = p.prompt_length + (p.length > 0 ? p.length : 1) - 1;
  for (int64_t s = 0; s < steps; ++s) {
    for (int l = 0; l < p.layer_count; ++l) {
      layer_step<kRows>(p, l, s, largest);
      grid_barrier();
      if (p.cell != CudaCell::layer_norm_lstm) continue;
      for (int64_t row = blockIdx.x; row < p.batch; row += gridDim.x) {
        __syncthreads();  // the row before has done with the shared memory
        normalised_cell(p, l, s, row, largest, scratch);
      }
      grid_barrier();
    }
    const int64_t drawn = s - (p.prompt_length - 1);
    if (drawn < 0 || drawn >= p.length) continue;
    head_step<kRows>(p, s);
    grid_barrier();
    for (int64_t row = blockIdx.x; row < p.batch; row += gridDim.x) {
      const int64_t at = row * p.length + drawn;
      float u = 0.0f, log_prob = 0.0f;
      if (p.u != nullptr) {
        u = p.u[at];
      } else if (p.rng != nullptr) {
        u = philox_uniform(seed, offset, (static_cast<uint64_t>(row) << 32) + static_cast<uint64_t>(drawn));
      }
      const int64_t token = block_sample(p, p.logits + row * p.vocab, u, log_prob, scratch);
      if (threadIdx.x == 0) {
        p.tokens[at] = token;
        p.log_probs[at] = log_prob;
      }
      __syncthreads();
    }
    grid_barrier();
  }
  for (int64_t i = me; i < p.batch * p.state; i += everyone)
    p.h_n[i] = load_fresh(p.h + (steps & 1) * p.batch * p.state + i);
}

}  // namespace

template <class W>
int launch_generate(const CudaGenerate<W>& p, int64_t largest_hidden, int multiprocessors, void* stream) {
  const int64_t shared = generate_shared_bytes(largest_hidden, p.cell == CudaCell::layer_norm_lstm);
  return launch_cooperative(p.batch == 1 ? generate<1, W> : generate<kRowTile, W>, multiprocessors, kGenerateThreads,
                            shared, stream, p, largest_hidden);
}
template int launch_generate(const CudaGenerate<float>&, int64_t, int, void*);
template int launch_generate(const CudaGenerate<BFloat16>&, int64_t, int, void*);

}  // namespace genfuse

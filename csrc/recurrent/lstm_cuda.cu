// The persistent LSTM, forward and backward (layout and launch: sequence_cuda.h).
#include "recurrent/cell_math.h"
#include "recurrent/persistent_cuda.cuh"

namespace genfuse {
namespace {

// A warp takes one unit and kRowTile rows: its 32 lanes end up with 4 gates x 8 rows of W_hh h, and the lanes of gate i
// collect the other three and finish the cell.
template <class T>
__global__ void __launch_bounds__(kPersistentThreads, 1) lstm_persistent_forward(PersistentForward<T> p) {
  const int depth = p.plan.depth, lane = lane_index(), gate = lane / kRowTile;
  const int64_t H = p.hidden, first = static_cast<int64_t>(blockIdx.x) * p.plan.units;
  const int units = static_cast<int>(H - first < p.plan.units ? H - first : p.plan.units);
  SharedArena arena{shared_memory()};
  T* weights = arena.take<T>(static_cast<int64_t>(p.plan.units) * 4 * depth);
  float* cell = arena.take<float>(p.batch * p.plan.units);
  float* staged = arena.take<float>(static_cast<int64_t>(p.plan.rows) * depth);
  load_weight_rows<4>(p, first, units, weights);
  for (int64_t i = threadIdx.x; i < p.batch * units; i += kPersistentThreads) {
    cell[i] = p.c0[i / units * H + first + i % units];
  }
  const Zoneout zone_h(p.zoneout_h, p.training, p.rng, kStreamZoneoutH);
  const Zoneout zone_c(p.zoneout_c, p.training, p.rng, kStreamZoneoutC);

  for (int64_t s = 0; s < p.steps; ++s) {
    const int64_t t = p.reverse ? p.steps - 1 - s : s;
    const float* h_old = s == 0 ? p.h0 : p.exchange + (s & 1) * p.batch * H;
    float* h_new = p.exchange + (1 - (s & 1)) * p.batch * H;
    for (int64_t row0 = 0; row0 < p.batch; row0 += p.plan.rows) {
      const int64_t n = p.batch - row0 < p.plan.rows ? p.batch - row0 : p.plan.rows;
      __syncthreads();  // the rows staged before have been used
      stage_states(p, h_old, t, row0, n, staged);
      __syncthreads();
      const int tiles = static_cast<int>((n + kRowTile - 1) / kRowTile);
      for (int task = warp_index(); task < units * tiles; task += kPersistentThreads / kWarp) {
        const int u = task % units, b = task / units * kRowTile + lane % kRowTile;
        const int64_t unit = first + u, row = row0 + b, place = t * p.batch + row;
        const bool live = b < n;
        float a = 0.0f;
        if (live) {
          a = p.xp[(place * 4 + gate) * H + unit];
          if (p.bias_ih != nullptr) a += p.bias_ih[gate * H + unit];
          if (p.bias_hh != nullptr) a += p.bias_hh[gate * H + unit];
        }
        a += tile_product<4>(weights + static_cast<int64_t>(u) * 4 * depth, depth,
                             staged + static_cast<int64_t>(task / units) * kRowTile * depth, depth, depth);
        const float a_f = __shfl_sync(kFullWarp, a, kRowTile + lane % kRowTile);
        const float a_g = __shfl_sync(kFullWarp, a, 2 * kRowTile + lane % kRowTile);
        const float a_o = __shfl_sync(kFullWarp, a, 3 * kRowTile + lane % kRowTile);
        if (!live || gate != 0) continue;

        const LstmGates<float> g = lstm_gates(a, a_f, a_g, a_o);
        const bool reset = is_reset(p, t, row);
        const float c_old = reset ? 0.0f : cell[row * units + u];
        const float c_tilde = lstm_cell(g, c_old);
        const float h_tilde = g.o * tanh(c_tilde);
        const int64_t element = place * H + unit, state = row * H + unit;
        const float c = zone_c.mix(c_tilde, c_old, zone_c.kept(element));
        const float h = zone_h.mix(h_tilde, staged[static_cast<int64_t>(b) * depth + unit], zone_h.kept(element));
        cell[row * units + u] = c;
        h_new[state] = h;
        p.y[element] = from_float<T>(p.output_mask == nullptr ? h : h * p.output_mask[state]);
        if (p.hidden_states != nullptr) p.hidden_states[element] = h;
        if (p.cells != nullptr) p.cells[element] = c;
        if (p.gates != nullptr) {
          float* out = p.gates + place * 4 * H + unit;
          out[0] = g.i, out[H] = g.f, out[2 * H] = g.g, out[3 * H] = g.o;
        }
        if (s == p.steps - 1) {
          p.h_n[state] = h;
          p.c_n[state] = c;
        }
      }
    }
    if (s < p.steps - 1) grid_barrier();
  }
}

// The mirror image: a warp takes four units, kRowTile rows and one gate's share of dh = sum over gates of W_hh^T da.
template <class T>
__global__ void __launch_bounds__(kPersistentThreads, 1) lstm_persistent_backward(PersistentBackward<T> p) {
  const int depth = p.plan.depth;
  const int64_t H = p.hidden, first = static_cast<int64_t>(blockIdx.x) * p.plan.units;
  const int units = static_cast<int>(H - first < p.plan.units ? H - first : p.plan.units);
  const int groups = (p.plan.units + 3) / 4;
  SharedArena arena{shared_memory()};
  T* weights = arena.take<T>(static_cast<int64_t>(groups) * 16 * depth);
  float* direct = arena.take<float>(p.batch * p.plan.units);  // of h_t, past the products
  float* d_cell = arena.take<float>(p.batch * p.plan.units);  // of c_t
  float* parts = arena.take<float>(4 * groups * kWarp);
  float* staged = arena.take<float>(static_cast<int64_t>(p.plan.staged) * kRowTile * depth);
  load_weight_columns<4>(p, first, units, groups * 4, weights);
  for (int64_t i = threadIdx.x; i < p.batch * units; i += kPersistentThreads) {
    const int64_t state = i / units * H + first + i % units;
    direct[i] = p.grad_h_n == nullptr ? 0.0f : p.grad_h_n[state];
    d_cell[i] = p.grad_c_n == nullptr ? 0.0f : p.grad_c_n[state];
  }
  __syncthreads();
  const Zoneout zone_h(p.zoneout_h, p.training, p.rng, kStreamZoneoutH);
  const Zoneout zone_c(p.zoneout_c, p.training, p.rng, kStreamZoneoutC);

  // One round more than steps: the last one only takes the gradient through to h0.
  for (int64_t s = 0; s <= p.steps; ++s) {
    const int64_t t = p.reverse ? s : p.steps - 1 - s;
    const int64_t t_later = p.reverse ? t - 1 : t + 1, t_old = p.reverse ? t + 1 : t - 1;
    for (int64_t row0 = 0; row0 < p.batch; row0 += kRowTile) {
      const int64_t n = p.batch - row0 < kRowTile ? p.batch - row0 : kRowTile;
      if (s > 0) later_step_product<4, false>(p, t_later, row0, n, weights, groups, staged, parts);
      for (int i = static_cast<int>(threadIdx.x); i < n * units; i += kPersistentThreads) {
        const int b = i / units, u = i % units;
        const int64_t row = row0 + b, state = row * H + first + u, own = row * units + u;
        float grad = direct[own];
        if (s > 0) grad += summed_parts<4>(parts, groups, u, b);
        if (s == p.steps) {
          p.grad_h0[state] = grad;
          p.grad_c0[state] = d_cell[own];
          continue;
        }
        const int64_t place = t * p.batch + row, element = place * H + first + u;
        if (p.grad_y != nullptr) {
          const float shown = to_float(p.grad_y[element]);
          grad += p.output_mask == nullptr ? shown : shown * p.output_mask[state];
        }
        const float* saved = p.gates + place * 4 * H + first + u;
        const LstmGates<float> g{saved[0], saved[H], saved[2 * H], saved[3 * H]};
        const bool reset = is_reset(p, t, row);
        float c_old = 0.0f;
        if (!reset) c_old = s == p.steps - 1 ? p.c0[state] : p.cells[(t_old * p.batch + row) * H + first + u];

        const float keep_h = zone_h.kept(element), keep_c = zone_c.kept(element);
        const float grad_h = zone_h.to_fresh(grad, keep_h);
        float grad_ai, grad_af, grad_ag, grad_ao;
        const float grad_c = zone_c.to_fresh(d_cell[own], keep_c) +
                             lstm_output_backward(grad_h, g.o, tanh(lstm_cell(g, c_old)), grad_ao);
        const float grad_c_old = lstm_cell_backward(grad_c, g, c_old, grad_ai, grad_af, grad_ag);
        direct[own] = reset ? 0.0f : zone_h.to_old(grad, keep_h);
        d_cell[own] = reset ? 0.0f : grad_c_old + zone_c.to_old(d_cell[own], keep_c);
        T* out = p.grad_gates + place * 4 * H + first + u;
        out[0] = from_float<T>(grad_ai), out[H] = from_float<T>(grad_af);
        out[2 * H] = from_float<T>(grad_ag), out[3 * H] = from_float<T>(grad_ao);
      }
    }
    if (s < p.steps) grid_barrier();
  }
}

template <class T>
__global__ void dropout(Dropout<T> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.count) return;
  const float u = philox_uniform(static_cast<uint64_t>(p.rng[0]), static_cast<uint64_t>(p.rng[1]) + p.stream,
                                 static_cast<uint64_t>(i % p.period));
  const bool kept = static_cast<double>(u) >= p.p;
  const float scale = static_cast<float>(p.p >= 1 ? 0.0 : 1.0 / (1.0 - p.p));
  p.out[i] = from_float<T>(kept ? (p.x == nullptr ? 1.0f : to_float(p.x[i])) * scale : 0.0f);
}

template <class T>
__global__ void previous_states(PreviousStates<T> p) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= p.steps * p.batch * p.hidden) return;
  const int64_t place = i / p.hidden, t = place / p.batch, t_old = p.reverse ? t + 1 : t - 1;
  float h = 0.0f;
  if (p.resets == nullptr || !p.resets[place]) {
    const int64_t from = i + (t_old - t) * p.batch * p.hidden;
    if (t_old < 0 || t_old >= p.steps) {
      h = p.h0[i % (p.batch * p.hidden)];
    } else {
      h = p.kept != nullptr ? p.kept[from] : to_float(p.y[from]);
    }
  }
  p.out[i] = from_float<T>(h);
}

}  // namespace

template <class T>
int launch_dropout(const Dropout<T>& p, void* stream) {
  return launch_elements(dropout<T>, p.count, stream, p);
}
template <class T>
int launch_previous_states(const PreviousStates<T>& p, void* stream) {
  return launch_elements(previous_states<T>, p.steps * p.batch * p.hidden, stream, p);
}
template int launch_dropout(const Dropout<float>&, void*);
template int launch_dropout(const Dropout<BFloat16>&, void*);
template int launch_previous_states(const PreviousStates<float>&, void*);
template int launch_previous_states(const PreviousStates<BFloat16>&, void*);

#ifndef GENFUSE_CUDA_ON_HOST
DeviceLimits device_limits(int device) {
  const auto ask = [device](cudaDeviceAttr attribute) {
    int value = 0;
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  return {ask(cudaDevAttrMultiProcessorCount), ask(cudaDevAttrMaxSharedMemoryPerBlockOptin),
          ask(cudaDevAttrCooperativeLaunch) != 0};
}

const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }
#endif

template <class T>
int launch_lstm_forward(const PersistentForward<T>& p, void* stream) {
  return launch_cooperative(lstm_persistent_forward<T>, p.plan.blocks, kPersistentThreads, p.plan.shared_bytes, stream,
                            p);
}
template <class T>
int launch_lstm_backward(const PersistentBackward<T>& p, void* stream) {
  return launch_cooperative(lstm_persistent_backward<T>, p.plan.blocks, kPersistentThreads, p.plan.shared_bytes, stream,
                            p);
}
template int launch_lstm_forward(const PersistentForward<float>&, void*);
template int launch_lstm_forward(const PersistentForward<BFloat16>&, void*);
template int launch_lstm_backward(const PersistentBackward<float>&, void*);
template int launch_lstm_backward(const PersistentBackward<BFloat16>&, void*);

}  // namespace genfuse

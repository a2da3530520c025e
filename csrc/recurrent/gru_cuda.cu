// The persistent GRU, forward and backward (layout and launch: sequence_cuda.h); the LSTM's kernels with three gates.
#include "recurrent/cell_math.h"
#include "recurrent/persistent_cuda.cuh"

namespace genfuse {
namespace {

template <class T>
__global__ void __launch_bounds__(kPersistentThreads, 1) gru_persistent_forward(PersistentForward<T> p) {
  const int depth = p.plan.depth, lane = lane_index(), gate = lane / kRowTile;
  const int64_t H = p.hidden, first = static_cast<int64_t>(blockIdx.x) * p.plan.units;
  const int units = static_cast<int>(H - first < p.plan.units ? H - first : p.plan.units);
  SharedArena arena{shared_memory()};
  T* weights = arena.take<T>(static_cast<int64_t>(p.plan.units) * 3 * depth);
  float* staged = arena.take<float>(static_cast<int64_t>(p.plan.rows) * depth);
  load_weight_rows<3>(p, first, units, weights);
  const Zoneout zone(p.zoneout_h, p.training, p.rng, kStreamZoneoutH);

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
        const bool live = b < n && gate < 3;
        // The candidate's input part waits for the reset gate; the rest adds up at once.
        float from_input = 0.0f, a = 0.0f;
        if (live) {
          from_input = p.xp[(place * 3 + gate) * H + unit];
          if (p.bias_ih != nullptr) from_input += p.bias_ih[gate * H + unit];
          if (p.bias_hh != nullptr) a = p.bias_hh[gate * H + unit];
        }
        a += tile_product<3>(weights + static_cast<int64_t>(u) * 3 * depth, depth,
                             staged + static_cast<int64_t>(task / units) * kRowTile * depth, depth, depth);
        if (gate < 2) a += from_input;
        const float a_z = __shfl_sync(kFullWarp, a, kRowTile + lane % kRowTile);
        const float hn = __shfl_sync(kFullWarp, a, 2 * kRowTile + lane % kRowTile);
        const float x_n = __shfl_sync(kFullWarp, from_input, 2 * kRowTile + lane % kRowTile);
        if (!live || gate != 0) continue;

        const GruGates<float> g = gru_gates(a, a_z, x_n, hn);
        const float old = staged[static_cast<int64_t>(b) * depth + unit];
        const int64_t element = place * H + unit, state = row * H + unit;
        const float h = zone.mix(gru_output(g, old), old, zone.kept(element));
        h_new[state] = h;
        p.y[element] = from_float<T>(p.output_mask == nullptr ? h : h * p.output_mask[state]);
        if (p.hidden_states != nullptr) p.hidden_states[element] = h;
        if (p.gates != nullptr) {
          float* out = p.gates + place * 4 * H + unit;
          out[0] = g.r, out[H] = g.z, out[2 * H] = g.n, out[3 * H] = hn;
        }
        if (s == p.steps - 1) p.h_n[state] = h;
      }
    }
    if (s < p.steps - 1) grid_barrier();
  }
}

template <class T>
__global__ void __launch_bounds__(kPersistentThreads, 1) gru_persistent_backward(PersistentBackward<T> p) {
  const int depth = p.plan.depth;
  const int64_t H = p.hidden, first = static_cast<int64_t>(blockIdx.x) * p.plan.units;
  const int units = static_cast<int>(H - first < p.plan.units ? H - first : p.plan.units);
  const int groups = (p.plan.units + 3) / 4;
  SharedArena arena{shared_memory()};
  T* weights = arena.take<T>(static_cast<int64_t>(groups) * 12 * depth);
  float* direct = arena.take<float>(p.batch * p.plan.units);
  float* parts = arena.take<float>(3 * groups * kWarp);
  float* staged = arena.take<float>(static_cast<int64_t>(p.plan.staged) * kRowTile * depth);
  load_weight_columns<3>(p, first, units, groups * 4, weights);
  for (int64_t i = threadIdx.x; i < p.batch * units; i += kPersistentThreads) {
    direct[i] = p.grad_h_n == nullptr ? 0.0f : p.grad_h_n[i / units * H + first + i % units];
  }
  __syncthreads();
  const Zoneout zone(p.zoneout_h, p.training, p.rng, kStreamZoneoutH);

  // One round more than steps: the last one only takes the gradient through to h0.
  for (int64_t s = 0; s <= p.steps; ++s) {
    const int64_t t = p.reverse ? s : p.steps - 1 - s;
    const int64_t t_later = p.reverse ? t - 1 : t + 1, t_old = p.reverse ? t + 1 : t - 1;
    for (int64_t row0 = 0; row0 < p.batch; row0 += kRowTile) {
      const int64_t n = p.batch - row0 < kRowTile ? p.batch - row0 : kRowTile;
      if (s > 0) later_step_product<3, true>(p, t_later, row0, n, weights, groups, staged, parts);
      for (int i = static_cast<int>(threadIdx.x); i < n * units; i += kPersistentThreads) {
        const int b = i / units, u = i % units;
        const int64_t row = row0 + b, state = row * H + first + u, own = row * units + u;
        float grad = direct[own];
        if (s > 0) grad += summed_parts<3>(parts, groups, u, b);
        if (s == p.steps) {
          p.grad_h0[state] = grad;
          continue;
        }
        const int64_t place = t * p.batch + row, element = place * H + first + u;
        if (p.grad_y != nullptr) {
          const float shown = to_float(p.grad_y[element]);
          grad += p.output_mask == nullptr ? shown : shown * p.output_mask[state];
        }
        const float* saved = p.gates + place * 4 * H + first + u;
        const GruGates<float> g{saved[0], saved[H], saved[2 * H]};
        const bool reset = is_reset(p, t, row);
        float h_old = 0.0f;
        if (!reset) {
          const int64_t before = (t_old * p.batch + row) * H + first + u;
          if (s == p.steps - 1) {
            h_old = p.h0[state];
          } else {
            h_old = p.hidden_states != nullptr ? p.hidden_states[before] : to_float(p.y[before]);
          }
        }
        const float keep = zone.kept(element);
        float grad_ar, grad_az, grad_an, grad_hn;
        const float grad_old =
            gru_backward(zone.to_fresh(grad, keep), g, saved[3 * H], h_old, grad_ar, grad_az, grad_an, grad_hn);
        direct[own] = reset ? 0.0f : grad_old + zone.to_old(grad, keep);
        T* out = p.grad_gates + place * 4 * H + first + u;
        out[0] = from_float<T>(grad_ar), out[H] = from_float<T>(grad_az);
        out[2 * H] = from_float<T>(grad_an), out[3 * H] = from_float<T>(grad_hn);
      }
    }
    if (s < p.steps) grid_barrier();
  }
}

}  // namespace

template <class T>
int launch_gru_forward(const PersistentForward<T>& p, void* stream) {
  return launch_cooperative(gru_persistent_forward<T>, p.plan.blocks, kPersistentThreads, p.plan.shared_bytes, stream,
                            p);
}
template <class T>
int launch_gru_backward(const PersistentBackward<T>& p, void* stream) {
  return launch_cooperative(gru_persistent_backward<T>, p.plan.blocks, kPersistentThreads, p.plan.shared_bytes, stream,
                            p);
}
template int launch_gru_forward(const PersistentForward<float>&, void*);
template int launch_gru_forward(const PersistentForward<BFloat16>&, void*);
template int launch_gru_backward(const PersistentBackward<float>&, void*);
template int launch_gru_backward(const PersistentBackward<BFloat16>&, void*);

}  // namespace genfuse

// Device code that the persistent kernels share.
#pragma once

#include "common/device.h"
#include "common/philox.h"
#include "recurrent/sequence.h"
#include "recurrent/sequence_cuda.h"

namespace genfuse {
namespace {

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ inline int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// Sums each of 32 values over the warp; lane i gets the sum of value i. Halving: 31 shuffles instead of 160.
__device__ inline float reduce_scatter(float (&v)[kWarp]) {
  const int lane = lane_index();
#pragma unroll
  for (int offset = kWarp / 2; offset >= 1; offset /= 2) {
    const bool upper = (lane & offset) != 0;
#pragma unroll
    for (int i = 0; i < kWarp / 2; ++i) {
      if (i < offset) {
        const float give = upper ? v[i] : v[i + offset];
        const float keep = upper ? v[i + offset] : v[i];
        v[i] = keep + __shfl_xor_sync(kFullWarp, give, offset);
      }
    }
  }
  return v[0];
}

// Products of kWeights weight rows (w + i * w_stride) with kRowTile vectors (v + b * v_stride), all in shared memory
// and `depth` long; lane i * kRowTile + b gets that of row i and vector b.
template <int kWeights, class T>
__device__ inline float tile_product(const T* w, int64_t w_stride, const float* v, int64_t v_stride, int depth) {
  static_assert(kWeights * kRowTile <= kWarp);
  float sum[kWarp];
#pragma unroll
  for (int i = 0; i < kWarp; ++i) sum[i] = 0.0f;
  for (int k = 4 * lane_index(); k < depth; k += 4 * kWarp) {
    float weight[kWeights][4];
#pragma unroll
    for (int i = 0; i < kWeights; ++i) load4(w + i * w_stride + k, weight[i]);
#pragma unroll
    for (int b = 0; b < kRowTile; ++b) {
      float value[4];
      load4(v + b * v_stride + k, value);
#pragma unroll
      for (int i = 0; i < kWeights; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i * kRowTile + b] = fmaf(weight[i][j], value[j], sum[i * kRowTile + b]);
      }
    }
  }
  return reduce_scatter(sum);
}

struct Zoneout {
  double p;
  bool on, draws;
  uint64_t seed, offset;

  __device__ Zoneout(double probability, bool training, const int64_t* rng, uint64_t stream)
      : p(probability), on(probability > 0), draws(probability > 0 && training), seed(0), offset(0) {
    if (draws) {
      seed = static_cast<uint64_t>(rng[0]);
      offset = static_cast<uint64_t>(rng[1]) + stream;
    }
  }

  // How much of the old state is kept: 0 or 1 (training), or p.
  __device__ float kept(int64_t element) const {
    if (!on) return 0.0f;
    if (!draws) return static_cast<float>(p);
    return static_cast<double>(philox_uniform(seed, offset, static_cast<uint64_t>(element))) < p ? 1.0f : 0.0f;
  }

  // Selects rather than multiplies where a draw decides: 0 * infinity is not 0.
  __device__ float mix(float fresh, float old, float share) const {
    if (!on) return fresh;
    if (draws) return share != 0.0f ? old : fresh;
    return share * old + (1.0f - share) * fresh;
  }
  __device__ float to_old(float grad, float share) const {
    if (!on) return 0.0f;
    if (draws) return share != 0.0f ? grad : 0.0f;
    return share * grad;
  }
  __device__ float to_fresh(float grad, float share) const {
    if (!on) return grad;
    if (draws) return share != 0.0f ? 0.0f : grad;
    return (1.0f - share) * grad;
  }
};

template <class T>
__device__ inline bool is_reset(const PersistentSequence<T>& p, int64_t t, int64_t row) {
  return p.resets != nullptr && p.resets[t * p.batch + row];
}

// A block's shared memory, cut into arrays that stay aligned to 16 bytes.
struct SharedArena {
  char* next;
  template <class T>
  __device__ T* take(int64_t count) {
    T* p = reinterpret_cast<T*>(next);
    next += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return p;
  }
};

// Forward: row (gate, unit) of W_hh at weights[(u * kGates + gate) * depth]; zeros beyond the hidden size.
template <int kGates, class T>
__device__ inline void load_weight_rows(const PersistentSequence<T>& p, int64_t first, int units, T* weights) {
  const int depth = p.plan.depth;
  for (int r = warp_index(); r < p.plan.units * kGates; r += kPersistentThreads / kWarp) {
    const int u = r / kGates, gate = r % kGates;
    const T* from = p.w_hh + (gate * p.hidden + first + u) * p.hidden;
    for (int k = lane_index(); k < depth; k += kWarp) {
      weights[static_cast<int64_t>(r) * depth + k] = u < units && k < p.hidden ? from[k] : from_float<T>(0.0f);
    }
  }
}

// Backward: column of W_hh at weights[(u * kGates + gate) * depth + k] = W_hh[gate * hidden + k][first + u].
template <int kGates, class T>
__device__ inline void load_weight_columns(const PersistentSequence<T>& p, int64_t first, int units, int padded,
                                           T* weights) {
  const int depth = p.plan.depth;
  for (int r = warp_index(); r < padded * kGates; r += kPersistentThreads / kWarp) {
    const int u = r / kGates, gate = r % kGates;
    for (int k = lane_index(); k < depth; k += kWarp) {
      const bool real = u < units && k < p.hidden;
      weights[static_cast<int64_t>(r) * depth + k] =
          real ? p.w_hh[(gate * p.hidden + k) * p.hidden + first + u] : from_float<T>(0.0f);
    }
  }
}

// h_{t-1} of rows [row0, row0 + n) into [rows][depth]; zeros where reset, beyond the batch and beyond the hidden size.
template <class T>
__device__ inline void stage_states(const PersistentSequence<T>& p, const float* states, int64_t t, int64_t row0,
                                    int64_t n, float* staged) {
  const int depth = p.plan.depth;
  for (int b = warp_index(); b < p.plan.rows; b += kPersistentThreads / kWarp) {
    const bool live = b < n && !is_reset(p, t, row0 + b);
    for (int k = lane_index(); k < depth; k += kWarp) {
      staged[static_cast<int64_t>(b) * depth + k] =
          live && k < p.hidden ? load_fresh(states + (row0 + b) * p.hidden + k) : 0.0f;
    }
  }
}

// The product of the later step's gate gradients with this block's columns, for kRowTile rows from row0. On return
// parts[(gate * groups + u / 4) * 32 + u % 4 * kRowTile + b] holds gate's share for unit u and row row0 + b; the caller
// sums over the gates, in their order. The gate's column block in grad_gates is `column` (the GRU's hn is the fourth).
template <int kGates, bool kGru, class T>
__device__ inline void later_step_product(const PersistentBackward<T>& p, int64_t t_later, int64_t row0, int64_t n,
                                          const T* weights, int groups, float* staged, float* parts) {
  const int depth = p.plan.depth, stage = p.plan.staged;
  const int64_t width = static_cast<int64_t>(stage) * depth;
  for (int gate0 = 0; gate0 < kGates; gate0 += stage) {
    __syncthreads();  // what was staged before has been used
    for (int r = warp_index(); r < kRowTile * stage; r += kPersistentThreads / kWarp) {
      const int b = r / stage, gate = gate0 + r % stage;
      const int column = kGru && gate == 2 ? 3 : gate;
      const bool live = b < n && !is_reset(p, t_later, row0 + b);
      const T* from = p.grad_gates + ((t_later * p.batch + row0 + b) * 4 + column) * p.hidden;
      for (int k = lane_index(); k < depth; k += kWarp) {
        staged[static_cast<int64_t>(r) * depth + k] = live && k < p.hidden ? load_fresh(from + k) : 0.0f;
      }
    }
    __syncthreads();
    for (int item = warp_index(); item < groups * stage; item += kPersistentThreads / kWarp) {
      const int group = item / stage, gate = item % stage;
      const T* w = weights + (static_cast<int64_t>(group) * 4 * kGates + gate0 + gate) * depth;
      parts[((gate0 + gate) * groups + group) * kWarp + lane_index()] = tile_product<4>(
          w, static_cast<int64_t>(kGates) * depth, staged + static_cast<int64_t>(gate) * depth, width, depth);
    }
  }
  __syncthreads();
}

template <int kGates>
__device__ inline float summed_parts(const float* parts, int groups, int u, int b) {
  float sum = 0.0f;
#pragma unroll
  for (int gate = 0; gate < kGates; ++gate) sum += parts[(gate * groups + u / 4) * kWarp + u % 4 * kRowTile + b];
  return sum;
}

}  // namespace

}  // namespace genfuse

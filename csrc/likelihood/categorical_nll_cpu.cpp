// Where neighbouring positions are neighbours in memory, a lane is a position, and a tile of them goes through its
// levels once, with the largest logit so far; eight levels at a time, so that the sum is seldom scaled anew. Where
// levels are, a lane is a level. Where neither is, a position's levels are brought together first. Tiles do not depend
// on the threads.
#include "likelihood/categorical_nll.h"

#include <atomic>
#include <limits>

#include "common/math_simd.h"
#include "common/rows.h"
#include "likelihood/exp_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int kVectors = 4;               // of a tile
constexpr int64_t kThreadWork = 1 << 15;  // logits that are worth waking a thread for

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();

// Positions in runs of `length` whose neighbours are `step` apart.
template <class T>
struct Runs {
  int64_t length = 1, step = 1;
  const Levels<const T>& logits;

  explicit Runs(const Levels<const T>& l) : logits(l) {
    if (l.dims > 0) length = l.size[l.dims - 1], step = l.stride[l.dims - 1];
  }
  int64_t begin(int64_t run) const {
    int64_t at = 0;
    for (int i = logits.dims - 2; i >= 0; --i) {
      at += run % logits.size[i] * logits.stride[i];
      run /= logits.size[i];
    }
    return at;
  }
};

// ---- a lane is a position
// --------------------------------------------------------------------------------------------

// n positions, at most V vectors of them, side by side: the largest logit, and ln sum e^(logit - top).
template <class T, int V, bool whole>
inline void totals(const T* logits, int64_t level, int64_t levels, int64_t n, T* tops, T* log_sums) {
  constexpr int L = kLanes<T>, chunk = 8;
  const auto logit = [&](int64_t l, int v) {
    if constexpr (whole) return load(logits + l * level + v * L);
    return load_upto(logits + l * level + v * L, n - v * L);
  };
  Vec<T> top[V], sum[V];
  for (int v = 0; v < V; ++v) top[v] = broadcast(-kInfinity<T>), sum[v] = Vec<T>{};
  for (int64_t begin = 0; begin < levels; begin += chunk) {
    const int64_t end = minimum(begin + chunk, levels);
    for (int v = 0; v < V; ++v) {
      Vec<T> most = top[v];
      for (int64_t l = begin; l < end; ++l) {
        __builtin_prefetch(logits + (l + chunk) * level + v * L);  // the levels are pages apart
        const Vec<T> z = logit(l, v);
        most = z > most ? z : most;
      }
      if (any_lane(most > top[v])) {
        sum[v] *= exp_moderate(top[v] - most);
        top[v] = most;
      }
      const Vec<T> base = top[v] == -kInfinity<T> ? Vec<T>{} : top[v];
      for (int64_t l = begin; l < end; ++l) sum[v] += exp_moderate(logit(l, v) - base);
    }
  }
  for (int v = 0; v < V; ++v) {
    // Nothing but -infinity is no distribution: what is less than it by that is NaN.
    const Vec<T> r = log_wide(sum[v]);
    if constexpr (whole) {
      store(tops + v * L, top[v]);
      store(log_sums + v * L, r);
    } else {
      store_upto(tops + v * L, top[v], n - v * L);
      store_upto(log_sums + v * L, r, n - v * L);
    }
  }
}

template <class T, int V, bool whole>
inline void softmax_gradients(const T* logits, int64_t level, int64_t levels, int64_t n, const T* tops,
                              const T* log_sums, const T* grad, T* out) {
  constexpr int L = kLanes<T>;
  Vec<T> g[V], top[V], less[V];
  for (int v = 0; v < V; ++v) g[v] = load(grad + v * L), top[v] = load(tops + v * L), less[v] = load(log_sums + v * L);
  for (int64_t l = 0; l < levels; ++l) {
    for (int v = 0; v < V; ++v) {
      const int64_t at = l * level + v * L;
      if constexpr (whole) {
        __builtin_prefetch(logits + at + 8 * level);
        __builtin_prefetch(out + at + 8 * level, 1);
        store(out + at, g[v] * exp_weight<T>((load(logits + at) - top[v]) - less[v]));
      } else {
        const Vec<T> below = load_upto(logits + at, n - v * L) - top[v];
        store_upto(out + at, g[v] * exp_weight<T>(below - less[v]), n - v * L);
      }
    }
  }
}

// ---- a lane is a level
// -----------------------------------------------------------------------------------------------

template <class T>
inline void total_of_row(const T* logits, int64_t levels, T* largest, T* log_sum) {
  constexpr int L = kLanes<T>;
  Vec<T> most = broadcast(-kInfinity<T>);
  int64_t l = 0;
  for (; l + L <= levels; l += L) {
    const Vec<T> z = load(logits + l);
    most = z > most ? z : most;
  }
  T top = -kInfinity<T>;
  for (int j = 0; j < L; ++j) top = most[j] > top ? most[j] : top;
  for (; l < levels; ++l) top = logits[l] > top ? logits[l] : top;
  *largest = top;
  Vec<T> sum{};
  for (l = 0; l + L <= levels; l += L) sum += exp_weight<T>(load(logits + l) - top);
  if (l < levels) {
    const int64_t n = levels - l;
    sum += keep_first<T>(exp_weight<T>(load_partial(logits + l, static_cast<int>(n)) - top), n);
  }
  *log_sum = log_wide(broadcast(genfuse::GENFUSE_ISA::sum<T>(sum)))[0];
}
template <class T>
inline void gradients_of_row(const T* logits, int64_t levels, T top, T log_sum, T grad, T* out) {
  for (int64_t l = 0; l < levels; l += kLanes<T>) {
    const Vec<T> below = load_upto(logits + l, levels - l) - top;
    store_upto(out + l, grad * exp_weight<T>(below - log_sum), levels - l);
  }
}

// ---- all positions
// ---------------------------------------------------------------------------------------------------

// Calls tile(first position, offset of its logits, n) for tiles of at most kVectors vectors of neighbours.
template <class T, class F>
void for_tiles(const Executor& executor, const CategoricalNll<T>& p, F&& tile) {
  const Runs<T> runs(p.logits);
  constexpr int64_t most = kVectors * kLanes<T>;
  const int64_t each = ceil_div(runs.length, most), size = minimum(runs.length, most);
  parallel_ranges(executor, p.positions / runs.length * each, ceil_div(kThreadWork, size * p.levels),
                  [&](int64_t from, int64_t to) {
                    for (int64_t t = from; t < to; ++t) {
                      const int64_t run = t / each, begin = t % each * most;
                      tile(run * runs.length + begin, runs.begin(run) + begin, minimum(most, runs.length - begin));
                    }
                  });
}
// Calls row(position, offset of its logits, the thread's buffer) for all positions.
template <class T, class F>
void for_rows(const Executor& executor, const CategoricalNll<T>& p, T* buffers, F&& row) {
  const Runs<T> runs(p.logits);
  std::atomic<int64_t> taken{0};
  parallel_ranges(executor, p.positions, ceil_div(kThreadWork, p.levels), [&](int64_t from, int64_t to) {
    T* buffer = buffers + taken.fetch_add(1) * p.levels;
    int64_t start = runs.begin(from / runs.length), at = from % runs.length;
    for (int64_t i = from; i < to; ++i, ++at) {
      if (at == runs.length) start = runs.begin(i / runs.length), at = 0;
      row(i, start + at * runs.step, buffer);
    }
  });
}

template <class T>
bool side_by_side(const CategoricalNll<T>& p) {
  const Runs<T> runs(p.logits);
  return runs.step == 1 && runs.length >= kLanes<T> / 2;  // fewer would leave most lanes idle
}

template <class T>
int64_t row_bytes(const CategoricalNll<T>& p, int threads) {
  return round_up(threads * p.levels * int64_t{sizeof(T)}, 64);
}

template <class T>
void forward(const CategoricalNll<T>& p, char* workspace, const Executor& executor) {
  T* buffers = reinterpret_cast<T*>(workspace);
  T* each = p.by_position ? p.out : reinterpret_cast<T*>(workspace + row_bytes(p, executor.threads));
  if (side_by_side(p)) {
    for_tiles(executor, p, [&](int64_t first, int64_t offset, int64_t n) {
      const T* logits = p.logits.data + offset;
      T *top = p.top + first, *log_sum = p.log_sum + first;
      constexpr int64_t L = kLanes<T>;
      if (n == kVectors * L) {
        totals<T, kVectors, true>(logits, p.logits.level, p.levels, n, top, log_sum);
      } else {
        for (int64_t i = 0; i < n; i += L) {
          totals<T, 1, false>(logits + i, p.logits.level, p.levels, minimum(L, n - i), top + i, log_sum + i);
        }
      }
      for (int64_t j = 0; j < n; ++j) {
        each[first + j] = (top[j] - logits[p.target[first + j] * p.logits.level + j]) + log_sum[j];
      }
    });
  } else {
    for_rows(executor, p, buffers, [&](int64_t i, int64_t offset, T* buffer) {
      const T* logits = p.logits.data + offset;
      if (p.logits.level != 1) {
        for (int64_t l = 0; l < p.levels; ++l) buffer[l] = logits[l * p.logits.level];
        logits = buffer;
      }
      total_of_row(logits, p.levels, p.top + i, p.log_sum + i);
      each[i] = (p.top[i] - logits[p.target[i]]) + p.log_sum[i];
    });
  }
  if (p.by_position) return;
  for (int64_t r = 0; r * p.row < p.positions; ++r) {
    double sum = 0;
    for (int64_t at = 0; at < p.row; at += kBlock) {
      sum += static_cast<double>(sum_of(each + r * p.row + at, minimum(kBlock, p.row - at)));
    }
    p.out[r] = static_cast<T>(sum);
  }
}

template <class T>
void backward(const CategoricalNllBackward<T>& b, char* workspace, const Executor& executor) {
  const CategoricalNll<T>& p = b.forward;
  const auto grad_of = [&](int64_t i) { return b.grad[p.by_position ? i : i / p.row]; };
  if (side_by_side(p)) {
    for_tiles(executor, p, [&](int64_t first, int64_t offset, int64_t n) {
      constexpr int64_t L = kLanes<T>;
      alignas(64) T grad[kVectors * L] = {}, top[kVectors * L] = {}, log_sum[kVectors * L] = {};
      for (int64_t j = 0; j < n; ++j) {
        grad[j] = grad_of(first + j), top[j] = p.top[first + j], log_sum[j] = p.log_sum[first + j];
      }
      const T* logits = p.logits.data + offset;
      T* out = b.grad_logits + offset;
      if (n == kVectors * L) {
        softmax_gradients<T, kVectors, true>(logits, p.logits.level, p.levels, n, top, log_sum, grad, out);
      } else {
        for (int64_t i = 0; i < n; i += L) {
          softmax_gradients<T, 1, false>(logits + i, p.logits.level, p.levels, minimum(L, n - i), top + i, log_sum + i,
                                         grad + i, out + i);
        }
      }
      for (int64_t j = 0; j < n; ++j) out[p.target[first + j] * p.logits.level + j] -= grad[j];
    });
  } else {
    for_rows(executor, p, reinterpret_cast<T*>(workspace), [&](int64_t i, int64_t offset, T* buffer) {
      const T* logits = p.logits.data + offset;
      T* out = b.grad_logits + offset;
      const T grad = grad_of(i);
      if (p.logits.level == 1) {
        gradients_of_row(logits, p.levels, p.top[i], p.log_sum[i], grad, out);
        out[p.target[i]] -= grad;
        return;
      }
      for (int64_t l = 0; l < p.levels; ++l) buffer[l] = logits[l * p.logits.level];
      gradients_of_row<T>(buffer, p.levels, p.top[i], p.log_sum[i], grad, buffer);
      buffer[p.target[i]] -= grad;
      for (int64_t l = 0; l < p.levels; ++l) out[l * p.logits.level] = buffer[l];
    });
  }
}

}  // namespace

template <class T>
KernelOf<CategoricalNll<T>> categorical_nll_kernel() {
  return {[](const CategoricalNll<T>& p, int threads) {
            return static_cast<size_t>(row_bytes(p, threads) + (p.by_position ? 0 : p.positions * int64_t{sizeof(T)}));
          },
          &forward<T>};
}
template <class T>
KernelOf<CategoricalNllBackward<T>> categorical_nll_backward_kernel() {
  return {[](const CategoricalNllBackward<T>& b, int threads) {
            return static_cast<size_t>(row_bytes(b.forward, threads));
          },
          &backward<T>};
}
template KernelOf<CategoricalNll<float>> categorical_nll_kernel<float>();
template KernelOf<CategoricalNll<double>> categorical_nll_kernel<double>();
template KernelOf<CategoricalNllBackward<float>> categorical_nll_backward_kernel<float>();
template KernelOf<CategoricalNllBackward<double>> categorical_nll_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// Gumbel-softmax: as many rows at a time as make a block; their noise is drawn into a buffer, the logits are added, and
// each row is finished in cache. Hard samples need no exponential forward: the largest is enough. Backward of a soft
// sample reads it, or computes it anew where it was hard or rounded.
#include "sampling/relaxed.h"

#include <atomic>
#include <limits>

#include "common/math_simd.h"
#include "common/rows.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

template <class T>
inline constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
inline constexpr T kNan = std::numeric_limits<T>::quiet_NaN();

inline int64_t rows_at_once(int64_t classes) { return maximum(1, kBlock / maximum(classes, 1)); }
// The first element of some rows may be up to 3 behind the start of a Philox block.
inline int64_t buffer_size(int64_t classes) {
  return round_up(rows_at_once(classes) * classes + 3, kNoiseDrawn) + kNoiseDrawn;
}
template <class T>
size_t buffers(const Relaxed<T>& p, int threads) {
  return static_cast<size_t>(threads * buffer_size(p.classes)) * sizeof(T);
}

// logits + noise of elements [first, first + n); returns where they are in the buffer.
template <Noise noise, class T>
T* perturbed(const Relaxed<T>& p, int64_t first, int64_t n, T* buffer) {
  T* v = buffer;
  if (p.noise.data == nullptr) {
    const int64_t lead = first % 4;
    draw_noise<noise>(p.seed, p.offset, first - lead, lead + n, buffer);
    v = buffer + lead;
  }
  const auto add = [&](const Periodic<T>& from, bool assign) {
    int64_t at = first % from.period;
    for (int64_t i = 0; i < n;) {
      const int64_t run = minimum(n - i, from.period - at);
      for (int64_t k = 0; k < run; k += kLanes<T>) {
        const Vec<T> x = load_upto(from.data + at + k, run - k);
        store_upto(v + i + k, assign ? x : x + load_upto(v + i + k, run - k), run - k);
      }
      i += run;
      at = 0;
    }
  };
  if (p.noise.data != nullptr) add(p.noise, true);
  add(p.logits, false);
  return v;
}

template <class T>
struct Largest {
  T value;
  int64_t index;
  bool sound;  // no NaN, and the largest is finite
};
template <class T>
Largest<T> largest(const T* v, int64_t n) {
  using I = VecInt<T>;
  constexpr int L = kLanes<T>;
  I lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  Vec<T> best = broadcast(-kInfinity<T>);
  I where{}, nan{};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Vec<T> x = load(v + i);
    const I more = x > best;
    best = more ? x : best;
    where = more ? lane + static_cast<typename VecTraits<T>::scalar_integer>(i) : where;
    nan |= x != x;
  }
  Largest<T> r{-kInfinity<T>, 0, true};
  for (int j = 0; j < L; ++j) {
    if (best[j] > r.value || (best[j] == r.value && where[j] < r.index)) r = {best[j], where[j], r.sound};
  }
  for (int j = 0; j < L; ++j) r.sound = r.sound && nan[j] == 0;
  for (; i < n; ++i) {
    if (v[i] > r.value) r = {v[i], i, r.sound};
    r.sound = r.sound && v[i] == v[i];
  }
  r.sound = r.sound && r.value > -kInfinity<T> && r.value < kInfinity<T>;
  return r;
}

// out = softmax(v / tau); NaN throughout where there is none.
template <class T>
void softmax(const T* v, int64_t n, T tau, T* out) {
  constexpr int L = kLanes<T>;
  const T top = largest(v, n).value;
  Vec<T> total{};
  for (int64_t i = 0; i < n; i += L) {
    const Vec<T> e = exp_wide<T>((load_upto(v + i, n - i) - top) / tau);
    store_upto(out + i, e, n - i);
    total += keep_first<T>(e, n - i);
  }
  const T scale = 1 / sum<T>(total);
  for (int64_t i = 0; i < n; i += L) store_upto(out + i, load_upto(out + i, n - i) * scale, n - i);
}

template <class F, class T>
void for_rows(const Relaxed<T>& p, char* workspace, const Executor& executor, F&& rows) {
  const int64_t size = buffer_size(p.classes);
  std::atomic<int> taken{0};
  const int64_t least = ceil_div(kThreadBlocks * kBlock, maximum(p.classes, 1));
  parallel_ranges(executor, p.rows, least, [&](int64_t begin, int64_t end) {
    T* buffer = reinterpret_cast<T*>(workspace) + taken.fetch_add(1) * size;
    const int64_t step = rows_at_once(p.classes);
    for (int64_t row = begin; row < end; row += step) rows(row, minimum(step, end - row), buffer);
  });
}

template <class T>
void gumbel_softmax(const Relaxed<T>& p, char* workspace, const Executor& executor) {
  const int64_t n = p.classes;
  for_rows(p, workspace, executor, [&](int64_t row, int64_t count, T* buffer) {
    const T* v = perturbed<Noise::gumbel>(p, row * n, count * n, buffer);
    for (int64_t r = 0; r < count; ++r, v += n) {
      T* y = p.y + (row + r) * n;
      if (!p.hard) {
        softmax(v, n, p.tau, y);
        continue;
      }
      const Largest<T> top = largest(v, n);
      const T fill = top.sound ? T(0) : kNan<T>;
      for (int64_t i = 0; i < n; ++i) y[i] = fill;
      if (top.sound) y[top.index] = 1;
    }
  });
}

template <class T>
void gumbel_softmax_backward(const RelaxedBackward<T>& b, char* workspace, const Executor& executor) {
  constexpr int L = kLanes<T>;
  const Relaxed<T>& p = b.forward;
  const int64_t n = p.classes;
  for_rows(p, workspace, executor, [&](int64_t row, int64_t count, T* buffer) {
    T* v = b.recompute ? perturbed<Noise::gumbel>(p, row * n, count * n, buffer) : nullptr;
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (row + r) * n;
      const T* y = b.y + at;
      if (b.recompute) {
        softmax(v, n, p.tau, v);
        y = v;
        v += n;
      }
      const T* g = b.grad_y + at;
      Vec<T> dots{};
      for (int64_t i = 0; i < n; i += L) dots += load_upto(g + i, n - i) * load_upto(y + i, n - i);
      const T dot = sum<T>(dots);
      for (int64_t i = 0; i < n; i += L) {
        const Vec<T> grad = load_upto(y + i, n - i) * (load_upto(g + i, n - i) - dot) / p.tau;
        store_upto(b.grad_logits + at + i, grad, n - i);
      }
    }
  });
}

// logits + noise of a block, in `v`.
template <class T>
void perturb_block(const Relaxed<T>& p, int64_t begin, int64_t n, T* v) {
  alignas(64) T buffer[kBlock];
  if (p.noise.data == nullptr) draw_noise<Noise::logistic>(p.seed, p.offset, begin, n, v);
  const T* noise = p.noise.data == nullptr ? v : block_of(p.noise, begin, n, v);
  const T* logits = block_of(p.logits, begin, n, buffer);
  for (int64_t i = 0; i < n; i += kLanes<T>) store(v + i, load_upto(logits + i, n - i) + load_upto(noise + i, n - i));
}

template <class T>
void relaxed_bernoulli(const Relaxed<T>& p, char*, const Executor& executor) {
  for_blocks(executor, p.rows * p.classes, [&](int64_t begin, int64_t n) {
    alignas(64) T v[kBlock];
    perturb_block(p, begin, n, v);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> x = load(v + i);
      const Vec<T> one = broadcast(T(1)), hard = x > 0 ? one : x == x ? Vec<T>{} : x;
      store_upto(p.y + begin + i, p.hard ? hard : one / (one + exp_wide<T>(-x / p.tau)), n - i);
    }
  });
}

template <class T>
void relaxed_bernoulli_backward(const RelaxedBackward<T>& b, char*, const Executor& executor) {
  const Relaxed<T>& p = b.forward;
  for_blocks(executor, p.rows * p.classes, [&](int64_t begin, int64_t n) {
    alignas(64) T v[kBlock];
    if (b.recompute) perturb_block(p, begin, n, v);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> one = broadcast(T(1));
      const Vec<T> y =
          b.recompute ? one / (one + exp_wide<T>(-load(v + i) / p.tau)) : load_upto(b.y + begin + i, n - i);
      const Vec<T> grad = load_upto(b.grad_y + begin + i, n - i) * y * (one - y) / p.tau;
      store_upto(b.grad_logits + begin + i, grad, n - i);
    }
  });
}

}  // namespace

template <class T>
KernelOf<Relaxed<T>> gumbel_softmax_kernel() {
  return {&buffers<T>, &gumbel_softmax<T>};
}
template <class T>
KernelOf<RelaxedBackward<T>> gumbel_softmax_backward_kernel() {
  return {[](const RelaxedBackward<T>& b, int threads) { return buffers(b.forward, threads); },
          &gumbel_softmax_backward<T>};
}
template <class T>
KernelOf<Relaxed<T>> relaxed_bernoulli_kernel() {
  return {[](const Relaxed<T>&, int) { return size_t{0}; }, &relaxed_bernoulli<T>};
}
template <class T>
KernelOf<RelaxedBackward<T>> relaxed_bernoulli_backward_kernel() {
  return {[](const RelaxedBackward<T>&, int) { return size_t{0}; }, &relaxed_bernoulli_backward<T>};
}
template KernelOf<Relaxed<float>> gumbel_softmax_kernel<float>();
template KernelOf<Relaxed<double>> gumbel_softmax_kernel<double>();
template KernelOf<RelaxedBackward<float>> gumbel_softmax_backward_kernel<float>();
template KernelOf<RelaxedBackward<double>> gumbel_softmax_backward_kernel<double>();
template KernelOf<Relaxed<float>> relaxed_bernoulli_kernel<float>();
template KernelOf<Relaxed<double>> relaxed_bernoulli_kernel<double>();
template KernelOf<RelaxedBackward<float>> relaxed_bernoulli_backward_kernel<float>();
template KernelOf<RelaxedBackward<double>> relaxed_bernoulli_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

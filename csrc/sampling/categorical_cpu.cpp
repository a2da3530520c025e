// The weights of a row are summed in double, class by class, with the sum so far kept for every kRun classes. A sample
// is the first class at which the sum exceeds u times the total: found among the runs, then within one by the same
// additions. A class that adds nothing is never the first to exceed anything.
#include "sampling/categorical.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "common/math_simd.h"
#include "common/rows.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kRun = 32;
constexpr int64_t kUniforms = 1024;  // drawn at a time

template <class T>
int64_t buffer_bytes(int64_t classes) {
  return round_up(classes * static_cast<int64_t>(sizeof(T)), 64) + round_up(ceil_div(classes, kRun) * 8, 64);
}

// weights[] = e^(logit - largest), sums[r] = their sum before run r; returns the total, NaN if there is none.
template <class T>
double weigh(const T* logits, int64_t n, T* weights, double* sums) {
  constexpr int L = kLanes<T>;
  constexpr T infinity = std::numeric_limits<T>::infinity();
  Vec<T> best = broadcast(-infinity);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Vec<T> x = load(logits + i);
    best = x > best ? x : best;
  }
  T top = -infinity;
  for (int j = 0; j < L; ++j) top = best[j] > top ? best[j] : top;
  for (; i < n; ++i) top = logits[i] > top ? logits[i] : top;
  for (i = 0; i < n; i += L) store_upto(weights + i, exp_wide<T>(load_upto(logits + i, n - i) - top), n - i);
  double total = 0;
  for (i = 0; i < n; ++i) {
    if (i % kRun == 0) sums[i / kRun] = total;
    total += static_cast<double>(weights[i]);
  }
  return total;
}

template <class T>
int64_t invert(const T* weights, const double* sums, int64_t n, double threshold) {
  int64_t low = 0, high = ceil_div(n, kRun);  // the last run whose sum before it does not exceed the threshold
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (sums[middle] <= threshold ? low : high) = middle;
  }
  double sum = sums[low];
  for (int64_t i = low * kRun; i < n; ++i) {
    sum += static_cast<double>(weights[i]);
    if (sum > threshold) return i;
  }
  for (int64_t i = n; i-- > 0;) {
    if (weights[i] > 0) return i;  // u so near 1 that the product was rounded up to the total
  }
  return -1;
}

template <class T>
void categorical(const Categorical<T>& p, char* workspace, const Executor& executor) {
  std::atomic<int> taken{0};
  const int64_t least = ceil_div(kThreadBlocks * kBlock, p.classes + p.samples);
  parallel_ranges(executor, p.rows, least, [&](int64_t begin, int64_t end) {
    char* buffer = workspace + taken.fetch_add(1) * buffer_bytes<T>(p.classes);
    T* weights = reinterpret_cast<T*>(buffer);
    double* sums = reinterpret_cast<double*>(buffer + round_up(p.classes * static_cast<int64_t>(sizeof(T)), 64));
    alignas(64) T uniforms[kUniforms];
    int64_t drawn = begin * p.samples / 4 * 4, until = drawn;  // `uniforms` holds elements [drawn, until)
    for (int64_t row = begin; row < end; ++row) {
      const double total = weigh(p.logits + row * p.classes, p.classes, weights, sums);
      const bool sound = total < std::numeric_limits<double>::infinity();  // false for NaN
      for (int64_t s = 0; s < p.samples; ++s) {
        const int64_t at = row * p.samples + s;
        T u;
        if (p.u != nullptr) {
          u = p.u[at];
        } else {
          if (at >= until) {
            drawn = at / 4 * 4;
            until = drawn + kUniforms;
            draw_noise<Noise::uniform>(p.seed, p.offset, drawn, minimum(kUniforms, p.rows * p.samples - drawn),
                                       uniforms);
          }
          u = uniforms[at - drawn];
        }
        p.out[at] = sound ? invert(weights, sums, p.classes, static_cast<double>(u) * total) : -1;
      }
    }
  });
}

}  // namespace

template <class T>
KernelOf<Categorical<T>> categorical_kernel() {
  return {
      [](const Categorical<T>& p, int threads) { return static_cast<size_t>(threads * buffer_bytes<T>(p.classes)); },
      &categorical<T>};
}
template KernelOf<Categorical<float>> categorical_kernel<float>();
template KernelOf<Categorical<double>> categorical_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

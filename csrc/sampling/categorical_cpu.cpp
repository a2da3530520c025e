// Classes drawn by inversion (sampling/categorical_simd.h), row by row.
#include "sampling/categorical.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "common/rows.h"
#include "sampling/categorical_simd.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kUniforms = 1024;  // drawn at a time

template <class T>
void categorical(const Categorical<T>& p, char* workspace, const Executor& executor) {
  std::atomic<int> taken{0};
  const int64_t least = ceil_div(kThreadBlocks * kBlock, p.classes + p.samples);
  parallel_ranges(executor, p.rows, least, [&](int64_t begin, int64_t end) {
    char* buffer = workspace + taken.fetch_add(1) * inversion_bytes<T>(p.classes);
    T* weights = reinterpret_cast<T*>(buffer);
    double* sums = reinterpret_cast<double*>(buffer + weights_bytes<T>(p.classes));
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
      [](const Categorical<T>& p, int threads) { return static_cast<size_t>(threads * inversion_bytes<T>(p.classes)); },
      &categorical<T>};
}
template KernelOf<Categorical<float>> categorical_kernel<float>();
template KernelOf<Categorical<double>> categorical_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

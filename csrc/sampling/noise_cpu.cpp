// Noise on CPU: every thread takes a run of whole groups of Philox blocks, so what an element becomes depends on
// neither the threads nor where a run begins.
#include "sampling/noise.h"

#include <cstring>

#include "common/gemm.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

// Elements [begin, end) of the stream; begin is a multiple of kNoiseDrawn.
template <Noise noise, class T>
void draw(const NoiseFill<T>& p, int64_t begin, int64_t end) {
  const int64_t whole = (end - begin) / kNoiseDrawn * kNoiseDrawn;
  draw_noise<noise>(p.seed, p.offset, begin, whole, p.out + begin, p.uniform_bits);
  if (begin + whole < end) {
    alignas(64) T rest[kNoiseDrawn];
    draw_noise<noise>(p.seed, p.offset, begin + whole, kNoiseDrawn, rest, p.uniform_bits);
    std::memcpy(p.out + begin + whole, rest, static_cast<size_t>(end - begin - whole) * sizeof(T));
  }
}

template <class T>
void draw_any(const NoiseFill<T>& p, int64_t begin, int64_t end) {
  if constexpr (std::is_integral_v<T>) {
    draw<Noise::bits>(p, begin, end);
  } else {
    switch (p.noise) {
      case Noise::uniform:
        return draw<Noise::uniform>(p, begin, end);
      case Noise::normal:
        return draw<Noise::normal>(p, begin, end);
      case Noise::gumbel:
        return draw<Noise::gumbel>(p, begin, end);
      case Noise::logistic:
        return draw<Noise::logistic>(p, begin, end);
      case Noise::bits:
        break;
    }
  }
}

// Below this many elements a thread, waking it costs more than it saves.
constexpr int64_t kThreadElements = 32768;

}  // namespace

template <class T>
KernelOf<NoiseFill<T>> noise_kernel() {
  return {[](const NoiseFill<T>&, int) { return size_t{0}; },
          [](const NoiseFill<T>& p, char*, const Executor& executor) {
            const int64_t threads = maximum(1, minimum(executor.threads, p.count / kThreadElements));
            const auto body = [](void* context, int64_t begin, int64_t end) {
              const auto& [fill, parts] = *static_cast<std::pair<const NoiseFill<T>&, int64_t>*>(context);
              const int64_t groups = ceil_div(fill.count, kNoiseDrawn);
              draw_any(fill, split(groups, parts, begin).begin * kNoiseDrawn,
                       minimum(fill.count, split(groups, parts, end - 1).end * kNoiseDrawn));
            };
            std::pair<const NoiseFill<T>&, int64_t> context{p, threads};
            if (threads == 1 || executor.run == nullptr) {
              draw_any(p, 0, p.count);
            } else {
              executor.run(threads, body, &context);
            }
          }};
}
template KernelOf<NoiseFill<float>> noise_kernel<float>();
template KernelOf<NoiseFill<double>> noise_kernel<double>();
template KernelOf<NoiseFill<int64_t>> noise_kernel<int64_t>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// Noise on CPU: every thread takes a run of whole groups of Philox blocks, so what an element becomes depends on
// neither the threads nor where a run begins.
#include "sampling/noise.h"

#include <cstring>

#include "common/gemm.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int kGroups = 4;  // at once: one group's chain of multiplications leaves most ports empty
constexpr int64_t kDrawn = kGroups * kPhiloxGroup;

// out[kPhiloxGroup] = a group's elements.
template <Noise noise>
GENFUSE_HD void put_group(const NoiseFill<float>& p, const PhiloxVector& bits, float* out) {
  constexpr int L = kLanes<float>;
  const auto as_words = [](VecWide w) { return reinterpret_cast<VecWord>(w); };
  VecFloat value[2];
  if constexpr (noise == Noise::normal) {
    constexpr auto all = std::make_index_sequence<L>{};
    VecFloat even, odd;
    normal_pair(as_words(join_words(bits.word[0], bits.word[2])), as_words(join_words(bits.word[1], bits.word[3])),
                even, odd);
    value[0] = interleave_low(even, odd, all);
    value[1] = interleave_high(even, odd, all);
  } else {
    VecWord words[2];
    philox_in_order(bits, words);
    for (int v = 0; v < 2; ++v) {
      if constexpr (noise == Noise::uniform) {
        const VecWord top = words[v] >> static_cast<uint32_t>(32 - p.uniform_bits);
        value[v] = to_float(reinterpret_cast<VecInt32>(top)) * (1.0f / static_cast<float>(1 << p.uniform_bits));
      } else {
        value[v] = noise == Noise::gumbel ? gumbel(words[v]) : logistic(words[v]);
      }
    }
  }
  for (int v = 0; v < 2; ++v) store(out + v * L, value[v]);
}

// float64 and raw bits, an element at a time.
template <Noise noise, class T>
inline void put_group(const NoiseFill<T>& p, const PhiloxVector& bits, T* out) {
  VecWord words[2];
  philox_in_order(bits, words);
  uint32_t word[kPhiloxGroup];
  std::memcpy(word, words, sizeof(word));
  for (int i = 0; i < kPhiloxGroup; ++i) {
    if constexpr (noise == Noise::bits) {
      out[i] = word[i];
    } else if constexpr (noise == Noise::uniform) {
      out[i] = static_cast<T>(word[i] >> (32 - p.uniform_bits)) / static_cast<T>(1 << p.uniform_bits);
    } else if constexpr (noise == Noise::normal) {
      if (i % 2 == 0) normal_pair(word[i], word[i + 1], out[i], out[i + 1]);
    } else {
      out[i] = noise == Noise::gumbel ? gumbel(word[i]) : logistic(word[i]);
    }
  }
}

// Elements [begin, end) of the stream; begin is a multiple of kDrawn.
template <Noise noise, class T>
void draw(const NoiseFill<T>& p, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kDrawn) {
    PhiloxVector bits[kGroups];
    philox_vectors(p.seed, p.offset, static_cast<uint64_t>(at) / 4, bits);
    alignas(64) T rest[kDrawn];
    T* to = at + kDrawn <= end ? p.out + at : rest;
    for (int n = 0; n < kGroups; ++n) put_group<noise>(p, bits[n], to + n * kPhiloxGroup);
    if (to == rest) std::memcpy(p.out + at, rest, static_cast<size_t>(end - at) * sizeof(T));
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
              const int64_t groups = ceil_div(fill.count, kDrawn);
              draw_any(fill, split(groups, parts, begin).begin * kDrawn,
                       minimum(fill.count, split(groups, parts, end - 1).end * kDrawn));
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

// The nearest code has the largest x.e - |e|^2 / 2: a matrix product whose every tile is reduced to the best so far of
// each row before the next is computed, so that the matrix of all distances is never there. Panels of codes stay in L1
// while a block of rows passes; each lane keeps its own best, and a later code has to be better, so the lowest index
// wins ties.
#include "sampling/quantize.h"

#include <atomic>
#include <cmath>
#include <limits>

#include "common/rows.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kRowBlock = 16 * kTileRows;

template <class T>
struct Packed {
  T *center, *panels, *half;  // [dim]; codes less center [panels][dim][kPanel]; |e|^2 / 2, infinite where no code is
  T* rows;                    // [threads][kRowBlock][dim]
};
template <class T>
Packed<T> packed(const Quantize<T>& p, char* workspace) {
  const int64_t columns = round_up(p.codes, kPanel<T>), dim = round_up(p.dim, kLanes<T>);
  T* center = reinterpret_cast<T*>(workspace);
  return {center, center + dim, center + dim + columns * p.dim, center + dim + columns * (p.dim + 1)};
}
template <class T>
size_t quantize_workspace(const Quantize<T>& p, int threads) {
  const int64_t columns = round_up(p.codes, kPanel<T>), dim = round_up(p.dim, kLanes<T>);
  return static_cast<size_t>(dim + columns * (p.dim + 1) + threads * kRowBlock * p.dim) * sizeof(T);
}

// The mean of what is finite, to a multiple of the power of two above the codes' spread: near the origin that is 0, and
// elsewhere what is subtracted has few digits, so that distances that are equal stay equal.
template <class T>
void find_center(const Quantize<T>& p, T* center) {
  const T largest = std::numeric_limits<T>::max();
  const auto code = [&](int64_t k, int64_t d, T otherwise) {
    const T e = p.codebook[k * p.dim + d];
    return e <= largest && e >= -largest ? e : otherwise;
  };
  for (int64_t d = 0; d < p.dim; ++d) center[d] = 0;
  const T share = T(1) / static_cast<T>(p.codes);
  for (int64_t k = 0; k < p.codes; ++k) {
    for (int64_t d = 0; d < p.dim; ++d) center[d] += code(k, d, T(0)) * share;
  }
  T spread = 0;
  for (int64_t k = 0; k < p.codes; ++k) {
    for (int64_t d = 0; d < p.dim; ++d) {
      const T distance = code(k, d, center[d]) - center[d];
      spread = distance > spread ? distance : -distance > spread ? -distance : spread;
    }
  }
  if (!(spread > 0 && spread <= largest / 4)) return;
  int exponent = 0;
  (void)std::frexp(spread, &exponent);
  const T unit = std::ldexp(T(1), exponent);
  for (int64_t d = 0; d < p.dim; ++d) center[d] = std::round(center[d] / unit) * unit;
}

template <class T>
void pack(const Quantize<T>& p, const Packed<T>& to, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    const int64_t first = panel * kPanel<T>;
    T* codes = to.panels + first * p.dim;
    const auto code = [&](int64_t c) { return first + c < p.codes ? p.codebook + (first + c) * p.dim : nullptr; };
    pack_columns<T>(kPanel<T>, p.dim, code, codes);
    Vec<T> square[kPanelVectors]{};
    for (int64_t d = 0; d < p.dim; ++d) {
      for (int v = 0; v < kPanelVectors; ++v) {
        T* at = codes + d * kPanel<T> + v * kLanes<T>;
        const Vec<T> e = load(at) - to.center[d];
        store(at, e);
        square[v] += e * e;
      }
    }
    for (int v = 0; v < kPanelVectors; ++v) store(to.half + first + v * kLanes<T>, square[v] * T(0.5));
    for (int64_t k = p.codes; k < first + kPanel<T>; ++k) to.half[k] = std::numeric_limits<T>::infinity();
  }
}

template <class T>
T emit(const Quantize<T>& p, int64_t row, T best, int64_t index) {
  constexpr int L = kLanes<T>;
  const T *x = p.x + row * p.dim, *e = p.codebook + index * p.dim;
  T* to = p.quantized + row * p.dim;
  const T infinity = std::numeric_limits<T>::infinity();
  const bool found = best > -infinity && best < infinity;
  Vec<T> square{};
  for (int64_t d = 0; d < p.dim; d += L) {
    const Vec<T> code = load_upto(e + d, p.dim - d), difference = load_upto(x + d, p.dim - d) - code;
    square += difference * difference;
    store_upto(to + d, found ? code : broadcast(std::numeric_limits<T>::quiet_NaN()), p.dim - d);
  }
  return p.weight * sum<T>(square);
}

template <class T>
void nearest(const Quantize<T>& p, const Packed<T>& codes, T* vectors, int64_t begin, int64_t end) {
  using I = VecInt<T>;
  using Integer = typename VecTraits<T>::scalar_integer;
  constexpr int L = kLanes<T>;
  I lane;
  for (int i = 0; i < L; ++i) lane[i] = i;
  alignas(64) T tile[kTileRows * kPanel<T>];
  for (int64_t block = begin; block < end; block += kRowBlock) {
    const int64_t rows = minimum(kRowBlock, end - block);
    for (int64_t r = 0; r < rows; ++r) {
      const T* x = p.x + (block + r) * p.dim;
      for (int64_t d = 0; d < p.dim; ++d) vectors[r * p.dim + d] = x[d] - codes.center[d];
    }
    Vec<T> best[kRowBlock];
    I where[kRowBlock];
    for (int64_t r = 0; r < rows; ++r) {
      best[r] = broadcast(-std::numeric_limits<T>::infinity());
      where[r] = I{};
    }
    for (int64_t first = 0; first < p.codes; first += kPanel<T>) {
      for_tiles(0, rows, [&](int64_t from, int size) {
        const T* x[kTileRows];
        for (int r = 0; r < size; ++r) x[r] = vectors + (from + r) * p.dim;
        multiply(size, kPanelVectors, p.dim, x, 1, codes.panels + first * p.dim, tile);
        for (int r = 0; r < size; ++r) {
          Vec<T> top = best[from + r];
          I at = where[from + r];
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVectors; ++v) {
            const Vec<T> score = load(tile + (r * kPanelVectors + v) * L) - load(codes.half + first + v * L);
            const I better = score > top;
            top = better ? score : top;
            at = better ? lane + static_cast<Integer>(first + v * L) : at;
          }
          best[from + r] = top;
          where[from + r] = at;
        }
      });
    }
    for (int64_t r = 0; r < rows; ++r) {
      T top = best[r][0];
      int64_t index = where[r][0];
      for (int j = 1; j < L; ++j) {
        if (best[r][j] > top || (best[r][j] == top && where[r][j] < index)) top = best[r][j], index = where[r][j];
      }
      const T infinity = std::numeric_limits<T>::infinity();
      if (!(top > -infinity && top < infinity)) index = 0;
      p.indices[block + r] = index;
      p.loss[block + r] = emit(p, block + r, top, index);
    }
  }
}

template <class T>
void quantize(const Quantize<T>& p, char* workspace, const Executor& executor) {
  const Packed<T> codes = packed(p, workspace);
  const int64_t panels = ceil_div(p.codes, kPanel<T>);
  find_center(p, codes.center);
  // A thread is worth waking for a hundred thousand multiplications or so.
  parallel_ranges(executor, panels, ceil_div(16384, kPanel<T> * maximum(p.dim, 1)),
                  [&](int64_t begin, int64_t end) { pack(p, codes, begin, end); });
  const int64_t least = ceil_div(100000, maximum(p.codes * p.dim, 1));
  std::atomic<int> taken{0};
  parallel_ranges(executor, p.count, least, [&](int64_t begin, int64_t end) {
    nearest(p, codes, codes.rows + taken.fetch_add(1) * kRowBlock * p.dim, begin, end);
  });
}

// out[k] = the sum of what add(row, from, to, sums of the row's code) adds, in double: a code may be taken by millions
// of vectors. The threads share the columns, not the rows: every sum is in the order of the rows.
template <class T, class Add>
void by_code(const Executor& executor, int64_t count, int64_t codes, int64_t dim, const int64_t* indices, double* sums,
             T* out, Add add) {
  const int64_t slices = ceil_div(dim, kLanes<T>);
  parallel_ranges(executor, slices, ceil_div(32768, maximum(count * kLanes<T>, 1)), [&](int64_t begin, int64_t end) {
    const int64_t from = begin * kLanes<T>, to = minimum(end * kLanes<T>, dim);
    for (int64_t k = 0; k < codes; ++k) {
      for (int64_t d = from; d < to; ++d) sums[k * dim + d] = 0;
    }
    for (int64_t row = 0; row < count; ++row) add(row, from, to, sums + indices[row] * dim);
    for (int64_t k = 0; k < codes; ++k) {
      for (int64_t d = from; d < to; ++d) out[k * dim + d] = static_cast<T>(sums[k * dim + d]);
    }
  });
}

template <class T>
void quantize_backward(const QuantizeBackward<T>& p, char* workspace, const Executor& executor) {
  constexpr int L = kLanes<T>;
  if (p.grad_x != nullptr) {
    parallel_ranges(executor, p.count, ceil_div(16384, maximum(p.dim, 1)), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *x = p.x + row * p.dim, *e = p.codebook + p.indices[row] * p.dim;
        const T weight = p.grad_loss != nullptr ? 2 * p.commitment_weight * p.grad_loss[row] : T(0);
        for (int64_t d = 0; d < p.dim; d += L) {
          const int64_t left = p.dim - d;
          Vec<T> g{};
          if (p.grad_quantized != nullptr) g = load_upto(p.grad_quantized + row * p.dim + d, left);
          if (p.grad_loss != nullptr) g += weight * (load_upto(x + d, left) - load_upto(e + d, left));
          store_upto(p.grad_x + row * p.dim + d, g, left);
        }
      }
    });
  }
  if (p.grad_codebook == nullptr) return;
  by_code(executor, p.grad_loss != nullptr ? p.count : 0, p.codes, p.dim, p.indices,
          reinterpret_cast<double*>(workspace), p.grad_codebook,
          [&](int64_t row, int64_t from, int64_t to, double* sums) {
            const T *e = p.codebook + p.indices[row] * p.dim, *x = p.x + row * p.dim;
            const T weight = 2 * p.codebook_weight * p.grad_loss[row];
            for (int64_t d = from; d < to; ++d) sums[d] += static_cast<double>(weight * (e[d] - x[d]));
          });
}

template <class T>
void quantize_statistics(const QuantizeStatistics<T>& p, char* workspace, const Executor& executor) {
  double* sums = reinterpret_cast<double*>(workspace);
  double* counts = sums + p.codes * p.dim;
  for (int64_t k = 0; k < p.codes; ++k) counts[k] = 0;
  for (int64_t row = 0; row < p.count; ++row) counts[p.indices[row]] += 1;
  for (int64_t k = 0; k < p.codes; ++k) p.counts[k] = static_cast<T>(counts[k]);
  by_code(executor, p.count, p.codes, p.dim, p.indices, sums, p.sums,
          [&](int64_t row, int64_t from, int64_t to, double* into) {
            for (int64_t d = from; d < to; ++d) into[d] += static_cast<double>(p.x[row * p.dim + d]);
          });
}

}  // namespace

template <class T>
KernelOf<Quantize<T>> quantize_kernel() {
  return {&quantize_workspace<T>, &quantize<T>};
}
template <class T>
KernelOf<QuantizeBackward<T>> quantize_backward_kernel() {
  return {[](const QuantizeBackward<T>& p, int) {
            return p.grad_codebook != nullptr ? static_cast<size_t>(p.codes * p.dim) * sizeof(double) : size_t{0};
          },
          &quantize_backward<T>};
}
template <class T>
KernelOf<QuantizeStatistics<T>> quantize_statistics_kernel() {
  return {
      [](const QuantizeStatistics<T>& p, int) { return static_cast<size_t>(p.codes * (p.dim + 1)) * sizeof(double); },
      &quantize_statistics<T>};
}
template KernelOf<Quantize<float>> quantize_kernel<float>();
template KernelOf<Quantize<double>> quantize_kernel<double>();
template KernelOf<QuantizeBackward<float>> quantize_backward_kernel<float>();
template KernelOf<QuantizeBackward<double>> quantize_backward_kernel<double>();
template KernelOf<QuantizeStatistics<float>> quantize_statistics_kernel<float>();
template KernelOf<QuantizeStatistics<double>> quantize_statistics_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

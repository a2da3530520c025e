// Tensors of any size a block at a time: functions of elements, and their sums over rows. A block lies in L1, and where
// it begins depends on nothing but the tensor's size, so neither does the order of a sum: not on the threads.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/gemm.h"
#include "common/periodic.h"

namespace genfuse {

GENFUSE_NAMESPACE {

inline constexpr int64_t kBlock = 1024;  // a multiple of kNoiseDrawn

// Elements [begin, begin + n) of an operand: in place, or gathered in buffer[kBlock].
template <class T>
inline const T* block_of(const Periodic<T>& p, int64_t begin, int64_t n, T* buffer) {
  if (p.data == nullptr) return nullptr;
  int64_t at = begin % p.period;
  if (at + n <= p.period) return p.data + at;
  if (p.period == 1) {
    for (int64_t i = 0; i < n; ++i) buffer[i] = p.data[0];
    return buffer;
  }
  for (int64_t i = 0; i < n;) {
    const int64_t run = minimum(n - i, p.period - at);
    std::memcpy(buffer + i, p.data + at, static_cast<size_t>(run) * sizeof(T));
    i += run;
    at = 0;
  }
  return buffer;
}

// Calls part(begin, end) for ranges of [0, n) on all threads, each of at least `least` (or all).
template <class F>
inline void parallel_ranges(const Executor& executor, int64_t n, int64_t least, F&& part) {
  const int64_t parts = maximum(1, minimum(executor.threads, n / maximum(least, 1)));
  if (parts == 1 || executor.run == nullptr) {
    if (n > 0) part(int64_t{0}, n);
    return;
  }
  struct Context {
    F& part;
    int64_t n, parts;
  } context{part, n, parts};
  executor.run(
      parts,
      [](void* pointer, int64_t begin, int64_t end) {
        auto& c = *static_cast<Context*>(pointer);
        const int64_t from = split(c.n, c.parts, begin).begin, to = split(c.n, c.parts, end - 1).end;
        if (from < to) c.part(from, to);
      },
      &context);
}

// Calls block(begin, n) for every block of [0, count). A thread is worth waking for kThreadBlocks of them.
inline constexpr int64_t kThreadBlocks = 8;
template <class F>
inline void for_blocks(const Executor& executor, int64_t count, F&& block) {
  parallel_ranges(executor, ceil_div(count, kBlock), kThreadBlocks, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) block(b * kBlock, minimum(kBlock, count - b * kBlock));
  });
}

template <class T>
inline T sum_of(const T* x, int64_t n) {
  constexpr int L = kLanes<T>;
  Vec<T> a{}, b{}, c{}, d{};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    a += load(x + i);
    b += load(x + i + L);
    c += load(x + i + 2 * L);
    d += load(x + i + 3 * L);
  }
  for (; i + L <= n; i += L) a += load(x + i);
  if (i < n) b += load_partial(x + i, static_cast<int>(n - i));
  return sum<T>((a + b) + (c + d));
}

// out[r] = sum of elements [r row, (r + 1) row), which come block by block.
template <class T>
struct RowSums {
  T* out;
  int64_t row;      // elements; at least 1
  double* partial;  // [blocks][2]: of the row that began before a block, and of the one that goes on after it

  static size_t workspace(int64_t count) { return static_cast<size_t>(2 * ceil_div(count, kBlock)) * sizeof(double); }

  void put(int64_t begin, int64_t n, const T* each) const {
    if (row == 1) {
      std::memcpy(out + begin, each, static_cast<size_t>(n) * sizeof(T));
      return;
    }
    const int64_t end = begin + n;
    for (int64_t r = begin / row; r * row < end; ++r) {
      const int64_t first = r * row, last = first + row;
      const int64_t from = maximum(first, begin), to = minimum(last, end);
      const T sum = sum_of(each + (from - begin), to - from);
      if (first >= begin && last <= end) {
        out[r] = sum;
      } else {
        partial[begin / kBlock * 2 + (first >= begin ? 1 : 0)] = static_cast<double>(sum);
      }
    }
  }

  // After all blocks.
  void finish(int64_t count) const {
    if (kBlock % row == 0) return;
    for (int64_t r = 0; r * row < count; ++r) {
      const int64_t first = r * row / kBlock, last = ((r + 1) * row - 1) / kBlock;
      if (first == last) continue;
      double total = partial[first * 2 + 1];
      for (int64_t b = first + 1; b <= last; ++b) total += partial[b * 2];
      out[r] = static_cast<T>(total);
    }
  }
};

// each[i] = of[row of element begin + i]: a row's gradient for every element of a block.
template <class T>
inline const T* spread_rows(const T* of, int64_t row, int64_t begin, int64_t n, T* each) {
  if (of == nullptr) return nullptr;
  if (row == 1) return of + begin;
  for (int64_t i = 0; i < n;) {
    const int64_t r = (begin + i) / row, run = minimum(n - i, (r + 1) * row - begin - i);
    for (int64_t k = 0; k < run; ++k) each[i + k] = of[r];
    i += run;
  }
  return each;
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// A block of elements at a time, and of it a vector's worth: their parameters are brought side by side (by a
// transposition where an element's own lie together), and every lane evaluates its spline.
#include "flow/spline.h"

#include "common/rows.h"
#include "flow/spline_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

// Whether the elements [e, e + n) lie in one run and one period, so that their strides are those of the run.
template <class T>
inline bool together(const SplineParameters<T>& p, int64_t e, int64_t n) {
  return (p.run >= p.period || e % p.run + n <= p.run) && e + n <= p.period;
}

// to[j][lane] = parameter j of element e + lane; zeros for the lanes from n on.
template <class T>
inline void load_parameters(const SplineParameters<const T>& p, int64_t e, int n, Vec<T>* to) {
  constexpr int L = kLanes<T>;
  e %= p.period;
  if (together(p, e, n)) {
    const int64_t base = p.offset(e);
    const T* from = p.data + base;
    if (p.stride == 1) {
      for (int j = 0; j < p.count; ++j) to[j] = load_upto(from + j * p.step, n);
      return;
    }
    if (p.step == 1) {
      for (int first = 0; first < p.count; first += L) {
        const int width = static_cast<int>(minimum(L, p.count - first));
        Vec<T> block[L];
        // Whole vectors are read as long as they end inside of the tensor, whatever lies there.
        const bool whole = n == L && (width == L || base + (L - 1) * p.stride + first + L <= p.extent);
        if (whole) {
#pragma GCC unroll 16
          for (int i = 0; i < L; ++i) block[i] = load(from + i * p.stride + first);
        } else {
          for (int i = 0; i < L; ++i) block[i] = i < n ? load_upto(from + i * p.stride + first, width) : Vec<T>{};
        }
        transpose<T>(block);
        for (int j = 0; j < width; ++j) to[first + j] = block[j];
      }
      return;
    }
  }
  for (int j = 0; j < p.count; ++j) to[j] = Vec<T>{};
  for (int i = 0; i < n; ++i) {
    const T* from = p.data + p.offset((e + i) % p.period);
    for (int j = 0; j < p.count; ++j) to[j][i] = from[j * p.step];
  }
}

template <class T>
inline void store_parameters(const SplineParameters<T>& p, int64_t e, int n, const Vec<T>* from) {
  constexpr int L = kLanes<T>;
  if (p.data == nullptr) return;
  if (together(p, e, n)) {
    T* to = p.data + p.offset(e);
    if (p.stride == 1) {
      for (int j = 0; j < p.count; ++j) store_upto(to + j * p.step, from[j], n);
      return;
    }
    if (p.step == 1) {
      for (int first = 0; first < p.count; first += L) {
        const int width = static_cast<int>(minimum(L, p.count - first));
        Vec<T> block[L];
        for (int j = 0; j < L; ++j) block[j] = j < width ? from[first + j] : Vec<T>{};
        transpose<T>(block);
        if (width == L) {
          for (int i = 0; i < n; ++i) store(to + i * p.stride + first, block[i]);
        } else {
          for (int i = 0; i < n; ++i) store_upto(to + i * p.stride + first, block[i], width);
        }
      }
      return;
    }
  }
  for (int i = 0; i < n; ++i) {
    T* to = p.data + p.offset(e + i);
    for (int j = 0; j < p.count; ++j) to[j * p.step] = from[j][i];
  }
}

// Vectors of parameters and of scratch for a group of elements; too many for registers, few enough for L1 at usual K.
template <class T>
struct Group {
  Vec<T> parameters[3 * kSplineMaxBins + 1];
  Vec<T> scratch[SplineMath<T>::kScratch];

  void load(const Spline<T>& p, int64_t e, int n) {
    Vec<T>* to = parameters;
    for (const auto& part : p.parameters) {
      if (part.count == 0) continue;
      load_parameters(part, e, n, to);
      to += part.count;
    }
  }
};

// A thread is worth waking for two blocks: an element costs some ten nanoseconds.
template <class F>
inline void blocks(const Executor& executor, int64_t count, F&& block) {
  parallel_ranges(executor, ceil_div(count, kBlock), 2, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) block(b * kBlock, minimum(kBlock, count - b * kBlock));
  });
}

// Rational-quadratic splines of 8 bins, which most people use, are compiled apart.
template <class T>
bool usual(const SplineOptions<T>& o) {
  return o.kind == SplineKind::rational_quadratic && o.bins == 8;
}

template <class T, int Bins>
void forward(const Spline<T>& p, char* workspace, const Executor& executor) {
  const RowSums<T> sums{p.log_slope, p.row, reinterpret_cast<double*>(workspace)};
  const SplineMath<T, Bins> math(p.options);
  blocks(executor, p.count, [&](int64_t begin, int64_t n) {
    alignas(64) T buffer[kBlock], each[kBlock];
    Group<T> group;
    const T* x = block_of(p.x, begin, n, buffer);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int lanes = static_cast<int>(minimum(kLanes<T>, n - i));
      group.load(p, begin + i, lanes);
      Vec<T> y, log_slope;
      math.apply(load_upto(x + i, lanes), group.parameters, group.scratch, y, log_slope);
      store_upto(p.y + begin + i, y, lanes);
      store(each + i, log_slope);
    }
    sums.put(begin, n, each);
  });
  sums.finish(p.count);
}

template <class T, int Bins>
void backward(const SplineBackward<T>& b, const Executor& executor) {
  const Spline<T>& p = b.forward;
  const SplineMath<T, Bins> math(p.options);
  blocks(executor, p.count, [&](int64_t begin, int64_t n) {
    alignas(64) T buffer[kBlock], each[kBlock];
    Group<T> group;
    const T* x = block_of(p.x, begin, n, buffer);
    const T* grad_log = spread_rows(b.grad_log_slope, p.row, begin, n, each);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int lanes = static_cast<int>(minimum(kLanes<T>, n - i));
      group.load(p, begin + i, lanes);
      const Vec<T> gy = b.grad_y != nullptr ? load_upto(b.grad_y + begin + i, lanes) : Vec<T>{};
      const Vec<T> gl = grad_log != nullptr ? load_upto(grad_log + i, lanes) : Vec<T>{};
      const Vec<T> gx = math.differentiate(load_upto(x + i, lanes), gy, gl, group.parameters, group.scratch);
      if (b.grad_x != nullptr) store_upto(b.grad_x + begin + i, gx, lanes);
      const Vec<T>* from = group.parameters;
      for (int part = 0; part < 3; ++part) {
        if (p.parameters[part].count == 0) continue;
        store_parameters(b.grad_parameters[part], begin + i, lanes, from);
        from += p.parameters[part].count;
      }
    }
  });
}

}  // namespace

template <class T>
KernelOf<Spline<T>> spline_kernel() {
  return {[](const Spline<T>& p, int) { return RowSums<T>::workspace(p.count); },
          [](const Spline<T>& p, char* workspace, const Executor& executor) {
            return usual(p.options) ? forward<T, 8>(p, workspace, executor) : forward<T, 0>(p, workspace, executor);
          }};
}
template <class T>
KernelOf<SplineBackward<T>> spline_backward_kernel() {
  return {[](const SplineBackward<T>&, int) { return size_t{0}; },
          [](const SplineBackward<T>& b, char*, const Executor& executor) {
            return usual(b.forward.options) ? backward<T, 8>(b, executor) : backward<T, 0>(b, executor);
          }};
}
template KernelOf<Spline<float>> spline_kernel<float>();
template KernelOf<Spline<double>> spline_kernel<double>();
template KernelOf<SplineBackward<float>> spline_backward_kernel<float>();
template KernelOf<SplineBackward<double>> spline_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

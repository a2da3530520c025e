// A block at a time. The noise of an element depends on where it is and on nothing else, so the backward pass draws it
// again.
#include "flow/dequantize.h"

#include <cmath>

#include "common/math_simd.h"
#include "common/rows.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

template <class T>
struct Buffers {
  alignas(64) T x[kBlock], u[kBlock], each[kBlock];
};

// p and q = 1 - p of a block's elements; q is not taken from p, which has lost the digits of a small difference.
template <class T>
struct Probabilities {
  const T *x, *u;
  T inner, scale, levels;  // alpha, 1 - 2 alpha

  Probabilities(const Dequantize<T>& d, int64_t begin, int64_t n, Buffers<T>& buffer)
      : x(nullptr), u(nullptr), inner(d.alpha), scale(T(1) - T(2) * d.alpha), levels(d.levels) {
    if (d.bytes != nullptr) {
      for (int64_t i = 0; i < n; ++i) buffer.x[i] = static_cast<T>(d.bytes[begin + i]);
      x = buffer.x;
    } else {
      x = block_of(d.x, begin, n, buffer.x);
    }
    if (d.u.data != nullptr) {
      u = block_of(d.u, begin, n, buffer.u);
    } else {
      draw_noise<Noise::uniform>(d.seed, d.offset, begin, n, buffer.u);
      u = buffer.u;
    }
  }
  GENFUSE_HD void at(int64_t i, int64_t left, Vec<T>& p, Vec<T>& q) const {
    const Vec<T> value = load_upto(x + i, left), noise = load_upto(u + i, left);
    p = inner + scale * ((value + noise) / levels);
    q = inner + scale * (((levels - value) - noise) / levels);
  }
};

template <class T>
void forward(const Dequantize<T>& d, char* workspace, const Executor& executor) {
  const RowSums<T> sums{d.log_abs_det, d.row, reinterpret_cast<double*>(workspace)};
  const auto constant =
      static_cast<T>(std::log((1 - 2 * static_cast<double>(d.alpha)) / static_cast<double>(d.levels)));
  for_blocks(executor, d.count, [&](int64_t begin, int64_t n) {
    Buffers<T> buffer;
    const Probabilities<T> of(d, begin, n, buffer);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      Vec<T> p, q;
      of.at(i, n - i, p, q);
      const Vec<T> log_p = log_wide(p), log_q = log_wide(q);
      store_upto(d.y + begin + i, log_p - log_q, n - i);
      store(buffer.each + i, constant - log_p - log_q);
    }
    sums.put(begin, n, buffer.each);
  });
  sums.finish(d.count);
}

template <class T>
void backward(const DequantizeBackward<T>& b, char*, const Executor& executor) {
  const Dequantize<T>& d = b.forward;
  const T by_value = (T(1) - T(2) * d.alpha) / d.levels;
  for_blocks(executor, d.count, [&](int64_t begin, int64_t n) {
    Buffers<T> buffer;
    const Probabilities<T> of(d, begin, n, buffer);
    const T* grad_log = spread_rows(b.grad_log_abs_det, d.row, begin, n, buffer.each);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      Vec<T> p, q, grad{};
      of.at(i, n - i, p, q);
      const Vec<T> by_p = T(1) / p, by_q = T(1) / q;
      if (b.grad_y != nullptr) grad += load_upto(b.grad_y + begin + i, n - i) * (by_p + by_q);
      if (grad_log != nullptr) grad += load_upto(grad_log + i, n - i) * (by_q - by_p);
      store_upto(b.grad + begin + i, by_value * grad, n - i);
    }
  });
}

template <class T>
GENFUSE_HD Vec<T> whole(Vec<T> x) {  // x >= 0 without its fraction; NaN stays
  return x == x ? __builtin_convertvector(__builtin_convertvector(x, VecInt<T>), Vec<T>) : x;
}

template <class T>
void quantize(const LogitQuantize<T>& l, char*, const Executor& executor) {
  const T scale = T(1) - T(2) * l.alpha;
  for_blocks(executor, l.count, [&](int64_t begin, int64_t n) {
    for (int64_t i = begin; i < begin + n; i += kLanes<T>) {
      const int64_t left = begin + n - i;
      const Vec<T> v = (sigmoid(load_upto(l.y + i, left)) - l.alpha) / scale;
      store_upto(l.x + i, whole<T>(within(v * l.levels, T(0), l.levels - T(1))), left);
    }
  });
}

}  // namespace

template <class T>
KernelOf<Dequantize<T>> dequantize_kernel() {
  return {[](const Dequantize<T>& d, int) { return RowSums<T>::workspace(d.count); }, &forward<T>};
}
template <class T>
KernelOf<DequantizeBackward<T>> dequantize_backward_kernel() {
  return {[](const DequantizeBackward<T>&, int) { return size_t{0}; }, &backward<T>};
}
template <class T>
KernelOf<LogitQuantize<T>> logit_quantize_kernel() {
  return {[](const LogitQuantize<T>&, int) { return size_t{0}; }, &quantize<T>};
}
template KernelOf<Dequantize<float>> dequantize_kernel<float>();
template KernelOf<Dequantize<double>> dequantize_kernel<double>();
template KernelOf<DequantizeBackward<float>> dequantize_backward_kernel<float>();
template KernelOf<DequantizeBackward<double>> dequantize_backward_kernel<double>();
template KernelOf<LogitQuantize<float>> logit_quantize_kernel<float>();
template KernelOf<LogitQuantize<double>> logit_quantize_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// A block at a time: its noise is drawn into L1, one loop computes the sample and each element's KL, and the KLs are
// summed by rows. Backward draws the noise again, which takes less time than reading it from memory would.
#include "sampling/gaussian.h"

#include <type_traits>

#include "common/math_simd.h"
#include "common/rows.h"
#include "sampling/noise_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

template <class T>
struct Block {
  T mean[kBlock], scale[kBlock], prior_mean[kBlock], prior_scale[kBlock], eps[kBlock], each[kBlock];
};

// What forward and backward need of one vector of elements. With d = ln variance - ln prior variance and s = (mean -
// prior mean) / prior std, the KL is (e^d - 1 - d + s^2) / 2; s is formed by the deviation, whose inverse overflows
// later than the variance's. All of d comes of h = d / 2 and e^h = 1 + p: e^d - 1 = 2 p + p^2, and e^d - 1 - d = 2 (p -
// h)
// + p^2, where p - h is the tail of the exponential's polynomial, so that nothing cancels near 0.
template <class T>
struct Terms {
  Vec<T> std, less_one, inverse, distance, kl;
};

// Loads of whole vectors, or of the last elements of a block.
template <bool whole, class T>
GENFUSE_HD Vec<T> fetch(const T* p, int64_t left) {
  if constexpr (whole) {
    return load(p);
  } else {
    return load_partial(p, static_cast<int>(left));
  }
}
template <bool whole, class T>
GENFUSE_HD void put(T* p, Vec<T> v, int64_t left) {
  if constexpr (whole) {
    store(p, v);
  } else {
    store_partial(p, v, static_cast<int>(left));
  }
}
// Calls body(whole, at, left) for the vectors of a block.
template <class T, class Body>
GENFUSE_HD void for_vectors(int64_t n, Body body) {
  int64_t i = 0;
  for (; i + kLanes<T> <= n; i += kLanes<T>) body(std::true_type{}, i, kLanes<T>);
  if (i < n) body(std::false_type{}, i, n - i);
}

template <bool whole, class T>
GENFUSE_HD void find_terms(const Gaussian<T>& p, Vec<T> mean, Vec<T> scale, const T* prior_mean, const T* prior_scale,
                           int64_t left, bool wants_std, bool wants_kl, Terms<T>& t) {
  scale = within(scale, p.low, p.high);
  const Vec<T> log_std = p.log_std ? scale : T(0.5) * scale;
  if (!wants_kl) {
    t.std = exp_wide<T>(log_std);
    return;
  }
  t.distance = prior_mean == nullptr ? mean : mean - fetch<whole>(prior_mean, left);
  Vec<T> h = log_std, tail, expm1, ratio;  // the deviations' ratio, e^h
  VecInt<T> near;
  if (prior_scale == nullptr) {
    t.inverse = broadcast(T(1));
    const WideExp<T> e(h);
    tail = e.tail;
    expm1 = e.expm1;
    ratio = t.std = e.value;
    near = e.near;
  } else {
    const Vec<T> prior = fetch<whole>(prior_scale, left), prior_log_std = p.log_std ? prior : T(0.5) * prior;
    h = log_std - prior_log_std;
    t.inverse = finite_exp<T>(-prior_log_std);
    t.distance = t.distance * t.inverse;
    if (wants_std) t.std = exp_wide<T>(log_std);
    const WideExp<T> e(h);
    tail = e.tail;
    expm1 = e.expm1;
    ratio = e.value;
    near = e.near;
  }
  const Vec<T> far = ratio * ratio - T(1);
  t.less_one = near ? expm1 * (T(2) + expm1) : far;
  // Infinity less infinity is no number; beyond the limit the first is infinite anyway.
  const Vec<T> rest =
      near ? T(2) * tail + expm1 * expm1 : far - T(2) * (h > kWideLimit<T> ? broadcast(kWideLimit<T>) : h);
  t.kl = T(0.5) * (rest + t.distance * t.distance);
}

template <class T>
void forward(const Gaussian<T>& p, char* workspace, const Executor& executor) {
  const RowSums<T> sums{p.kl, p.row, reinterpret_cast<double*>(workspace)};
  for_blocks(executor, p.count, [&](int64_t begin, int64_t n) {
    alignas(64) Block<T> buffer;
    const T* eps = block_of(p.eps, begin, n, buffer.eps);
    if (p.z != nullptr && eps == nullptr) {
      draw_noise<Noise::normal>(p.seed, p.offset, begin, n, buffer.eps);
      eps = buffer.eps;
    }
    const T* mean = block_of(p.mean, begin, n, buffer.mean);
    const T* scale = block_of(p.scale, begin, n, buffer.scale);
    const T* prior_mean = block_of(p.prior_mean, begin, n, buffer.prior_mean);
    const T* prior_scale = block_of(p.prior_scale, begin, n, buffer.prior_scale);
    const bool wants_z = p.z != nullptr, wants_kl = p.kl != nullptr;
    for_vectors<T>(n, [&](auto whole, int64_t i, int64_t left) {
      constexpr bool all = decltype(whole)::value;
      const Vec<T> m = fetch<all>(mean + i, left);
      Terms<T> t{};
      find_terms<all>(p, m, fetch<all>(scale + i, left), prior_mean == nullptr ? nullptr : prior_mean + i,
                      prior_scale == nullptr ? nullptr : prior_scale + i, left, wants_z, wants_kl, t);
      if (wants_z) put<all>(p.z + begin + i, m + t.std * fetch<all>(eps + i, left), left);
      if (wants_kl) {
        if (p.free_bits > 0) t.kl = t.kl < p.free_bits ? broadcast(p.free_bits) : t.kl;
        store(buffer.each + i, t.kl);
      }
    });
    if (wants_kl) sums.put(begin, n, buffer.each);
  });
  if (p.kl != nullptr) sums.finish(p.count);
}

template <class T>
void backward(const GaussianBackward<T>& b, char*, const Executor& executor) {
  const Gaussian<T>& p = b.forward;
  const bool wants_z = b.grad_z != nullptr, wants_kl = b.grad_kl != nullptr;
  const bool wants_eps = wants_z && b.grad_scale != nullptr;
  for_blocks(executor, p.count, [&](int64_t begin, int64_t n) {
    alignas(64) Block<T> buffer;
    const T* eps = block_of(p.eps, begin, n, buffer.eps);
    if (wants_eps && eps == nullptr) {
      draw_noise<Noise::normal>(p.seed, p.offset, begin, n, buffer.eps);
      eps = buffer.eps;
    }
    const T* mean = block_of(p.mean, begin, n, buffer.mean);
    const T* scale = block_of(p.scale, begin, n, buffer.scale);
    const T* prior_mean = block_of(p.prior_mean, begin, n, buffer.prior_mean);
    const T* prior_scale = block_of(p.prior_scale, begin, n, buffer.prior_scale);
    const T* grad_kl = spread_rows(b.grad_kl, p.row, begin, n, buffer.each);
    for_vectors<T>(n, [&](auto whole, int64_t i, int64_t left) {
      constexpr bool all = decltype(whole)::value;
      Terms<T> t{};
      find_terms<all>(p, fetch<all>(mean + i, left), fetch<all>(scale + i, left),
                      prior_mean == nullptr ? nullptr : prior_mean + i,
                      prior_scale == nullptr ? nullptr : prior_scale + i, left, wants_z, wants_kl, t);
      Vec<T> by_mean{}, by_scale{};
      if (wants_z) {
        const Vec<T> g = fetch<all>(b.grad_z + begin + i, left);
        by_mean = g;
        if (wants_eps) by_scale = g * t.std * fetch<all>(eps + i, left) * (p.log_std ? T(1) : T(0.5));
        if (b.grad_eps != nullptr) put<all>(b.grad_eps + begin + i, g * t.std, left);
      }
      if (wants_kl) {
        const Vec<T> g = fetch<all>(grad_kl + i, left);
        const VecInt<T> free = p.free_bits > 0 ? t.kl < p.free_bits : VecInt<T>{};
        const Vec<T> m = free ? Vec<T>{} : g * t.distance * t.inverse;
        const Vec<T> half = g * (p.log_std ? T(1) : T(0.5));
        by_mean = by_mean + m;
        by_scale = by_scale + (free ? Vec<T>{} : half * t.less_one);
        if (b.grad_prior_mean != nullptr) put<all>(b.grad_prior_mean + begin + i, -m, left);
        if (b.grad_prior_scale != nullptr) {
          const Vec<T> s = free ? Vec<T>{} : -half * (t.less_one + t.distance * t.distance);
          put<all>(b.grad_prior_scale + begin + i, s, left);
        }
      }
      if (b.grad_mean != nullptr) put<all>(b.grad_mean + begin + i, by_mean, left);
      if (b.grad_scale != nullptr) put<all>(b.grad_scale + begin + i, by_scale, left);
    });
  });
}

}  // namespace

template <class T>
KernelOf<Gaussian<T>> gaussian_kernel() {
  return {[](const Gaussian<T>& p, int) { return RowSums<T>::workspace(p.count); }, &forward<T>};
}
template <class T>
KernelOf<GaussianBackward<T>> gaussian_backward_kernel() {
  return {[](const GaussianBackward<T>&, int) { return size_t{0}; }, &backward<T>};
}
template KernelOf<Gaussian<float>> gaussian_kernel<float>();
template KernelOf<Gaussian<double>> gaussian_kernel<double>();
template KernelOf<GaussianBackward<float>> gaussian_backward_kernel<float>();
template KernelOf<GaussianBackward<double>> gaussian_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// A block at a time: its noise is drawn into L1, one loop computes the sample and each element's KL, and the KLs are
// summed by rows. Backward draws the noise again, which takes less time than reading it from memory would.
#include "sampling/gaussian.h"

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
// later than the variance's.
template <class T>
struct Terms {
  Vec<T> std, less_one, inverse, distance, kl;
};

template <class T>
GENFUSE_HD void find_terms(const Gaussian<T>& p, Vec<T> mean, Vec<T> scale, const T* prior_mean, const T* prior_scale,
                           int64_t i, int64_t left, bool wants_std, bool wants_kl, Terms<T>& t) {
  scale = scale < p.low ? broadcast(p.low) : scale;  // false for NaN
  scale = scale > p.high ? broadcast(p.high) : scale;
  if (wants_std) t.std = exp_wide<T>(p.log_std ? scale : T(0.5) * scale);
  if (!wants_kl) return;
  Vec<T> d = p.log_std ? scale + scale : scale;
  t.distance = prior_mean == nullptr ? mean : mean - load_upto(prior_mean + i, left);
  t.inverse = broadcast(T(1));
  if (prior_scale != nullptr) {
    const Vec<T> prior = load_upto(prior_scale + i, left);
    d = d - (p.log_std ? prior + prior : prior);
    t.inverse = exp_wide<T>(p.log_std ? -prior : T(-0.5) * prior);
    t.distance = t.distance * t.inverse;
  }
  Vec<T> rest;
  exp_minus<T>(d, t.less_one, rest);
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
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int64_t left = n - i;
      const Vec<T> m = load_upto(mean + i, left);
      Terms<T> t{};
      find_terms(p, m, load_upto(scale + i, left), prior_mean, prior_scale, i, left, wants_z, wants_kl, t);
      if (wants_z) store_upto(p.z + begin + i, m + t.std * load_upto(eps + i, left), left);
      if (wants_kl) {
        if (p.free_bits > 0) t.kl = t.kl < p.free_bits ? broadcast(p.free_bits) : t.kl;
        store(buffer.each + i, t.kl);
      }
    }
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
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const int64_t left = n - i;
      Terms<T> t{};
      find_terms(p, load_upto(mean + i, left), load_upto(scale + i, left), prior_mean, prior_scale, i, left, wants_z,
                 wants_kl, t);
      Vec<T> by_mean{}, by_scale{};
      if (wants_z) {
        const Vec<T> g = load_upto(b.grad_z + begin + i, left);
        by_mean = g;
        if (wants_eps) by_scale = g * t.std * load_upto(eps + i, left) * (p.log_std ? T(1) : T(0.5));
        if (b.grad_eps != nullptr) store_upto(b.grad_eps + begin + i, g * t.std, left);
      }
      if (wants_kl) {
        const Vec<T> g = load_upto(grad_kl + i, left);
        const VecInt<T> free = p.free_bits > 0 ? t.kl < p.free_bits : VecInt<T>{};
        const Vec<T> m = free ? Vec<T>{} : g * t.distance * t.inverse;
        const Vec<T> half = g * (p.log_std ? T(1) : T(0.5));
        by_mean = by_mean + m;
        by_scale = by_scale + (free ? Vec<T>{} : half * t.less_one);
        if (b.grad_prior_mean != nullptr) store_upto(b.grad_prior_mean + begin + i, -m, left);
        if (b.grad_prior_scale != nullptr) {
          const Vec<T> s = free ? Vec<T>{} : -half * (t.less_one + t.distance * t.distance);
          store_upto(b.grad_prior_scale + begin + i, s, left);
        }
      }
      if (b.grad_mean != nullptr) store_upto(b.grad_mean + begin + i, by_mean, left);
      if (b.grad_scale != nullptr) store_upto(b.grad_scale + begin + i, by_scale, left);
    }
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

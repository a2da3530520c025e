// What is added to a channel is a number for a whole plane where space is long within a channel. Where it is short
// (channels last, vectors) a row of all channels is one stretch of numbers, to each of which its own is added; so it is
// where nothing is added. Sums over positions are made of parts whose sizes follow from the tensors' alone.
#include "masked_conv/gate.h"

#include "common/math_simd.h"
#include "common/rows.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kShort = 16;       // space below which rows are stretches
constexpr int64_t kRowsOfPart = 32;  // rows that share their sums in the type of the tensors
constexpr int64_t kColumns = 64;     // of a block of the final sums

template <class T>
inline constexpr VecInt<T> kSign =
    VecInt<T>{} + static_cast<typename VecTraits<T>::scalar_integer>(uint64_t{1} << (8 * sizeof(T) - 1));

template <class T>
GENFUSE_HD Vec<T> minus_magnitude(Vec<T> x) {
  return reinterpret_cast<Vec<T>>(reinterpret_cast<VecInt<T>>(x) | kSign<T>);
}
// |x| with the sign of another.
template <class T>
GENFUSE_HD Vec<T> with_sign_of(Vec<T> x, Vec<T> other) {
  return reinterpret_cast<Vec<T>>((reinterpret_cast<VecInt<T>>(x) & ~kSign<T>) |
                                  (reinterpret_cast<VecInt<T>>(other) & kSign<T>));
}

// e^x and e^x - 1 for x <= 0, each with its relative accuracy. The exponential ends at 0: a shut gate is shut for any
// a.
template <class T>
struct Decay {
  Vec<T> exp, expm1;
  GENFUSE_HD explicit Decay(Vec<T> x) {
    x = x < ExpConstants<T>::lowest ? broadcast(ExpConstants<T>::lowest) : x;
    Vec<T> scale;
    const Vec<T> p = exp_reduced<T>(x, scale);
    exp = scale * p + scale;
    expm1 = scale * p + (scale - 1);
  }
};

// e^x for x <= 0, for the gate. Where a is not bounded it ends at 0, so that a shut gate is shut for any a.
template <class T, bool linear>
GENFUSE_HD Vec<T> decay_of(Vec<T> x) {
  if constexpr (!linear) return Decay<T>(x).exp;
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return exp_wide<T>(x);
#endif
  const Vec<T> decay = Decay<T>(x).exp;
  if (any_lane(x < ExpConstants<T>::lowest)) [[unlikely]]
    return exp_wide<T>(x);
  return decay;
}

// Both functions as fractions whose denominators lie within 1 and 2, so that one division serves for both and nothing
// overflows: tanh a = +-(1 - e^-2|a|) / (1 + e^-2|a|), sigmoid b = (1 or e^-|b|) / (1 + e^-|b|).
template <class T, bool linear>
GENFUSE_HD Vec<T> gated(Vec<T> a, Vec<T> b) {
  const Vec<T> decay = decay_of<T, linear>(minus_magnitude<T>(b));
  const Vec<T> up = b >= 0 ? broadcast(T(1)) : decay, down = decay + 1;
  if constexpr (linear) return a * (up / down);
  const Vec<T> m = Decay<T>(minus_magnitude<T>(a + a)).expm1;
  return with_sign_of<T>(m * up, a) / ((m + 2) * down);
}

// The gradients of a and b, where that of y is g.
template <class T, bool linear>
GENFUSE_HD void gated_backward(Vec<T> a, Vec<T> b, Vec<T> g, Vec<T>& by_a, Vec<T>& by_b) {
  const Vec<T> decay = decay_of<T, linear>(minus_magnitude<T>(b));
  const Vec<T> up = b >= 0 ? broadcast(T(1)) : decay, down = decay + 1;
  if constexpr (linear) {
    const Vec<T> inverse = 1 / down;
    by_a = g * (up * inverse);
    by_b = g * a * (decay * inverse * inverse);
  } else {
    const Decay<T> d(minus_magnitude<T>(a + a));
    const Vec<T> below = d.expm1 + 2, both = 1 / (below * down);
    const Vec<T> inverse_below = both * down, inverse = both * below;
    by_a = g * (up * inverse) * (4 * d.exp * inverse_below * inverse_below);
    by_b = g * with_sign_of<T>(d.expm1 * inverse_below, a) * (decay * inverse * inverse);
  }
}

// What is added to the elements of a block's halves: a number for each of them, or one for all.
template <class T>
struct Plus {
  const T *a = nullptr, *b = nullptr;
};
enum class Added { nothing, one, each };

template <class T>
struct Block {
  const T *a, *b, *full_a, *full_b, *residual, *grad;
  T *y, *grad_a, *grad_b;
  int64_t n;
};

template <class T, bool tail>
GENFUSE_HD Vec<T> load_some(const T* p, int64_t n) {
  return tail ? load_partial(p, static_cast<int>(n)) : load(p);
}
template <class T, bool tail>
GENFUSE_HD void store_some(T* p, Vec<T> v, int64_t n) {
  if constexpr (tail) {
    store_partial(p, v, static_cast<int>(n));
  } else {
    store(p, v);
  }
}

// Rows of channels are read and written half by half, which the hardware's prefetcher does not see through.
constexpr int64_t kAhead = 2048;  // bytes
template <class T>
GENFUSE_HD void will_read(const T* p) {
  __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead);
}
template <class T>
GENFUSE_HD void will_write(T* p) {
  __builtin_prefetch(reinterpret_cast<char*>(p) + kAhead, 1);
}

template <class T, Added added, bool tail>
GENFUSE_HD void halves(const Block<T>& k, const Plus<T>& plus, int64_t i, Vec<T>& a, Vec<T>& b) {
  const int64_t left = k.n - i;
  will_read(k.a + i);
  will_read(k.b + i);
  a = load_some<T, tail>(k.a + i, left);
  b = load_some<T, tail>(k.b + i, left);
  if constexpr (added == Added::one) {
    a += plus.a[0];
    b += plus.b[0];
  } else if constexpr (added == Added::each) {
    a += load_some<T, tail>(plus.a + i, left);
    b += load_some<T, tail>(plus.b + i, left);
  }
  if (k.full_a != nullptr) {
    a += load_some<T, tail>(k.full_a + i, left);
    b += load_some<T, tail>(k.full_b + i, left);
  }
}

template <class T, bool linear, Added added>
inline void forward_block(const Block<T>& k, const Plus<T>& plus) {
  const auto step = [&]<bool tail>(int64_t i, std::bool_constant<tail>) {
    Vec<T> a, b;
    halves<T, added, tail>(k, plus, i, a, b);
    will_write(k.y + i);
    Vec<T> y = gated<T, linear>(a, b);
    if (k.residual != nullptr) y += load_some<T, tail>(k.residual + i, k.n - i);
    store_some<T, tail>(k.y + i, y, k.n - i);
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= k.n; i += kLanes<T>) step(i, std::false_type{});
  if (i < k.n) step(i, std::true_type{});
}

// Also adds gradients: all of a half's to one sum, or each to its own.
template <class T, bool linear, Added added>
inline void backward_block(const Block<T>& k, const Plus<T>& plus, T* sum_a, T* sum_b) {
  Vec<T> all_a{}, all_b{};
  const auto step = [&]<bool tail>(int64_t i, std::bool_constant<tail>) {
    const int64_t left = k.n - i;
    Vec<T> a, b, by_a, by_b;
    halves<T, added, tail>(k, plus, i, a, b);
    will_read(k.grad + i);
    will_write(k.grad_a + i);
    will_write(k.grad_b + i);
    gated_backward<T, linear>(a, b, load_some<T, tail>(k.grad + i, left), by_a, by_b);
    store_some<T, tail>(k.grad_a + i, by_a, left);
    store_some<T, tail>(k.grad_b + i, by_b, left);
    if constexpr (added == Added::one) {
      all_a += tail ? keep_first<T>(by_a, left) : by_a;
      all_b += tail ? keep_first<T>(by_b, left) : by_b;
    } else if constexpr (added == Added::each) {
      store_some<T, tail>(sum_a + i, load_some<T, tail>(sum_a + i, left) + by_a, left);
      store_some<T, tail>(sum_b + i, load_some<T, tail>(sum_b + i, left) + by_b, left);
    }
  };
  int64_t i = 0;
  for (; i + kLanes<T> <= k.n; i += kLanes<T>) step(i, std::false_type{});
  if (i < k.n) step(i, std::true_type{});
  if constexpr (added == Added::one) {
    *sum_a = sum<T>(all_a);
    *sum_b = sum<T>(all_b);
  }
}

// How the work is cut, by the sizes and what there is alone.
template <class T>
struct Cut {
  Added added;
  int64_t width, blocks;    // of a plane (one) or a row, and its blocks
  int64_t group, groups;    // rows of x to which the same is added
  int64_t per_part, parts;  // rows of a part, parts of a group
  int64_t units;

  explicit Cut(const Gate<T>& p) {
    const bool adds = p.bias != nullptr || p.rows != nullptr;
    added = !adds ? Added::nothing : p.inner >= kShort ? Added::one : Added::each;
    width = added == Added::one ? p.inner : p.channels * p.inner;
    blocks = ceil_div(width, kBlock);
    group = p.rows != nullptr ? p.group : p.outer;
    groups = p.outer / group;
    per_part = added == Added::one ? 1 : minimum(group, added == Added::each ? kRowsOfPart : ceil_div(kBlock, width));
    parts = ceil_div(group, per_part);
    units = groups * parts * blocks * (added == Added::one ? p.channels : 1);
  }
  int64_t least() const { return ceil_div(kThreadBlocks * blocks * kBlock, per_part * width); }
  // Numbers in the workspace for sums.
  int64_t sums() const {
    return added == Added::nothing ? 0 : added == Added::one ? 2 * units : 2 * groups * parts * width;
  }
};

// Calls block(Block, Plus, place of its sums) for all blocks of y.
template <class T, Added added, class F>
void for_each_block(const Gate<T>& p, const Cut<T>& cut, const Executor& executor, F&& block) {
  const int64_t half = p.channels * p.inner;
  // Of y's row o from its element `at` on, `n` elements.
  const auto piece = [&](int64_t o, int64_t at, int64_t n) {
    Block<T> k{};
    k.n = n;
    k.a = p.x.data + o * p.x.stride + at;
    k.b = k.a + half;
    if (p.full.data != nullptr) {
      k.full_a = p.full.data + o * p.full.stride + at;
      k.full_b = k.full_a + half;
    }
    if (p.residual.data != nullptr) k.residual = p.residual.data + o * p.residual.stride + at;
    return k;
  };
  parallel_ranges(executor, cut.units, cut.least(), [&](int64_t begin, int64_t end) {
    [[maybe_unused]] T buffer[added == Added::each ? 2 * kBlock : 2];
    for (int64_t u = begin; u < end; ++u) {
      const int64_t whole = u / cut.blocks, at = (u - whole * cut.blocks) * kBlock, n = minimum(kBlock, cut.width - at);
      if constexpr (added == Added::one) {
        const int64_t o = whole / p.channels, c = whole - o * p.channels;
        const T* row = p.rows != nullptr ? p.rows + o / p.group * 2 * p.channels : nullptr;
        for (int64_t h = 0; h < 2; ++h) {
          const int64_t channel = h * p.channels + c;
          buffer[h] = (p.bias != nullptr ? p.bias[channel] : T(0)) + (row != nullptr ? row[channel] : T(0));
        }
        block(piece(o, c * p.inner + at, n), o, c * p.inner + at, Plus<T>{buffer, buffer + 1}, 2 * u, 2 * u + 1);
      } else {
        const int64_t g = whole / cut.parts, part = whole - g * cut.parts;
        Plus<T> plus;
        if constexpr (added == Added::each) {
          const T* row = p.rows != nullptr ? p.rows + g * 2 * p.channels : nullptr;
          if (p.inner == 1 && (row == nullptr || p.bias == nullptr)) {
            plus.a = (row != nullptr ? row : p.bias) + at;
            plus.b = plus.a + p.channels;
          } else {
            for (int64_t h = 0; h < 2; ++h) {
              for (int64_t i = 0; i < n; ++i) {
                const int64_t channel = h * p.channels + (p.inner == 1 ? at + i : (at + i) / p.inner);
                buffer[h * kBlock + i] =
                    (p.bias != nullptr ? p.bias[channel] : T(0)) + (row != nullptr ? row[channel] : T(0));
              }
            }
            plus = {buffer, buffer + kBlock};
          }
        }
        const int64_t first = g * cut.group + part * cut.per_part;
        const int64_t last = minimum(first + cut.per_part, (g + 1) * cut.group), sums = whole * 2 * cut.width + at;
        for (int64_t o = first; o < last; ++o) block(piece(o, at, n), o, at, plus, sums, sums + cut.width);
      }
    }
  });
}

// Calls f with the case that is compiled for p.
template <class T, class F>
void with_case(const Gate<T>& p, const Cut<T>& cut, F&& f) {
  const auto with_added = [&]<bool linear>(std::bool_constant<linear> l) {
    switch (cut.added) {
      case Added::nothing:
        return f(l, std::integral_constant<Added, Added::nothing>{});
      case Added::one:
        return f(l, std::integral_constant<Added, Added::one>{});
      default:
        return f(l, std::integral_constant<Added, Added::each>{});
    }
  };
  p.linear ? with_added(std::true_type{}) : with_added(std::false_type{});
}

template <class T>
void forward(const Gate<T>& p, char*, const Executor& executor) {
  if (p.outer * p.channels * p.inner == 0) return;
  const Cut<T> cut(p);
  with_case(p, cut, [&]<bool linear, Added added>(std::bool_constant<linear>, std::integral_constant<Added, added>) {
    for_each_block<T, added>(p, cut, executor,
                             [&](Block<T> k, int64_t o, int64_t at, const Plus<T>& plus, int64_t, int64_t) {
                               k.y = p.y + o * p.channels * p.inner + at;
                               forward_block<T, linear, added>(k, plus);
                             });
  });
}

// grad_rows and grad_bias from the sums of planes or of parts.
template <class T>
void finish(const GateBackward<T>& g, const Cut<T>& cut, const T* sums, const Executor& executor) {
  const Gate<T>& p = g.forward;
  const int64_t halves = 2 * p.channels;
  parallel_ranges(executor, ceil_div(halves, kColumns),
                  ceil_div(kThreadBlocks * kBlock * halves, kColumns * cut.sums()), [&](int64_t begin, int64_t end) {
                    for (int64_t first = begin * kColumns; first < minimum(end * kColumns, halves); first += kColumns) {
                      const int64_t count = minimum(kColumns, halves - first);
                      double total[kColumns] = {};
                      for (int64_t row = 0; row < cut.groups; ++row) {
                        double of_row[kColumns] = {};
                        for (int64_t part = row * cut.parts; part < (row + 1) * cut.parts; ++part) {
                          for (int64_t k = 0; k < count; ++k) {
                            const int64_t h = (first + k) / p.channels, c = first + k - h * p.channels;
                            if (cut.added == Added::one) {
                              const T* at = sums + 2 * (part * p.channels + c) * cut.blocks + h;
                              for (int64_t b = 0; b < cut.blocks; ++b) of_row[k] += static_cast<double>(at[2 * b]);
                            } else {
                              const T* at = sums + (2 * part + h) * cut.width + c * p.inner;
                              for (int64_t i = 0; i < p.inner; ++i) of_row[k] += static_cast<double>(at[i]);
                            }
                          }
                        }
                        for (int64_t k = 0; k < count; ++k) {
                          total[k] += of_row[k];
                          if (g.grad_rows != nullptr) g.grad_rows[row * halves + first + k] = static_cast<T>(of_row[k]);
                        }
                      }
                      if (g.grad_bias != nullptr) {
                        for (int64_t k = 0; k < count; ++k) g.grad_bias[first + k] = static_cast<T>(total[k]);
                      }
                    }
                  });
}

template <class T>
void backward(const GateBackward<T>& g, char* workspace, const Executor& executor) {
  const Gate<T>& p = g.forward;
  if (p.outer * p.channels * p.inner == 0) return;
  const Cut<T> cut(p);
  T* sums = reinterpret_cast<T*>(workspace);
  const int64_t half = p.channels * p.inner;
  with_case(p, cut, [&]<bool linear, Added added>(std::bool_constant<linear>, std::integral_constant<Added, added>) {
    for_each_block<T, added>(p, cut, executor,
                             [&](Block<T> k, int64_t o, int64_t at, const Plus<T>& plus, int64_t sum_a, int64_t sum_b) {
                               k.grad = g.grad_y.data + o * g.grad_y.stride + at;
                               k.grad_a = g.grad_x + o * 2 * half + at;
                               k.grad_b = k.grad_a + half;
                               if constexpr (added == Added::each) {
                                 if (o % cut.group % cut.per_part == 0) {  // the first row of a part
                                   for (int64_t i = 0; i < k.n; ++i) sums[sum_a + i] = sums[sum_b + i] = T(0);
                                 }
                               }
                               backward_block<T, linear, added>(k, plus, sums + sum_a, sums + sum_b);
                             });
  });
  if (cut.added != Added::nothing && (g.grad_bias != nullptr || g.grad_rows != nullptr)) finish(g, cut, sums, executor);
}

template <class T>
size_t backward_workspace(const GateBackward<T>& g, int) {
  const Gate<T>& p = g.forward;
  if (p.outer * p.channels * p.inner == 0) return 0;
  return static_cast<size_t>(Cut<T>(p).sums()) * sizeof(T);
}

// Calls block(row, place in it, n) for all blocks of x: some short rows at a time, or a part of a long one.
template <class T, class F>
void for_each_stretch(const ConcatElu<T>& p, const Executor& executor, F&& block) {
  const int64_t width = p.channels * p.inner;
  if (p.outer * width == 0) return;
  const int64_t blocks = ceil_div(width, kBlock), rows = ceil_div(kBlock, width);
  parallel_ranges(executor, ceil_div(p.outer, rows) * blocks,
                  ceil_div(kThreadBlocks * kBlock, minimum(kBlock, rows * width)), [&](int64_t begin, int64_t end) {
                    for (int64_t u = begin; u < end; ++u) {
                      const int64_t part = u / blocks, at = (u - part * blocks) * kBlock;
                      const int64_t first = part * rows, last = minimum(first + rows, p.outer);
                      for (int64_t o = first; o < last; ++o) block(o, at, minimum(kBlock, width - at));
                    }
                  });
}

template <class T>
void elu_forward(const ConcatElu<T>& p, char*, const Executor& executor) {
  const int64_t width = p.channels * p.inner;
  for_each_stretch(p, executor, [&](int64_t o, int64_t at, int64_t n) {
    const T* from = p.x.data + o * p.x.stride + at;
    T *first = p.y + 2 * o * width + at, *second = first + width;
    const auto step = [&]<bool tail>(int64_t i, std::bool_constant<tail>) {
      will_read(from + i);
      will_write(first + i);
      will_write(second + i);
      const Vec<T> x = load_some<T, tail>(from + i, n - i);
      const Vec<T> below = Decay<T>(minus_magnitude<T>(x)).expm1;
      store_some<T, tail>(first + i, x > 0 ? x : below, n - i);
      store_some<T, tail>(second + i, x > 0 ? below : -x, n - i);
    };
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) step(i, std::false_type{});
    if (i < n) step(i, std::true_type{});
  });
}

template <class T>
void elu_backward(const ConcatEluBackward<T>& g, char*, const Executor& executor) {
  const ConcatElu<T>& p = g.forward;
  const int64_t width = p.channels * p.inner;
  for_each_stretch(p, executor, [&](int64_t o, int64_t at, int64_t n) {
    const T *from = p.x.data + o * p.x.stride + at, *first = g.grad_y.data + o * g.grad_y.stride + at;
    const T* second = first + width;
    T* to = g.grad_x + o * width + at;
    const auto step = [&]<bool tail>(int64_t i, std::bool_constant<tail>) {
      const int64_t left = n - i;
      will_read(from + i);
      will_read(first + i);
      will_read(second + i);
      will_write(to + i);
      const Vec<T> x = load_some<T, tail>(from + i, left);
      const Vec<T> decay = Decay<T>(minus_magnitude<T>(x)).exp, one = broadcast(T(1));
      const Vec<T> up = load_some<T, tail>(first + i, left), down = load_some<T, tail>(second + i, left);
      store_some<T, tail>(to + i, up * (x > 0 ? one : decay) - down * (x > 0 ? decay : one), left);
    };
    int64_t i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) step(i, std::false_type{});
    if (i < n) step(i, std::true_type{});
  });
}

template <class A>
size_t no_workspace(const A&, int) {
  return 0;
}

}  // namespace

template <class T>
KernelOf<Gate<T>> gate_kernel() {
  return {&no_workspace<Gate<T>>, &forward<T>};
}
template <class T>
KernelOf<GateBackward<T>> gate_backward_kernel() {
  return {&backward_workspace<T>, &backward<T>};
}
template <class T>
KernelOf<ConcatElu<T>> concat_elu_kernel() {
  return {&no_workspace<ConcatElu<T>>, &elu_forward<T>};
}
template <class T>
KernelOf<ConcatEluBackward<T>> concat_elu_backward_kernel() {
  return {&no_workspace<ConcatEluBackward<T>>, &elu_backward<T>};
}
template KernelOf<Gate<float>> gate_kernel<float>();
template KernelOf<Gate<double>> gate_kernel<double>();
template KernelOf<GateBackward<float>> gate_backward_kernel<float>();
template KernelOf<GateBackward<double>> gate_backward_kernel<double>();
template KernelOf<ConcatElu<float>> concat_elu_kernel<float>();
template KernelOf<ConcatElu<double>> concat_elu_kernel<double>();
template KernelOf<ConcatEluBackward<float>> concat_elu_backward_kernel<float>();
template KernelOf<ConcatEluBackward<double>> concat_elu_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

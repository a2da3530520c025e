// Where space is long, a block of a channel's plane at a time. Where it is short (vectors, say), a batch row is one
// stretch of numbers, and so is a tile of several rows, each number with its own scale and shift.
#include "flow/actnorm.h"

#include "common/math_simd.h"
#include "common/rows.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kShort = 16;  // space below which rows are stretches
constexpr int64_t kTile = 512;  // least numbers of a tile
constexpr int64_t kParts = 32;  // at most so many parts of a batch have sums of their own

// How the work is cut, by the sizes alone.
struct Cut {
  bool planes;
  int64_t blocks;           // of a plane
  int64_t rows;             // of a tile
  int64_t tiles;            // rounded up
  int64_t parts, per_part;  // tiles are summed in parts

  template <class T>
  explicit Cut(const Actnorm<T>& p) {
    const int64_t row = p.channels * p.space;
    planes = p.space >= kShort;
    blocks = ceil_div(p.space, kBlock);
    rows = ceil_div(kTile, row);
    if (p.stride != row) rows = 1;
    tiles = ceil_div(p.batch, rows);
    per_part = maximum(ceil_div(tiles, kParts), ceil_div(kThreadBlocks * kBlock, rows * row));
    parts = ceil_div(tiles, per_part);
  }
  int64_t sums(int64_t row) const { return rows * row; }
};

// Of each channel: e^(+-log_scale / 2), which is taken twice so that products are right wherever they are numbers; and
// +-bias.
template <class T>
struct Affine {
  T *half, *shift;

  // In workspace: one number for each channel, or for each of `count` elements of a tile.
  Affine(const Actnorm<T>& p, const Cut& cut, T* at, int64_t count) : half(at), shift(at + count) {
    const T sign = p.inverse ? T(-1) : T(1);
    const int64_t space = cut.planes ? 1 : p.space, row = p.channels * space;
    for (int64_t c = 0; c < p.channels; ++c) {
      const T h = finite_exp<T>(broadcast(T(0.5) * sign * p.log_scale[c]))[0], t = sign * p.bias[c];
      for (int64_t i = c * space; i < (c + 1) * space; ++i) {
        half[i] = h;
        shift[i] = t;
      }
    }
    for (int64_t i = row; i < count; ++i) {
      half[i] = half[i - row];
      shift[i] = shift[i - row];
    }
  }
  static int64_t count(const Actnorm<T>& p, const Cut& cut) {
    return cut.planes ? p.channels : cut.sums(p.channels * p.space);
  }
  static size_t bytes(const Actnorm<T>& p, const Cut& cut) {
    return (static_cast<size_t>(2 * count(p, cut)) * sizeof(T) + 63) / 64 * 64;
  }
};

// Half and shift of each of n elements, or of all of them where `each` is false.
template <class T, bool each>
inline void forward_block(const T* x, const T* half, const T* shift, bool first, int64_t n, T* y) {
  const Vec<T> half_of_all = broadcast(half[0]), shift_of_all = broadcast(shift[0]);
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t left = n - i;
    const Vec<T> h = each ? load_upto(half + i, left) : half_of_all,
                 t = each ? load_upto(shift + i, left) : shift_of_all;
    const Vec<T> v = load_upto(x + i, left);
    store_upto(y + i, first ? (v + t) * h * h : v * h * h + t, left);
  }
}

template <class T>
void forward(const Actnorm<T>& p, char* workspace, const Executor& executor) {
  const Cut cut(p);
  const Affine<T> affine(p, cut, reinterpret_cast<T*>(workspace), Affine<T>::count(p, cut));
  const bool first = p.add_first != p.inverse;
  const int64_t row = p.channels * p.space;
  if (cut.planes) {
    const int64_t units = p.batch * p.channels * cut.blocks;
    parallel_ranges(
        executor, units, ceil_div(kThreadBlocks * cut.blocks * kBlock, p.space), [&](int64_t begin, int64_t end) {
          for (int64_t u = begin; u < end; ++u) {
            const int64_t plane = u / cut.blocks, at = (u - plane * cut.blocks) * kBlock;
            const int64_t b = plane / p.channels, c = plane - b * p.channels;
            forward_block<T, false>(p.x + b * p.stride + c * p.space + at, affine.half + c, affine.shift + c, first,
                                    minimum(kBlock, p.space - at), p.y + plane * p.space + at);
          }
        });
  } else {
    parallel_ranges(executor, cut.tiles, ceil_div(kThreadBlocks * kBlock, cut.rows * row),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t tile = begin; tile < end; ++tile) {
                        const int64_t b = tile * cut.rows, n = minimum(cut.rows, p.batch - b) * row;
                        forward_block<T, true>(p.x + b * p.stride, affine.half, affine.shift, first, n, p.y + b * row);
                      }
                    });
  }
  double log = 0;
  for (int64_t c = 0; c < p.channels; ++c) log += static_cast<double>(p.log_scale[c]);
  const T all = static_cast<T>((p.inverse ? -log : log) * static_cast<double>(p.space));
  for (int64_t b = 0; b < p.batch; ++b) p.log_abs_det[b] = all;
}

// Adds the gradient of y, and its product with what is scaled, to sums of one pair for all n elements.
template <class T>
inline void backward_plane(const T* x, const T* grad, T half_, T shift, bool first, int64_t n, T* grad_x,
                           double* sums) {
  const Vec<T> half = broadcast(half_), plus = broadcast(first ? shift : T(0));
  Vec<T> by_shift{}, by_scale{};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t left = n - i;
    const Vec<T> g = load_upto(grad + i, left), v = load_upto(x + i, left) + plus;
    if (grad_x != nullptr) store_upto(grad_x + i, g * half * half, left);
    by_shift += g;
    by_scale += keep_first<T>(g * v, left);
  }
  sums[0] = static_cast<double>(sum<T>(by_shift));
  sums[1] = static_cast<double>(sum<T>(by_scale));
}

// The same for a tile, of a pair for each of its elements.
template <class T>
inline void backward_tile(const T* x, const T* grad, const T* half, const T* shift, bool first, int64_t n, T* grad_x,
                          double* __restrict__ by_shift, double* __restrict__ by_scale) {
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t left = n - i;
    const Vec<T> g = load_upto(grad + i, left), h = load_upto(half + i, left);
    if (grad_x != nullptr) store_upto(grad_x + i, g * h * h, left);
  }
  for (int64_t i = 0; i < n; ++i) {
    by_shift[i] += static_cast<double>(grad[i]);
    by_scale[i] += static_cast<double>(grad[i] * (first ? x[i] + shift[i] : x[i]));
  }
}

template <class T>
void backward(const ActnormBackward<T>& g, char* workspace, const Executor& executor) {
  const Actnorm<T>& p = g.forward;
  const Cut cut(p);
  const Affine<T> affine(p, cut, reinterpret_cast<T*>(workspace), Affine<T>::count(p, cut));
  auto* partial = reinterpret_cast<double*>(workspace + Affine<T>::bytes(p, cut));
  const bool first = p.add_first != p.inverse;
  const int64_t row = p.channels * p.space, tile_size = cut.sums(row);
  if (g.grad_y != nullptr && cut.planes) {
    const int64_t units = p.batch * p.channels * cut.blocks;
    parallel_ranges(executor, units, ceil_div(kThreadBlocks * cut.blocks * kBlock, p.space),
                    [&](int64_t begin, int64_t end) {
                      for (int64_t u = begin; u < end; ++u) {
                        const int64_t plane = u / cut.blocks, at = (u - plane * cut.blocks) * kBlock;
                        const int64_t b = plane / p.channels, c = plane - b * p.channels, to = plane * p.space + at;
                        backward_plane(p.x + b * p.stride + c * p.space + at, g.grad_y + to, affine.half[c],
                                       affine.shift[c], first, minimum(kBlock, p.space - at),
                                       g.grad_x != nullptr ? g.grad_x + to : nullptr, partial + 2 * u);
                      }
                    });
  } else if (g.grad_y != nullptr) {
    parallel_ranges(executor, cut.parts, 1, [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        double *by_shift = partial + part * 2 * tile_size, *by_scale = by_shift + tile_size;
        for (int64_t i = 0; i < 2 * tile_size; ++i) by_shift[i] = 0;
        const int64_t last = minimum((part + 1) * cut.per_part, cut.tiles);
        for (int64_t tile = part * cut.per_part; tile < last; ++tile) {
          const int64_t b = tile * cut.rows, n = minimum(cut.rows, p.batch - b) * row;
          backward_tile(p.x + b * p.stride, g.grad_y + b * row, affine.half, affine.shift, first, n,
                        g.grad_x != nullptr ? g.grad_x + b * row : nullptr, by_shift, by_scale);
        }
      }
    });
  } else if (g.grad_x != nullptr) {
    for (int64_t i = 0; i < p.batch * row; ++i) g.grad_x[i] = 0;
  }
  if (g.grad_log_scale == nullptr && g.grad_bias == nullptr) return;
  double logs = 0;
  if (g.grad_log_abs_det != nullptr) {
    for (int64_t b = 0; b < p.batch; ++b) logs += static_cast<double>(g.grad_log_abs_det[b]);
  }
  const double sign = p.inverse ? -1 : 1;
  for (int64_t c = 0; c < p.channels; ++c) {
    double by_shift = 0, by_scale = 0;
    if (g.grad_y != nullptr && cut.planes) {
      for (int64_t b = 0; b < p.batch; ++b) {
        const double* of = partial + 2 * (b * p.channels + c) * cut.blocks;
        for (int64_t k = 0; k < cut.blocks; ++k) {
          by_shift += of[2 * k];
          by_scale += of[2 * k + 1];
        }
      }
    } else if (g.grad_y != nullptr) {
      for (int64_t part = 0; part < cut.parts; ++part) {
        for (int64_t r = 0; r < cut.rows; ++r) {
          const double* of = partial + part * 2 * tile_size + r * row + c * p.space;
          for (int64_t s = 0; s < p.space; ++s) {
            by_shift += of[s];
            by_scale += of[tile_size + s];
          }
        }
      }
    }
    const double half = static_cast<double>(affine.half[cut.planes ? c : c * p.space]);
    if (g.grad_bias != nullptr) g.grad_bias[c] = static_cast<T>(sign * (first ? by_shift * half * half : by_shift));
    if (g.grad_log_scale != nullptr) {
      g.grad_log_scale[c] = static_cast<T>(sign * (by_scale * half * half + static_cast<double>(p.space) * logs));
    }
  }
}

template <class T>
size_t backward_workspace(const ActnormBackward<T>& g, int) {
  const Actnorm<T>& p = g.forward;
  const Cut cut(p);
  const int64_t sums = cut.planes ? p.batch * p.channels * cut.blocks : cut.parts * cut.sums(p.channels * p.space);
  return Affine<T>::bytes(p, cut) + static_cast<size_t>(2 * sums) * sizeof(double);
}

}  // namespace

template <class T>
KernelOf<Actnorm<T>> actnorm_kernel() {
  return {[](const Actnorm<T>& p, int) { return Affine<T>::bytes(p, Cut(p)); }, &forward<T>};
}
template <class T>
KernelOf<ActnormBackward<T>> actnorm_backward_kernel() {
  return {&backward_workspace<T>, &backward<T>};
}
template KernelOf<Actnorm<float>> actnorm_kernel<float>();
template KernelOf<Actnorm<double>> actnorm_kernel<double>();
template KernelOf<ActnormBackward<float>> actnorm_backward_kernel<float>();
template KernelOf<ActnormBackward<double>> actnorm_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

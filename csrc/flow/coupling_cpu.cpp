// One pass over x, the parameters and y; nothing in between is kept but ln s summed over each block.
//
// A block is up to kBlock elements of the transformed channels. Where a row's channels follow each other in every
// tensor, or space is long, a block is a stretch of memory. Otherwise (vectors whose parameters are interleaved, lists
// of channels, rows of a few elements) it is gathered into L1 first, of as many rows as it holds.
#include "flow/coupling.h"

#include <limits>

#include "common/math_simd.h"
#include "common/rows.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

// ---- the formulas
// ----------------------------------------------------------------------------------------------------

// s, or 1 / s of the inverse, is a b: two factors, so that x a b is right wherever it is a number.
template <class T>
struct Factors {
  Vec<T> a, b;
  Vec<T> log;    // ln s
  Vec<T> slope;  // and its derivative by the raw scale

  GENFUSE_HD Vec<T> times(Vec<T> x) const { return x * a * b; }
};

template <class T>
GENFUSE_HD void set_exponential(Factors<T>& f, const Coupling<T>& p) {
  f.a = f.b = finite_exp<T>((p.inverse ? T(-0.5) : T(0.5)) * f.log);
}

template <ScaleKind kind, class T>
GENFUSE_HD Factors<T> sigmoid_factors(const Coupling<T>& p, Vec<T> raw) {
  constexpr bool reciprocal = kind == ScaleKind::inverse_sigmoid;
  const Vec<T> one = broadcast(T(1)), z = raw + p.offset;
  const VecInt<T> below = z < 0;
  const Vec<T> distance = below ? -z : z;
  Factors<T> f;
  f.b = one;
  if (kind == ScaleKind::sigmoid && p.eps > 0) {
    const Vec<T> u = exp_wide<T>(-distance), half = one / (one + u), s = (below ? u : one) * half + p.eps;
    f.a = p.inverse ? one / s : s;
    f.log = log_wide(s);
    f.slope = u * half * half / s;
    return f;
  }
  Vec<T> u;
  if (reciprocal == p.inverse) {
    u = exp_wide<T>(-distance);
    f.a = (below ? u : one) / (one + u);
  } else {  // 1 + e^-z; where that is large, e^(-z/2) (e^(-z/2) (1 + e^z))
    const Vec<T> root = exp_wide<T>(T(-0.5) * distance);
    u = root * root;
    f.a = below ? within(one / root, T(0), std::numeric_limits<T>::max()) : one;
    f.b = f.a * (one + u);
  }
  f.log = log_sigmoid<T>(z, u);
  f.slope = (below ? one : u) / (one + u);
  if (reciprocal) {
    f.log = -f.log;
    f.slope = -f.slope;
  }
  return f;
}

template <class T>
GENFUSE_HD Factors<T> softplus_factors(const Coupling<T>& p, Vec<T> raw) {
  const Vec<T> one = broadcast(T(1)), zero{};
  const VecInt<T> below = raw < 0;
  const Vec<T> u = exp_wide<T>(below ? raw : -raw);
  const Vec<T> softplus = (below ? zero : raw) + log1p_unit(u), sigmoid = (below ? u : one) / (one + u);
  Factors<T> f;
  if (p.eps > 0) {
    Vec<T> s = softplus + p.eps;
    const VecInt<T> over = s > p.clamp;
    s = over ? broadcast(p.clamp) : s;
    f.a = p.inverse ? one / s : s;
    f.b = one;
    f.log = log_wide(s);
    f.slope = over ? zero : sigmoid / s;
  } else {  // softplus may vanish; ln softplus(r) = r - e^r / 2 + ...
    const VecInt<T> small = raw < T(-20);
    f.log = small ? raw - T(0.5) * u : log_wide(small ? one : softplus);
    const VecInt<T> over = f.log > p.low;
    f.log = over ? broadcast(p.low) : f.log;
    f.slope = over ? zero : (small ? one - T(0.5) * u : sigmoid / (small ? one : softplus));
    set_exponential(f, p);
  }
  return f;
}

template <ScaleKind kind, class T>
GENFUSE_HD Factors<T> factors_of(const Coupling<T>& p, Vec<T> raw) {
  const Vec<T> one = broadcast(T(1));
  if constexpr (kind == ScaleKind::sigmoid || kind == ScaleKind::inverse_sigmoid) {
    return sigmoid_factors<kind>(p, raw);
  } else if constexpr (kind == ScaleKind::softplus) {
    return softplus_factors(p, raw);
  } else {
    Factors<T> f;
    if constexpr (kind == ScaleKind::none) return {one, one, Vec<T>{}, Vec<T>{}};
    if constexpr (kind == ScaleKind::exp) {
      f.log = raw;
      f.slope = one;
    } else if constexpr (kind == ScaleKind::tanh || kind == ScaleKind::sigmoid_clamp) {
      constexpr T inner = kind == ScaleKind::tanh ? T(1) : T(0.5);  // 2 sigmoid(r) - 1 = tanh(r / 2)
      const Vec<T> t = tanh(inner * raw);
      f.log = p.clamp * t;
      f.slope = p.clamp * inner * (one - t * t);
    } else if constexpr (kind == ScaleKind::atan) {
      const T factor = p.clamp * static_cast<T>(0.636);
      f.log = factor * atan(raw);
      f.slope = factor / (one + raw * raw);
    } else if constexpr (kind == ScaleKind::softclip) {
      const Vec<T> ratio = one / (one + (raw < 0 ? -raw : raw) / p.clamp);
      f.log = raw * ratio;
      f.slope = ratio * ratio;
    } else {
      f.log = within(raw, p.low, p.clamp);
      f.slope = one;
    }
    set_exponential(f, p);
    return f;
  }
}

// Lanes whose byte is not 0.
template <class T>
GENFUSE_HD VecInt<T> load_mask(const uint8_t* mask, int64_t n) {
  typedef uint8_t Bytes __attribute__((vector_size(kLanes<T>)));
  Bytes bytes{};
  if (n >= kLanes<T>) {
    std::memcpy(&bytes, mask, kLanes<T>);
  } else {
    for (int64_t i = 0; i < n; ++i) reinterpret_cast<uint8_t*>(&bytes)[i] = mask[i];
  }
  return __builtin_convertvector(bytes, VecInt<T>) != 0;
}

// ---- a block
// ---------------------------------------------------------------------------------------------------------

// n elements in a stretch. Null: raw of ScaleKind::none, a mask of ones, what is not wanted.
template <class T>
struct Block {
  const T *x, *raw, *shift;
  const uint8_t* mask;
  T *y, *each;
};

// Returns the sum of ln |dy/dx|.
template <ScaleKind kind, class T>
inline double forward_block(const Coupling<T>& p, const Block<T>& block, int64_t n) {
  const bool first = p.add_first != p.inverse;
  const T sign = p.inverse ? T(-1) : T(1);
  Vec<T> sum{};
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t left = n - i;
    const Vec<T> x = load_upto(block.x + i, left), shift = sign * load_upto(block.shift + i, left);
    const Vec<T> raw = kind == ScaleKind::none ? Vec<T>{} : load_upto(block.raw + i, left);
    const Factors<T> f = factors_of<kind>(p, raw);
    Vec<T> y = first ? f.times(x + shift) : f.times(x) + shift, log = sign * f.log;
    if (block.mask != nullptr) {
      const VecInt<T> in = load_mask<T>(block.mask + i, left);
      y = in ? y : x;
      log = in ? log : Vec<T>{};
    }
    store_upto(block.y + i, y, left);
    if constexpr (kind == ScaleKind::none) continue;
    if (block.each != nullptr) store_upto(block.each + i, log, left);
    sum += keep_first<T>(log, left);
  }
  return static_cast<double>(genfuse::GENFUSE_ISA::sum<T>(sum));
}

template <class T>
struct BackwardBlock {
  const T *x, *raw, *shift;
  const uint8_t* mask;
  const T *grad_y, *grad_each;  // grad_each[i], or if that is null grad_log for all
  T grad_log;
  T *grad_x, *grad_raw, *grad_shift;
};

template <ScaleKind kind, class T>
inline void backward_block(const Coupling<T>& p, const BackwardBlock<T>& block, int64_t n) {
  const bool first = p.add_first != p.inverse;
  const T sign = p.inverse ? T(-1) : T(1);
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const int64_t left = n - i;
    const Vec<T> grad = block.grad_y != nullptr ? load_upto(block.grad_y + i, left) : Vec<T>{};
    const Vec<T> raw = kind == ScaleKind::none ? Vec<T>{} : load_upto(block.raw + i, left);
    const Factors<T> f = factors_of<kind>(p, raw);
    Vec<T> grad_x = f.times(grad), grad_shift = sign * (first ? grad_x : grad), grad_raw{};
    if constexpr (kind != ScaleKind::none) {
      if (block.grad_raw != nullptr) {
        const Vec<T> grad_log =
            block.grad_each != nullptr ? load_upto(block.grad_each + i, left) : broadcast(block.grad_log);
        Vec<T> x = load_upto(block.x + i, left);
        if (first) x += sign * load_upto(block.shift + i, left);
        grad_raw = sign * f.slope * (f.times(grad * x) + grad_log);
      }
    }
    if (block.mask != nullptr) {
      const VecInt<T> in = load_mask<T>(block.mask + i, left);
      grad_x = in ? grad_x : grad;
      grad_shift = in ? grad_shift : Vec<T>{};
      grad_raw = in ? grad_raw : Vec<T>{};
    }
    if (block.grad_x != nullptr) store_upto(block.grad_x + i, grad_x, left);
    if (block.grad_shift != nullptr) store_upto(block.grad_shift + i, grad_shift, left);
    if (block.grad_raw != nullptr) store_upto(block.grad_raw + i, grad_raw, left);
  }
}

// ---- where blocks are
// ------------------------------------------------------------------------------------------------

// How the work is cut, by the sizes alone.
struct Cut {
  bool in_place;
  int64_t row;           // transformed elements of a batch row
  int64_t run;           // of which so many lie together (in place), in `runs`
  int64_t runs, blocks;  // and a run is so many blocks
  int64_t group;         // or so many rows are gathered into a block, or one row into `blocks`
  int64_t units;         // of work, of a row (in place; those that copy included) or of all
  int64_t copies;        // of them those that copy

  template <class T>
  explicit Cut(const Coupling<T>& p) {
    row = p.moved * p.space;
    const bool together = p.moved <= 1 || (p.x.channel.together() && p.shift.channel.together() &&
                                           (p.raw.data == nullptr || p.raw.channel.together()));
    run = together ? row : p.space;
    runs = together ? 1 : p.moved;
    in_place = row == 0 || run >= 16;
    if (in_place) {
      if (row == 0) runs = 0;
      group = 1;
      blocks = ceil_div(run, kBlock);
      copies = p.kept == nullptr ? pieces(p.x.channel.first * p.space) + pieces(after(p) * p.space)
                                 : (p.channels - p.moved) * pieces(p.space);
      units = runs * blocks + copies;
    } else {
      copies = 0;
      group = maximum(1, kBlock / row);
      blocks = ceil_div(row, kBlock);
      units = ceil_div(p.batch, group) * blocks;
    }
  }

  static constexpr int64_t kPiece = 4 * kBlock;  // of a copy
  static int64_t pieces(int64_t n) { return ceil_div(n, kPiece); }
  template <class T>
  static int64_t after(const Coupling<T>& p) {
    return p.channels - p.moved - p.x.channel.first;
  }
  int64_t sums() const { return in_place ? runs * blocks : blocks; }  // of a row
};

template <class T>
inline void copy_or_clear(const T* from, int64_t n, T* to) {
  if (n <= 0) return;
  if (from != nullptr) {
    std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
  } else {
    std::memset(to, 0, static_cast<size_t>(n) * sizeof(T));
  }
}

// Piece k of a row's channels that are not transformed: in `to`, from `from` or zeros.
template <class T>
inline void copy_piece(const Coupling<T>& p, int64_t k, const T* from, T* to) {
  int64_t start, length;
  if (p.kept == nullptr) {
    start = 0;
    length = p.x.channel.first * p.space;
    if (k >= Cut::pieces(length)) {
      k -= Cut::pieces(length);
      start = (p.x.channel.first + p.moved) * p.space;
      length = Cut::after(p) * p.space;
    }
  } else {
    const int64_t each = Cut::pieces(p.space);
    start = p.kept[k / each] * p.space;
    length = p.space;
    k %= each;
  }
  const int64_t at = k * Cut::kPiece;
  copy_or_clear(from != nullptr ? from + start + at : nullptr, minimum(Cut::kPiece, length - at), to + start + at);
}

// Some rows of a tensor.
template <class T>
struct Rows {
  T* data;
  int64_t stride, count;
};

// Calls visit(i, offset) for elements [begin, begin + n) of some channels: the i-th is at offset in its row.
template <class F>
inline void walk(const ChannelMap& channel, int64_t space, int64_t begin, int64_t n, F&& visit) {
  if (space == 1) {
    for (int64_t i = 0; i < n; ++i) visit(i, channel[begin + i]);
    return;
  }
  int64_t j = begin / space, s = begin - j * space;
  for (int64_t i = 0; i < n; ++j, s = 0) {
    const int64_t count = minimum(space - s, n - i), at = channel[j] * space + s;
    for (int64_t k = 0; k < count; ++k) visit(i + k, at + k);
    i += count;
  }
}
// The same of several rows: visit(row, i, offset). Short rows are the inner loop: a loop of two elements costs more to
// begin than to run.
template <class F>
inline void walk_rows(const ChannelMap& channel, int64_t space, int64_t begin, int64_t n, int64_t rows, F&& visit) {
  if (channel.together() && n >= 8) {
    const int64_t at = channel.first * space + begin;
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t i = 0; i < n; ++i) visit(r, i, at + i);
    }
  } else {
    walk(channel, space, begin, n, [&](int64_t i, int64_t at) {
      for (int64_t r = 0; r < rows; ++r) visit(r, i, at);
    });
  }
}
// To and from a block [rows][n].
template <class T>
inline void gather(Rows<const T> from, const ChannelMap& channel, int64_t space, int64_t begin, int64_t n, T* to) {
  walk_rows(channel, space, begin, n, from.count,
            [&](int64_t r, int64_t i, int64_t at) { to[r * n + i] = from.data[r * from.stride + at]; });
}
template <class T>
inline void scatter(const T* from, const ChannelMap& channel, int64_t space, int64_t begin, int64_t n, Rows<T> to) {
  walk_rows(channel, space, begin, n, to.count,
            [&](int64_t r, int64_t i, int64_t at) { to.data[r * to.stride + at] = from[r * n + i]; });
}

// All that is not transformed; `from` without data for zeros.
template <class T>
inline void copy_kept(const Coupling<T>& p, Rows<const T> from, Rows<T> to) {
  const auto copy = [&](const ChannelMap& channel, int64_t count) {
    if (from.data == nullptr) {
      walk_rows(channel, p.space, 0, count * p.space, to.count,
                [&](int64_t r, int64_t, int64_t at) { to.data[r * to.stride + at] = T(0); });
    } else {
      walk_rows(channel, p.space, 0, count * p.space, to.count,
                [&](int64_t r, int64_t, int64_t at) { to.data[r * to.stride + at] = from.data[r * from.stride + at]; });
    }
  };
  if (p.kept != nullptr) {
    copy({0, 1, p.kept}, p.channels - p.moved);
  } else {
    copy({0, 1}, p.x.channel.first);
    copy({p.x.channel.first + p.moved, 1}, Cut::after(p));
  }
}

// ln |det| of rows from the sums of their blocks, which come in any order.
template <class T>
struct BlockSums {
  T* out;
  double* partial;  // [batch][count]
  int64_t count;

  void put(int64_t b, int64_t k, double sum) const {
    if (out == nullptr) return;
    if (count == 1) {
      out[b] = static_cast<T>(sum);
    } else {
      partial[b * count + k] = sum;
    }
  }
  void finish(int64_t batch) const {
    if (out == nullptr || count == 1) return;
    for (int64_t b = 0; b < batch; ++b) {
      double total = 0;
      for (int64_t k = 0; k < count; ++k) total += partial[b * count + k];
      out[b] = static_cast<T>(total);
    }
  }
};

// Calls unit(b, k) for every unit k of every row b (in place), or unit(0, k) for every unit (gathered).
template <class T, class F>
inline void for_units(const Coupling<T>& p, const Cut& cut, const Executor& executor, F&& unit) {
  const int64_t rows = cut.in_place ? p.batch : 1, total = rows * cut.units;
  const int64_t elements = maximum(1, p.batch * p.channels * p.space);
  const int64_t least = ceil_div(kThreadBlocks * kBlock * total, elements);
  parallel_ranges(executor, total, least, [&](int64_t first, int64_t last) {
    int64_t b = first / cut.units, k = first - b * cut.units;
    for (int64_t u = first; u < last; ++u) {
      unit(b, k);
      if (++k == cut.units) {
        k = 0;
        ++b;
      }
    }
  });
}

// The mask of a gathered block of rows: that of a row, repeated.
inline const uint8_t* repeat_mask(const uint8_t* mask, int64_t n, int64_t rows, uint8_t* buffer) {
  if (mask == nullptr || rows == 1) return mask;
  for (int64_t r = 0; r < rows; ++r) std::memcpy(buffer + r * n, mask, static_cast<size_t>(n));
  return buffer;
}

// ---- forward
// ---------------------------------------------------------------------------------------------------------

template <ScaleKind kind, class T>
void forward_of(const Coupling<T>& p, char* workspace, const Executor& executor) {
  const Cut cut(p);
  const int64_t whole = p.channels * p.space;
  const BlockSums<T> sums{p.log_abs_det, reinterpret_cast<double*>(workspace), cut.sums()};
  if (cut.in_place) {
    for_units(p, cut, executor, [&](int64_t b, int64_t k) {
      const T* x = p.x.data + b * p.x.stride;
      const int64_t copied = k - cut.runs * cut.blocks;
      if (copied >= 0) {
        copy_piece(p, copied, x, p.y + b * whole);
        if (p.each != nullptr) copy_piece<T>(p, copied, nullptr, p.each + b * whole);
        return;
      }
      const int64_t j = k / cut.blocks, at = (k - j * cut.blocks) * kBlock, n = minimum(kBlock, cut.run - at);
      const int64_t in_x = p.x.channel[j] * p.space + at;
      const Block<T> block{
          x + in_x,
          kind == ScaleKind::none ? nullptr : p.raw.data + b * p.raw.stride + p.raw.channel[j] * p.space + at,
          p.shift.data + b * p.shift.stride + p.shift.channel[j] * p.space + at,
          p.mask != nullptr ? p.mask + in_x : nullptr,
          p.y + b * whole + in_x,
          p.each != nullptr ? p.each + b * whole + in_x : nullptr};
      sums.put(b, k, forward_block<kind>(p, block, n));
    });
  } else {
    for_units(p, cut, executor, [&](int64_t, int64_t k) {
      alignas(64) T x[kBlock], raw[kBlock], shift[kBlock], each[kBlock];
      uint8_t mask[kBlock];
      const int64_t first = k / cut.blocks * cut.group, rows = minimum(cut.group, p.batch - first);
      const int64_t part = k % cut.blocks, at = part * kBlock, n = minimum(kBlock, cut.row - at);
      const auto read = [&](const CouplingInput<T>& from, T* to) {
        gather<T>({from.data + first * from.stride, from.stride, rows}, from.channel, p.space, at, n, to);
      };
      const Rows<T> y{p.y + first * whole, whole, rows};
      const Rows<T> to_each{p.each != nullptr ? p.each + first * whole : nullptr, whole, rows};
      read(p.x, x);
      read(p.shift, shift);
      if constexpr (kind != ScaleKind::none) read(p.raw, raw);
      if (part == 0) {
        copy_kept<T>(p, {p.x.data + first * p.x.stride, p.x.stride, rows}, y);
        if (p.each != nullptr) copy_kept<T>(p, {nullptr, 0, rows}, to_each);
      }
      const uint8_t* moved = p.mask != nullptr ? repeat_mask(p.mask + at, n, rows, mask) : nullptr;
      const double sum = forward_block<kind>(p, Block<T>{x, raw, shift, moved, x, each}, rows * n);
      scatter<T>(x, p.x.channel, p.space, at, n, y);
      if constexpr (kind == ScaleKind::none) return;
      if (p.each != nullptr) scatter<T>(each, p.x.channel, p.space, at, n, to_each);
      if (p.log_abs_det == nullptr) return;
      for (int64_t r = 0; r < rows; ++r) {
        double own = sum;
        if (rows > 1) {
          own = 0;
          for (int64_t i = 0; i < n; ++i) own += static_cast<double>(each[r * n + i]);
        }
        sums.put(first + r, part, own);
      }
    });
  }
  sums.finish(p.batch);
}

// ---- backward
// --------------------------------------------------------------------------------------------------------

template <ScaleKind kind, class T>
void backward_of(const CouplingBackward<T>& g, char*, const Executor& executor) {
  const Coupling<T>& p = g.forward;
  const Cut cut(p);
  const int64_t whole = p.channels * p.space;
  const bool needs_shift = p.add_first != p.inverse;
  const auto shifted = [](auto* pointer, int64_t by) { return pointer != nullptr ? pointer + by : nullptr; };
  if (cut.in_place) {
    for_units(p, cut, executor, [&](int64_t b, int64_t k) {
      const int64_t copied = k - cut.runs * cut.blocks;
      if (copied >= 0) {
        if (g.grad_x != nullptr) copy_piece(p, copied, shifted(g.grad_y, b * whole), g.grad_x + b * whole);
        return;
      }
      const int64_t j = k / cut.blocks, at = (k - j * cut.blocks) * kBlock, n = minimum(kBlock, cut.run - at);
      const int64_t in_x = p.x.channel[j] * p.space + at, in_shift = p.shift.channel[j] * p.space + at;
      const int64_t in_raw = kind == ScaleKind::none ? 0 : p.raw.channel[j] * p.space + at;
      const BackwardBlock<T> block{shifted(p.x.data, b * p.x.stride + in_x),
                                   shifted(p.raw.data, b * p.raw.stride + in_raw),
                                   shifted(p.shift.data, b * p.shift.stride + in_shift),
                                   shifted(p.mask, in_x),
                                   shifted(g.grad_y, b * whole + in_x),
                                   shifted(g.grad_each, b * whole + in_x),
                                   g.grad_log_abs_det != nullptr ? g.grad_log_abs_det[b] : T(0),
                                   shifted(g.grad_x, b * whole + in_x),
                                   shifted(g.grad_raw, b * g.raw_stride + in_raw),
                                   shifted(g.grad_shift, b * g.shift_stride + in_shift)};
      backward_block<kind>(p, block, n);
    });
  } else {
    for_units(p, cut, executor, [&](int64_t, int64_t k) {
      alignas(64) T x[kBlock], raw[kBlock], shift[kBlock], grad[kBlock], each[kBlock];
      alignas(64) T to_x[kBlock], to_raw[kBlock], to_shift[kBlock];
      uint8_t mask[kBlock];
      const int64_t first = k / cut.blocks * cut.group, rows = minimum(cut.group, p.batch - first);
      const int64_t part = k % cut.blocks, at = part * kBlock, n = minimum(kBlock, cut.row - at);
      const bool logs = g.grad_log_abs_det != nullptr || g.grad_each != nullptr;
      const auto read = [&](const CouplingInput<T>& from, T* to) {
        gather<T>({from.data + first * from.stride, from.stride, rows}, from.channel, p.space, at, n, to);
      };
      const auto read_dense = [&](const T* from, T* to) {
        if (from != nullptr) gather<T>({from + first * whole, whole, rows}, p.x.channel, p.space, at, n, to);
      };
      read(p.x, x);
      if (needs_shift) read(p.shift, shift);
      if constexpr (kind != ScaleKind::none) read(p.raw, raw);
      read_dense(g.grad_y, grad);
      read_dense(g.grad_each, each);
      if (g.grad_log_abs_det != nullptr) {
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t i = 0; i < n; ++i) each[r * n + i] = g.grad_log_abs_det[first + r];
        }
      }
      if (part == 0 && g.grad_x != nullptr) {
        copy_kept<T>(p, {shifted(g.grad_y, first * whole), whole, rows}, {g.grad_x + first * whole, whole, rows});
      }
      const BackwardBlock<T> block{x,
                                   raw,
                                   shift,
                                   p.mask != nullptr ? repeat_mask(p.mask + at, n, rows, mask) : nullptr,
                                   g.grad_y != nullptr ? grad : nullptr,
                                   logs ? each : nullptr,
                                   T(0),
                                   g.grad_x != nullptr ? to_x : nullptr,
                                   g.grad_raw != nullptr ? to_raw : nullptr,
                                   g.grad_shift != nullptr ? to_shift : nullptr};
      backward_block<kind>(p, block, rows * n);
      const auto write = [&](const T* from, const ChannelMap& channel, T* to, int64_t stride) {
        if (to != nullptr) scatter<T>(from, channel, p.space, at, n, {to + first * stride, stride, rows});
      };
      write(to_x, p.x.channel, g.grad_x, whole);
      write(to_raw, p.raw.channel, g.grad_raw, g.raw_stride);
      write(to_shift, p.shift.channel, g.grad_shift, g.shift_stride);
    });
  }
}

template <class T>
void forward(const Coupling<T>& p, char* workspace, const Executor& executor) {
  switch (p.scale) {
    case ScaleKind::exp:
      return forward_of<ScaleKind::exp>(p, workspace, executor);
    case ScaleKind::sigmoid:
      return forward_of<ScaleKind::sigmoid>(p, workspace, executor);
    case ScaleKind::inverse_sigmoid:
      return forward_of<ScaleKind::inverse_sigmoid>(p, workspace, executor);
    case ScaleKind::softplus:
      return forward_of<ScaleKind::softplus>(p, workspace, executor);
    case ScaleKind::tanh:
      return forward_of<ScaleKind::tanh>(p, workspace, executor);
    case ScaleKind::atan:
      return forward_of<ScaleKind::atan>(p, workspace, executor);
    case ScaleKind::sigmoid_clamp:
      return forward_of<ScaleKind::sigmoid_clamp>(p, workspace, executor);
    case ScaleKind::softclip:
      return forward_of<ScaleKind::softclip>(p, workspace, executor);
    case ScaleKind::clip:
      return forward_of<ScaleKind::clip>(p, workspace, executor);
    case ScaleKind::none:
      return forward_of<ScaleKind::none>(p, workspace, executor);
  }
}

template <class T>
void backward(const CouplingBackward<T>& g, char* workspace, const Executor& executor) {
  switch (g.forward.scale) {
    case ScaleKind::exp:
      return backward_of<ScaleKind::exp>(g, workspace, executor);
    case ScaleKind::sigmoid:
      return backward_of<ScaleKind::sigmoid>(g, workspace, executor);
    case ScaleKind::inverse_sigmoid:
      return backward_of<ScaleKind::inverse_sigmoid>(g, workspace, executor);
    case ScaleKind::softplus:
      return backward_of<ScaleKind::softplus>(g, workspace, executor);
    case ScaleKind::tanh:
      return backward_of<ScaleKind::tanh>(g, workspace, executor);
    case ScaleKind::atan:
      return backward_of<ScaleKind::atan>(g, workspace, executor);
    case ScaleKind::sigmoid_clamp:
      return backward_of<ScaleKind::sigmoid_clamp>(g, workspace, executor);
    case ScaleKind::softclip:
      return backward_of<ScaleKind::softclip>(g, workspace, executor);
    case ScaleKind::clip:
      return backward_of<ScaleKind::clip>(g, workspace, executor);
    case ScaleKind::none:
      return backward_of<ScaleKind::none>(g, workspace, executor);
  }
}

}  // namespace

template <class T>
KernelOf<Coupling<T>> coupling_kernel() {
  return {[](const Coupling<T>& p, int) { return static_cast<size_t>(p.batch * Cut(p).sums()) * sizeof(double); },
          &forward<T>};
}
template <class T>
KernelOf<CouplingBackward<T>> coupling_backward_kernel() {
  return {[](const CouplingBackward<T>&, int) { return size_t{0}; }, &backward<T>};
}
template KernelOf<Coupling<float>> coupling_kernel<float>();
template KernelOf<Coupling<double>> coupling_kernel<double>();
template KernelOf<CouplingBackward<float>> coupling_backward_kernel<float>();
template KernelOf<CouplingBackward<double>> coupling_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

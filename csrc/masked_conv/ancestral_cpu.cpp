// Each thread draws images of its own, a few at a time, so that a column of weights serves all of them. Before a row of
// pixels is drawn, everything that follows from the rows above is computed for the whole row: values of the vertical
// stacks, and of the other convolutions the part that taps above see, which is most of their work, as products of many
// rows. What is left for a pixel are the taps in its own row.
#include "masked_conv/ancestral.h"

#include <atomic>
#include <cmath>
#include <cstring>

#include "common/rows.h"
#include "likelihood/mixture.h"
#include "sampling/categorical_simd.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kImages = 2 * kTileRows;  // drawn together by a thread

template <class T>
Vec<T> activate(Vec<T> x, PixelActivation kind) {
  switch (kind) {
    case PixelActivation::relu:
      return x < 0 ? Vec<T>{} : x;
    case PixelActivation::elu: {
      const WideExp<T> e(x);
      const Vec<T> below = e.near ? x + e.tail : e.value - T(1);
      return x > 0 ? x : below;
    }
    case PixelActivation::tanh:
      return tanh(x);
    case PixelActivation::sigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

template <class T>
struct Sampler {
  static constexpr int L = kLanes<T>;
  const Ancestral<T>& p;
  const T* packed;
  T* storage;     // of `count` images, p.image_storage each
  T* buffer;      // scores of an attention, logits
  char* weights;  // of a draw
  int64_t first, count;

  const PixelValue& value(int64_t index) const { return p.values[index]; }
  T* image(int64_t r) const { return storage + r * p.image_storage; }
  T* at(int64_t r, const PixelValue& v, int64_t y, int64_t x) const {
    return image(r) + v.offset + ((y % v.rows) * v.pitch + v.left + x) * v.channels;
  }
  T* sums_at(int64_t r, const PixelInstruction<T>& in, int64_t x) const {
    return image(r) + in.sums + x * round_up(in.outputs, kPixelPad);
  }

  void draw() {
    std::memset(storage, 0, static_cast<size_t>(count * p.image_storage) * sizeof(T));
    for (int64_t y = 0; y < p.height; ++y) {
      for (int64_t i = 0; i < p.instruction_count; ++i) row(p.instructions[i], y);
      for (int64_t x = 0; x < p.width; ++x) {
        for (int64_t sub = 0; sub < p.sub_pixels; ++sub) {
          for (int64_t i = 0; i < p.instruction_count; ++i) {
            if (p.sub_pixels > 1 || !p.instructions[i].own) pixel(p.instructions[i], y, x);
          }
          for (int64_t r = 0; r < count; ++r) {
            if (p.sub_pixels > 1) {
              draw_channel(r, sub, y, x);
            } else if (p.head == PixelHead::mixture) {
              draw_components(r, y, x);
            } else {
              for (int64_t c = 0; c < p.channels; ++c) draw_channel(r, c, y, x);
            }
          }
        }
        if (p.outputs != nullptr) record(y, x);
        for (int64_t i = 0; i < p.instruction_count; ++i) {
          if (p.instructions[i].own) pixel(p.instructions[i], y, x);
        }
      }
    }
  }

  // ---- what is known for a whole row -------------------------------------------------------------------------------

  void row(const PixelInstruction<T>& in, int64_t image_row) {
    const PixelValue& out = value(in.out);
    if (image_row % out.factor != 0) return;
    const int64_t y = image_row / out.factor;
    if (in.op == PixelOp::conv) {
      add_rows(in, out, y);
      if (!out.by_rows) return;
      for (int64_t x = 0; x < out.width; ++x) {
        for (int64_t r = 0; r < count; ++r) finish(in, out, r, y, x, sums_at(r, in, x), nullptr, 0, in.outputs);
      }
    } else if (in.op == PixelOp::constant) {
      for (int64_t r = 0; r < count; ++r) {
        const T* from = in.tensor + (first + r) * in.image_stride + y * out.width;
        T* to = at(r, out, y, 0);
        for (int64_t c = 0; c < out.channels; ++c) {
          for (int64_t x = 0; x < out.width; ++x) to[x * out.channels + c] = from[c * out.height * out.width + x];
        }
      }
    } else if (out.by_rows) {
      for (int64_t x = 0; x < out.width; ++x) {
        for (int64_t r = 0; r < count; ++r) elementwise(in, out, r, y, x);
      }
    }
  }

  // The sums of row y begin with the bias and what the runs of the rows add.
  void add_rows(const PixelInstruction<T>& in, const PixelValue& out, int64_t y) {
    const int64_t padded = round_up(in.outputs, kPixelPad);
    for (int64_t r = 0; r < count; ++r) {
      T* sums = sums_at(r, in, 0);
      const T* bias = in.bias == nullptr ? nullptr : in.bias + (first + r) * in.image_stride;
      for (int64_t x = 0; x < out.width; ++x, sums += padded) {
        if (bias != nullptr) {
          std::memcpy(sums, bias, static_cast<size_t>(in.outputs) * sizeof(T));
        } else {
          std::memset(sums, 0, static_cast<size_t>(in.outputs) * sizeof(T));
        }
      }
    }
    const PixelValue& from = value(in.in);
    alignas(64) T tile[kTileRows * kPanel<T>];
    for (int64_t px = 0; px < in.up; ++px) {
      const int64_t phase = in.up == 2 ? 2 * (y % 2) + px : 0;
      const int64_t positions = (out.width - px + in.up - 1) / in.up;
      for (int64_t n = 0; n < in.row_runs[phase]; ++n) {
        const PixelRun& run = in.runs[phase][n];
        const int64_t seen = in.stride * (y / in.up) + run.dy;
        if (seen < 0) continue;
        for (int64_t column = 0; column < in.outputs; column += kPanel<T>) {
          const int64_t wanted = minimum(kPanel<T>, in.outputs - column);
          const int vectors = static_cast<int>(ceil_div(wanted, L));
          const T* panel = packed + run.packed + run.depth * column;
          for_tiles(0, positions * count, [&](int64_t begin, int tile_rows) {
            const T* rows[kTileRows];
            for (int t = 0; t < tile_rows; ++t) {
              const int64_t r = (begin + t) / positions, k = (begin + t) % positions;
              rows[t] = at(r, from, seen, in.stride * k + run.dx);
            }
            multiply(tile_rows, vectors, run.depth, rows, 1, panel, tile);
            for (int t = 0; t < tile_rows; ++t) {
              const int64_t r = (begin + t) / positions, k = (begin + t) % positions;
              T* to = sums_at(r, in, in.up * k + px) + column;
              for (int v = 0; v < vectors; ++v) {  // the sums are padded to whole vectors
                store(to + v * L, load(to + v * L) + load(tile + (t * vectors + v) * L));
              }
            }
          });
        }
      }
    }
  }

  // ---- one pixel ---------------------------------------------------------------------------------------------------

  void pixel(const PixelInstruction<T>& in, int64_t image_row, int64_t image_column) {
    const PixelValue& out = value(in.out);
    if (out.by_rows || image_row % out.factor != 0 || image_column % out.factor != 0) return;
    const int64_t y = image_row / out.factor, x = image_column / out.factor;
    if (in.op == PixelOp::conv) {
      convolve(in, out, y, x);
    } else if (in.op == PixelOp::attention) {
      for (int64_t r = 0; r < count; ++r) attend(in, out, r, y, x);
    } else {
      for (int64_t r = 0; r < count; ++r) elementwise(in, out, r, y, x);
    }
  }

  void convolve(const PixelInstruction<T>& in, const PixelValue& out, int64_t y, int64_t x) {
    const int64_t phase = in.up == 2 ? 2 * (y % 2) + x % 2 : 0;
    const PixelValue& from = value(in.in);
    alignas(64) T tile[kTileRows * kPanel<T>], more[kTileRows * kPanel<T>];
    for (int64_t column = 0; column < in.outputs; column += kPanel<T>) {
      const int64_t wanted = minimum(kPanel<T>, in.outputs - column);
      const int vectors = static_cast<int>(ceil_div(wanted, L));
      for_tiles(0, count, [&](int64_t begin, int tile_rows) {
        bool any = false;
        for (int64_t n = in.row_runs[phase]; n < in.run_count[phase]; ++n) {
          const PixelRun& run = in.runs[phase][n];
          const int64_t seen = in.stride * (y / in.up) + run.dy;
          if (seen < 0) continue;
          const T* rows[kTileRows];
          for (int t = 0; t < tile_rows; ++t) rows[t] = at(begin + t, from, seen, in.stride * (x / in.up) + run.dx);
          multiply(tile_rows, vectors, run.depth, rows, 1, packed + run.packed + run.depth * column, any ? more : tile);
          for (int i = 0; any && i < tile_rows * vectors; ++i) {
            store(tile + i * L, load(tile + i * L) + load(more + i * L));
          }
          any = true;
        }
        for (int t = 0; t < tile_rows; ++t) {
          const int64_t r = begin + t;
          finish(in, out, r, y, x, sums_at(r, in, x), any ? tile + t * vectors * L : nullptr, column, wanted);
        }
      });
    }
  }

  // Channels [column, column + wanted) of a convolution's value from its sums, whose `tile` begins at `column`.
  void finish(const PixelInstruction<T>& in, const PixelValue& out, int64_t r, int64_t y, int64_t x, const T* sums,
              const T* tile, int64_t column, int64_t wanted) {
    T* to = at(r, out, y, x) + column;
    const T* add = in.other < 0 ? nullptr : at(r, value(in.other), y, x) + column;
    for (int64_t c = 0; c < wanted; c += L) {
      Vec<T> sum = load(sums + column + c);
      if (tile != nullptr) sum += load(tile + c);
      if (add != nullptr) sum += load_upto(add + c, wanted - c);
      store_upto(to + c, activate<T>(sum, in.activation), wanted - c);
    }
  }

  void elementwise(const PixelInstruction<T>& in, const PixelValue& out, int64_t r, int64_t y, int64_t x) {
    const T* from = at(r, value(in.in), y, x);
    const T* other = in.other < 0 ? nullptr : at(r, value(in.other), y, x);
    T* to = at(r, out, y, x);
    const int64_t C = out.channels;
    if (in.op == PixelOp::add) {
      for (int64_t c = 0; c < C; c += L) {
        store_upto(to + c, load_upto(from + c, C - c) + load_upto(other + c, C - c), C - c);
      }
    } else if (in.op == PixelOp::gate) {
      const T* condition = in.tensor == nullptr ? nullptr : in.tensor + (first + r) * in.image_stride;
      for (int64_t c = 0; c < C; c += L) {
        Vec<T> a = load_upto(from + c, C - c), b = load_upto(from + C + c, C - c);
        if (condition != nullptr) {
          a += load_upto(condition + c, C - c);
          b += load_upto(condition + C + c, C - c);
        }
        Vec<T> gated = (in.linear ? a : tanh(a)) * sigmoid(b);
        if (other != nullptr) gated += load_upto(other + c, C - c);
        store_upto(to + c, gated, C - c);
      }
    } else if (in.activation == PixelActivation::concat_elu) {
      for (int64_t c = 0; c < C / 2; c += L) {
        const Vec<T> v = load_upto(from + c, C / 2 - c);
        store_upto(to + c, activate<T>(v, PixelActivation::elu), C / 2 - c);
        store_upto(to + C / 2 + c, activate<T>(-v, PixelActivation::elu), C / 2 - c);
      }
    } else {
      for (int64_t c = 0; c < C; c += L) {
        store_upto(to + c, activate<T>(load_upto(from + c, C - c), in.activation), C - c);
      }
    }
  }

  void attend(const PixelInstruction<T>& in, const PixelValue& out, int64_t r, int64_t y, int64_t x) {
    const PixelValue &q = value(in.in), &k = value(in.key), &v = value(in.value);
    const int64_t seen = y * q.width + x + (in.strict ? 0 : 1);
    const int64_t width = q.channels / in.heads, wide = v.channels / in.heads;
    const T scale = static_cast<T>(1.0 / std::sqrt(static_cast<double>(width)));
    for (int64_t h = 0; h < in.heads; ++h) {
      T* to = at(r, out, y, x) + h * wide;
      if (seen == 0) {
        std::memset(to, 0, static_cast<size_t>(wide) * sizeof(T));
        continue;
      }
      const T* query = at(r, q, y, x) + h * width;
      T top = -std::numeric_limits<T>::infinity();
      bool sound = true;
      for (int64_t j = 0; j < seen; ++j) {
        const T* key = at(r, k, j / q.width, j % q.width) + h * width;
        Vec<T> each{};
        for (int64_t c = 0; c < width; c += L) each += load_upto(query + c, width - c) * load_upto(key + c, width - c);
        buffer[j] = scale * sum<T>(each);
        top = buffer[j] > top ? buffer[j] : top;
        sound = sound && buffer[j] == buffer[j];
      }
      T total = 0;
      for (int64_t j = 0; j < seen; j += L) {
        const Vec<T> share = keep_first<T>(exp_wide<T>(load_upto(buffer + j, seen - j) - top), seen - j);
        store_upto(buffer + j, share, seen - j);
        total += sum<T>(share);
      }
      const T inverse = sound ? T(1) / total : std::numeric_limits<T>::quiet_NaN();
      for (int64_t c = 0; c < wide; c += L) {
        Vec<T> mean{};
        for (int64_t j = 0; j < seen; ++j) {
          mean += buffer[j] * load_upto(at(r, v, j / q.width, j % q.width) + h * wide + c, wide - c);
        }
        store_upto(to + c, inverse * mean, wide - c);
      }
    }
  }

  // ---- draws -------------------------------------------------------------------------------------------------------

  T uniform(int64_t r, int64_t draw, int64_t y, int64_t x) const {
    return p.u[(((first + r) * p.draws + draw) * p.height + y) * p.width + x];
  }

  // Takes the level that is given, if one is.
  void put(int64_t r, int64_t c, int64_t y, int64_t x, int64_t level) {
    const int64_t index = (((first + r) * p.channels + c) * p.height + y) * p.width + x;
    if (p.given != nullptr && p.given[index] >= 0) level = p.given[index];
    p.out[index] = level;
    at(r, value(0), y, x)[c] = static_cast<T>(level) * p.scale + p.shift;
  }

  void draw_channel(int64_t r, int64_t c, int64_t y, int64_t x) {
    const T* head = at(r, value(p.head_value), y, x);
    const T u = uniform(r, c, y, x);
    if (p.head == PixelHead::bernoulli) {
      put(r, c, y, x, head[c] == head[c] ? (u < sigmoid(head[c]) ? 1 : 0) : -1);
      return;
    }
    const T* logits = head + c * p.levels;
    if (p.head == PixelHead::categorical_outer && p.channels > 1) {
      for (int64_t l = 0; l < p.levels; ++l) buffer[l] = head[l * p.channels + c];
      logits = buffer;
    }
    T* each = reinterpret_cast<T*>(weights);
    double* sums = reinterpret_cast<double*>(weights + weights_bytes<T>(p.levels));
    const double total = weigh(logits, p.levels, each, sums);
    const bool sound = total < std::numeric_limits<double>::infinity();  // false for NaN
    put(r, c, y, x, sound ? invert(each, sums, p.levels, static_cast<double>(u) * total) : -1);
  }

  void draw_components(int64_t r, int64_t y, int64_t x) {
    T u[4], drawn[3];
    for (int64_t i = 0; i < p.draws; ++i) u[i] = uniform(r, i, y, x);
    int bits = 0;
    while ((int64_t{1} << bits) < p.levels) ++bits;
    draw_mixture<T>(at(r, value(p.head_value), y, x), 1, p.components, static_cast<int>(p.channels),
                    static_cast<MixtureLayout>(p.layout), p.log_scale_min, bits, true, u, drawn);
    for (int64_t c = 0; c < p.channels; ++c) {
      const T level = std::nearbyint((drawn[c] + T(1)) * T(0.5) * static_cast<T>(p.levels - 1));
      put(r, c, y, x, level >= 0 && level < static_cast<T>(p.levels) ? static_cast<int64_t>(level) : -1);
    }
  }

  void record(int64_t y, int64_t x) {
    const PixelValue& head = value(p.head_value);
    for (int64_t r = 0; r < count; ++r) {
      const T* from = at(r, head, y, x);
      T* to = p.outputs + ((first + r) * head.channels * p.height + y) * p.width + x;
      for (int64_t c = 0; c < head.channels; ++c) to[c * p.height * p.width] = from[c];
    }
  }
};

template <class T>
struct Sizes {
  int64_t packed, storage, buffer, weights;  // bytes
  explicit Sizes(const Ancestral<T>& p) {
    const auto bytes = [](int64_t n) { return round_up(n * static_cast<int64_t>(sizeof(T)), 64); };
    packed = bytes(p.packed);
    storage = bytes(minimum(kImages, p.batch) * p.image_storage);
    buffer = bytes(maximum(p.attended, p.levels));
    weights = inversion_bytes<T>(p.levels);
  }
  int64_t of_thread() const { return storage + buffer + weights; }
};

// [tap and input channel][output] of a run, in panels.
template <class T>
void pack(const PixelInstruction<T>& in, const PixelRun& run, T* to) {
  constexpr int L = kLanes<T>;
  const int64_t step = in.inputs * in.kernel;  // from output to output
  for (int64_t column = 0; column < in.outputs; column += kPanel<T>) {
    const int64_t wanted = minimum(kPanel<T>, in.outputs - column), width = round_up(wanted, L);
    T* panel = to + run.depth * column;
    for (int64_t t = 0; t < run.taps; ++t) {
      const T* from = in.weight + column * step + in.places[run.first + t];
      for (int64_t c = 0; c < in.inputs; ++c, panel += width) {
        for (int64_t o = 0; o < wanted; ++o) panel[o] = from[o * step + c * in.kernel];
        for (int64_t o = wanted; o < width; ++o) panel[o] = 0;
      }
    }
  }
}

template <class T>
void ancestral(const Ancestral<T>& p, char* workspace, const Executor& executor) {
  const Sizes<T> sizes(p);
  T* packed = reinterpret_cast<T*>(workspace);
  parallel_ranges(executor, p.instruction_count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const PixelInstruction<T>& in = p.instructions[i];
      for (int64_t phase = 0; in.op == PixelOp::conv && phase < in.up * in.up; ++phase) {
        for (int64_t n = 0; n < in.run_count[phase]; ++n) {
          pack(in, in.runs[phase][n], packed + in.runs[phase][n].packed);
        }
      }
    }
  });
  std::atomic<int> taken{0};
  parallel_ranges(executor, p.batch, 1, [&](int64_t begin, int64_t end) {
    char* mine = workspace + sizes.packed + taken.fetch_add(1) * sizes.of_thread();
    T* storage = reinterpret_cast<T*>(mine);
    T* buffer = reinterpret_cast<T*>(mine + sizes.storage);
    char* weights = mine + sizes.storage + sizes.buffer;
    const int64_t parts = ceil_div(end - begin, kImages);
    for (int64_t i = 0; i < parts; ++i) {
      const Range range = split(end - begin, parts, i);
      Sampler<T>{p, packed, storage, buffer, weights, begin + range.begin, range.end - range.begin}.draw();
    }
  });
}

}  // namespace

template <class T>
KernelOf<Ancestral<T>> ancestral_kernel() {
  return {[](const Ancestral<T>& p, int threads) {
            const Sizes<T> sizes(p);
            return static_cast<size_t>(sizes.packed + threads * sizes.of_thread());
          },
          &ancestral<T>};
}
template KernelOf<Ancestral<float>> ancestral_kernel<float>();
template KernelOf<Ancestral<double>> ancestral_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

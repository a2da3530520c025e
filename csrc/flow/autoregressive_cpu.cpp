// A panel of rows at a time, one row a lane: every unit of the network is computed once, as soon as the columns that it
// sees are known, by a product of its live weights with the panel; so the whole inverse costs one masked forward pass.
//
// The way back is the same in reverse: from the last group of columns to the first, every unit's gradient is computed
// once, when those of all units that see it are known. Nothing is kept from the forward pass but x.
#include "flow/autoregressive.h"

#include <cstring>

#include "common/gemm.h"
#include "common/rows.h"
#include "flow/activation_simd.h"
#include "flow/scale_simd.h"
#include "flow/spline_simd.h"
#include "flow/workspace.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

template <class T>
struct Columns {
  static constexpr int L = kLanes<T>;
  using V = Vec<T>;

  const Autoregressive<T>& p;
  SplineMath<T> spline;
  V *raw = nullptr, *scratch = nullptr;  // of a spline

  Columns(const Autoregressive<T>& arguments, Workspace& workspace) : p(arguments), spline(arguments.spline) {
    if (p.transform != ColumnTransform::rational_quadratic) return;
    raw = workspace.take<V>(p.parameters);
    scratch = workspace.take<V>(SplineMath<T>::kScratch);
  }

  V shift(const T* parameters, int64_t width) const { return load(parameters + (p.scale_first ? width : 0)); }
  V scale(const T* parameters, int64_t width) const { return load(parameters + (p.scale_first ? 0 : width)); }

  // x and ln |dx/du|; a column's parameters are `width` apart.
  V invert(V u, const T* parameters, int64_t width, V& log) const {
    switch (p.transform) {
      case ColumnTransform::affine: {
        const ScaleAt<T> at(p.scale, u - shift(parameters, width), scale(parameters, width), true);
        log = at.log;
        return at.product;
      }
      case ColumnTransform::additive:
        log = V{};
        return u - load(parameters);
      default: {
        for (int64_t k = 0; k < p.parameters; ++k) raw[k] = load(parameters + k * width);
        V x;
        spline.apply(u, raw, scratch, x, log);
        return x;
      }
    }
  }

  // The gradient by u; the parameters' gradients go to `to`, in the parameters' own layout.
  V invert_gradient(V u, V x, V grad_x, V grad_log, const T* parameters, int64_t width, T* to) const {
    switch (p.transform) {
      case ColumnTransform::affine: {
        const ScaleAt<T> at(p.scale, grad_x, scale(parameters, width), true);
        store(to + (p.scale_first ? width : 0), -at.product);
        // x and its logarithm both fall by dln s: x by x itself
        store(to + (p.scale_first ? 0 : width), -at.rate * (grad_x * x + grad_log));
        return at.product;
      }
      case ColumnTransform::additive:
        store(to, -grad_x);
        return grad_x;
      default: {
        for (int64_t k = 0; k < p.parameters; ++k) raw[k] = load(parameters + k * width);
        const V grad_u = spline.differentiate(u, grad_x, grad_log, raw, scratch);
        for (int64_t k = 0; k < p.parameters; ++k) store(to + k * width, raw[k]);
        return grad_u;
      }
    }
  }
};

// What a panel of rows needs; one for each thread.
template <class T>
struct Panel {
  T *u, *x, *log;  // [columns][width] in the columns' own order; x in places; [width] and what rounding left of it
  T** values;      // for each layer [places][width]
  T** views;       // for each view, which may be the values themselves
  T** added;       // for each layer [units][width], in the units' own order
  T* parameters;   // of the columns of a group, or on the way back of all
  T *grad_x, *grad_log;  // [columns][width], [width]
  T* grad_u;             // [columns][width], in places
  T** grads;             // for each layer [places][width]
  Columns<T> math;

  Panel(const Autoregressive<T>& p, bool backward, int64_t width, Workspace& workspace)
      : u(workspace.take<T>(p.columns.count * width)),
        x(workspace.take<T>(p.columns.count * width)),
        log(workspace.take<T>(2 * width)),
        values(workspace.take<T*>(p.layer_count)),
        views(workspace.take<T*>(p.view_count)),
        added(workspace.take<T*>(p.layer_count)),
        parameters(nullptr),
        grad_x(nullptr),
        grad_log(nullptr),
        grad_u(nullptr),
        grads(nullptr),
        math(p, workspace) {
    const auto set = [](auto** to, int64_t at, auto* value) {
      if (to != nullptr) to[at] = value;
    };
    const int64_t last = p.layer_count - 1;
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const AutoregressiveLayer<T>& layer = p.layers[l];
      set(values, l, l < last || backward ? workspace.take<T>(layer.units.count * width) : nullptr);
      set(added, l, layer.add != nullptr ? workspace.take<T>(layer.units.count * width) : nullptr);
    }
    for (int64_t v = 0; v < p.view_count; ++v) {
      const AutoregressiveView& view = p.views[v];
      T* own = view.activation != Activation::none ? workspace.take<T>(p.order_of(view.source).count * width)
               : values == nullptr                 ? nullptr
               : view.source < 0                   ? x
                                                   : values[view.source];
      set(views, v, own);
    }
    if (!backward) {
      int64_t largest = 0;
      for (int64_t g = 0; g < p.groups; ++g) {
        largest = maximum(largest, p.columns.ends[g] - (g > 0 ? p.columns.ends[g - 1] : 0));
      }
      parameters = workspace.take<T>(largest * p.parameters * width);
      return;
    }
    if (values != nullptr) parameters = values[last];
    grad_x = workspace.take<T>(p.columns.count * width);
    grad_log = workspace.take<T>(width);
    grad_u = workspace.take<T>(p.columns.count * width);
    grads = workspace.take<T*>(p.layer_count);
    for (int64_t l = 0; l < p.layer_count; ++l) set(grads, l, workspace.take<T>(p.layers[l].units.count * width));
  }
};

template <class T>
class Run {
  static constexpr int L = kLanes<T>;
  using V = Vec<T>;

  const Autoregressive<T>& p;
  const AutoregressiveBackward<T>* b;
  int vectors;            // of a panel
  int64_t width, panels;  // its lanes; how many there are
  int threads;
  const T** weights;     // for each layer the live weights of each place, one place after the other
  const T** transposed;  // the same by the places of the source
  char* own;             // the threads' panels
  size_t own_size;

 public:
  Run(const Autoregressive<T>& arguments, const AutoregressiveBackward<T>* backward, Workspace& workspace,
      int most_threads)
      : p(arguments), b(backward) {
    // Narrow panels where wide ones would leave threads without any.
    const int64_t all = maximum(1, ceil_div(p.batch, L));
    vectors = static_cast<int>(minimum(kPanelVectors, ceil_div(all, maximum(1, most_threads))));
    width = vectors * L;
    panels = ceil_div(p.batch, width);
    threads = static_cast<int>(maximum(1, minimum(most_threads, panels)));
    weights = workspace.take<const T*>(p.layer_count);
    transposed = workspace.take<const T*>(p.layer_count);
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const AutoregressiveLayer<T>& layer = p.layers[l];
      const int64_t count = layer.begin[layer.units.count];
      const T* packed = in_place(layer) ? nullptr : workspace.take<T>(count);
      if (weights != nullptr) weights[l] = packed;
      const T* other = b != nullptr ? workspace.take<T>(layer.transposed_begin[source_of(layer).count]) : nullptr;
      if (transposed != nullptr) transposed[l] = other;
    }
    Workspace measure{nullptr};
    const Panel<T> one(p, b != nullptr, width, measure);
    (void)one;
    own_size = static_cast<size_t>(round_up(static_cast<int64_t>(measure.used), 64));
    own = workspace.take<char>(static_cast<int64_t>(own_size) * threads);
  }

  void run(const Executor& executor) {
    if (p.batch == 0) return;
    parallel_ranges(executor, p.layer_count * kParts, 1, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) pack(i / kParts, split_of(p.layers[i / kParts], i % kParts));
    });
    struct Context {
      Run& run;
    } context{*this};
    const auto part = [](void* pointer, int64_t begin, int64_t end) {
      Run& self = static_cast<Context*>(pointer)->run;
      for (int64_t t = begin; t < end; ++t) {
        Workspace mine{self.own + static_cast<size_t>(t) * self.own_size};
        Panel<T> panel(self.p, self.b != nullptr, self.width, mine);
        const Range range = split(self.panels, self.threads, t);
        for (int64_t i = range.begin; i < range.end; ++i) self.panel(panel, i * self.width);
      }
    };
    if (threads == 1 || executor.run == nullptr) {
      part(&context, 0, threads);
    } else {
      executor.run(threads, part, &context);
    }
  }

 private:
  static constexpr int64_t kParts = 8;  // in which a layer's weights are packed

  const AutoregressiveOrder& source_of(const AutoregressiveLayer<T>& layer) const {
    return p.order_of(p.views[layer.view].source);
  }
  bool in_place(const AutoregressiveLayer<T>& layer) const { return layer.units.sorted && source_of(layer).sorted; }
  int64_t known(const AutoregressiveOrder& units) const { return units.ends[p.groups - 1]; }
  Range split_of(const AutoregressiveLayer<T>& layer, int64_t part) const {
    return split(layer.units.count, kParts, part);
  }

  const T* row(int64_t l, int64_t place) const {
    const AutoregressiveLayer<T>& layer = p.layers[l];
    if (weights[l] == nullptr) return layer.weight + place * source_of(layer).count;
    return weights[l] + layer.begin[place];
  }

  void pack(int64_t l, Range places) {
    const AutoregressiveLayer<T>& layer = p.layers[l];
    const AutoregressiveOrder& source = source_of(layer);
    if (weights[l] != nullptr) {
      for (int64_t j = places.begin; j < places.end; ++j) {
        const T* from = layer.weight + layer.units.order[j] * source.count;
        T* to = const_cast<T*>(weights[l]) + layer.begin[j];
        if (source.sorted) {
          std::memcpy(to, from, static_cast<size_t>(layer.live[j]) * sizeof(T));
        } else {
          for (int64_t k = 0; k < layer.live[j]; ++k) to[k] = from[source.order[k]];
        }
      }
    }
    if (b == nullptr) return;
    // Row k of the transposed holds what the places from first[k] on see it by.
    for (int64_t j = places.begin; j < places.end; ++j) {
      const T* from = layer.weight + layer.units.order[j] * source.count;
      T* to = const_cast<T*>(transposed[l]) + j;
      for (int64_t k = 0; k < layer.live[j]; ++k) {
        to[layer.transposed_begin[k] - layer.first[k]] = from[source.order[k]];
      }
    }
  }

  // panel[column][lane] from rows; 0 in lanes beyond the batch.
  void load_panel(const T* rows, int64_t stride, int64_t columns, int64_t row0, T* panel) const {
    pack_columns<T>(
        width, columns, [&](int64_t i) { return row0 + i < p.batch ? rows + (row0 + i) * stride : nullptr; }, panel);
  }

  // rows[row][column] from the places of a panel; columns at places from `known` on are 0.
  void store_panel(const T* panel, const AutoregressiveOrder& order, int64_t known_places, int64_t row0,
                   T* rows) const {
    const int64_t lanes = minimum(width, p.batch - row0);
    for (int64_t c = 0; c < order.count; c += L) {
      const int64_t n = minimum(L, order.count - c);
      for (int64_t v = 0; v < lanes; v += L) {
        V block[L];
        for (int64_t i = 0; i < L; ++i) {
          const int64_t place = i < n ? order.place[c + i] : known_places;
          block[i] = place < known_places ? load(panel + place * width + v) : V{};
        }
        transpose<T>(block);
        const int64_t count = minimum(L, lanes - v);
        for (int64_t i = 0; i < count; ++i) store_upto(rows + (row0 + v + i) * order.count + c, block[i], n);
      }
    }
  }

  // ---- forward -----------------------------------------------------------------------------------------------------

  // The layer's places [begin, end); to[0] is place `begin`.
  void compute(Panel<T>& panel, int64_t l, int64_t begin, int64_t end, T* to) const {
    const AutoregressiveLayer<T>& layer = p.layers[l];
    const T* view = panel.views[layer.view];
    alignas(64) T tile[kTileRows * kPanel<T>];
    for (int64_t j = begin; j < end;) {
      const int64_t live = layer.live[j];
      int64_t same = j + 1;
      while (same < end && layer.live[same] == live) ++same;
      for_tiles(j, same, [&](int64_t first, int count) {
        const T* from[kTileRows];
        for (int r = 0; r < count; ++r) from[r] = row(l, first + r);
        multiply(count, vectors, live, from, 1, view, tile);
        for (int r = 0; r < count; ++r)
          finish(panel, layer, first + r, tile + r * width, to + (first + r - begin) * width);
      });
      j = same;
    }
  }

  void finish(Panel<T>& panel, const AutoregressiveLayer<T>& layer, int64_t place, const T* product, T* to) const {
    const int64_t unit = layer.units.order[place], l = &layer - p.layers;
    const V bias = broadcast(layer.bias != nullptr ? layer.bias[unit] : T(0));
    const T* added = layer.add != nullptr ? panel.added[l] + unit * width : nullptr;
    const T* residual = nullptr;
    if (layer.residual >= 0) {
      residual = panel.values[layer.residual] + p.layers[layer.residual].units.place[unit] * width;
    }
    for (int64_t v = 0; v < width; v += L) {
      V h = load(product + v) + bias;
      if (added != nullptr) h += load(added + v);
      if (residual != nullptr) h += load(residual + v);
      store(to + v, h);
    }
  }

  // The activated views of places [begin, end) of a source.
  void show(Panel<T>& panel, int64_t source, int64_t begin, int64_t end) const {
    const T* values = source < 0 ? panel.x : panel.values[source];
    for (int64_t i = 0; i < p.view_count; ++i) {
      const AutoregressiveView& view = p.views[i];
      if (view.source != source || view.activation == Activation::none) continue;
      for (int64_t at = begin * width; at < end * width; at += L) {
        store(panel.views[i] + at, activate<T>(view.activation, load(values + at)));
      }
    }
  }

  void hidden(Panel<T>& panel, int64_t group) const {
    for (int64_t l = 0; l + 1 < p.layer_count; ++l) {
      const int64_t *ends = p.layers[l].units.ends, begin = group > 0 ? ends[group - 1] : 0;
      if (begin == ends[group]) continue;
      compute(panel, l, begin, ends[group], panel.values[l] + begin * width);
      show(panel, l, begin, ends[group]);
    }
  }

  void panel(Panel<T>& panel, int64_t row0) const {
    const int64_t D = p.columns.count;
    load_panel(p.u, D, D, row0, panel.u);
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const AutoregressiveLayer<T>& layer = p.layers[l];
      if (layer.add != nullptr) {
        load_panel(layer.add, layer.add_stride, layer.units.count, row0, panel.added[l]);
      }
    }
    if (b != nullptr) return backward(panel, row0);
    std::memset(panel.log, 0, static_cast<size_t>(2 * width) * sizeof(T));
    const int64_t last = p.layer_count - 1, P = p.parameters;
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t begin = g > 0 ? p.columns.ends[g - 1] : 0, end = p.columns.ends[g];
      hidden(panel, g);
      compute(panel, last, begin * P, end * P, panel.parameters);
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t v = 0; v < width; v += L) {
          V log;
          const V u = load(panel.u + p.columns.order[j] * width + v);
          store(panel.x + j * width + v,
                panel.math.invert(u, panel.parameters + (j - begin) * P * width + v, width, log));
          // Kahan's sum: the logarithms of many columns.
          const V sum = load(panel.log + v), term = log - load(panel.log + width + v), next = sum + term;
          store(panel.log + v, next);
          const V left = (next - sum) - term;
          store(panel.log + width + v, left == left ? left : V{});  // of an infinite sum there is none
        }
      }
      show(panel, -1, begin, end);
    }
    store_panel(panel.x, p.columns, D, row0, p.x);
    std::memcpy(p.log_abs_det + row0, panel.log, static_cast<size_t>(minimum(width, p.batch - row0)) * sizeof(T));
  }

  // ---- backward ----------------------------------------------------------------------------------------------------

  // The gradients of places [begin, end) of a source, from all that sees it; `to` has what is there already.
  void gather(Panel<T>& panel, int64_t source, int64_t begin, int64_t end, T* to) const {
    const T* values = source < 0 ? panel.x : panel.values[source];
    alignas(64) T tile[kTileRows * kPanel<T>];
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const AutoregressiveLayer<T>& layer = p.layers[l];
      const T* grads = panel.grads[l];
      if (layer.residual == source && source >= 0) {
        const AutoregressiveOrder& own = p.layers[source].units;
        for (int64_t k = begin; k < end; ++k) {
          const int64_t place = layer.units.place[own.order[k]];
          if (place >= known(layer.units)) continue;
          for (int64_t v = 0; v < width; v += L) {
            store(to + k * width + v, load(to + k * width + v) + load(grads + place * width + v));
          }
        }
      }
      const AutoregressiveView& view = p.views[layer.view];
      if (view.source != source) continue;
      for (int64_t k = begin; k < end;) {
        const int64_t first = layer.first[k], depth = known(layer.units) - first;
        int64_t same = k + 1;
        while (same < end && layer.first[same] == first) ++same;
        if (depth > 0) {
          for_tiles(k, same, [&](int64_t at, int count) {
            const T* from[kTileRows];
            for (int r = 0; r < count; ++r) from[r] = transposed[l] + layer.transposed_begin[at + r];
            multiply(count, vectors, depth, from, 1, grads + first * width, tile);
            for (int64_t i = 0; i < count * width; i += L) {
              const int64_t place = at * width + i;
              const V slope = activation_slope<T>(view.activation, load(values + place));
              store(to + place, load(to + place) + slope * load(tile + i));
            }
          });
        }
        k = same;
      }
    }
  }

  void clear(T* from, int64_t begin, int64_t end) const {
    std::memset(from + begin * width, 0, static_cast<size_t>((end - begin) * width) * sizeof(T));
  }

  void backward(Panel<T>& panel, int64_t row0) const {
    const int64_t D = p.columns.count, last = p.layer_count - 1, P = p.parameters;
    // x into places, by way of the gradient's buffer.
    load_panel(p.x, D, D, row0, panel.grad_x);
    for (int64_t j = 0; j < D; ++j) {
      std::memcpy(panel.x + j * width, panel.grad_x + p.columns.order[j] * width,
                  static_cast<size_t>(width) * sizeof(T));
    }
    if (b->grad_x != nullptr) {
      load_panel(b->grad_x, D, D, row0, panel.grad_x);
    } else {
      clear(panel.grad_x, 0, D);
    }
    const bool has_log = b->grad_log_abs_det != nullptr;
    for (int64_t i = 0; i < width; ++i)
      panel.grad_log[i] = has_log && row0 + i < p.batch ? b->grad_log_abs_det[row0 + i] : 0;

    show(panel, -1, 0, D);
    for (int64_t l = 0; l < last; ++l) {
      compute(panel, l, 0, known(p.layers[l].units), panel.values[l]);
      show(panel, l, 0, known(p.layers[l].units));
    }
    compute(panel, last, 0, D * P, panel.parameters);

    for (int64_t g = p.groups - 1; g >= 0; --g) {
      if (g + 1 < p.groups) {
        for (int64_t l = last - 1; l >= 0; --l) {
          const int64_t *ends = p.layers[l].units.ends, begin = ends[g], end = ends[g + 1];
          clear(panel.grads[l], begin, end);
          gather(panel, l, begin, end, panel.grads[l]);
        }
      }
      const int64_t begin = g > 0 ? p.columns.ends[g - 1] : 0, end = p.columns.ends[g];
      for (int64_t j = begin; j < end; ++j) {
        std::memcpy(panel.grad_u + j * width, panel.grad_x + p.columns.order[j] * width,
                    static_cast<size_t>(width) * sizeof(T));
      }
      gather(panel, -1, begin, end, panel.grad_u);
      for (int64_t j = begin; j < end; ++j) {
        for (int64_t v = 0; v < width; v += L) {
          const V u = load(panel.u + p.columns.order[j] * width + v), x = load(panel.x + j * width + v);
          T* grad_u = panel.grad_u + j * width + v;
          const int64_t at = j * P * width + v;
          store(grad_u, panel.math.invert_gradient(u, x, load(grad_u), load(panel.grad_log + v), panel.parameters + at,
                                                   width, panel.grads[last] + at));
        }
      }
    }
    // Units that every column sees the first of: those below the first group, whose gradients feed nothing but biases.
    for (int64_t l = last - 1; l >= 0; --l) {
      clear(panel.grads[l], 0, p.layers[l].units.ends[0]);
      gather(panel, l, 0, p.layers[l].units.ends[0], panel.grads[l]);
    }

    if (b->grad_u != nullptr) store_panel(panel.grad_u, p.columns, D, row0, b->grad_u);
    for (int64_t l = 0; l < p.layer_count; ++l) {
      const AutoregressiveOrder& units = p.layers[l].units;
      if (b->grad_layers[l] != nullptr) store_panel(panel.grads[l], units, known(units), row0, b->grad_layers[l]);
    }
    for (int64_t i = 0; i < p.view_count; ++i) {
      const AutoregressiveOrder& source = p.order_of(p.views[i].source);
      if (b->values[i] != nullptr) store_panel(panel.views[i], source, known(source), row0, b->values[i]);
    }
  }
};

}  // namespace

template <class T>
KernelOf<Autoregressive<T>> autoregressive_kernel() {
  return {[](const Autoregressive<T>& p, int threads) {
            Workspace workspace{nullptr};
            const Run<T> run(p, nullptr, workspace, threads);
            (void)run;
            return workspace.used;
          },
          [](const Autoregressive<T>& p, char* memory, const Executor& executor) {
            Workspace workspace{memory};
            Run<T>(p, nullptr, workspace, executor.threads).run(executor);
          }};
}
template <class T>
KernelOf<AutoregressiveBackward<T>> autoregressive_backward_kernel() {
  return {[](const AutoregressiveBackward<T>& b, int threads) {
            Workspace workspace{nullptr};
            const Run<T> run(b.forward, &b, workspace, threads);
            (void)run;
            return workspace.used;
          },
          [](const AutoregressiveBackward<T>& b, char* memory, const Executor& executor) {
            Workspace workspace{memory};
            Run<T>(b.forward, &b, workspace, executor.threads).run(executor);
          }};
}
template KernelOf<Autoregressive<float>> autoregressive_kernel<float>();
template KernelOf<Autoregressive<double>> autoregressive_kernel<double>();
template KernelOf<AutoregressiveBackward<float>> autoregressive_backward_kernel<float>();
template KernelOf<AutoregressiveBackward<double>> autoregressive_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

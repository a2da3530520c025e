// Products that leave out what the mask makes 0: with inputs and outputs in order of their degrees a panel of outputs
// multiplies only the inputs that its last one sees, which is half of them. Dead weights are never read.
#include "flow/masked_linear.h"

#include <cstring>

#include "common/gemm.h"
#include "common/rows.h"
#include "flow/workspace.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

template <class T>
inline constexpr int W = kPanel<T>;
constexpr int64_t kRowBlock = 8 * kTileRows;  // rows of one piece of work

// Columns of a matrix in another order: rows[row][place], in place where that is the matrix itself.
template <class T>
struct Sorted {
  const T* from = nullptr;
  const int64_t* order = nullptr;
  T* own = nullptr;
  int64_t columns = 0;

  Sorted(const T* matrix, int64_t rows, int64_t count, const int64_t* places, bool sorted, Workspace& workspace)
      : from(matrix), order(places), columns(count) {
    if (!sorted) own = workspace.take<T>(rows * columns);
  }
  void fill(int64_t begin, int64_t end) const {
    if (own == nullptr) return;
    for (int64_t r = begin; r < end; ++r) {
      const T* source = from + r * columns;
      T* to = own + r * columns;
      for (int64_t k = 0; k < columns; ++k) to[k] = source[order[k]];
    }
  }
  const T* row(int64_t r) const { return (own != nullptr ? own : from) + r * columns; }
};

// A tile of results to rows of a matrix in its own order.
template <class T>
inline void put_row(const T* tile, int64_t count, const int64_t* order, bool sorted, int64_t place, const T* bias,
                    bool later, T* row) {
  if (sorted) {
    for (int64_t c = 0; c < count; c += kLanes<T>) {
      Vec<T> value = load(tile + c);
      const int64_t left = count - c;
      if (later) {
        value += load_upto(row + place + c, left);
      } else if (bias != nullptr) {
        value += load_upto(bias + place + c, left);
      }
      store_upto(row + place + c, value, left);
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) {
    const int64_t at = order[place + c];
    row[at] = tile[c] + (later ? row[at] : bias != nullptr ? bias[at] : T(0));
  }
}

// Rows in blocks times panels of columns: block(panel, rows) for each.
template <class F>
inline void for_pieces(const Executor& executor, int64_t rows, int64_t panels, F&& piece) {
  const int64_t blocks = ceil_div(rows, kRowBlock);
  parallel_ranges(executor, blocks * panels, 2, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      piece(i / blocks, Range{i % blocks * kRowBlock, minimum(rows, (i % blocks + 1) * kRowBlock)});
    }
  });
}

// to[c] = the value at place + c, for c below count; 0 for the rest of a panel.
template <class T>
inline void take_places(const T* from, const int64_t* order, bool sorted, int64_t place, int64_t count, T* to) {
  if (sorted) {
    for (int64_t c = 0; c < W<T>; c += kLanes<T>) {
      store(to + c, c < count ? load_upto(from + place + c, count - c) : Vec<T>{});
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) to[c] = from[order[place + c]];
  for (int64_t c = maximum(count, 0); c < W<T>; ++c) to[c] = 0;
}

template <class T>
class Forward {
  const MaskedLinear<T>& p;
  int64_t panels;
  Sorted<T> x;
  T* weights;  // [panels][live of the last][W]; space for all inputs

 public:
  Forward(const MaskedLinear<T>& arguments, Workspace& workspace)
      : p(arguments),
        panels(ceil_div(p.outputs, W<T>)),
        x(p.x, p.rows, p.inputs, p.in_order, p.in_sorted, workspace),
        weights(workspace.take<T>(panels * W<T> * p.inputs)) {}

  void run(const Executor& executor) const {
    if (p.rows == 0 || p.outputs == 0) return;
    parallel_ranges(executor, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i);
    });
    parallel_ranges(executor, p.rows, kRowBlock, [&](int64_t begin, int64_t end) { x.fill(begin, end); });
    for_pieces(executor, p.rows, panels, [&](int64_t panel, Range rows) {
      const int64_t first = panel * W<T>, count = minimum(W<T>, p.outputs - first);
      multiply_blocked(
          rows, kPanelVectors, depth(panel), [&](int64_t r) { return x.row(r); }, weights + first * p.inputs,
          [&](int64_t row, int tiles, const T* tile, bool later) {
            for (int i = 0; i < tiles; ++i) {
              put_row(tile + i * W<T>, count, p.out_order, p.out_sorted, first, p.bias, later,
                      p.y + (row + i) * p.outputs);
            }
          });
    });
  }

 private:
  int64_t depth(int64_t panel) const { return p.live[minimum((panel + 1) * W<T>, p.outputs) - 1]; }

  void pack(int64_t panel) const {
    const int64_t first = panel * W<T>, count = minimum(W<T>, p.outputs - first);
    T* to = weights + first * p.inputs;
    int64_t all = 0;  // how many inputs all of the panel's outputs see
    if (p.in_sorted) {
      all = p.live[first];
      pack_columns<T>(
          W<T>, all, [&](int64_t c) { return c < count ? p.weight + p.out_order[first + c] * p.inputs : nullptr; }, to);
    }
    std::memset(to + all * W<T>, 0, static_cast<size_t>((depth(panel) - all) * W<T>) * sizeof(T));
    for (int64_t c = 0; c < count; ++c) {
      const T* from = p.weight + p.out_order[first + c] * p.inputs;
      for (int64_t k = all; k < p.live[first + c]; ++k) to[k * W<T> + c] = from[p.in_order[k]];
    }
  }
};

template <class T>
class Backward {
  const MaskedLinearBackward<T>& b;
  const MaskedLinear<T>& p;
  int64_t panels;   // of inputs
  int64_t columns;  // rows, a multiple of the lanes
  bool by_weight;
  Sorted<T> grad;  // for grad_x
  T* weights;      // [panels][outputs][W]: what the outputs from the panel's first on see of it
  T* transposed;   // grad_y [outputs][columns], in its own order
  T* x;            // [panels][rows][W] in places

 public:
  Backward(const MaskedLinearBackward<T>& arguments, Workspace& workspace)
      : b(arguments),
        p(arguments.forward),
        panels(ceil_div(p.inputs, W<T>)),
        columns(round_up(p.rows, kLanes<T>)),
        by_weight(b.grad_weight != nullptr || b.grad_bias != nullptr),
        grad(b.grad_y, p.rows, p.outputs, p.out_order, p.out_sorted || b.grad_x == nullptr, workspace),
        weights(b.grad_x != nullptr ? workspace.take<T>(panels * W<T> * p.outputs) : nullptr),
        transposed(by_weight ? workspace.take<T>(p.outputs * columns) : nullptr),
        x(b.grad_weight != nullptr ? workspace.take<T>(panels * W<T> * p.rows) : nullptr) {}

  void run(const Executor& executor) const {
    if (b.grad_x != nullptr) {
      if (p.rows > 0 && p.inputs > 0) inputs(executor);
    }
    if (by_weight) parameters(executor);
  }

 private:
  int64_t first_output(int64_t panel) const { return p.first[panel * W<T>]; }

  void inputs(const Executor& executor) const {
    parallel_ranges(executor, panels, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) pack(i);
    });
    parallel_ranges(executor, p.rows, kRowBlock, [&](int64_t begin, int64_t end) { grad.fill(begin, end); });
    for_pieces(executor, p.rows, panels, [&](int64_t panel, Range rows) {
      const int64_t place = panel * W<T>, count = minimum(W<T>, p.inputs - place), first = first_output(panel);
      multiply_blocked(
          rows, kPanelVectors, p.outputs - first, [&](int64_t r) { return grad.row(r) + first; },
          weights + place * p.outputs,
          [&](int64_t row, int tiles, const T* tile, bool later) {
            for (int i = 0; i < tiles; ++i) {
              put_row<T>(tile + i * W<T>, count, p.in_order, p.in_sorted, place, nullptr, later,
                         b.grad_x + (row + i) * p.inputs);
            }
          });
    });
  }

  void pack(int64_t panel) const {
    const int64_t place = panel * W<T>, count = minimum(W<T>, p.inputs - place);
    T* to = weights + place * p.outputs;
    for (int64_t o = first_output(panel); o < p.outputs; ++o, to += W<T>) {
      const T* from = p.weight + p.out_order[o] * p.inputs;
      take_places(from, p.in_order, p.in_sorted, place, minimum(count, p.live[o] - place), to);
    }
  }

  void parameters(const Executor& executor) const {
    // grad_y with each output's rows together, and the sums of them.
    parallel_ranges(executor, ceil_div(columns, kLanes<T>), kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin * kLanes<T>; v < end * kLanes<T>; v += kLanes<T>) {
        transpose_rows(v);
      }
    });
    if (b.grad_bias != nullptr) {
      for (int64_t o = 0; o < p.outputs; ++o) b.grad_bias[o] = sum_of(transposed + o * columns, p.rows);
    }
    if (b.grad_weight == nullptr) return;
    parallel_ranges(executor, p.rows, kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t place = panel * W<T>, count = minimum(W<T>, p.inputs - place);
        for (int64_t r = begin; r < end; ++r) {
          take_places(p.x + r * p.inputs, p.in_order, p.in_sorted, place, count, x + place * p.rows + r * W<T>);
        }
      }
    });
    std::memset(b.grad_weight, 0, static_cast<size_t>(p.outputs * p.inputs) * sizeof(T));
    for_pieces(executor, p.outputs, panels, [&](int64_t panel, Range outputs) {
      const int64_t place = panel * W<T>;
      outputs.begin = maximum(outputs.begin, first_output(panel));
      if (outputs.begin >= outputs.end) return;
      multiply_blocked(
          outputs, kPanelVectors, p.rows, [&](int64_t o) { return transposed + p.out_order[o] * columns; },
          x + place * p.rows,
          [&](int64_t o, int tiles, const T* tile, bool later) {
            for (int i = 0; i < tiles; ++i) {
              const int64_t live = minimum(W<T>, p.live[o + i] - place);
              if (live <= 0) continue;
              put_row<T>(tile + i * W<T>, live, p.in_order, p.in_sorted, place, nullptr, later,
                         b.grad_weight + p.out_order[o + i] * p.inputs);
            }
          });
    });
  }

  // Rows [row, row + lanes) of grad_y, 0 beyond the last.
  void transpose_rows(int64_t row) const {
    constexpr int L = kLanes<T>;
    for (int64_t o = 0; o < p.outputs; o += L) {
      const int64_t n = minimum(L, p.outputs - o);
      Vec<T> block[L];
      for (int i = 0; i < L; ++i) {
        block[i] = row + i < p.rows ? load_upto(b.grad_y + (row + i) * p.outputs + o, n) : Vec<T>{};
      }
      transpose<T>(block);
      for (int64_t i = 0; i < n; ++i) store(transposed + (o + i) * columns + row, block[i]);
    }
  }
};

template <template <class> class Run, class T, class Arguments>
KernelOf<Arguments> kernel() {
  return {[](const Arguments& arguments, int) {
            Workspace workspace{nullptr};
            const Run<T> run(arguments, workspace);
            (void)run;
            return workspace.used;
          },
          [](const Arguments& arguments, char* memory, const Executor& executor) {
            Workspace workspace{memory};
            Run<T>(arguments, workspace).run(executor);
          }};
}

}  // namespace

template <class T>
KernelOf<MaskedLinear<T>> masked_linear_kernel() {
  return kernel<Forward, T, MaskedLinear<T>>();
}
template <class T>
KernelOf<MaskedLinearBackward<T>> masked_linear_backward_kernel() {
  return kernel<Backward, T, MaskedLinearBackward<T>>();
}
template KernelOf<MaskedLinear<float>> masked_linear_kernel<float>();
template KernelOf<MaskedLinear<double>> masked_linear_kernel<double>();
template KernelOf<MaskedLinearBackward<float>> masked_linear_backward_kernel<float>();
template KernelOf<MaskedLinearBackward<double>> masked_linear_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

// Panels of 64 places (float32, AVX-512) are packed as [channel][place] and multiplied by the rows of the weight; the
// input's gradient is the same with the weight turned. The weight's is a product over all places of all images: images
// are added up in a fixed number of parts, so that the sum does not depend on the threads.
//
// Glow's step at 64 x 48 x 16 x 16 is 75 MFLOP and 6 MB forward: bound by the multiply-adds (0.7 ms on one core at 105
// GFLOP/s), not by memory.
#include "flow/conv1x1.h"

#include "common/gemm.h"
#include "common/rows.h"

namespace genfuse {
GENFUSE_NAMESPACE {
namespace {

constexpr int64_t kParts = 16;    // of the batch, in the weight's gradient
constexpr int64_t kPlaces = 256;  // of a block of the weight's gradient

template <class T>
size_t bytes(int64_t count) {
  return static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(T)), 64));
}

template <class T>
T* take(char*& at, int64_t count) {
  T* p = reinterpret_cast<T*>(at);
  at += bytes<T>(count);
  return p;
}

// y[b] = weight x[b] + bias for all images; panels: one for each thread.
template <class T>
void product(const Conv1x1<T>& p, T* panels, const Executor& executor) {
  constexpr int L = kLanes<T>;
  const int64_t blocks = ceil_div(p.places, kPanel<T>), all = p.batch * blocks;
  const int64_t threads = maximum(1, minimum(executor.threads, all));
  parallel_ranges(executor, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      T* panel = panels + thread * round_up(p.inputs * kPanel<T>, 64);
      alignas(64) T tile[kTileRows * kPanel<T>];
      const Range range = split(all, threads, thread);
      for (int64_t i = range.begin; i < range.end; ++i) {
        const int64_t b = i / blocks, place = i % blocks * kPanel<T>;
        const int64_t valid = minimum(kPanel<T>, p.places - place);
        const int vectors = static_cast<int>(ceil_div(valid, L));
        const T* x = p.x + b * p.inputs * p.places;
        pack_rows<T>(vectors * L, valid, p.inputs, [&](int64_t k) { return x + k * p.places; }, place, panel);
        for_tiles(0, p.outputs, [&](int64_t row, int count) {
          const T* rows[kTileRows];
          for (int r = 0; r < count; ++r) rows[r] = p.weight + (row + r) * p.inputs;
          multiply(count, vectors, p.inputs, rows, 1, panel, tile);
          for (int r = 0; r < count; ++r) {
            T* to = p.y + (b * p.outputs + row + r) * p.places + place;
            const Vec<T> add = p.bias != nullptr ? broadcast(p.bias[row + r]) : Vec<T>{};
            for (int v = 0; v < vectors; ++v) {
              store_upto(to + v * L, load(tile + (r * vectors + v) * L) + add, valid - v * L);
            }
          }
        });
      }
    }
  });
}

template <class T>
int64_t panel_of(int64_t inputs) {
  return round_up(inputs * kPanel<T>, 64);
}

template <class T>
void forward(const Conv1x1<T>& p, char* workspace, const Executor& executor) {
  product(p, reinterpret_cast<T*>(workspace), executor);
}

// The sums over the images [first, last) of part `part`: weight[n][c] and bias[n].
template <class T>
void sum_images(const Conv1x1Backward<T>& b, Range images, T* weight, T* bias, T* panel) {
  constexpr int L = kLanes<T>;
  const Conv1x1<T>& p = b.forward;
  alignas(64) T tile[kTileRows * kPanel<T>];
  for (int64_t i = 0; i < p.outputs * p.inputs; ++i) weight[i] = T(0);
  for (int64_t i = 0; i < p.outputs; ++i) bias[i] = T(0);
  for (int64_t image = images.begin; image < images.end; ++image) {
    const T *x = p.x + image * p.inputs * p.places, *grad = b.grad_y + image * p.outputs * p.places;
    for (int64_t n = 0; n < p.outputs; ++n) bias[n] += sum_of(grad + n * p.places, p.places);
    for (int64_t place = 0; place < p.places; place += kPlaces) {
      const int64_t depth = minimum(kPlaces, p.places - place);
      for (int64_t column = 0; column < p.inputs; column += kPanel<T>) {
        const int64_t valid = minimum(kPanel<T>, p.inputs - column);
        const int vectors = static_cast<int>(ceil_div(valid, L));
        pack_columns<T>(
            vectors * L, depth,
            [&](int64_t c) { return c < valid ? x + (column + c) * p.places + place : static_cast<const T*>(nullptr); },
            panel);
        for_tiles(0, p.outputs, [&](int64_t row, int count) {
          const T* rows[kTileRows];
          for (int r = 0; r < count; ++r) rows[r] = grad + (row + r) * p.places + place;
          multiply(count, vectors, depth, rows, 1, panel, tile);
          for (int r = 0; r < count; ++r) {
            T* to = weight + (row + r) * p.inputs + column;
            for (int v = 0; v < vectors; ++v) {
              const int64_t left = valid - v * L;
              store_upto(to + v * L, load_upto(to + v * L, left) + load(tile + (r * vectors + v) * L), left);
            }
          }
        });
      }
    }
  }
}

template <class T>
size_t backward_workspace(const Conv1x1Backward<T>& b, int threads) {
  const Conv1x1<T>& p = b.forward;
  const int64_t each = maximum(panel_of<T>(p.outputs), round_up(kPlaces * kPanel<T>, 64));
  return bytes<T>(p.inputs * p.outputs) + static_cast<size_t>(threads) * bytes<T>(each) +
         static_cast<size_t>(kParts) * (bytes<T>(p.inputs * p.outputs) + bytes<T>(p.outputs));
}

template <class T>
void backward(const Conv1x1Backward<T>& b, char* workspace, const Executor& executor) {
  const Conv1x1<T>& p = b.forward;
  const int64_t each = maximum(panel_of<T>(p.outputs), round_up(kPlaces * kPanel<T>, 64));
  T* turned = take<T>(workspace, p.inputs * p.outputs);
  T* panels = take<T>(workspace, 0);
  workspace += static_cast<size_t>(executor.threads) * bytes<T>(each);
  if (b.grad_x != nullptr) {
    for (int64_t n = 0; n < p.outputs; ++n) {
      for (int64_t c = 0; c < p.inputs; ++c) turned[c * p.outputs + n] = p.weight[n * p.inputs + c];
    }
    Conv1x1<T> back = p;
    back.inputs = p.outputs;
    back.outputs = p.inputs;
    back.x = b.grad_y;
    back.weight = turned;
    back.bias = nullptr;
    back.y = b.grad_x;
    product(back, panels, executor);
  }
  if (b.grad_weight == nullptr && b.grad_bias == nullptr) return;
  const int64_t parts = maximum(1, minimum(kParts, p.batch));
  T* weights = reinterpret_cast<T*>(workspace);
  const auto weight_step = static_cast<int64_t>(bytes<T>(p.inputs * p.outputs) / sizeof(T));
  const auto bias_step = static_cast<int64_t>(bytes<T>(p.outputs) / sizeof(T));
  T* biases = weights + kParts * weight_step;
  const int64_t threads = maximum(1, minimum(executor.threads, parts));
  parallel_ranges(executor, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t thread = first; thread < last; ++thread) {
      T* panel = panels + thread * static_cast<int64_t>(bytes<T>(each) / sizeof(T));
      const Range range = split(parts, threads, thread);
      for (int64_t part = range.begin; part < range.end; ++part) {
        sum_images(b, split(p.batch, parts, part), weights + part * weight_step, biases + part * bias_step, panel);
      }
    }
  });
  const auto total = [&](T* to, const T* from, int64_t step, int64_t count) {
    if (to == nullptr) return;
    for (int64_t i = 0; i < count; ++i) {
      T sum = from[i];
      for (int64_t part = 1; part < parts; ++part) sum += from[part * step + i];
      to[i] = sum;
    }
  };
  total(b.grad_weight, weights, weight_step, p.inputs * p.outputs);
  total(b.grad_bias, biases, bias_step, p.outputs);
}

}  // namespace

template <class T>
KernelOf<Conv1x1<T>> conv1x1_kernel() {
  return {
      [](const Conv1x1<T>& p, int threads) { return static_cast<size_t>(threads) * bytes<T>(panel_of<T>(p.inputs)); },
      &forward<T>};
}
template <class T>
KernelOf<Conv1x1Backward<T>> conv1x1_backward_kernel() {
  return {&backward_workspace<T>, &backward<T>};
}
template KernelOf<Conv1x1<float>> conv1x1_kernel<float>();
template KernelOf<Conv1x1<double>> conv1x1_kernel<double>();
template KernelOf<Conv1x1Backward<float>> conv1x1_backward_kernel<float>();
template KernelOf<Conv1x1Backward<double>> conv1x1_backward_kernel<double>();

}  // namespace GENFUSE_ISA
}  // namespace genfuse

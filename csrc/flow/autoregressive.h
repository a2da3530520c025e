// The inverse of a flow whose columns are transformed one after the other, the parameters of each given by a network
// that sees the columns before it. Plain data: no torch, no Python.
//
// Columns and units lie in order of their degrees ("places"), so that what a unit sees of its source is the first
// `live` places of it, and what becomes known with a group of columns of one degree is a range of places.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"
#include "flow/scale.h"
#include "flow/spline.h"

namespace genfuse {

enum class Activation : int64_t { none, relu, tanh, elu, leaky_relu, sigmoid, silu, gelu };
inline constexpr int64_t kActivations = 8;
enum class ColumnTransform : int64_t { affine, additive, rational_quadratic };
inline constexpr int64_t kColumnTransforms = 3;

// The columns of x (source -1), or the units of a layer.
struct AutoregressiveOrder {
  int64_t count = 0;
  const int64_t* order = nullptr;  // [count]: which lies at each place
  const int64_t* place = nullptr;  // [count]: where each lies
  const int64_t* ends =
      nullptr;          // [groups]: columns: where each group ends; units: the places before group g's columns
  bool sorted = false;  // each lies at the place of its own number
};

// What is multiplied: x (-1) or the output of a layer, through an activation.
struct AutoregressiveView {
  int64_t source = -1;
  Activation activation = Activation::none;
};

template <class T>
struct AutoregressiveLayer {
  AutoregressiveOrder units;
  const T* weight = nullptr;  // [units, inputs]
  const T* bias = nullptr;    // [units] or null
  const T* add = nullptr;     // [batch] rows of `units`, add_stride apart, or null
  int64_t add_stride = 0;
  int64_t view = 0;                // the number of what is multiplied
  int64_t residual = -1;           // a layer whose output is added, or -1
  const int64_t* live = nullptr;   // [units]: how many places of its source the unit at each place sees
  const int64_t* begin = nullptr;  // [units + 1]: sums of `live`
  // For the way back: from which place on the units see the source's place, and the sums of how many they are.
  const int64_t* first = nullptr;             // [inputs]
  const int64_t* transposed_begin = nullptr;  // [inputs + 1]
};

template <class T>
struct Autoregressive {
  int64_t batch = 0, groups = 0, parameters = 0;  // parameters of each column
  AutoregressiveOrder columns;
  const T* u = nullptr;  // [batch, columns]
  // The last layer's units lie in the order of the columns' places, those of a column together.
  const AutoregressiveLayer<T>* layers = nullptr;
  int64_t layer_count = 0;
  const AutoregressiveView* views = nullptr;
  int64_t view_count = 0;
  ColumnTransform transform = ColumnTransform::affine;
  bool scale_first = false;  // of an affine transformation's two parameters
  ScaleOptions<T> scale;
  SplineOptions<T> spline;
  T* x = nullptr;            // [batch, columns]
  T* log_abs_det = nullptr;  // [batch]

  const AutoregressiveOrder& order_of(int64_t source) const { return source < 0 ? columns : layers[source].units; }
};

// From the solution x: the gradient by u, and what parameters' gradients are products of. Layers' gradients and views'
// values are [batch, units], in the units' own order; 0 for what no column depends on.
template <class T>
struct AutoregressiveBackward {
  Autoregressive<T> forward;            // its x is read
  const T* grad_x = nullptr;            // [batch, columns] or null
  const T* grad_log_abs_det = nullptr;  // [batch] or null
  T* grad_u = nullptr;                  // [batch, columns]
  T* const* grad_layers = nullptr;      // [layers], each null if not wanted
  T* const* values = nullptr;           // [views], each null if not wanted
};

GENFUSE_DECLARE(template <class T> KernelOf<Autoregressive<T>> autoregressive_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<AutoregressiveBackward<T>> autoregressive_backward_kernel())

}  // namespace genfuse

// How an affine transformation gets its scale from what a network gives: the kinds of reference/flow/coupling.py, whose
// order is that of the codes.
#pragma once

#include <cstdint>

namespace genfuse {

enum class ScaleKind : int64_t { exp, sigmoid, inverse_sigmoid, softplus, tanh, atan, sigmoid_clamp, softclip, clip };
inline constexpr int64_t kScaleKinds = 9;

template <class T>
struct ScaleOptions {
  ScaleKind kind = ScaleKind::exp;
  T offset = 0, eps = 0, low = 0, clamp = 0;
};

}  // namespace genfuse

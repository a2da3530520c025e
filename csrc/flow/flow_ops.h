// What the operators of couplings and pointwise flows share: tensors [B, C, *S] read row by row, computed in the widest
// dtype among them.
#pragma once

#include "common/torch_glue.h"

namespace genfuse {

inline void check_rows(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() >= 2, name, " must have at least 2 dimensions, [B, C, ...], got ", shape_of(t));
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
}

// Calls f with a double if any of the tensors is one, else with a float.
template <class F>
auto with_widest_type(const Tensor& x, const Tensor& second, const OptionalTensor& third, F&& f) {
  bool wide = compute_type("x", x) == ScalarType::Double;
  wide = compute_type("the second argument", second) == ScalarType::Double || wide;
  wide = (third.has_value() && compute_type("the third argument", *third) == ScalarType::Double) || wide;
  return wide ? f(double{}) : f(float{});
}

// A tensor whose batch rows are dense, each `stride` elements after the one before: as it is (a batch may be a slice or
// expanded), or copied. The caller keeps it alive while a kernel runs.
template <class T>
struct RowTensor {
  Tensor held;
  const T* data;
  int64_t stride;

  RowTensor(const char* name, const Tensor& t) : held(to_type(t, kScalar<T>)) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
    int64_t size = 1;
    bool is_dense = true;
    for (int64_t i = held.dim() - 1; i >= 1; --i) {
      is_dense = is_dense && (held.size(i) == 1 || held.stride(i) == size);
      size *= held.size(i);
    }
    if (!is_dense) held = torch::stable::contiguous(held);
    stride = held.size(0) == 1 ? 0 : held.stride(0);
    data = read<T>(held);
  }
};

}  // namespace genfuse

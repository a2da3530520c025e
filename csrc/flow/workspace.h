// Hands out aligned pieces of the caller's workspace; with a null base it only measures.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/math.h"

namespace genfuse {
GENFUSE_NAMESPACE {

struct Workspace {
  char* base;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    used = (used + 63) / 64 * 64;
    T* p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + used);
    used += static_cast<size_t>(count > 0 ? count : 0) * sizeof(T);
    return p;
  }
};

}  // namespace GENFUSE_ISA
}  // namespace genfuse

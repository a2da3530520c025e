#pragma once

#include <cstdint>

namespace genfuse {

// An operand of an elementwise function: element e is data[e % period]. So a tensor that is broadcast over the batch is
// read where it lies. Null if absent.
template <class T>
struct Periodic {
  const T* data = nullptr;
  int64_t period = 1;
};

}  // namespace genfuse

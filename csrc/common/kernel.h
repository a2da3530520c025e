// How the layers above reach a CPU kernel. It allocates nothing: the caller asks how much workspace (64-byte aligned)
// it wants for a number of threads, and hands it over.
#pragma once

#include <cstddef>

namespace genfuse {

struct Executor;

template <class Arguments>
struct KernelOf {
  size_t (*workspace)(const Arguments& arguments, int threads) = nullptr;
  void (*run)(const Arguments& arguments, char* workspace, const Executor& executor) = nullptr;
};

}  // namespace genfuse

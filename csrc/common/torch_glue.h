// The one header that knows torch, through the LibTorch Stable ABI only: allocation, checks, threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "common/kernel.h"
#include "common/parallel.h"
#include "common/periodic.h"

namespace genfuse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Buffers of more than 32 MB (a reserve) are mapped anew by malloc every time, and a page fault for each 4 KB was a
// tenth of a forward pass. Linux gives pages of 2 MB to those who ask. Only whole ones inside the buffer are asked for,
// so none takes more memory; smaller buffers are reused by malloc and fault no more.
inline void prefer_huge_pages([[maybe_unused]] const Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{2} << 20;
  const auto bytes = static_cast<uintptr_t>(t.numel()) * static_cast<uintptr_t>(t.element_size());
  if (bytes < 16 * page) return;
  const auto address = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
  const uintptr_t begin = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a refusal changes nothing
#endif
}

// Through aten::empty, so that torch.utils.deterministic.fill_uninitialized_memory poisons our buffers, too.
inline Tensor empty(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const Tensor t = torch::stable::empty({sizes.begin(), sizes.size()}, dtype);
  prefer_huge_pages(t);
  return t;
}

inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

inline std::string shape_of(std::initializer_list<int64_t> sizes) {
  std::string s = "[";
  for (int64_t size : sizes) s += (s.size() > 1 ? ", " : "") + std::to_string(size);
  return s + "]";
}

inline void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == static_cast<int64_t>(sizes.size());
  int64_t i = 0;
  for (int64_t size : sizes) same = same && t.size(i++) == size;
  STD_TORCH_CHECK(same, name, " must have shape ", shape_of(sizes), ", got ", shape_of(t));
}

inline bool is_floating(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::Double || t == ScalarType::BFloat16 || t == ScalarType::Half;
}

// What the kernels compute in: float64 for float64, float32 for everything narrower.
inline ScalarType compute_type(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), name,
                  " must be a floating point tensor (float32, float64, bfloat16 or float16)");
  return t.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Contiguous and in the type that the kernel computes in; the caller keeps the result alive while the kernel runs.
inline Tensor prepared(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, ScalarType dtype,
                       ScalarType compute) {
  check_shape(name, t, sizes);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must have the dtype of x");
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like x");
  const Tensor converted = dtype == compute ? t : torch::stable::to(t, compute);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}

inline OptionalTensor prepared(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes,
                               ScalarType dtype, ScalarType compute) {
  return t.has_value() ? OptionalTensor(prepared(name, *t, sizes, dtype, compute)) : std::nullopt;
}

inline Tensor to_type(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
template <class T>
const T* read(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* read(const OptionalTensor& t) {
  return t.has_value() ? read<T>(*t) : nullptr;
}

// After how many elements an expanded tensor repeats itself, if it is dense but for a broadcast over its first
// dimensions; 0 if it is not.
inline int64_t period_of(const Tensor& t) {
  int64_t period = 1;
  bool repeats = false;
  for (int64_t i = t.dim() - 1; i >= 0; --i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    if (stride == 0 && size > 1) {
      repeats = true;
    } else if (repeats || stride != period) {
      return 0;
    } else {
      period *= size;
    }
  }
  return period;
}

// An operand of an elementwise kernel: of x's shape (a broadcast is an expanded tensor) and dtype. It is copied only
// where the kernel could not read it. The caller keeps `held` alive while the kernel runs.
template <class T>
struct Operand {
  Tensor held;
  Periodic<T> read;

  Operand(const char* name, const Tensor& t, const Tensor& x, ScalarType compute) : held(t) {
    bool same = t.dim() == x.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == x.size(i);
    STD_TORCH_CHECK(same, name, " must have the shape ", shape_of(x), " of the first argument, got ", shape_of(t));
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of the first argument");
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like the first argument");
    if (t.scalar_type() != compute) held = torch::stable::to(held, compute);
    int64_t period = period_of(held);
    if (period == 0) {
      held = torch::stable::contiguous(held);
      period = held.numel();
    }
    read = {genfuse::read<T>(held), period > 0 ? period : 1};
  }
};
template <class T>
struct OptionalOperand {
  std::optional<Operand<T>> operand;
  Periodic<T> read;

  OptionalOperand(const char* name, const OptionalTensor& t, const Tensor& x, ScalarType compute) {
    if (t.has_value()) read = operand.emplace(name, *t, x, compute).read;
  }
};

// A dense tensor of x's shape, converted to what the kernel computes in.
inline Tensor dense(const char* name, const Tensor& t, ScalarType compute) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
  const Tensor converted = to_type(t, compute);
  return converted.is_contiguous() ? converted : torch::stable::contiguous(converted);
}
inline OptionalTensor dense(const char* name, const OptionalTensor& t, ScalarType compute) {
  return t.has_value() ? OptionalTensor(dense(name, *t, compute)) : std::nullopt;
}

inline Tensor empty_like(const Tensor& x, ScalarType dtype) {
  const Tensor t = torch::stable::empty(x.sizes(), dtype);
  prefer_huge_pages(t);
  return t;
}

// The rows of a tensor, whose first `batch_dims` dimensions are the batch.
struct Rows {
  std::vector<int64_t> sizes;
  int64_t count = 1, row = 1;  // rows, and elements of each

  Rows(const char* name, const Tensor& t, int64_t batch_dims) {
    STD_TORCH_CHECK(batch_dims >= 0 && batch_dims <= t.dim(), "batch_dims must be between 0 and the ", t.dim(),
                    " dimensions of ", name, ", got ", batch_dims);
    for (int64_t i = 0; i < t.dim(); ++i) (i < batch_dims ? count : row) *= t.size(i);
    for (int64_t i = 0; i < batch_dims; ++i) sizes.push_back(t.size(i));
  }
  Tensor new_sums(ScalarType dtype) const { return torch::stable::empty({sizes.data(), sizes.size()}, dtype); }
};

struct RandomPair {
  uint64_t seed = 0, offset = 0;
};
inline RandomPair random_pair(const OptionalTensor& rng) {
  if (!rng.has_value()) return {};
  check_shape("rng", *rng, {2});
  STD_TORCH_CHECK(rng->is_cpu() && rng->scalar_type() == ScalarType::Long && rng->is_contiguous(),
                  "rng must be a contiguous int64 tensor (seed, offset) on the CPU");
  const auto* pair = read<int64_t>(*rng);
  return {static_cast<uint64_t>(pair[0]), static_cast<uint64_t>(pair[1])};
}

inline Tensor nothing(ScalarType dtype) { return torch::stable::empty({int64_t{0}}, dtype); }

// Calls f with a value of the type that is computed in.
template <class F>
auto with_compute_type(const char* name, const Tensor& x, F&& f) {
  return compute_type(name, x) == ScalarType::Double ? f(double{}) : f(float{});
}
template <class T>
inline constexpr ScalarType kScalar = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;

// torch's own intra-op pool.
inline Executor torch_executor() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t n, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// Runs a kernel with workspace from torch's allocator.
template <class Arguments>
void run_kernel(const KernelOf<Arguments>& kernel, const Arguments& arguments) {
  const Executor executor = torch_executor();
  const auto bytes = static_cast<int64_t>(kernel.workspace(arguments, executor.threads));
  const Tensor workspace = empty({bytes + 64}, ScalarType::Byte);
  auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
  address = (address + 63) / 64 * 64;
  kernel.run(arguments, reinterpret_cast<char*>(address), executor);
}

}  // namespace genfuse

#include "sampling/quantize.h"

#include <limits>

#include "common/torch_glue.h"

namespace genfuse {
namespace {

void check_vectors(const Tensor& x, const Tensor& codebook) {
  STD_TORCH_CHECK(x.dim() > 0 && codebook.dim() == 2 && codebook.size(0) > 0 && codebook.size(1) == x.size(x.dim() - 1),
                  "x must be [..., D] and codebook [K, D] with K > 0, got ", shape_of(x), " and ", shape_of(codebook));
  STD_TORCH_CHECK(codebook.size(0) <= std::numeric_limits<int32_t>::max(), "codebook must have fewer than 2^31 codes");
  STD_TORCH_CHECK(x.scalar_type() == codebook.scalar_type(), "codebook must have the dtype of x");
}

std::vector<int64_t> rows_of(const Tensor& x) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) sizes.push_back(x.size(i));
  return sizes;
}
int64_t product(const std::vector<int64_t>& sizes) {
  int64_t n = 1;
  for (int64_t size : sizes) n *= size;
  return n;
}

const Tensor checked_indices(const Tensor& indices, int64_t count, int64_t codes) {
  STD_TORCH_CHECK(indices.is_cpu() && indices.scalar_type() == ScalarType::Long && indices.numel() == count,
                  "indices must be int64 on the CPU, one for each vector of x; got ", shape_of(indices));
  const Tensor t = indices.is_contiguous() ? indices : torch::stable::contiguous(indices);
  const auto* index = read<int64_t>(t);
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < codes, "indices must be in [0, ", codes, "), got ", index[i]);
  }
  return t;
}

std::tuple<Tensor, Tensor, Tensor> vector_quantize(const Tensor& x, const Tensor& codebook, double commitment_weight,
                                                   double codebook_weight) {
  check_vectors(x, codebook);
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    const std::vector<int64_t> sizes = rows_of(x);
    const Tensor from = dense("x", x, kScalar<T>), codes = dense("codebook", codebook, kScalar<T>);
    const Tensor quantized = empty_like(x, kScalar<T>);
    const Tensor indices = torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::Long);
    const Tensor loss = torch::stable::empty({sizes.data(), sizes.size()}, kScalar<T>);
    Quantize<T> p;
    p.count = product(sizes);
    p.codes = codebook.size(0);
    p.dim = codebook.size(1);
    p.x = read<T>(from);
    p.codebook = read<T>(codes);
    p.weight = static_cast<T>(commitment_weight + codebook_weight);
    p.quantized = data<T>(quantized);
    p.indices = data<int64_t>(indices);
    p.loss = data<T>(loss);
    if (p.count > 0) run_kernel(GENFUSE_DISPATCH(quantize_kernel<T>)(), p);
    return {to_type(quantized, x.scalar_type()), indices, loss};
  });
}

std::tuple<Tensor, Tensor> vector_quantize_backward(const OptionalTensor& grad_quantized,
                                                    const OptionalTensor& grad_loss, const Tensor& x,
                                                    const Tensor& codebook, const Tensor& indices,
                                                    double commitment_weight, double codebook_weight, int64_t needs) {
  check_vectors(x, codebook);
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    const int64_t count = product(rows_of(x));
    const Tensor from = dense("x", x, kScalar<T>), codes = dense("codebook", codebook, kScalar<T>);
    const Tensor index = checked_indices(indices, count, codebook.size(0));
    STD_TORCH_CHECK(!grad_quantized.has_value() || grad_quantized->numel() == x.numel(),
                    "grad_quantized must have the shape of x");
    STD_TORCH_CHECK(!grad_loss.has_value() || grad_loss->numel() == count, "grad_loss must have one element a vector");
    const OptionalTensor by_quantized = dense("grad_quantized", grad_quantized, kScalar<T>);
    const OptionalTensor by_loss = dense("grad_loss", grad_loss, kScalar<T>);
    const bool for_x = (needs & 1) != 0, for_codes = (needs & 2) != 0;
    const Tensor grad_x = for_x ? empty_like(x, kScalar<T>) : nothing(kScalar<T>);
    const Tensor grad_codebook = for_codes ? empty_like(codebook, kScalar<T>) : nothing(kScalar<T>);
    QuantizeBackward<T> p;
    p.count = count;
    p.codes = codebook.size(0);
    p.dim = codebook.size(1);
    p.x = read<T>(from);
    p.codebook = read<T>(codes);
    p.indices = read<int64_t>(index);
    p.grad_quantized = read<T>(by_quantized);
    p.grad_loss = read<T>(by_loss);
    p.commitment_weight = static_cast<T>(commitment_weight);
    p.codebook_weight = static_cast<T>(codebook_weight);
    if (for_x) p.grad_x = data<T>(grad_x);
    if (for_codes) p.grad_codebook = data<T>(grad_codebook);
    run_kernel(GENFUSE_DISPATCH(quantize_backward_kernel<T>)(), p);
    return {to_type(grad_x, x.scalar_type()), to_type(grad_codebook, x.scalar_type())};
  });
}

std::tuple<Tensor, Tensor> vector_quantize_statistics(const Tensor& x, const Tensor& indices, int64_t num_codes) {
  STD_TORCH_CHECK(x.dim() > 0, "x must be [..., D]");
  STD_TORCH_CHECK(num_codes > 0, "num_codes must be above 0, got ", num_codes);
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    const Tensor from = dense("x", x, kScalar<T>);
    QuantizeStatistics<T> p;
    p.count = product(rows_of(x));
    p.codes = num_codes;
    p.dim = x.size(x.dim() - 1);
    const Tensor index = checked_indices(indices, p.count, num_codes);
    const Tensor counts = empty({num_codes}, kScalar<T>), sums = empty({num_codes, p.dim}, kScalar<T>);
    p.x = read<T>(from);
    p.indices = read<int64_t>(index);
    p.counts = data<T>(counts);
    p.sums = data<T>(sums);
    run_kernel(GENFUSE_DISPATCH(quantize_statistics_kernel<T>)(), p);
    return {counts, sums};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("vector_quantize", TORCH_BOX(&genfuse::vector_quantize));
  m.impl("vector_quantize_backward", TORCH_BOX(&genfuse::vector_quantize_backward));
  m.impl("vector_quantize_statistics", TORCH_BOX(&genfuse::vector_quantize_statistics));
}

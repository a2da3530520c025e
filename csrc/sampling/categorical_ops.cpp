#include "sampling/categorical.h"

#include "common/torch_glue.h"

namespace genfuse {
namespace {

Tensor categorical_sample(const Tensor& logits, const OptionalTensor& u, const OptionalTensor& rng,
                          int64_t num_samples) {
  STD_TORCH_CHECK(logits.dim() > 0 && logits.size(logits.dim() - 1) > 0,
                  "logits must be [..., V] with at least one class, got ", shape_of(logits));
  STD_TORCH_CHECK(num_samples >= 0, "num_samples must not be negative, got ", num_samples);
  STD_TORCH_CHECK(u.has_value() || rng.has_value(), "a sample needs u or rng");
  return with_compute_type("logits", logits, [&]<class T>(T) {
    std::vector<int64_t> sizes;
    for (int64_t i = 0; i + 1 < logits.dim(); ++i) sizes.push_back(logits.size(i));
    sizes.push_back(num_samples);
    const Tensor out = torch::stable::empty({sizes.data(), sizes.size()}, ScalarType::Long);
    const Tensor from = dense("logits", logits, kScalar<T>);
    const OptionalTensor uniforms = dense("u", u, kScalar<T>);
    STD_TORCH_CHECK(!u.has_value() || u->numel() == out.numel(), "u must have shape ", shape_of(out), ", got ",
                    shape_of(*u));
    const RandomPair pair = random_pair(rng);
    Categorical<T> p;
    p.classes = logits.size(logits.dim() - 1);
    p.rows = logits.numel() / p.classes;
    p.samples = num_samples;
    p.logits = read<T>(from);
    p.u = read<T>(uniforms);
    p.seed = pair.seed;
    p.offset = pair.offset;
    p.out = data<int64_t>(out);
    if (out.numel() == 0) return out;
    run_kernel(GENFUSE_DISPATCH(categorical_kernel<T>)(), p);
    for (int64_t row = 0; row < p.rows; ++row) {
      STD_TORCH_CHECK(p.out[row * num_samples] >= 0, "row ", row,
                      " of logits is no distribution: it has NaN or +inf, or nothing but -inf");
    }
    return out;
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) { m.impl("categorical_sample", TORCH_BOX(&genfuse::categorical_sample)); }

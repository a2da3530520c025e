#include "masked_conv/ancestral.h"

#include "common/torch_glue.h"
#include "masked_conv/ancestral_plan.h"

namespace genfuse {
namespace {

std::tuple<Tensor, Tensor> ancestral_sample(const std::vector<Tensor>& tensors, const Tensor& u,
                                            const OptionalTensor& given, const std::vector<int64_t>& program,
                                            const std::vector<double>& constants, bool record) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors must hold at least one tensor");
  return with_compute_type("tensors", tensors[0], [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    std::vector<Tensor> held;
    std::vector<PixelTensor<T>> seen;
    for (const Tensor& tensor : tensors) {
      STD_TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "tensors must all have the dtype of the first");
      held.push_back(dense("tensors", tensor, kScalar<T>));
      PixelTensor<T>& last = seen.emplace_back();
      last.data = read<T>(held.back());
      for (int64_t i = 0; i < tensor.dim(); ++i) last.sizes.push_back(tensor.size(i));
    }
    STD_TORCH_CHECK(u.dim() == 4, "u must have shape [B, draws, H, W], got ", shape_of(u));
    PixelPlan<T> plan(u.size(0), seen, program, constants);
    Ancestral<T>& p = plan.p;
    const int64_t outputs = p.values[p.head_value].channels;
    check_shape("u", u, {p.batch, p.draws, p.height, p.width});
    const Tensor uniforms = dense("u", u, kScalar<T>);
    p.u = read<T>(uniforms);
    OptionalTensor levels_given;
    if (given.has_value()) {
      check_shape("given", *given, {p.batch, p.channels, p.height, p.width});
      STD_TORCH_CHECK(given->is_cpu() && given->scalar_type() == ScalarType::Long, "given must be int64 on the CPU");
      levels_given = torch::stable::contiguous(*given);
      p.given = read<int64_t>(levels_given);
    }
    const Tensor levels = empty({p.batch, p.channels, p.height, p.width}, ScalarType::Long);
    const Tensor recorded = record ? empty({p.batch, outputs, p.height, p.width}, kScalar<T>) : nothing(kScalar<T>);
    p.out = data<int64_t>(levels);
    p.outputs = record ? data<T>(recorded) : nullptr;
    if (p.batch > 0) run_kernel(GENFUSE_DISPATCH(ancestral_kernel<T>)(), p);
    return {levels, recorded};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) { m.impl("ancestral_sample", TORCH_BOX(&genfuse::ancestral_sample)); }

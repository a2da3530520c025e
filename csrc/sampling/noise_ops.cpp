#include "sampling/noise.h"

#include "common/torch_glue.h"

namespace genfuse {
namespace {

template <class T>
void fill(const Tensor& out, NoiseFill<T> args) {
  args.out = data<T>(out);
  args.count = out.numel();
  run_kernel(GENFUSE_DISPATCH(noise_kernel<T>)(), args);
}

// Fills `out` in the order of its elements.
void philox_(const Tensor& out, const Tensor& rng, int64_t noise) {
  STD_TORCH_CHECK(out.is_cpu(), "out must be on the CPU for this kernel");
  check_shape("rng", rng, {2});
  STD_TORCH_CHECK(rng.is_cpu() && rng.scalar_type() == ScalarType::Long && rng.is_contiguous(),
                  "rng must be a contiguous int64 tensor (seed, offset) on the CPU");
  STD_TORCH_CHECK(noise >= 0 && noise < kNoises, "noise must be between 0 and ", kNoises - 1, ", got ", noise);
  const auto kind = static_cast<Noise>(noise);
  const ScalarType type = out.scalar_type();
  STD_TORCH_CHECK(kind == Noise::bits ? type == ScalarType::Long : is_floating(type), "out must be ",
                  kind == Noise::bits ? "an int64 tensor" : "a floating point tensor");
  const ScalarType drawn = kind == Noise::bits ? ScalarType::Long : compute_type("out", out);
  const bool direct = type == drawn && out.is_contiguous();
  const Tensor to = direct ? out : torch::stable::empty(out.sizes(), drawn);
  const auto arguments = [&]<class T>(T) {
    NoiseFill<T> args;
    args.noise = kind;
    args.seed = static_cast<uint64_t>(read<int64_t>(rng)[0]);
    args.offset = static_cast<uint64_t>(read<int64_t>(rng)[1]);
    if (type == ScalarType::Half) args.uniform_bits = 11;
    if (type == ScalarType::BFloat16) args.uniform_bits = 8;
    return args;
  };
  switch (drawn) {
    case ScalarType::Long:
      fill(to, arguments(int64_t{}));
      break;
    case ScalarType::Double:
      fill(to, arguments(double{}));
      break;
    default:
      fill(to, arguments(float{}));
  }
  if (!direct) torch::stable::copy_(const_cast<Tensor&>(out), to);
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) { m.impl("philox_", TORCH_BOX(&genfuse::philox_)); }

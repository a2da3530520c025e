#include "masked_conv/ancestral_cuda.h"

#include <cstring>

#include "masked_conv/ancestral_plan.h"
#include "recurrent/sequence_cuda_ops.h"

namespace genfuse {
namespace {

// The plan's tables, one after the other, with pointers among them that are right where `base` is.
class Tables {
 public:
  explicit Tables(const Ancestral<float>& p) : p_(p) {
    for (int64_t i = 0; i < p.instruction_count; ++i) {
      const PixelInstruction<float>& in = p.instructions[i];
      for (int64_t phase = 0; in.op == PixelOp::conv && phase < in.up * in.up; ++phase) {
        runs_ += in.run_count[phase];
        for (int64_t n = 0; n < in.run_count[phase]; ++n) places_ += in.runs[phase][n].taps;
      }
    }
  }
  int64_t bytes() const { return of_places() + places_ * static_cast<int64_t>(sizeof(int64_t)); }

  void write(char* to, const char* base, Ancestral<float>& device) const {
    std::memcpy(to, p_.values, static_cast<size_t>(of_instructions()));
    int64_t run = of_runs(), place = of_places(), at = of_instructions();
    for (int64_t i = 0; i < p_.instruction_count; ++i) {
      PixelInstruction<float> in = p_.instructions[i];
      const int64_t* places = in.places;
      in.places = reinterpret_cast<const int64_t*>(base + place);
      for (int64_t phase = 0; in.op == PixelOp::conv && phase < in.up * in.up; ++phase) {
        const PixelRun* runs = in.runs[phase];
        const auto size = static_cast<int64_t>(sizeof(PixelRun)) * in.run_count[phase];
        in.runs[phase] = reinterpret_cast<const PixelRun*>(base + run);
        if (size > 0) std::memcpy(to + run, runs, static_cast<size_t>(size));
        run += size;
        for (int64_t n = 0; n < in.run_count[phase]; ++n) {
          const auto count = static_cast<int64_t>(sizeof(int64_t)) * runs[n].taps;
          std::memcpy(to + place, places + runs[n].first, static_cast<size_t>(count));
          place += count;
        }
      }
      std::memcpy(to + at, &in, sizeof(in));
      at += static_cast<int64_t>(sizeof(in));
    }
    device.values = reinterpret_cast<const PixelValue*>(base);
    device.instructions = reinterpret_cast<const PixelInstruction<float>*>(base + of_instructions());
  }

 private:
  int64_t of_instructions() const { return p_.value_count * static_cast<int64_t>(sizeof(PixelValue)); }
  int64_t of_runs() const {
    return of_instructions() + p_.instruction_count * static_cast<int64_t>(sizeof(PixelInstruction<float>));
  }
  int64_t of_places() const { return of_runs() + runs_ * static_cast<int64_t>(sizeof(PixelRun)); }

  const Ancestral<float>& p_;
  int64_t runs_ = 0, places_ = 0;
};

std::tuple<Tensor, Tensor> ancestral_sample(const std::vector<Tensor>& tensors, const Tensor& u,
                                            const OptionalTensor& given, const std::vector<int64_t>& program,
                                            const std::vector<double>& constants, bool record) {
  STD_TORCH_CHECK(!tensors.empty(), "tensors must hold at least one tensor");
  STD_TORCH_CHECK(on_device(u) && u.dim() == 4, "u must have shape [B, draws, H, W] on a CUDA device, got ",
                  shape_of(u));
  const OnDeviceOf guard(u);
  const auto beside_u = [&](const char* name, const Tensor& t) {
    STD_TORCH_CHECK(on_device(t) && t.get_device_index() == u.get_device_index(), name, " must be on u's device");
  };
  std::vector<Tensor> held;
  std::vector<PixelTensor<float>> seen;
  for (const Tensor& tensor : tensors) {
    beside_u("tensors", tensor);
    STD_TORCH_CHECK(is_floating(tensor.scalar_type()) && tensor.scalar_type() != ScalarType::Double,
                    "tensors must be float32, bfloat16 or float16");
    STD_TORCH_CHECK(tensor.scalar_type() == tensors[0].scalar_type(), "tensors must all have the dtype of the first");
    held.push_back(torch::stable::contiguous(to_type(tensor, ScalarType::Float)));
    PixelTensor<float>& last = seen.emplace_back();
    last.data = read<float>(held.back());
    for (int64_t i = 0; i < tensor.dim(); ++i) last.sizes.push_back(tensor.size(i));
  }
  const PixelPlan<float> plan(u.size(0), seen, program, constants);
  CudaAncestral a;
  a.sampler = plan.p;
  Ancestral<float>& p = a.sampler;
  check_shape("u", u, {p.batch, p.draws, p.height, p.width});
  const Tensor uniforms = torch::stable::contiguous(to_type(u, ScalarType::Float));
  p.u = read<float>(uniforms);
  Tensor levels_given;
  if (given.has_value()) {
    beside_u("given", *given);
    check_shape("given", *given, {p.batch, p.channels, p.height, p.width});
    STD_TORCH_CHECK(given->scalar_type() == ScalarType::Long, "given must be int64");
    levels_given = torch::stable::contiguous(*given);
    p.given = read<int64_t>(levels_given);
  }
  const int64_t outputs = plan.p.values[p.head_value].channels;
  const Tensor levels = empty_like_x(u, {p.batch, p.channels, p.height, p.width}, ScalarType::Long);
  const Tensor recorded = record ? empty_like_x(u, {p.batch, outputs, p.height, p.width}, ScalarType::Float)
                                 : empty_like_x(u, {0}, ScalarType::Float);
  p.out = data<int64_t>(levels);
  p.outputs = record ? data<float>(recorded) : nullptr;
  if (p.batch == 0) return {levels, recorded};

  const DeviceLimits limits = device_limits(u.get_device_index());
  STD_TORCH_CHECK(limits.cooperative, "ancestral_sample: the device has no cooperative launch");
  a.blocks = static_cast<int>(p.batch < limits.multiprocessors ? p.batch : limits.multiprocessors);
  a.buffer_size = p.attended > p.levels ? p.attended : p.levels;
  const Tensor packed = empty_like_x(u, {p.packed}, ScalarType::Float);
  const Tensor storage = empty_like_x(u, {a.blocks * p.image_storage}, ScalarType::Float);
  const Tensor buffer = empty_like_x(u, {a.blocks * a.buffer_size}, ScalarType::Float);
  a.packed = data<float>(packed), a.storage = data<float>(storage), a.buffer = data<float>(buffer);

  const Tables tables(plan.p);
  const Tensor here = empty({tables.bytes()}, ScalarType::Byte);
  Tensor there = empty_like_x(u, {tables.bytes()}, ScalarType::Byte);
  tables.write(data<char>(here), data<char>(there), p);
  torch::stable::copy_(there, here);
  check_launch("ancestral_sample", launch_ancestral(a, current_stream(u)));
  return {levels, recorded};
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_FRAGMENT(GENFUSE_CUDA_LIBRARY, m) {
  m.def(
      "ancestral_sample(Tensor[] tensors, Tensor u, Tensor? given, int[] program, float[] constants, bool record) -> "
      "(Tensor levels, Tensor outputs)");
}

STABLE_TORCH_LIBRARY_IMPL(GENFUSE_CUDA_LIBRARY, GENFUSE_CUDA_KEY, m) {
  m.impl("ancestral_sample", TORCH_BOX(&genfuse::ancestral_sample));
}

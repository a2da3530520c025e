// From CUDA tensors to the arguments of the persistent kernels, and the products around the recurrence, which are
// torch's. The operators are those of library.cpp under a namespace of their own, genfuse_cuda: whoever serves
// genfuse::lstm on CUDA chooses between these, the Triton kernels and the reference (python/genfuse/ops).
#pragma once

#ifndef GENFUSE_CUDA_ON_HOST
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include "common/device_types.h"
#include "common/torch_glue.h"
#include "recurrent/sequence.h"
#include "recurrent/sequence_cuda.h"

namespace genfuse {

inline void check_launch(const char* op, int error) {
  STD_TORCH_CHECK(error == 0, op, ": the CUDA kernel could not be launched: ", error_text(error));
}

// tests/cuda_host compiles these files, too, for tensors on the CPU.
#ifdef GENFUSE_CUDA_ON_HOST
#define GENFUSE_CUDA_KEY CPU
#define GENFUSE_CUDA_LIBRARY genfuse_cuda_host
inline bool on_device(const Tensor& t) { return t.is_cpu(); }
inline void* current_stream(const Tensor&) { return nullptr; }
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
};
#else
#define GENFUSE_CUDA_KEY CUDA
#define GENFUSE_CUDA_LIBRARY genfuse_cuda
inline bool on_device(const Tensor& t) { return t.is_cuda(); }
inline void* current_stream(const Tensor& on) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  return stream;
}
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor& t) : guard(t.get_device_index()) {}
  torch::stable::accelerator::DeviceGuard guard;
};
#endif

// What the kernels take: contiguous, on x's device, of x's dtype.
inline Tensor on_cuda(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, const Tensor& x) {
  check_shape(name, t, sizes);
  STD_TORCH_CHECK(on_device(t) && t.get_device_index() == x.get_device_index(), name, " must be on x's device");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  return torch::stable::contiguous(t);
}
inline Tensor on_cuda_float(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes, const Tensor& x) {
  return to_type(on_cuda(name, t, sizes, x), ScalarType::Float);
}
inline OptionalTensor on_cuda_float(const char* name, const OptionalTensor& t, std::initializer_list<int64_t> sizes,
                                    const Tensor& x) {
  return t.has_value() ? OptionalTensor(on_cuda_float(name, *t, sizes, x)) : std::nullopt;
}

inline Tensor empty_like_x(const Tensor& x, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return torch::stable::new_empty(x, {sizes.begin(), sizes.size()}, dtype);
}

inline Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// a b with a float32 result, for float32 or bfloat16 operands: what is not rounded needs no second rounding.
inline Tensor product_in_float(const Tensor& a, const Tensor& b) {
  if (a.scalar_type() == ScalarType::Float || !a.is_cuda()) {
    return torch::stable::matmul(to_type(a, ScalarType::Float), to_type(b, ScalarType::Float));
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(ScalarType::Float)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "dtype", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Calls run(float{}) or run(BFloat16{}).
template <class Run>
void for_type(ScalarType type, const Run& run) {
  if (type == ScalarType::Float) {
    run(float{});
  } else {
    run(BFloat16{});
  }
}

inline Tensor dropped(const OptionalTensor& x, const Tensor& out, int64_t period, double p, const Tensor& rng,
                      uint64_t stream_of_numbers) {
  for_type(out.scalar_type(), [&]<class T>(T) {
    Dropout<T> arguments;
    arguments.x = read<T>(x);
    arguments.out = data<T>(out);
    arguments.count = out.numel();
    arguments.period = period;
    arguments.p = p;
    arguments.rng = read<int64_t>(rng);
    arguments.stream = stream_of_numbers;
    check_launch("dropout", launch_dropout(arguments, current_stream(out)));
  });
  return out;
}

// One call's sequence: what both cells and both directions need, checked.
struct CudaSequence {
  Tensor x, h0, weight_ih, weight_hh;
  Tensor h0_float, w_hh;  // w_hh: with its weights dropped
  OptionalTensor resets, rng, output_mask;
  int64_t steps, batch, input, hidden, gates, rows;
  double zoneout_h, zoneout_c, weight_drop, input_dropout, output_dropout;
  bool training, reverse;
  PersistentPlan plan;

  CudaSequence(const char* op, const Tensor& x_in, const Tensor& h0_in, const Tensor& w_ih, const Tensor& w_hh_in,
               int64_t gate_count, const OptionalTensor& batch_sizes, const OptionalTensor& reset,
               const OptionalTensor& numbers, double zone_h, double zone_c, double drop_weights, double drop_input,
               double drop_output, bool train, bool backwards, bool backward_pass)
      : gates(gate_count),
        zoneout_h(zone_h),
        zoneout_c(zone_c),
        weight_drop(train ? drop_weights : 0),
        input_dropout(train ? drop_input : 0),
        output_dropout(train ? drop_output : 0),
        training(train),
        reverse(backwards) {
    STD_TORCH_CHECK(on_device(x_in), "x must be on a CUDA device for this kernel");
    STD_TORCH_CHECK(!batch_sizes.has_value(), op, ": the persistent CUDA kernel takes no packed sequences");
    STD_TORCH_CHECK(x_in.dim() == 3, "x must have 3 dimensions ([T, B, I]), got shape ", shape_of(x_in));
    STD_TORCH_CHECK(x_in.scalar_type() == ScalarType::Float || x_in.scalar_type() == ScalarType::BFloat16, op,
                    ": the persistent CUDA kernel takes float32 and bfloat16");
    x = x_in;
    steps = x.size(0), batch = x.size(1), input = x.size(2), rows = steps * batch;
    STD_TORCH_CHECK(h0_in.dim() == 2 && h0_in.size(0) == batch, "h0 must have shape [", batch, ", H], got ",
                    shape_of(h0_in));
    hidden = h0_in.size(1);
    h0 = on_cuda("h0", h0_in, {batch, hidden}, x);
    h0_float = to_type(h0, ScalarType::Float);
    weight_ih = on_cuda("weight_ih", w_ih, {gates * hidden, input}, x);
    weight_hh = w_hh = on_cuda("weight_hh", w_hh_in, {gates * hidden, hidden}, x);
    for (double p : {zone_h, zone_c, drop_weights, drop_input, drop_output}) {
      STD_TORCH_CHECK(p >= 0 && p <= 1, op, ": zoneout and dropout must be probabilities between 0 and 1, got ", p);
    }
    if (reset.has_value()) {
      check_shape("resets", *reset, {steps, batch});
      STD_TORCH_CHECK(on_device(*reset) && reset->scalar_type() == ScalarType::Bool,
                      "resets must be a bool tensor on x's device");
      resets = torch::stable::contiguous(*reset);
    }
    const bool draws =
        training && (zoneout_h > 0 || zoneout_c > 0 || weight_drop > 0 || input_dropout > 0 || output_dropout > 0);
    if (draws) {
      STD_TORCH_CHECK(numbers.has_value(), "rng must be given: training with dropout or zoneout draws random numbers");
      check_shape("rng", *numbers, {2});
      STD_TORCH_CHECK(on_device(*numbers) && numbers->scalar_type() == ScalarType::Long,
                      "rng must be an int64 tensor (seed, offset) on x's device");
      rng = torch::stable::contiguous(*numbers);
    }
    plan = persistent_plan(hidden, batch, static_cast<int>(gates), x.scalar_type() == ScalarType::Float ? 4 : 2,
                           backward_pass, device_limits(x.get_device_index()));
    STD_TORCH_CHECK(plan.objection == nullptr, op, ": ", plan.objection);
    if (weight_drop > 0) {
      w_hh =
          dropped(weight_hh, torch::stable::empty_like(weight_hh), weight_hh.numel(), weight_drop, *rng, kStreamWeight);
    }
    if (output_dropout > 0) {
      output_mask = dropped(std::nullopt, empty_like_x(x, {batch, hidden}, ScalarType::Float), batch * hidden,
                            output_dropout, *rng, kStreamOutput);
    }
  }

  bool empty() const { return rows == 0 || hidden == 0; }

  // x as rows, under the locked input mask; the same serves for its gradient.
  Tensor masked_rows(const Tensor& t) const {
    const Tensor flat = torch::stable::contiguous(torch::stable::reshape(t, {rows, input}));
    if (input_dropout == 0 || rows == 0) return flat;
    return dropped(flat, torch::stable::empty_like(flat), batch * input, input_dropout, *rng, kStreamInput);
  }

  Tensor from_input() const { return product_in_float(masked_rows(x), transposed(weight_ih)); }

  template <class T>
  void fill(PersistentSequence<T>& p) const {
    p.plan = plan;
    p.steps = steps, p.batch = batch, p.hidden = hidden, p.reverse = reverse;
    p.resets = read<bool>(resets);
    p.rng = read<int64_t>(rng);
    p.zoneout_h = zoneout_h, p.zoneout_c = zoneout_c, p.training = training;
    p.output_mask = read<float>(output_mask);
    p.w_hh = read<T>(w_hh);
  }

  // h_{t-1} of every row, as the weights' gradient reads it.
  Tensor previous_states(const Tensor& y, const Tensor& kept) const {
    const Tensor out = empty_like_x(x, {rows, hidden}, x.scalar_type());
    for_type(x.scalar_type(), [&]<class T>(T) {
      PreviousStates<T> p;
      p.kept = kept.numel() > 0 ? read<float>(kept) : nullptr;
      p.y = read<T>(y);
      p.h0 = read<float>(h0_float);
      p.resets = read<bool>(resets);
      p.out = data<T>(out);
      p.steps = steps, p.batch = batch, p.hidden = hidden, p.reverse = reverse;
      check_launch("previous_states", launch_previous_states(p, current_stream(x)));
    });
    return out;
  }

  // A weight's gradient under the mask that its forward pass was multiplied with.
  Tensor undropped(const Tensor& grad) const {
    if (weight_drop == 0) return grad;
    return dropped(grad, torch::stable::empty_like(grad), grad.numel(), weight_drop, *rng, kStreamWeight);
  }

  Tensor in_x_type(const Tensor& t) const { return to_type(t, x.scalar_type()); }
  Tensor nothing() const { return empty_like_x(x, {0}, x.scalar_type()); }
  Tensor nothing_float() const { return empty_like_x(x, {0}, ScalarType::Float); }
};

inline Tensor column_sums(const Tensor& t, ScalarType dtype) {
  const int64_t rows[] = {0};
  return to_type(torch::stable::sum(t, torch::headeronly::IntHeaderOnlyArrayRef(rows, 1), false, ScalarType::Float),
                 dtype);
}

}  // namespace genfuse

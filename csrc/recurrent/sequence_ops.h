// From tensors to the kernels' Sequence and Regularizers, with the checks that keep a kernel inside its buffers. The
// public functions in python/genfuse/ops say more about what is wrong; these also guard callers of torch.ops.
#pragma once

#include "common/torch_glue.h"
#include "recurrent/sequence.h"

namespace genfuse {

struct SequenceTensors {
  Sequence seq;
  ScalarType dtype = ScalarType::Float, compute = ScalarType::Float;
  Tensor x;  // with unit stride in the last dimension, of type compute
  OptionalTensor batch_sizes, resets;

  SequenceTensors(const Tensor& x_in, const Tensor& h0, int64_t hidden, const OptionalTensor& sizes,
                  const OptionalTensor& reset, bool reverse) {
    STD_TORCH_CHECK(x_in.is_cpu(), "x must be on the CPU for this kernel");
    const bool packed = sizes.has_value();
    STD_TORCH_CHECK(x_in.dim() == (packed ? 2 : 3), "x must have ", packed ? 2 : 3, " dimensions ",
                    packed ? "([N, I], with batch_sizes)" : "([T, B, I])", ", got shape ", shape_of(x_in));
    STD_TORCH_CHECK(h0.dim() == 2, "h0 must have 2 dimensions ([B, features]), got shape ", shape_of(h0));
    dtype = x_in.scalar_type();
    compute = compute_type("x", x_in);
    x = to_type(x_in, compute);
    const int64_t last = x.dim() - 1;
    if (x.size(last) > 1 && x.stride(last) != 1) x = torch::stable::contiguous(x);
    seq.input = x.size(last);
    seq.hidden = hidden;
    seq.state = h0.size(1);
    seq.batch = h0.size(0);
    seq.reverse = reverse;
    if (packed) {
      STD_TORCH_CHECK(sizes->is_cpu() && sizes->dim() == 1 && sizes->scalar_type() == ScalarType::Long,
                      "batch_sizes must be a 1-D int64 tensor on the CPU");
      STD_TORCH_CHECK(!reset.has_value(), "resets cannot be combined with batch_sizes");
      batch_sizes = torch::stable::contiguous(*sizes);
      seq.batch_sizes = read<int64_t>(*batch_sizes);
      seq.steps = batch_sizes->size(0);
      seq.rows = x.size(0);
      seq.x_batch = x.stride(0);
      int64_t rows = 0, before = seq.batch;
      for (int64_t t = 0; t < seq.steps; ++t) {
        const int64_t n = seq.batch_sizes[t];
        STD_TORCH_CHECK(n > 0 && n <= before && (t > 0 || n == seq.batch), "batch_sizes must start at the batch size ",
                        seq.batch, " and never increase, got ", n, " at ", t);
        before = n;
        rows += n;
      }
      STD_TORCH_CHECK(rows == seq.rows, "batch_sizes add up to ", rows, ", but x has ", seq.rows, " rows");
    } else {
      seq.steps = x.size(0);
      STD_TORCH_CHECK(x.size(1) == seq.batch, "h0 must have x's batch size ", x.size(1), ", got ", seq.batch);
      seq.rows = seq.steps * seq.batch;
      seq.x_step = x.stride(0);
      seq.x_batch = x.stride(1);
      if (reset.has_value()) {
        check_shape("resets", *reset, {seq.steps, seq.batch});
        STD_TORCH_CHECK(reset->is_cpu() && reset->scalar_type() == ScalarType::Bool,
                        "resets must be a bool tensor on the CPU");
        resets = torch::stable::contiguous(*reset);
        seq.resets = read<bool>(*resets);
      }
    }
  }

  Tensor empty_rows(int64_t features, ScalarType type) const {
    return batch_sizes.has_value() ? empty({seq.rows, features}, type) : empty({seq.steps, seq.batch, features}, type);
  }
  // A row-major [rows, features] gradient or result in either layout.
  Tensor rows(const char* name, const Tensor& t, int64_t features) const {
    return batch_sizes.has_value() ? prepared(name, t, {seq.rows, features}, t.scalar_type(), compute)
                                   : prepared(name, t, {seq.steps, seq.batch, features}, t.scalar_type(), compute);
  }
};

inline double probability(const char* name, double p) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, name, " must be a probability between 0 and 1, got ", p);
  return p;
}

inline Regularizers make_regularizers(double zoneout_h, double zoneout_c, double weight_drop, double input_dropout,
                                      double output_dropout, bool training, const OptionalTensor& rng) {
  Regularizers r;
  r.zoneout_h = probability("zoneout_h", zoneout_h);
  r.zoneout_c = probability("zoneout_c", zoneout_c);
  r.weight_drop = probability("weight_drop", weight_drop);
  r.input_dropout = probability("input_dropout", input_dropout);
  r.output_dropout = probability("output_dropout", output_dropout);
  r.training = training;
  if (training && (zoneout_h > 0 || zoneout_c > 0 || weight_drop > 0 || input_dropout > 0 || output_dropout > 0)) {
    STD_TORCH_CHECK(rng.has_value(), "rng must be given: training with dropout or zoneout draws random numbers");
    check_shape("rng", *rng, {2});
    STD_TORCH_CHECK(rng->is_cpu() && rng->scalar_type() == ScalarType::Long && rng->is_contiguous(),
                    "rng must be a contiguous int64 tensor (seed, offset) on the CPU");
    r.seed = static_cast<uint64_t>(read<int64_t>(*rng)[0]);
    r.offset = static_cast<uint64_t>(read<int64_t>(*rng)[1]);
  }
  return r;
}

// A result that may be absent: [0], as schemas have no optional results.
inline Tensor absent(ScalarType type) { return empty({0}, type); }

// Part of a forward pass's reserve, as backward gets it back.
inline Tensor saved(const char* name, const Tensor& t, int64_t rows, int64_t features, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == features, name, " must have shape ",
                  shape_of({rows, features}), " (was the forward pass run with save=True?), got ", shape_of(t));
  return prepared(name, t, {rows, features}, type, type);
}

}  // namespace genfuse

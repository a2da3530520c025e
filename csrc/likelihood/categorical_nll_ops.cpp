#include "likelihood/categorical_nll.h"

#include "common/torch_glue.h"

namespace genfuse {
namespace {

// logits' dimensions but `dim`, merged where they can be counted as one.
template <class T>
Levels<const T> levels_of(const Tensor& t, int64_t dim) {
  Levels<const T> r;
  r.data = read<T>(t);
  r.level = t.stride(dim);
  for (int64_t i = 0; i < t.dim(); ++i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (i == dim || size == 1) continue;
    const int last = r.dims - 1;
    if (last >= 0 && r.stride[last] == size * stride) {
      r.size[last] *= size;
      r.stride[last] = stride;
    } else {
      STD_TORCH_CHECK(r.dims < kPositionDims, "logits must have at most ", kPositionDims, " dimensions");
      r.size[r.dims] = size;
      r.stride[r.dims++] = stride;
    }
  }
  return r;
}

// `held` and what it comes to are kept alive while a kernel runs.
template <class T>
struct Inputs {
  Tensor held, target;
  CategoricalNll<T> p;

  Inputs(const Tensor& logits, const Tensor& target_, int64_t dim, bool by_position)
      : held(to_type(logits, kScalar<T>)), target(dense("target", target_, ScalarType::Long)) {
    p.levels = logits.size(dim);
    p.positions = target.numel();
    for (int64_t i = 1; i < target.dim(); ++i) p.row *= target.size(i);
    if (p.row == 0) p.row = 1;
    p.by_position = by_position;
    p.target = read<int64_t>(target);
    p.logits = levels_of<T>(held, dim);
    for (int64_t i = 0; i < p.positions; ++i) {
      STD_TORCH_CHECK(p.target[i] >= 0 && p.target[i] < p.levels, "target must hold levels in [0, ", p.levels,
                      "), got ", p.target[i]);
    }
  }
};

template <class F>
auto checked(const Tensor& logits, const Tensor& target, int64_t dim, F&& f) {
  STD_TORCH_CHECK(dim >= 1 && dim < logits.dim(), "dim must be a dimension of logits but the first, got ", dim,
                  " for logits of shape ", shape_of(logits));
  STD_TORCH_CHECK(logits.size(dim) > 0, "logits must have at least one level, got ", shape_of(logits));
  STD_TORCH_CHECK(logits.is_cpu() && target.is_cpu(), "logits and target must be on the CPU");
  const ScalarType t = target.scalar_type();
  STD_TORCH_CHECK(t == ScalarType::Long || t == ScalarType::Int || t == ScalarType::Short || t == ScalarType::Byte,
                  "target must be int64, int32, int16 or uint8");
  bool same = target.dim() == logits.dim() - 1;
  for (int64_t i = 0; same && i < target.dim(); ++i) same = target.size(i) == logits.size(i < dim ? i : i + 1);
  STD_TORCH_CHECK(same, "target must have the shape of logits, ", shape_of(logits), ", without dimension ", dim,
                  "; got ", shape_of(target));
  return with_compute_type("logits", logits, f);
}

std::tuple<Tensor, Tensor, Tensor> categorical_nll(const Tensor& logits, const Tensor& target, int64_t dim,
                                                   bool by_position) {
  return checked(logits, target, dim, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Inputs<T> in(logits, target, dim, by_position);
    const Tensor top = empty_like(target, kScalar<T>), log_sum = empty_like(target, kScalar<T>);
    Tensor out = by_position ? empty_like(target, kScalar<T>) : empty({target.size(0)}, kScalar<T>);
    in.p.out = data<T>(out);
    in.p.top = data<T>(top);
    in.p.log_sum = data<T>(log_sum);
    if (in.p.positions > 0) {
      run_kernel(GENFUSE_DISPATCH(categorical_nll_kernel<T>)(), in.p);
    } else {
      torch::stable::zero_(out);
    }
    return {out, top, log_sum};
  });
}

Tensor categorical_nll_backward(const OptionalTensor& grad, const Tensor& logits, const Tensor& target,
                                const Tensor& top, const Tensor& log_sum, int64_t dim, bool by_position,
                                int64_t needs) {
  return checked(logits, target, dim, [&]<class T>(T) -> Tensor {
    if ((needs & 1) == 0) return nothing(logits.scalar_type());
    Tensor result = torch::stable::empty_like(logits);
    prefer_huge_pages(result);
    if (!grad.has_value() || logits.numel() == 0) return torch::stable::zero_(result);
    Inputs<T> in(logits, target, dim, by_position);
    STD_TORCH_CHECK(top.numel() == in.p.positions, "top must have the shape of target, got ", shape_of(top));
    STD_TORCH_CHECK(log_sum.numel() == in.p.positions, "log_sum must have the shape of target, got ",
                    shape_of(log_sum));
    STD_TORCH_CHECK(grad->numel() == (by_position ? in.p.positions : target.size(0)),
                    "grad must have the shape of the result, got ", shape_of(*grad));
    // The gradient lies as the logits do; where that is no dense tensor, both are brought in order.
    Tensor held = logits.scalar_type() == kScalar<T> ? result : torch::stable::empty_like(in.held);
    bool same = true;
    for (int64_t i = 0; i < held.dim(); ++i) same = same && (held.size(i) == 1 || held.stride(i) == in.held.stride(i));
    if (!same) {
      in.held = torch::stable::contiguous(in.held);
      in.p.logits = levels_of<T>(in.held, dim);
      held = result.is_contiguous() && logits.scalar_type() == kScalar<T> ? result : empty_like(logits, kScalar<T>);
    }
    const Tensor from = dense("grad", *grad, kScalar<T>);
    const Tensor tops = dense("top", top, kScalar<T>), sums = dense("log_sum", log_sum, kScalar<T>);
    CategoricalNllBackward<T> b;
    b.forward = in.p;
    b.forward.top = data<T>(tops);
    b.forward.log_sum = data<T>(sums);
    b.grad = read<T>(from);
    b.grad_logits = data<T>(held);
    run_kernel(GENFUSE_DISPATCH(categorical_nll_backward_kernel<T>)(), b);
    return held.const_data_ptr() == result.const_data_ptr() ? result : torch::stable::copy_(result, held);
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("categorical_nll", TORCH_BOX(&genfuse::categorical_nll));
  m.impl("categorical_nll_backward", TORCH_BOX(&genfuse::categorical_nll_backward));
}

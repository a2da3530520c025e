#include "flow/spline.h"

#include <algorithm>

#include "common/torch_glue.h"

namespace genfuse {
namespace {

// How the elements of parameters [*shape of x, P] lie, if it is in a way that the kernel can read: at most two
// dimensions once those that follow each other are merged, perhaps repeated over the first dimensions.
template <class T>
bool layout_of(const Tensor& t, SplineParameters<T>& to) {
  struct Dim {
    int64_t size, stride;
  };
  std::vector<Dim> dims;
  bool repeats = false;
  int64_t period = 1, extent = 1;
  for (int64_t i = t.dim() - 2; i >= 0; --i) {
    const int64_t size = t.size(i), stride = t.stride(i);
    if (size == 1) continue;
    if (stride == 0) {
      repeats = true;
      continue;
    }
    if (repeats) return false;
    period *= size;
    extent += (size - 1) * stride;
    if (!dims.empty() && stride == dims.back().stride * dims.back().size) {
      dims.back().size *= size;
    } else {
      dims.push_back({size, stride});
    }
  }
  if (dims.size() > 2) return false;
  const int64_t last = t.dim() - 1;
  to.step = t.size(last) > 1 ? t.stride(last) : 1;
  to.extent = extent + (t.size(last) - 1) * to.step;
  to.period = std::max(period, int64_t{1});
  to.run = dims.empty() ? 1 : dims[0].size;
  to.stride = dims.empty() ? 1 : dims[0].stride;
  to.run_stride = dims.size() < 2 ? 0 : dims[1].stride;
  return true;
}

struct Options {
  int64_t kind, normalizer, ends;
  bool tails, inverse;
  double left, right, bottom, top, min_width, min_height, min_derivative, logit_scale;
  int64_t bins, batch_dims;
};

// The arguments, and the tensors that they point into.
template <class T>
struct Inputs {
  Operand<T> x;
  Rows rows;
  std::vector<Tensor> held;  // params, heights, derivatives
  Spline<T> p;

  Inputs(const Tensor& x_, const Tensor& params, const OptionalTensor& heights, const OptionalTensor& derivatives,
         const Options& o)
      : x("x", x_, x_, kScalar<T>), rows("x", x_, o.batch_dims) {
    STD_TORCH_CHECK(o.kind >= 0 && o.kind <= 3 && o.normalizer >= 0 && o.normalizer <= 3 && o.ends >= 0 && o.ends <= 2,
                    "kind, normalizer and ends must be those of genfuse.ops, got ", o.kind, ", ", o.normalizer, ", ",
                    o.ends);
    STD_TORCH_CHECK(o.kind == 0 || o.normalizer == 0,
                    "normalizer must be softmax for kinds but rational quadratic, got ", o.normalizer);
    STD_TORCH_CHECK(o.bins >= 1 && o.bins <= kSplineMaxBins, "bins must be between 1 and ", kSplineMaxBins, ", got ",
                    o.bins);
    auto& options = p.options;
    options.kind = static_cast<SplineKind>(o.kind);
    options.normalizer = static_cast<SplineNormalizer>(o.normalizer);
    options.ends = static_cast<SplineEnds>(o.ends);
    options.tails = o.tails;
    options.inverse = o.inverse;
    options.left = static_cast<T>(o.left);
    options.right = static_cast<T>(o.right);
    options.bottom = static_cast<T>(o.bottom);
    options.top = static_cast<T>(o.top);
    options.min_width = static_cast<T>(o.min_width);
    options.min_height = static_cast<T>(o.min_height);
    options.min_derivative = static_cast<T>(o.min_derivative);
    options.logit_scale = static_cast<T>(o.logit_scale);
    options.bins = static_cast<int>(o.bins);
    STD_TORCH_CHECK(options.kind != SplineKind::quadratic || options.ends != SplineEnds::one || o.bins >= 2,
                    "bins must be at least 2 for a quadratic spline with tails, got 1");
    p.count = rows.count * rows.row;
    p.row = rows.row > 0 ? rows.row : 1;
    p.x = x.read;
    const bool packed = !heights.has_value();
    add("params", params, x_, packed ? options.parameters() : options.widths());
    if (!packed) {
      add("heights", *heights, x_, options.heights());
      STD_TORCH_CHECK(derivatives.has_value() || options.derivatives() == 0,
                      "derivatives must be given where the spline has any");
      if (derivatives.has_value()) add("derivatives", *derivatives, x_, options.derivatives());
    } else {
      STD_TORCH_CHECK(!derivatives.has_value(), "derivatives must not be given with packed parameters");
    }
  }

  void add(const char* name, const Tensor& t, const Tensor& x_, int count) {
    bool fits = t.dim() == x_.dim() + 1 && t.size(t.dim() - 1) == count;
    for (int64_t i = 0; fits && i < x_.dim(); ++i) fits = t.size(i) == x_.size(i);
    STD_TORCH_CHECK(fits, name, " must have the shape of x ", shape_of(x_), " and ", count,
                    " parameters in a last dimension, got ", shape_of(t));
    STD_TORCH_CHECK(t.scalar_type() == x_.scalar_type(), name, " must have the dtype of x");
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU like x");
    Tensor source = to_type(t, kScalar<T>);
    auto& part = p.parameters[held.size()];
    if (!layout_of(source, part)) {
      source = torch::stable::contiguous(source);
      layout_of(source, part);
    }
    part.count = count;
    part.data = read<T>(source);
    held.push_back(source);
  }
};

std::tuple<Tensor, Tensor> spline(const Tensor& x, const Tensor& params, const OptionalTensor& heights,
                                  const OptionalTensor& derivatives, int64_t kind, int64_t normalizer, int64_t ends,
                                  bool tails, bool inverse, double left, double right, double bottom, double top,
                                  double min_width, double min_height, double min_derivative, double logit_scale,
                                  int64_t bins, int64_t batch_dims) {
  const Options o{kind, normalizer, ends,       tails,          inverse,     left, right,     bottom,
                  top,  min_width,  min_height, min_derivative, logit_scale, bins, batch_dims};
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(x, params, heights, derivatives, o);
    const Tensor y = empty_like(x, kScalar<T>);
    Tensor log_slope = in.rows.new_sums(kScalar<T>);
    in.p.y = data<T>(y);
    in.p.log_slope = data<T>(log_slope);
    if (in.p.count > 0) {
      run_kernel(GENFUSE_DISPATCH(spline_kernel<T>)(), in.p);
    } else {
      torch::stable::zero_(log_slope);
    }
    const bool each = batch_dims == x.dim();
    return {to_type(y, x.scalar_type()), each ? to_type(log_slope, x.scalar_type()) : log_slope};
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spline_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_log_slope, const Tensor& x, const Tensor& params,
    const OptionalTensor& heights, const OptionalTensor& derivatives, int64_t kind, int64_t normalizer, int64_t ends,
    bool tails, bool inverse, double left, double right, double bottom, double top, double min_width, double min_height,
    double min_derivative, double logit_scale, int64_t bins, int64_t batch_dims, int64_t needs) {
  const Options o{kind, normalizer, ends,       tails,          inverse,     left, right,     bottom,
                  top,  min_width,  min_height, min_derivative, logit_scale, bins, batch_dims};
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    Inputs<T> in(x, params, heights, derivatives, o);
    SplineBackward<T> b;
    b.forward = in.p;
    OptionalTensor from_y, from_log;
    if (grad_y.has_value()) {
      STD_TORCH_CHECK(grad_y->numel() == in.p.count, "grad_y must have the shape of x, got ", shape_of(*grad_y));
      from_y = dense("grad_y", *grad_y, kScalar<T>);
    }
    if (grad_log_slope.has_value()) {
      STD_TORCH_CHECK(grad_log_slope->numel() == in.rows.count,
                      "grad_log_slope must have an element for each row, got ", shape_of(*grad_log_slope));
      from_log = dense("grad_log_slope", *grad_log_slope, kScalar<T>);
    }
    b.grad_y = read<T>(from_y);
    b.grad_log_slope = read<T>(from_log);
    const ScalarType dtype = x.scalar_type();
    const Tensor to_x = (needs & 1) != 0 ? empty_like(x, kScalar<T>) : nothing(kScalar<T>);
    if ((needs & 1) != 0) b.grad_x = data<T>(to_x);
    // In the memory order of the parameters: the gradient of a permuted view is then a view, too.
    std::vector<Tensor> to;
    for (size_t i = 0; i < 3; ++i) {
      if (i >= in.held.size() || (needs >> (i + 1) & 1) == 0) {
        to.push_back(nothing(kScalar<T>));
        continue;
      }
      Tensor t = torch::stable::empty_like(in.held[i]);
      auto& part = b.grad_parameters[i];
      if (!layout_of(t, part) || part.period != std::max(in.p.count, int64_t{1})) {
        t = torch::stable::contiguous(t);
        layout_of(t, part);
      }
      prefer_huge_pages(t);
      part.count = in.p.parameters[i].count;
      part.data = data<T>(t);
      to.push_back(t);
    }
    if (in.p.count > 0) run_kernel(GENFUSE_DISPATCH(spline_backward_kernel<T>)(), b);
    return {to_type(to_x, dtype), to_type(to[0], dtype), to_type(to[1], dtype), to_type(to[2], dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("spline", TORCH_BOX(&genfuse::spline));
  m.impl("spline_backward", TORCH_BOX(&genfuse::spline_backward));
}

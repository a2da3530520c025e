#include "masked_conv/gate.h"

#include "common/torch_glue.h"

namespace genfuse {
namespace {

using torch::headeronly::MemoryFormat;

// How the dimensions of a tensor lie in memory, and where its channels are among them. The rule for the memory format
// is that of python/genfuse/ops/masked_conv/gate.py.
struct Layout {
  MemoryFormat format = MemoryFormat::Contiguous;
  std::vector<int64_t> order;  // of dimensions, slowest first
  int64_t dim, place = 0;      // of the channels, and where in `order`
  int64_t outer = 1, channels, inner = 1;

  Layout(const Tensor& x, int64_t dim_) : dim(dim_) {
    const int64_t dims = x.dim();
    STD_TORCH_CHECK(dim >= 0 && dim < dims, "dim must be between 0 and ", dims - 1, ", got ", dim);
    if (is_channels_last(x)) format = dims == 4 ? MemoryFormat::ChannelsLast : MemoryFormat::ChannelsLast3d;
    for (int64_t d = 0; d < dims; ++d) {
      if (d != 1 || format == MemoryFormat::Contiguous) order.push_back(d);
    }
    if (format != MemoryFormat::Contiguous) order.push_back(1);
    while (order[static_cast<size_t>(place)] != dim) ++place;
    channels = x.size(dim);
    for (int64_t i = 0; i < dims; ++i) {
      if (i != place) (i < place ? outer : inner) *= x.size(order[static_cast<size_t>(i)]);
    }
  }

  Tensor new_tensor(const Tensor& x, int64_t channels_, ScalarType dtype) const {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes[static_cast<size_t>(dim)] = channels_;
    const Tensor t =
        torch::stable::empty({sizes.data(), sizes.size()}, dtype, std::nullopt, std::nullopt, std::nullopt, format);
    prefer_huge_pages(t);
    return t;
  }

 private:
  static bool is_channels_last(const Tensor& x) {
    const int64_t dims = x.dim();
    if ((dims != 4 && dims != 5) || x.is_contiguous() || x.stride(1) != 1) return false;
    int64_t step = 1;
    const auto fits = [&](int64_t d) {
      if (x.size(d) == 1) return true;
      const bool wide = x.stride(d) >= step;
      step = x.stride(d) * x.size(d);
      return wide;
    };
    if (!fits(1)) return false;
    for (int64_t d = dims - 1; d > 1; --d) {
      if (!fits(d)) return false;
    }
    return fits(0);
  }
};

// A tensor as rows [channels, inner] in a layout: as it is, or copied. The caller keeps it alive while a kernel runs.
template <class T>
struct RowsOf {
  Tensor held;
  ChannelRows<T> rows;

  RowsOf(const Tensor& t, const Layout& layout) : held(to_type(t, kScalar<T>)) {
    if (!collapses(layout)) {
      held = torch::stable::contiguous(held, layout.format);
      collapses(layout);
    }
    rows.data = read<T>(held);
  }

 private:
  bool collapses(const Layout& layout) {
    int64_t size = 1, step = 0, count = 1;
    for (auto i = static_cast<int64_t>(layout.order.size()) - 1; i >= 0; --i) {
      const int64_t d = layout.order[static_cast<size_t>(i)], n = held.size(d), stride = held.stride(d);
      if (n == 1) continue;
      if (i >= layout.place) {
        if (stride != size) return false;
        size *= n;
      } else if (count == 1) {
        step = stride;
        count = n;
      } else if (stride == step * count) {
        count *= n;
      } else {
        return false;
      }
    }
    rows.stride = step;
    return true;
  }
};

void check_sizes(const char* name, const Tensor& t, const Tensor& x, int64_t dim, int64_t channels) {
  bool same = t.dim() == x.dim();
  for (int64_t d = 0; same && d < x.dim(); ++d) same = t.size(d) == (d == dim ? channels : x.size(d));
  STD_TORCH_CHECK(same, name, " must be of the shape of x, ", shape_of(x), ", with ", channels,
                  " channels in dimension ", dim, ", got ", shape_of(t));
  STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
}

template <class F>
auto with_widest(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& conditional,
                 const OptionalTensor& residual, F&& f) {
  bool wide = compute_type("x", x) == ScalarType::Double;
  const auto look = [&](const char* name, const OptionalTensor& t) {
    wide = (t.has_value() && compute_type(name, *t) == ScalarType::Double) || wide;
  };
  look("bias", bias);
  look("conditional", conditional);
  look("residual", residual);
  return wide ? f(double{}) : f(float{});
}

// The arguments, and the tensors that they point into.
template <class T>
struct Inputs {
  Layout layout;
  RowsOf<T> x;
  OptionalTensor bias, rows;
  std::optional<RowsOf<T>> full, residual;
  Gate<T> p;

  Inputs(const Tensor& x_, const OptionalTensor& bias_, const OptionalTensor& conditional,
         const OptionalTensor& residual_, int64_t dim, bool linear)
      : layout(x_, dim), x(x_, layout), bias(dense("bias", bias_, kScalar<T>)) {
    STD_TORCH_CHECK(x_.is_cpu(), "x must be on the CPU");
    STD_TORCH_CHECK(layout.channels % 2 == 0, "x must have an even number of channels in dimension ", dim, ", got ",
                    shape_of(x_));
    p.outer = layout.outer;
    p.channels = layout.channels / 2;
    p.inner = layout.inner;
    p.linear = linear;
    p.x = x.rows;
    if (bias.has_value()) check_shape("bias", *bias, {layout.channels});
    p.bias = read<T>(bias);
    if (conditional.has_value()) {
      STD_TORCH_CHECK(conditional->is_cpu(), "conditional must be on the CPU");
      if (is_full(x_, *conditional)) {
        p.full = full.emplace(*conditional, layout).rows;
      } else {
        bool fits = conditional->dim() == x_.dim();
        for (int64_t d = 0; fits && d < x_.dim(); ++d) {
          fits = conditional->size(d) == (d == 0 || d == dim ? x_.size(d) : 1);
        }
        STD_TORCH_CHECK(fits, "conditional must have the shape of x, ", shape_of(x_),
                        ", or 1 in all dimensions but 0 and ", dim, ", got ", shape_of(*conditional));
        rows = dense("conditional", *conditional, kScalar<T>);
        p.rows = read<T>(*rows);
        p.group = dim == 0 ? p.outer : x_.size(0) > 0 ? p.outer / x_.size(0) : 1;
      }
    }
    if (residual_.has_value()) {
      check_sizes("residual", *residual_, x_, dim, p.channels);
      p.residual = residual.emplace(*residual_, layout).rows;
    }
  }

  static bool is_full(const Tensor& x, const Tensor& conditional) {
    bool same = conditional.dim() == x.dim();
    for (int64_t d = 0; same && d < x.dim(); ++d) same = conditional.size(d) == x.size(d);
    return same;
  }
  bool empty() const { return p.outer * p.channels * p.inner == 0; }
};

void check_activation(int64_t activation) {
  STD_TORCH_CHECK(activation == 0 || activation == 1, "activation must be 0 (tanh) or 1 (linear), got ", activation);
}

// What torch's arithmetic makes of two floating dtypes.
ScalarType promoted(ScalarType a, ScalarType b) {
  if (a == b) return a;
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor gated_activation(const Tensor& x, const OptionalTensor& bias, const OptionalTensor& conditional,
                        const OptionalTensor& residual, int64_t dim, int64_t activation) {
  check_activation(activation);
  return with_widest(x, bias, conditional, residual, [&]<class T>(T) {
    Inputs<T> in(x, bias, conditional, residual, dim, activation == 1);
    const Tensor y = in.layout.new_tensor(x, in.p.channels, kScalar<T>);
    in.p.y = data<T>(y);
    if (!in.empty()) run_kernel(GENFUSE_DISPATCH(gate_kernel<T>)(), in.p);
    const ScalarType dtype = x.scalar_type();
    return to_type(y, residual.has_value() ? promoted(dtype, residual->scalar_type()) : dtype);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gated_activation_backward(const OptionalTensor& grad_y, const Tensor& x,
                                                                     const OptionalTensor& bias,
                                                                     const OptionalTensor& conditional,
                                                                     const OptionalTensor& residual, int64_t dim,
                                                                     int64_t activation, int64_t needs) {
  using torch::stable::zero_;
  check_activation(activation);
  return with_widest(x, bias, conditional, residual, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor, Tensor> {
    Inputs<T> in(x, bias, conditional, OptionalTensor(), dim, activation == 1);
    if (residual.has_value()) check_sizes("residual", *residual, x, dim, in.p.channels);
    const auto wants = [&](int bit, bool there) { return (needs >> bit & 1) != 0 && there; };
    const bool of_x = wants(0, true), of_bias = wants(1, bias.has_value());
    const bool of_conditional = wants(2, conditional.has_value()), of_residual = wants(3, residual.has_value());
    const bool of_full = of_conditional && in.full.has_value(), of_rows = of_conditional && !in.full.has_value();
    const bool there = grad_y.has_value() && !in.empty(), computes = there && (of_x || of_bias || of_conditional);
    GateBackward<T> b;
    b.forward = in.p;
    std::optional<RowsOf<T>> grad;
    if (grad_y.has_value()) {
      check_sizes("grad_y", *grad_y, x, dim, in.p.channels);
      b.grad_y = grad.emplace(*grad_y, in.layout).rows;
    }
    const auto made = [&](const Tensor& t) {
      Tensor zeroed = t;
      if (!there) zero_(zeroed);
      return t;
    };
    const auto none = [&] { return nothing(x.scalar_type()); };
    Tensor to_bias = none(), to_rows = none(), to_x = none();
    if (of_bias) {
      to_bias = made(empty({in.layout.channels}, kScalar<T>));
      b.grad_bias = data<T>(to_bias);
    }
    if (of_rows) {
      to_rows = made(empty_like(*conditional, kScalar<T>));
      b.grad_rows = data<T>(to_rows);
    }
    if (of_x || of_full || computes) {
      to_x = made(in.layout.new_tensor(x, in.layout.channels, kScalar<T>));
      b.grad_x = data<T>(to_x);
    }
    if (computes) run_kernel(GENFUSE_DISPATCH(gate_backward_kernel<T>)(), b);
    Tensor to_conditional = none(), to_residual = none();
    if (of_rows) to_conditional = to_type(to_rows, conditional->scalar_type());
    if (of_full) {
      const ScalarType dtype = conditional->scalar_type();
      const bool shared = of_x && dtype == x.scalar_type() && dtype == kScalar<T>;
      to_conditional = shared ? torch::stable::clone(to_x) : to_type(to_x, dtype);
    }
    if (of_residual) {
      to_residual = in.layout.new_tensor(x, in.p.channels, residual->scalar_type());
      if (grad_y.has_value()) {
        torch::stable::copy_(to_residual, *grad_y);
      } else {
        zero_(to_residual);
      }
    }
    return {of_x ? to_type(to_x, x.scalar_type()) : none(), of_bias ? to_type(to_bias, bias->scalar_type()) : none(),
            to_conditional, to_residual};
  });
}

Tensor concat_elu(const Tensor& x, int64_t dim) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  return with_compute_type("x", x, [&]<class T>(T) {
    const Layout layout(x, dim);
    const RowsOf<T> from(x, layout);
    const Tensor y = layout.new_tensor(x, 2 * layout.channels, kScalar<T>);
    const ConcatElu<T> p{layout.outer, layout.channels, layout.inner, from.rows, data<T>(y)};
    if (x.numel() > 0) run_kernel(GENFUSE_DISPATCH(concat_elu_kernel<T>)(), p);
    return to_type(y, x.scalar_type());
  });
}

Tensor concat_elu_backward(const OptionalTensor& grad_y, const Tensor& x, int64_t dim, int64_t needs) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  if ((needs & 1) == 0) return nothing(x.scalar_type());
  return with_compute_type("x", x, [&]<class T>(T) {
    const Layout layout(x, dim);
    const Tensor to = layout.new_tensor(x, layout.channels, kScalar<T>);
    if (!grad_y.has_value()) {
      Tensor zeroed = to;
      torch::stable::zero_(zeroed);
    } else if (x.numel() > 0) {
      check_sizes("grad_y", *grad_y, x, dim, 2 * layout.channels);
      const RowsOf<T> from(x, layout);
      const RowsOf<T> grad(*grad_y, layout);
      ConcatEluBackward<T> b;
      b.forward = {layout.outer, layout.channels, layout.inner, from.rows, nullptr};
      b.grad_y = grad.rows;
      b.grad_x = data<T>(to);
      run_kernel(GENFUSE_DISPATCH(concat_elu_backward_kernel<T>)(), b);
    }
    return to_type(to, x.scalar_type());
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("gated_activation", TORCH_BOX(&genfuse::gated_activation));
  m.impl("gated_activation_backward", TORCH_BOX(&genfuse::gated_activation_backward));
  m.impl("concat_elu", TORCH_BOX(&genfuse::concat_elu));
  m.impl("concat_elu_backward", TORCH_BOX(&genfuse::concat_elu_backward));
}

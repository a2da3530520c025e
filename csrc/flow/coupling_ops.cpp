#include "flow/coupling.h"

#include <cmath>
#include <vector>

#include "common/torch_glue.h"
#include "flow/flow_ops.h"

namespace genfuse {
namespace {

enum class Layout : int64_t { shift_scale, scale_shift, interleaved_shift_scale, interleaved_scale_shift };
enum class Split : int64_t { all, first, second, even, odd, list, mask };

void check_code(const char* name, int64_t code, int64_t count) {
  STD_TORCH_CHECK(code >= 0 && code < count, name, " must be a code in [0, ", count, "), got ", code);
}

// What a split says of the channels of x, and the tensors and lists that it points into.
struct Channels {
  int64_t channels, moved;
  ChannelMap map;
  std::vector<int64_t> list, kept;
  OptionalTensor held;  // the mask
  bool in_order = false;

  Channels(const Tensor& x, const OptionalTensor& given, int64_t split) : channels(x.size(1)), moved(channels) {
    check_code("split", split, 7);
    const int64_t middle = (channels + 1) / 2;
    const auto kind = static_cast<Split>(split);
    STD_TORCH_CHECK(given.has_value() == (kind == Split::list || kind == Split::mask),
                    "channels must be given for a split by a list or a mask, and only there");
    if (kind == Split::first) {
      moved = middle;
    } else if (kind == Split::second) {
      map.first = middle;
      moved = channels - middle;
    } else if (kind == Split::even || kind == Split::odd) {
      map.first = kind == Split::odd ? 1 : 0;
      map.step = 2;
      moved = kind == Split::odd ? channels - middle : middle;
      if (moved > 1) {
        for (int64_t c = 1 - map.first; c < channels; c += 2) kept.push_back(c);
      } else {
        map.step = 1;
      }
    } else if (kind == Split::list) {
      by_list(*given);
    } else if (kind == Split::mask) {
      STD_TORCH_CHECK(given->scalar_type() == ScalarType::Bool && given->is_cpu(),
                      "channels must be a bool tensor on the CPU for a split by a mask");
      bool same = given->dim() == x.dim() - 1;
      for (int64_t i = 0; same && i < given->dim(); ++i) same = given->size(i) == x.size(i + 1);
      STD_TORCH_CHECK(same, "a mask must have the shape of a batch row of x, ", shape_of(x), ", got ",
                      shape_of(*given));
      held = given->is_contiguous() ? *given : torch::stable::contiguous(*given);
    }
  }

  void by_list(const Tensor& given) {
    STD_TORCH_CHECK(given.scalar_type() == ScalarType::Long && given.is_cpu() && given.dim() == 1,
                    "channels must be an int64 vector on the CPU for a split by a list");
    moved = given.size(0);
    const Tensor dense = given.is_contiguous() ? given : torch::stable::contiguous(given);
    const auto* values = read<int64_t>(dense);
    std::vector<bool> seen(static_cast<size_t>(channels), false);
    bool together = true;
    for (int64_t j = 0; j < moved; ++j) {
      const int64_t c = values[j];
      STD_TORCH_CHECK(c >= 0 && c < channels, "split must hold channels of x, in [0, ", channels, "), got ", c);
      STD_TORCH_CHECK(!seen[static_cast<size_t>(c)], "split must hold no channel twice, got ", c, " again");
      seen[static_cast<size_t>(c)] = true;
      list.push_back(c);
      together = together && (j == 0 || c == values[j - 1] + 1);
    }
    if (together) {
      map.first = moved > 0 ? list[0] : 0;
    } else {
      map.list = list.data();
      for (int64_t c = 0; c < channels; ++c) {
        if (!seen[static_cast<size_t>(c)]) kept.push_back(c);
      }
    }
  }
};

// Of a parameter tensor: [B, channels, *S] like x.
void check_parameter(const char* name, const Tensor& t, const Tensor& x, int64_t channels) {
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == (i == 1 ? channels : x.size(i));
  STD_TORCH_CHECK(same, name, " must have the shape of x, ", shape_of(x), ", but for ", channels, " channels; got ",
                  shape_of(t));
}

template <class T>
struct Inputs {
  Channels channels;
  RowTensor<T> x, params;
  std::optional<RowTensor<T>> shift;
  Coupling<T> p;

  // An additive coupling's shift comes as params.
  Inputs(const Tensor& x_, const Tensor& params_, const OptionalTensor& shift_, const OptionalTensor& given,
         ScaleKind scale, int64_t layout, int64_t split, bool inverse)
      : channels(x_, given, split), x("x", x_), params("params", params_) {
    const bool additive = scale == ScaleKind::none, packed = !additive && !shift_.has_value();
    const int64_t moved = channels.moved;
    check_code("layout", layout, 4);
    check_parameter(additive ? "shift" : "params", params_, x_, packed ? 2 * moved : moved);
    if (shift_.has_value()) {
      check_parameter("shift", *shift_, x_, moved);
      shift.emplace("shift", *shift_);
    }
    p.batch = x_.size(0);
    p.channels = channels.channels;
    p.space = 1;
    for (int64_t i = 2; i < x_.dim(); ++i) p.space *= x_.size(i);
    p.moved = moved;
    p.scale = scale;
    p.inverse = inverse;
    p.x = {x.data, x.stride, channels.map};
    p.kept = channels.kept.empty() && channels.map.together() ? nullptr : channels.kept.data();
    p.mask = read<uint8_t>(channels.held);
    if (additive) {
      p.shift = {params.data, params.stride, {}};
      return;
    }
    const auto kind = static_cast<Layout>(layout);
    const bool interleaved = kind == Layout::interleaved_shift_scale || kind == Layout::interleaved_scale_shift;
    const bool shift_first = kind == Layout::shift_scale || kind == Layout::interleaved_shift_scale;
    const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : moved;
    if (packed) {
      p.shift = {params.data, params.stride, {shift_first ? 0 : second, step}};
      p.raw = {params.data, params.stride, {shift_first ? second : 0, step}};
    } else {
      p.raw = {params.data, params.stride, {}};
      p.shift = {shift->data, shift->stride, {}};
    }
  }

  void options(bool add_first, double offset, double eps, double low, double clamp) {
    p.add_first = add_first;
    p.offset = static_cast<T>(offset);
    p.eps = static_cast<T>(eps);
    p.clamp = static_cast<T>(clamp);
    p.low = static_cast<T>(low);
    if (p.scale == ScaleKind::softclip) p.clamp = static_cast<T>(std::fabs(std::log(clamp)));
    if (p.scale == ScaleKind::softplus) p.low = static_cast<T>(std::log(clamp));
  }
};

ScaleKind scale_of(int64_t scale) {
  check_code("scale", scale, static_cast<int64_t>(ScaleKind::none));
  return static_cast<ScaleKind>(scale);
}

std::tuple<Tensor, Tensor> affine_coupling(const Tensor& x, const Tensor& params, const OptionalTensor& shift,
                                           const OptionalTensor& channels, int64_t scale, int64_t layout, int64_t split,
                                           bool add_first, bool inverse, double offset, double eps, double low,
                                           double clamp, bool reduce) {
  check_rows("x", x);
  return with_widest_type(x, params, shift, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(x, params, shift, channels, scale_of(scale), layout, split, inverse);
    in.options(add_first, offset, eps, low, clamp);
    const Tensor y = empty_like(x, kScalar<T>);
    Tensor log_abs_det = reduce ? empty({x.size(0)}, kScalar<T>) : empty_like(x, kScalar<T>);
    in.p.y = data<T>(y);
    (reduce ? in.p.log_abs_det : in.p.each) = data<T>(log_abs_det);
    if (x.numel() > 0) {
      run_kernel(GENFUSE_DISPATCH(coupling_kernel<T>)(), in.p);
    } else {
      torch::stable::zero_(log_abs_det);
    }
    return {to_type(y, x.scalar_type()), log_abs_det};
  });
}

Tensor additive_coupling(const Tensor& x, const Tensor& shift, const OptionalTensor& channels, int64_t split,
                         bool inverse) {
  check_rows("x", x);
  return with_widest_type(x, shift, std::nullopt, [&]<class T>(T) {
    Inputs<T> in(x, shift, std::nullopt, channels, ScaleKind::none, 0, split, inverse);
    const Tensor y = empty_like(x, kScalar<T>);
    in.p.y = data<T>(y);
    if (x.numel() > 0) run_kernel(GENFUSE_DISPATCH(coupling_kernel<T>)(), in.p);
    return to_type(y, x.scalar_type());
  });
}

// Where gradients come from and go to.
template <class T>
struct Gradients {
  CouplingBackward<T> b;
  OptionalTensor from_y, from_log;
  Tensor x = nothing(kScalar<T>), params = nothing(kScalar<T>), shift = nothing(kScalar<T>);

  Gradients(const Inputs<T>& in, const Tensor& x_, const Tensor& params_, const OptionalTensor& shift_,
            const OptionalTensor& grad_y, const OptionalTensor& grad_log, bool reduce, int64_t needs) {
    b.forward = in.p;
    if (grad_y.has_value()) {
      STD_TORCH_CHECK(grad_y->numel() == x_.numel(), "grad_y must have the shape of x, got ", shape_of(*grad_y));
      from_y = dense("grad_y", *grad_y, kScalar<T>);
      b.grad_y = read<T>(from_y);
    }
    if (grad_log.has_value()) {
      STD_TORCH_CHECK(grad_log->numel() == (reduce ? x_.size(0) : x_.numel()),
                      "grad_log_abs_det must have the shape of log_abs_det, got ", shape_of(*grad_log));
      from_log = dense("grad_log_abs_det", *grad_log, kScalar<T>);
      (reduce ? b.grad_log_abs_det : b.grad_each) = read<T>(from_log);
    }
    const bool additive = in.p.scale == ScaleKind::none, some = grad_y.has_value() || grad_log.has_value();
    const auto wanted = [&](int bit, const Tensor& like, Tensor& to) {
      if ((needs >> bit & 1) == 0) return static_cast<T*>(nullptr);
      to = empty_like(like, kScalar<T>);
      if (some) return data<T>(to);
      torch::stable::zero_(to);
      return static_cast<T*>(nullptr);
    };
    b.grad_x = wanted(0, x_, x);
    T* to_params = wanted(1, params_, params);
    const int64_t channels = in.p.channels > 0 ? params_.size(1) : 0;
    if (additive) {
      b.grad_shift = to_params;
      b.shift_stride = channels * in.p.space;
    } else if (shift_.has_value()) {
      b.grad_raw = to_params;
      b.grad_shift = wanted(2, *shift_, shift);
      b.raw_stride = b.shift_stride = channels * in.p.space;
    } else {
      b.grad_raw = b.grad_shift = to_params;
      b.raw_stride = b.shift_stride = channels * in.p.space;
    }
    if (x_.numel() > 0 && (b.grad_x != nullptr || b.grad_raw != nullptr || b.grad_shift != nullptr)) {
      run_kernel(GENFUSE_DISPATCH(coupling_backward_kernel<T>)(), b);
    }
  }

  // What is not asked for is empty, and of x's dtype.
  static Tensor in_dtype_of(const Tensor& of, int bit, int64_t needs, const Tensor& x_, const Tensor& gradient) {
    return to_type(gradient, ((needs >> bit & 1) != 0 ? of : x_).scalar_type());
  }
};

std::tuple<Tensor, Tensor, Tensor> affine_coupling_backward(
    const OptionalTensor& grad_y, const OptionalTensor& grad_log_abs_det, const Tensor& x, const Tensor& params,
    const OptionalTensor& shift, const OptionalTensor& channels, int64_t scale, int64_t layout, int64_t split,
    bool add_first, bool inverse, double offset, double eps, double low, double clamp, bool reduce, int64_t needs) {
  check_rows("x", x);
  return with_widest_type(x, params, shift, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Inputs<T> in(x, params, shift, channels, scale_of(scale), layout, split, inverse);
    in.options(add_first, offset, eps, low, clamp);
    const Gradients<T> g(in, x, params, shift, grad_y, grad_log_abs_det, reduce, needs);
    return {to_type(g.x, x.scalar_type()), g.in_dtype_of(params, 1, needs, x, g.params),
            g.in_dtype_of(shift.value_or(x), 2, needs, x, g.shift)};
  });
}

std::tuple<Tensor, Tensor> additive_coupling_backward(const OptionalTensor& grad_y, const Tensor& x,
                                                      const Tensor& shift, const OptionalTensor& channels,
                                                      int64_t split, bool inverse, int64_t needs) {
  check_rows("x", x);
  return with_widest_type(x, shift, std::nullopt, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Inputs<T> in(x, shift, std::nullopt, channels, ScaleKind::none, 0, split, inverse);
    const Gradients<T> g(in, x, shift, std::nullopt, grad_y, std::nullopt, true, needs);
    return {to_type(g.x, x.scalar_type()), g.in_dtype_of(shift, 1, needs, x, g.params)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("affine_coupling", TORCH_BOX(&genfuse::affine_coupling));
  m.impl("affine_coupling_backward", TORCH_BOX(&genfuse::affine_coupling_backward));
  m.impl("additive_coupling", TORCH_BOX(&genfuse::additive_coupling));
  m.impl("additive_coupling_backward", TORCH_BOX(&genfuse::additive_coupling_backward));
}

#include "masked_conv/masked_conv2d.h"

#include <torch/headeronly/core/MemoryFormat.h>

#include "common/torch_glue.h"

namespace genfuse {
namespace {

using torch::headeronly::MemoryFormat;

// Whether a tensor [B, C, H, W] lies channels last, and not as [B, C, H, W] (where it could be said to be either).
bool is_channels_last(const Tensor& t) {
  if (t.dim() != 4 || t.is_contiguous()) return false;
  int64_t step = 1;
  for (const int64_t i : {1, 3, 2, 0}) {
    if (t.size(i) != 1 && t.stride(i) != step) return false;
    step *= t.size(i);
  }
  return true;
}

Tensor empty_image(std::initializer_list<int64_t> sizes, ScalarType dtype, bool channels_last) {
  const Tensor t = torch::stable::empty({sizes.begin(), sizes.size()}, dtype, std::nullopt, std::nullopt, std::nullopt,
                                        channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
  prefer_huge_pages(t);
  return t;
}

// Images that the kernel can read where they lie, or a copy; the caller keeps it alive.
template <class T>
struct ReadImages {
  Tensor held;
  ImageStrides strides;

  ReadImages(const char* name, const Tensor& t) : held(t) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be on the CPU");
    held = to_type(held, kScalar<T>);
    const auto readable = [&](int64_t dim) { return held.size(dim) == 1 || held.stride(dim) == 1; };
    if (!readable(1) && !readable(3)) held = torch::stable::contiguous(held);
    strides = {held.stride(0), held.stride(1), held.stride(2), held.stride(3)};
    if (readable(1)) {
      strides.channel = 1;
    } else {
      strides.column = 1;
    }
  }
};

// The arguments, and the tensors that they point into.
template <class T>
struct Inputs {
  Tensor weight;
  OptionalTensor bias;
  std::optional<ReadImages<T>> images;
  MaskedConv2d<T> p;
  bool channels_last;

  Inputs(const Tensor& x, const Tensor& weight_, const OptionalTensor& bias_, int64_t mask, int64_t channel_groups,
         bool interleaved, int64_t padding_h, int64_t padding_w, int64_t dilation_h, int64_t dilation_w, int64_t groups)
      : weight(weight_), bias(bias_), channels_last(is_channels_last(x) || is_channels_last(weight_)) {
    STD_TORCH_CHECK(x.dim() == 4, "x must have shape [B, I, H, W], got ", shape_of(x));
    STD_TORCH_CHECK(groups >= 1 && x.size(1) % groups == 0, "groups must divide the ", x.size(1),
                    " channels of x, got ", groups);
    STD_TORCH_CHECK(weight.dim() == 4 && weight.size(1) == x.size(1) / groups, "weight must have shape [O, ",
                    x.size(1) / groups, ", kh, kw], got ", shape_of(weight));
    STD_TORCH_CHECK(weight.size(0) % groups == 0, "groups must divide the ", weight.size(0), " outputs of weight, got ",
                    groups);
    STD_TORCH_CHECK(weight.size(2) % 2 == 1 && weight.size(3) % 2 == 1, "weight must have an odd kernel, got ",
                    shape_of(weight));
    STD_TORCH_CHECK(weight.size(2) <= kMost && weight.size(3) <= kMost, "weight must have a kernel of at most ", kMost,
                    " taps each way, got ", shape_of(weight));
    STD_TORCH_CHECK(mask >= 0 && mask <= static_cast<int64_t>(ConvMask::horizontal_b), "mask must be from 0 to 5, got ",
                    mask);
    STD_TORCH_CHECK(channel_groups >= 1 && channel_groups <= kMostChannelGroups, "channel_groups must be from 1 to ",
                    kMostChannelGroups, ", got ", channel_groups);
    STD_TORCH_CHECK(padding_h >= 0 && padding_w >= 0 && dilation_h >= 1 && dilation_w >= 1,
                    "padding must not be negative, and dilation be positive; got ", padding_h, ", ", padding_w, " and ",
                    dilation_h, ", ", dilation_w);
    STD_TORCH_CHECK(dilation_h <= kMost && dilation_w <= kMost, "dilation must be at most ", kMost, ", got ",
                    dilation_h, " and ", dilation_w);
    STD_TORCH_CHECK(padding_h <= kMost && padding_w <= kMost, "padding must be at most ", kMost, ", got ", padding_h,
                    " and ", padding_w);
    p.batch = x.size(0);
    p.inputs = x.size(1);
    p.height = x.size(2);
    p.width = x.size(3);
    p.outputs = weight.size(0);
    p.kernel_h = weight.size(2);
    p.kernel_w = weight.size(3);
    p.padding_h = padding_h;
    p.padding_w = padding_w;
    p.dilation_h = dilation_h;
    p.dilation_w = dilation_w;
    p.groups = groups;
    p.channel_groups = channel_groups;
    p.interleaved = interleaved;
    p.mask = static_cast<ConvMask>(mask);
    p.out_height = p.height + 2 * padding_h - dilation_h * (p.kernel_h - 1);
    p.out_width = p.width + 2 * padding_w - dilation_w * (p.kernel_w - 1);
    STD_TORCH_CHECK(p.out_height > 0 && p.out_width > 0,
                    "x must have at least the kernel's extent with its padding, got ", shape_of(x));
    const ScalarType dtype = x.scalar_type();
    weight = prepared("weight", weight, {p.outputs, p.inputs / groups, p.kernel_h, p.kernel_w}, dtype, kScalar<T>);
    bias = prepared("bias", bias, {p.outputs}, dtype, kScalar<T>);
    images.emplace("x", x);
    p.x = read<T>(images->held);
    p.x_strides = images->strides;
    p.weight = read<T>(weight);
    p.bias = read<T>(bias);
  }

  static constexpr int64_t kMostChannelGroups = 1 << 16;
  static constexpr int64_t kMost = 1 << 24;  // so that products of two of them, and a size, are numbers
};

Tensor masked_conv2d(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, int64_t mask,
                     int64_t channel_groups, bool interleaved, int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                     int64_t dilation_w, int64_t groups) {
  return with_compute_type("x", x, [&]<class T>(T) {
    Inputs<T> in(x, weight, bias, mask, channel_groups, interleaved, padding_h, padding_w, dilation_h, dilation_w,
                 groups);
    MaskedConv2d<T>& p = in.p;
    const Tensor y = empty_image({p.batch, p.outputs, p.out_height, p.out_width}, kScalar<T>, in.channels_last);
    p.y = data<T>(y);
    p.y_channels_last = in.channels_last;
    if (y.numel() > 0) run_kernel(GENFUSE_DISPATCH(masked_conv2d_kernel<T>)(), p);
    return to_type(y, x.scalar_type());
  });
}

std::tuple<Tensor, Tensor, Tensor> masked_conv2d_backward(const OptionalTensor& grad_y, const Tensor& x,
                                                          const Tensor& weight, const OptionalTensor& bias,
                                                          int64_t mask, int64_t channel_groups, bool interleaved,
                                                          int64_t padding_h, int64_t padding_w, int64_t dilation_h,
                                                          int64_t dilation_w, int64_t groups, int64_t needs) {
  return with_compute_type("x", x, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Inputs<T> in(x, weight, bias, mask, channel_groups, interleaved, padding_h, padding_w, dilation_h, dilation_w,
                 groups);
    const MaskedConv2d<T>& p = in.p;
    MaskedConv2dBackward<T> b;
    b.forward = p;
    std::optional<ReadImages<T>> from;
    if (grad_y.has_value()) {
      check_shape("grad_y", *grad_y, {p.batch, p.outputs, p.out_height, p.out_width});
      if (grad_y->numel() > 0) {
        from.emplace("grad_y", *grad_y);
        b.grad_y = read<T>(from->held);
        b.grad_y_strides = from->strides;
      }
    }
    // Where there is nothing to sum, zeros.
    const auto wanted = [&](int bit, const OptionalTensor& like, T*& to) {
      if ((needs >> bit & 1) == 0 || !like.has_value()) return nothing(kScalar<T>);
      b.grad_x_channels_last = bit == 0 && is_channels_last(x);
      Tensor t = bit == 0 ? empty_image({p.batch, p.inputs, p.height, p.width}, kScalar<T>, b.grad_x_channels_last)
                          : empty_like(*like, kScalar<T>);
      if (!from.has_value()) torch::stable::zero_(t);
      if (t.numel() > 0) to = data<T>(t);
      return t;
    };
    const Tensor to_weight = wanted(1, weight, b.grad_weight), to_bias = wanted(2, bias, b.grad_bias);
    const Tensor to_x = wanted(0, x, b.grad_x);
    if (from.has_value()) run_kernel(GENFUSE_DISPATCH(masked_conv2d_backward_kernel<T>)(), b);
    const ScalarType dtype = x.scalar_type();
    return {to_type(to_x, dtype), to_type(to_weight, dtype), to_type(to_bias, dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&genfuse::masked_conv2d));
  m.impl("masked_conv2d_backward", TORCH_BOX(&genfuse::masked_conv2d_backward));
}

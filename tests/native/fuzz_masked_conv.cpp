// Random cases of the masked convolution; what is dead of the weight is NaN.
#include "fuzz.h"
#include "masked_conv/masked_conv2d.h"

namespace fuzz {
namespace {

using genfuse::ConvMask;

// Whether output o sees channel c of x through tap (i, j): the rule by words, for one weight at a time.
template <class T>
bool alive(const genfuse::MaskedConv2d<T>& p, int64_t o, int64_t c, int64_t i, int64_t j) {
  const int64_t row = p.kernel_h / 2, column = p.kernel_w / 2;
  const bool vertical = p.mask == ConvMask::vertical_a || p.mask == ConvMask::vertical_b;
  const bool horizontal = p.mask == ConvMask::horizontal_a || p.mask == ConvMask::horizontal_b;
  if (i != row) return i < row && !horizontal;
  if (vertical) return p.mask == ConvMask::vertical_b;
  if (j != column) return j < column;
  const auto group = [&](int64_t channel, int64_t of) {
    return p.interleaved ? channel % p.channel_groups : channel * p.channel_groups / of;
  };
  const int64_t from = group(c, p.inputs), to = group(o, p.outputs);
  return p.mask == ConvMask::a || p.mask == ConvMask::horizontal_a ? from < to : from <= to;
}

// Images that lie in one of the ways the kernel can read, within a wider tensor or not.
template <class T>
struct Images {
  genfuse::ImageStrides strides;
  Buffer<T> buffer;

  Images(Random& random, int64_t batch, int64_t channels, int64_t height, int64_t width)
      : strides(draw(random, channels, height, width)),
        buffer(batch == 0 || channels * height * width == 0
                   ? 0
                   : (batch - 1) * strides.batch + (channels - 1) * strides.channel + (height - 1) * strides.row +
                         (width - 1) * strides.column + 1,
               random) {}

  static genfuse::ImageStrides draw(Random& random, int64_t channels, int64_t height, int64_t width) {
    const int64_t more = random.chance(0.3) ? 1 + random.below(5) : 0;
    if (random.chance(0.5)) {
      const int64_t pixel = channels + more, row = pixel * width + (random.chance(0.2) ? 3 : 0);
      return {row * height, 1, row, pixel};
    }
    const int64_t row = width + (random.chance(0.2) ? 2 : 0), plane = row * height;
    return {plane * (channels + more), plane, row, 1};
  }
};

template <class T>
void masked_conv2d_case_of(Random& random, std::string& description) {
  genfuse::MaskedConv2d<T> p;
  const auto size = [&] { return random.chance(0.8) ? 1 + random.below(9) : 1 + random.below(70); };
  p.groups = random.chance(0.7) ? 1 : 1 + random.below(4);
  p.channel_groups = random.chance(0.6) ? 1 : 1 + random.below(5);
  p.interleaved = random.chance(0.5);
  p.mask = static_cast<ConvMask>(random.below(6));
  p.batch = 1 + random.below(3);
  p.inputs = p.groups * (random.chance(0.03) ? 0 : size());
  p.outputs = p.groups * size();
  p.kernel_h = random.pick<int64_t>({1, 3, 3, 5, 7});
  p.kernel_w = random.pick<int64_t>({1, 3, 3, 5, 7});
  // Also with taps beyond the image, from which nothing is seen.
  const auto step = [&] {
    if (random.chance(0.7)) return int64_t{1};
    return random.chance(0.6) ? 1 + random.below(3) : random.pick<int64_t>({8, 13, 50, 1 << 13, 1 << 24});
  };
  p.dilation_h = step();
  p.dilation_w = step();
  const bool same = random.chance(0.6);
  // Of more than a few pixels apart about the half, so that the image stays small.
  const auto border = [&](int64_t kernel, int64_t dilation) {
    const int64_t half = dilation * (kernel / 2);
    if (same) return half;
    return dilation < 8 ? random.below(9) : half > 4 ? half + random.below(9) - 4 : random.below(5);
  };
  p.padding_h = border(p.kernel_h, p.dilation_h);
  p.padding_w = border(p.kernel_w, p.dilation_w);
  const auto length = [&](int64_t kernel, int64_t dilation, int64_t padding) {
    const int64_t least = dilation * (kernel - 1) + 1 - 2 * padding;
    return (least > 1 ? least : 1) + (random.chance(0.9) ? random.below(12) : random.below(40));
  };
  p.height = length(p.kernel_h, p.dilation_h, p.padding_h);
  p.width = length(p.kernel_w, p.dilation_w, p.padding_w);
  p.out_height = p.height + 2 * p.padding_h - p.dilation_h * (p.kernel_h - 1);
  p.out_width = p.width + 2 * p.padding_w - p.dilation_w * (p.kernel_w - 1);
  description = "masked_conv2d mask " + std::to_string(static_cast<int>(p.mask)) + ", " + std::to_string(p.batch) +
                " x " + std::to_string(p.inputs) + " -> " + std::to_string(p.outputs) + " x " +
                std::to_string(p.height) + " x " + std::to_string(p.width) + ", kernel " + std::to_string(p.kernel_h) +
                " x " + std::to_string(p.kernel_w) + ", groups " + std::to_string(p.groups) + " and " +
                std::to_string(p.channel_groups);

  const int64_t each = p.groups > 0 ? p.inputs / p.groups : 0, taps = p.kernel_h * p.kernel_w;
  const int64_t in = p.batch * p.inputs * p.height * p.width, out = p.batch * p.outputs * p.out_height * p.out_width;
  const Images<T> x(random, p.batch, p.inputs, p.height, p.width);
  const Images<T> grad(random, p.batch, p.outputs, p.out_height, p.out_width);
  Buffer<T> weight(p.outputs * each * taps, random), bias(p.outputs, random);
  for (int64_t n = 0; n < weight.count; ++n) {
    const int64_t o = n / (each * taps), c = o / (p.outputs / p.groups) * each + n / taps % each, tap = n % taps;
    if (!alive(p, o, c, tap / p.kernel_w, tap % p.kernel_w)) weight.data()[n] = std::numeric_limits<T>::quiet_NaN();
  }
  p.x = x.buffer.data();
  p.x_strides = x.strides;
  p.weight = weight.data();
  p.bias = optional(random.chance(0.7), bias);
  const bool by_x = random.chance(0.8), by_weight = random.chance(0.8), by_bias = random.chance(0.8);
  const bool y_last = random.chance(0.5), x_last = random.chance(0.5);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::MaskedConv2d<T> forward = p;
    forward.y = results.add("y", out);
    forward.y_channels_last = y_last;
    run(FUZZ_VERSION(isa, masked_conv2d_kernel<T>)(), forward, pool.executor);
    genfuse::MaskedConv2dBackward<T> b;
    b.forward = p;
    b.grad_y = grad.buffer.data();
    b.grad_y_strides = grad.strides;
    b.grad_x_channels_last = x_last;
    if (by_x && in > 0) b.grad_x = results.add("grad_x", in);
    if (by_weight) b.grad_weight = results.add("grad_weight", weight.count);
    if (by_bias) b.grad_bias = results.add("grad_bias", p.outputs);
    run(FUZZ_VERSION(isa, masked_conv2d_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

}  // namespace

void masked_conv2d_case(Random& random, std::string& description) {
  random.chance(0.5) ? masked_conv2d_case_of<float>(random, description)
                     : masked_conv2d_case_of<double>(random, description);
}

}  // namespace fuzz

#include <algorithm>

#include "fuzz.h"
#include "likelihood/categorical_nll.h"
#include "likelihood/mixture.h"

namespace fuzz {
namespace {

// A tensor [batch, channels, space] with positions or channels as neighbours, or neither; its images some way apart.
template <class T>
struct Lying {
  genfuse::Pixels<const T> read;
  int64_t count;
  Buffer<T> buffer;

  static genfuse::Pixels<const T> strides(int64_t channels, int64_t space, Random& random) {
    genfuse::Pixels<const T> p;
    const int64_t kind = random.below(3);
    p.pixel = kind == 0 ? 1 : kind == 1 ? channels + random.below(2) * 3 : 2;
    p.channel = kind == 1 ? 1 : kind == 0 ? space + random.below(2) : 2 * space;
    p.batch = 1 + (space - 1) * p.pixel + (channels - 1) * p.channel + random.below(2) * 5;
    return p;
  }
  Lying(int64_t batch, int64_t channels, int64_t space, Random& random)
      : read(strides(channels, space, random)),
        count((batch - 1) * read.batch + (channels - 1) * read.channel + (space - 1) * read.pixel + 1),
        buffer(count, random) {
    read.data = buffer.data();
  }
};

// A gradient of such a tensor: zero between, so that all of it is written.
template <class T>
genfuse::Pixels<T> gradient_of(const Lying<T>& t, Results<T>& results, const char* name) {
  genfuse::Pixels<T> p{results.add(name, t.count), t.read.batch, t.read.pixel, t.read.channel};
  std::fill(p.data, p.data + t.count, T(0));
  return p;
}

template <class T>
void poison(const Lying<T>& t, genfuse::Pixels<T> p, int64_t batch, int64_t channels, int64_t space) {
  (void)t;
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c) {
      for (int64_t s = 0; s < space; ++s) p.data[b * p.batch + c * p.channel + s * p.pixel] = T(NAN);
    }
  }
}

template <class T>
void mixture_case_of(Random& random, std::string& description) {
  genfuse::Mixture<T> p;
  p.channels = random.chance(0.5) ? 3 : 1;
  p.components = random.chance(0.9) ? 1 + random.below(6) : 1 + random.below(40);
  p.batch = random.size();
  p.space = random.chance(0.3) ? 1 : random.chance(0.9) ? random.size() : 1000 + random.below(200);
  if (p.batch * p.space > 2500) p.batch = 2;
  p.bits = random.pick({1, 5, 8, 16});
  p.openai = random.chance(0.4);
  p.layout = static_cast<genfuse::MixtureLayout>(random.below(3));
  p.log_scale_min = static_cast<T>(random.pick({-7.0, -1.0, -40.0}));
  p.by_pixel = random.chance(0.4);
  const int64_t parameters = genfuse::portable::mixture_parameters(p.components, p.channels);
  Lying<T> x(p.batch, p.channels, p.space, random), params(p.batch, parameters, p.space, random);
  const auto last = static_cast<T>((1 << p.bits) - 1);
  for (int64_t i = 0; i < x.count; ++i) {
    x.buffer.data()[i] = T(2) * static_cast<T>(random.below(int64_t{1} << p.bits)) / last - T(1);
  }
  const auto width = static_cast<T>(random.pick({1, 3, 20}));
  for (int64_t i = 0; i < params.count; ++i) params.buffer.data()[i] *= width;
  p.x = x.read;
  p.params = params.read;
  const int64_t rows = p.by_pixel ? p.batch * p.space : p.batch;
  Buffer<T> grad(rows, random), u(p.batch * (1 + p.channels) * p.space, random);
  for (int64_t i = 0; i < u.count; ++i) u.data()[i] = static_cast<T>(0.9999 * random.uniform());
  const bool by_x = random.chance(0.7), by_params = random.chance(0.8), given = random.chance(0.5);
  const uint64_t seed = random.bits(), offset = random.bits();
  description = "mixture of " + std::to_string(p.components) + " in " + std::to_string(p.batch) + " x " +
                std::to_string(p.channels) + " x " + std::to_string(p.space) + ", layout " +
                std::to_string(static_cast<int64_t>(p.layout)) + (p.openai ? ", openai" : "") + ", pixels " +
                std::to_string(p.params.pixel) + " apart, channels " + std::to_string(p.params.channel);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Mixture<T> forward = p;
    forward.out = results.add("nll", rows);
    run(FUZZ_VERSION(isa, mixture_kernel<T>)(), forward, pool.executor);
    genfuse::MixtureBackward<T> b;
    b.forward = p;
    b.grad = grad.data();
    if (by_x) {
      b.grad_x = gradient_of(x, results, "grad_x");
      poison(x, b.grad_x, p.batch, p.channels, p.space);
    }
    if (by_params) {
      b.grad_params = gradient_of(params, results, "grad_params");
      poison(params, b.grad_params, p.batch, parameters, p.space);
    }
    run(FUZZ_VERSION(isa, mixture_backward_kernel<T>)(), b, pool.executor);
    genfuse::MixtureDraw<T> d;
    d.batch = p.batch;
    d.space = p.space;
    d.components = p.components;
    d.channels = p.channels;
    d.bits = p.bits;
    d.snap = p.by_pixel && sizeof(T) == 4;  // in float64 instruction sets are compared, and a level is a jump
    d.layout = p.layout;
    d.log_scale_min = p.log_scale_min;
    d.params = p.params;
    d.u = given ? u.data() : nullptr;
    d.seed = seed;
    d.offset = offset;
    d.x = results.add("drawn", p.batch * p.channels * p.space);
    run(FUZZ_VERSION(isa, mixture_draw_kernel<T>)(), d, pool.executor);
    return results;
  });
}

template <class T>
void categorical_nll_case_of(Random& random, std::string& description) {
  genfuse::CategoricalNll<T> p;
  p.levels = random.chance(0.9) ? random.size() : 256 + random.below(3);
  // Dimensions of the positions, and the levels at some place among them.
  const int dims = 1 + static_cast<int>(random.below(3)), place = 1 + static_cast<int>(random.below(dims));
  int64_t size[5] = {}, stride[5] = {}, all = 1 + random.below(2) * 3, order[5];
  p.positions = 1;
  for (int i = 0, k = 0; i <= dims; ++i) {
    size[i] = i == place ? p.levels : random.chance(0.2) ? 1 : random.size();
    if (i != place && p.positions * size[i] * p.levels > 60000) size[i] = 1;
    if (i != place) p.positions *= size[i];
    order[i] = k++;
  }
  for (int i = dims; i > 0; --i) std::swap(order[i], order[random.chance(0.5) ? i : random.below(i + 1)]);
  int64_t count = all;
  for (int i = dims; i >= 0; --i) {  // the last in `order` is the innermost
    stride[order[i]] = count;
    count *= size[order[i]];
  }
  if (random.chance(0.7)) {  // dense
    for (int i = 0; i <= dims; ++i) stride[i] /= all;
    count /= all;
  }
  p.row = p.positions / size[0];
  p.logits.level = stride[place];
  for (int i = 0; i <= dims; ++i) {
    if (i == place || size[i] == 1) continue;
    p.logits.size[p.logits.dims] = size[i];
    p.logits.stride[p.logits.dims++] = stride[i];
  }
  Buffer<T> logits(count, random), grad(p.positions, random);
  Buffer<int64_t> target(p.positions);
  for (int64_t i = 0; i < p.positions; ++i) target.data()[i] = random.below(p.levels);
  p.logits.data = logits.data();
  p.target = target.data();
  p.by_position = random.chance(0.4);
  const int64_t rows = p.by_position ? p.positions : size[0];
  description = "categorical_nll of " + std::to_string(p.positions) + " positions, " + std::to_string(p.levels) +
                " levels " + std::to_string(p.logits.level) + " apart";
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::CategoricalNll<T> forward = p;
    forward.out = results.add("nll", rows);
    forward.top = results.add("top", p.positions);
    forward.log_sum = results.add("log_sum", p.positions);
    run(FUZZ_VERSION(isa, categorical_nll_kernel<T>)(), forward, pool.executor);
    genfuse::CategoricalNllBackward<T> b;
    b.forward = forward;
    b.grad = grad.data();
    b.grad_logits = results.add("grad_logits", count);
    if (count > p.positions * p.levels) std::fill(b.grad_logits, b.grad_logits + count, T(0));
    run(FUZZ_VERSION(isa, categorical_nll_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

}  // namespace

void mixture_case(Random& random, std::string& description) {
  random.chance(0.5) ? mixture_case_of<float>(random, description) : mixture_case_of<double>(random, description);
}
void categorical_nll_case(Random& random, std::string& description) {
  random.chance(0.5) ? categorical_nll_case_of<float>(random, description)
                     : categorical_nll_case_of<double>(random, description);
}

}  // namespace fuzz

#include "fuzz.h"
#include "likelihood/nll.h"
#include "sampling/categorical.h"
#include "sampling/gaussian.h"
#include "sampling/quantize.h"
#include "sampling/relaxed.h"

namespace fuzz {
namespace {

// An operand that is whole, or repeats after a divisor of the count, or is one element.
template <class T>
struct Operand {
  Buffer<T> buffer;
  genfuse::Periodic<T> read;

  Operand(int64_t count, int64_t row, Random& random, bool wanted = true)
      : Operand(wanted ? random.pick({count, row, int64_t{1}}) : 0, random) {}

 private:
  Operand(int64_t period, Random& random) : buffer(period, random) {
    if (period > 0) read = {buffer.data(), period};
  }
};

struct Shape {
  int64_t rows, row, count;
  explicit Shape(Random& random)
      : rows(random.size()), row(random.chance(0.9) ? random.size() : 1000 + random.below(4000)), count(rows * row) {
    if (random.chance(0.1)) rows *= 40;  // enough for several threads
    count = rows * row;
  }
};

template <class T>
void gaussian_case_of(Random& random, std::string& description) {
  const Shape shape(random);
  const bool sample = random.chance(0.7), divergence = !sample || random.chance(0.7);
  Operand<T> mean(shape.count, shape.row, random), scale(shape.count, shape.row, random);
  Operand<T> prior_mean(shape.count, shape.row, random, random.chance(0.5));
  Operand<T> prior_scale(shape.count, shape.row, random, random.chance(0.5));
  Operand<T> eps(shape.count, shape.row, random, random.chance(0.5));
  Buffer<T> grad_z(shape.count, random), grad_kl(shape.rows, random);
  genfuse::Gaussian<T> p;
  p.count = shape.count;
  p.row = shape.row;
  p.mean = mean.read;
  p.scale = scale.read;
  p.prior_mean = prior_mean.read;
  p.prior_scale = prior_scale.read;
  p.eps = eps.read;
  p.seed = random.bits();
  p.offset = random.bits();
  p.log_std = random.chance(0.5);
  p.free_bits = static_cast<T>(random.pick({0.0, 0.0, 0.05}));
  p.low = static_cast<T>(random.pick({-1e30, -0.5}));
  p.high = static_cast<T>(random.pick({1e30, 0.5}));
  description = "gaussian " + std::to_string(shape.rows) + " x " + std::to_string(shape.row);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::GaussianBackward<T> b;
    b.forward = p;
    genfuse::Gaussian<T> forward = p;
    if (sample) forward.z = results.add("z", shape.count);
    if (divergence) forward.kl = results.add("kl", shape.rows);
    run(FUZZ_VERSION(isa, gaussian_kernel<T>)(), forward, pool.executor);
    if (sample) b.grad_z = grad_z.data();
    if (divergence) b.grad_kl = grad_kl.data();
    b.grad_mean = results.add("grad_mean", shape.count);
    b.grad_scale = results.add("grad_scale", shape.count);
    if (divergence && p.prior_mean.data != nullptr) b.grad_prior_mean = results.add("grad_prior_mean", shape.count);
    if (divergence && p.prior_scale.data != nullptr) b.grad_prior_scale = results.add("grad_prior_scale", shape.count);
    if (sample && p.eps.data != nullptr) b.grad_eps = results.add("grad_eps", shape.count);
    run(FUZZ_VERSION(isa, gaussian_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

template <class T>
void relaxed_case_of(Random& random, std::string& description) {
  const Shape shape(random);
  Operand<T> logits(shape.count, shape.row, random), noise(shape.count, shape.row, random, random.chance(0.5));
  Buffer<T> grad(shape.count, random);
  genfuse::Relaxed<T> p;
  p.rows = shape.rows;
  p.classes = shape.row;
  p.logits = logits.read;
  p.noise = noise.read;
  p.seed = random.bits();
  p.offset = random.bits();
  p.tau = static_cast<T>(random.pick({0.5, 1.0, 3.0}));
  const bool gumbel = random.chance(0.6), recompute = random.chance(0.5);
  // What the largest is may depend on the last place; the instruction sets are compared where it does not matter.
  p.hard = recompute && random.chance(0.5) && p.noise.data != nullptr;
  description = std::string(gumbel ? "gumbel_softmax " : "relaxed_bernoulli ") + std::to_string(shape.rows) + " x " +
                std::to_string(shape.row) + (p.hard ? " hard" : "");
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Relaxed<T> forward = p;
    forward.y = results.add("y", shape.count);
    genfuse::RelaxedBackward<T> b;
    b.forward = p;
    b.recompute = recompute;
    b.y = forward.y;
    b.grad_y = grad.data();
    b.grad_logits = results.add("grad_logits", shape.count);
    if (gumbel) {
      run(FUZZ_VERSION(isa, gumbel_softmax_kernel<T>)(), forward, pool.executor);
      run(FUZZ_VERSION(isa, gumbel_softmax_backward_kernel<T>)(), b, pool.executor);
    } else {
      run(FUZZ_VERSION(isa, relaxed_bernoulli_kernel<T>)(), forward, pool.executor);
      run(FUZZ_VERSION(isa, relaxed_bernoulli_backward_kernel<T>)(), b, pool.executor);
    }
    return results;
  });
}

template <class T>
void categorical_case_of(Random& random, std::string& description) {
  genfuse::Categorical<T> p;
  p.rows = random.size();
  p.classes = random.chance(0.9) ? random.size() : 500 + random.below(5000);
  p.samples = random.chance(0.9) ? random.size() : 1000 + random.below(2000);
  Buffer<T> logits(p.rows * p.classes, random), u(p.rows * p.samples, random);
  for (int64_t i = 0; i < logits.count; ++i) {
    if (random.chance(0.2)) logits.data()[i] = -std::numeric_limits<T>::infinity();
  }
  for (int64_t r = 0; r < p.rows; ++r) logits.data()[r * p.classes + random.below(p.classes)] = 0;
  for (int64_t i = 0; i < u.count; ++i) {
    u.data()[i] = static_cast<T>(random.pick({0.0, random.uniform() * 0.999, 1.0 - 1e-7}));
  }
  p.logits = logits.data();
  p.u = optional(random.chance(0.5), u);
  p.seed = random.bits();
  p.offset = random.bits();
  description = "categorical " + std::to_string(p.rows) + " x " + std::to_string(p.classes) + ", " +
                std::to_string(p.samples) + " samples";
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    Buffer<int64_t> classes(p.rows * p.samples);
    genfuse::Categorical<T> mine = p;
    mine.out = classes.data();
    run(FUZZ_VERSION(isa, categorical_kernel<T>)(), mine, pool.executor);
    T* drawn = results.add("logit of the class", classes.count);
    for (int64_t i = 0; i < classes.count; ++i) {
      const int64_t k = classes.data()[i];
      if (k < 0 || k >= p.classes) throw Failure{"class " + std::to_string(k)};
      drawn[i] = p.logits[i / p.samples * p.classes + k];  // -inf, a class of no probability, fails as not finite
      if (sizeof(T) == 8 && std::isfinite(drawn[i])) drawn[i] = 0;  // a boundary may fall either way
    }
    return results;
  });
}

template <class T>
void quantize_case_of(Random& random, std::string& description) {
  const int64_t count = random.chance(0.9) ? random.size() * random.size() : 4000, codes = random.size() * 3;
  const int64_t dim = random.size();
  Buffer<T> x(count * dim, random), codebook(codes * dim, random), grad(count * dim, random), by_loss(count, random);
  Buffer<int64_t> given(count);
  for (int64_t i = 0; i < count; ++i) given.data()[i] = random.below(codes);
  description = "quantize " + std::to_string(count) + " of " + std::to_string(dim) + ", " + std::to_string(codes);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    Buffer<int64_t> indices(count);
    genfuse::Quantize<T> p;
    p.count = count;
    p.codes = codes;
    p.dim = dim;
    p.x = x.data();
    p.codebook = codebook.data();
    p.weight = T(1.25);
    p.quantized = results.add("quantized", count * dim);
    p.indices = indices.data();
    p.loss = results.add("loss", count);
    run(FUZZ_VERSION(isa, quantize_kernel<T>)(), p, pool.executor);
    for (int64_t i = 0; i < count; ++i) {
      if (indices.data()[i] < 0 || indices.data()[i] >= codes) throw Failure{"an index out of range"};
    }
    genfuse::QuantizeBackward<T> b;
    b.count = count;
    b.codes = codes;
    b.dim = dim;
    b.x = p.x;
    b.codebook = p.codebook;
    b.indices = given.data();
    b.grad_quantized = grad.data();
    b.grad_loss = by_loss.data();
    b.commitment_weight = T(0.25);
    b.codebook_weight = T(1);
    b.grad_x = results.add("grad_x", count * dim);
    b.grad_codebook = results.add("grad_codebook", codes * dim);
    run(FUZZ_VERSION(isa, quantize_backward_kernel<T>)(), b, pool.executor);
    genfuse::QuantizeStatistics<T> s;
    s.count = count;
    s.codes = codes;
    s.dim = dim;
    s.x = p.x;
    s.indices = given.data();
    s.counts = results.add("counts", codes);
    s.sums = results.add("sums", codes * dim);
    run(FUZZ_VERSION(isa, quantize_statistics_kernel<T>)(), s, pool.executor);
    return results;
  });
}

template <class T>
void nll_case_of(Random& random, std::string& description) {
  const Shape shape(random);
  genfuse::Nll<T> p;
  p.kind = static_cast<genfuse::Likelihood>(random.below(3));
  Operand<T> first(shape.count, shape.row, random), second(shape.count, shape.row, random);
  Operand<T> scale(shape.count, shape.row, random, p.kind != genfuse::Likelihood::bernoulli);
  Buffer<T> grad(shape.rows, random);
  p.count = shape.count;
  p.row = shape.row;
  p.first = first.read;
  p.second = second.read;
  p.scale = scale.read;
  p.log_std = random.chance(0.5);
  p.half_bin = T(1) / static_cast<T>(random.pick({1, 3, 255, 65535}));
  for (int64_t i = 0; i < scale.buffer.count; ++i) scale.buffer.data()[i] *= static_cast<T>(random.pick({1, 4}));
  description = "nll " + std::to_string(static_cast<int64_t>(p.kind)) + " " + std::to_string(shape.rows) + " x " +
                std::to_string(shape.row);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Nll<T> forward = p;
    forward.out = results.add("nll", shape.rows);
    run(FUZZ_VERSION(isa, nll_kernel<T>)(), forward, pool.executor);
    genfuse::NllBackward<T> b;
    b.forward = p;
    b.grad = grad.data();
    b.grad_first = results.add("grad_first", shape.count);
    b.grad_second = results.add("grad_second", shape.count);
    if (p.scale.data != nullptr) b.grad_scale = results.add("grad_scale", shape.count);
    run(FUZZ_VERSION(isa, nll_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

}  // namespace

void gaussian_case(Random& random, std::string& description) {
  random.chance(0.5) ? gaussian_case_of<float>(random, description) : gaussian_case_of<double>(random, description);
}
void relaxed_case(Random& random, std::string& description) {
  random.chance(0.5) ? relaxed_case_of<float>(random, description) : relaxed_case_of<double>(random, description);
}
void categorical_case(Random& random, std::string& description) {
  random.chance(0.5) ? categorical_case_of<float>(random, description)
                     : categorical_case_of<double>(random, description);
}
void quantize_case(Random& random, std::string& description) {
  random.chance(0.5) ? quantize_case_of<float>(random, description) : quantize_case_of<double>(random, description);
}
void nll_case(Random& random, std::string& description) {
  random.chance(0.5) ? nll_case_of<float>(random, description) : nll_case_of<double>(random, description);
}

}  // namespace fuzz

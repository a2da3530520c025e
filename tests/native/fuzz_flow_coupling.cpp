#include <numeric>

#include "flow/actnorm.h"
#include "flow/coupling.h"
#include "flow/dequantize.h"
#include "fuzz.h"

namespace fuzz {
namespace {

// A [batch, channels, space] tensor of which a coupling reads `moved` channels: dense rows, some way apart or repeated.
template <class T>
struct Rows {
  int64_t row, stride;
  Buffer<T> buffer;

  Rows(int64_t batch, int64_t row_, Random& random)
      : row(row_),
        stride(random.chance(0.7)   ? row_
               : random.chance(0.5) ? 0
                                    : row_ + 3),
        buffer(stride * (batch - 1) + row_, random) {}
};

template <class T>
void coupling_case_of(Random& random, std::string& description) {
  using genfuse::ScaleKind;
  genfuse::Coupling<T> p;
  p.batch = random.chance(0.9) ? random.size() : 300;
  p.channels = random.chance(0.95) ? random.size() : 1200;
  p.space = random.chance(0.4) ? 1 : random.chance(0.9) ? random.size() : 1000 + random.below(2000);
  if (p.batch * p.channels * p.space > 200000) p.batch = 1;
  const int64_t whole = p.channels * p.space;
  p.scale = static_cast<ScaleKind>(random.below(10));
  const bool additive = p.scale == ScaleKind::none;
  p.add_first = random.chance(0.5) && !additive;
  p.inverse = random.chance(0.5);
  p.offset = T(2);
  p.eps = static_cast<T>(random.pick({0.0, 1e-3}));
  p.low = static_cast<T>(p.scale == ScaleKind::softplus ? 0.5 : -0.5);
  p.clamp = static_cast<T>(p.scale == ScaleKind::softplus ? 1.6487212707001282 : 0.7);
  // Which channels: a range, every other one, a list, or all under a mask.
  std::vector<int64_t> order(static_cast<size_t>(p.channels)), list, kept;
  std::iota(order.begin(), order.end(), int64_t{0});
  Buffer<uint8_t> mask(whole);
  const int64_t kind = random.below(4);
  p.moved = kind == 3 ? p.channels : random.below(p.channels + 1);
  if (kind == 0) {
    p.x.channel.first = random.below(p.channels - p.moved + 1);
  } else if (kind == 1) {
    p.x.channel = {random.below(2), 2};
    p.moved = (p.channels + 1 - p.x.channel.first) / 2;
    for (int64_t c = 1 - p.x.channel.first; c < p.channels; c += 2) kept.push_back(c);
  } else if (kind == 2) {
    for (int64_t c = p.channels - 1; c > 0; --c) std::swap(order[static_cast<size_t>(c)], order[random.below(c + 1)]);
    list.assign(order.begin(), order.begin() + p.moved);
    kept.assign(order.begin() + p.moved, order.end());
    p.x.channel.list = list.data();
  } else {
    for (int64_t i = 0; i < whole; ++i) mask.data()[i] = random.chance(0.5);
    p.mask = mask.data();
  }
  p.kept = kept.empty() ? nullptr : kept.data();
  // Parameters apart, or one tensor in some layout.
  const bool packed = !additive && random.chance(0.7), interleaved = random.chance(0.5), swapped = random.chance(0.5);
  const int64_t own = p.moved * p.space, wide = packed ? 2 * own : own;
  Rows<T> x(p.batch, whole, random), raw(p.batch, wide > 0 ? wide : 1, random);
  Rows<T> shift(p.batch, own > 0 ? own : 1, random);
  p.x.data = x.buffer.data();
  p.x.stride = x.stride;
  p.shift = {shift.buffer.data(), shift.stride, {}};
  if (!additive) p.raw = {raw.buffer.data(), raw.stride, {}};
  if (packed) {
    const int64_t step = interleaved ? 2 : 1, second = interleaved ? 1 : p.moved;
    p.shift = {raw.buffer.data(), raw.stride, {swapped ? second : 0, step}};
    p.raw.channel = {swapped ? 0 : second, step};
  }
  const bool reduce = random.chance(0.6), by_y = random.chance(0.9), by_log = random.chance(0.9);
  Buffer<T> grad_y(p.batch * whole, random), grad_log(reduce ? p.batch : p.batch * whole, random);
  description = "coupling " + std::to_string(static_cast<int64_t>(p.scale)) + " " + std::to_string(p.batch) + " x " +
                std::to_string(p.channels) + " x " + std::to_string(p.space) + ", " + std::to_string(p.moved) +
                " channels of kind " + std::to_string(kind);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Coupling<T> forward = p;
    forward.y = results.add("y", p.batch * whole);
    if (!additive && reduce) forward.log_abs_det = results.add("log_abs_det", p.batch);
    if (!additive && !reduce) forward.each = results.add("each", p.batch * whole);
    run(FUZZ_VERSION(isa, coupling_kernel<T>)(), forward, pool.executor);
    genfuse::CouplingBackward<T> b;
    b.forward = p;
    if (by_y) b.grad_y = grad_y.data();
    if (by_log && !additive) (reduce ? b.grad_log_abs_det : b.grad_each) = grad_log.data();
    b.grad_x = results.add("grad_x", p.batch * whole);
    if (packed) {
      b.grad_raw = b.grad_shift = results.add("grad_params", p.batch * wide);
      b.raw_stride = b.shift_stride = wide;
    } else {
      b.grad_shift = results.add("grad_shift", p.batch * own);
      b.shift_stride = own;
      if (!additive) b.grad_raw = results.add("grad_raw", p.batch * own);
      b.raw_stride = own;
    }
    run(FUZZ_VERSION(isa, coupling_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

template <class T>
void actnorm_case_of(Random& random, std::string& description) {
  genfuse::Actnorm<T> p;
  p.batch = random.chance(0.9) ? random.size() : 700;
  p.channels = random.chance(0.95) ? random.size() : 700;
  p.space = random.chance(0.4) ? 1 : random.chance(0.9) ? random.size() : 1000 + random.below(2000);
  if (p.batch * p.channels * p.space > 200000) p.batch = 1;
  p.add_first = random.chance(0.5);
  p.inverse = random.chance(0.5);
  const int64_t whole = p.channels * p.space;
  Rows<T> x(p.batch, whole, random);
  Buffer<T> log_scale(p.channels, random), bias(p.channels, random);
  Buffer<T> grad_y(p.batch * whole, random), grad_log(p.batch, random);
  p.x = x.buffer.data();
  p.stride = p.batch == 1 ? whole : x.stride;
  p.log_scale = log_scale.data();
  p.bias = bias.data();
  const bool by_y = random.chance(0.9), by_log = random.chance(0.9), by_x = random.chance(0.8);
  description = "actnorm " + std::to_string(p.batch) + " x " + std::to_string(p.channels) + " x " +
                std::to_string(p.space) + ", rows " + std::to_string(p.stride) + " apart";
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Actnorm<T> forward = p;
    forward.y = results.add("y", p.batch * whole);
    forward.log_abs_det = results.add("log_abs_det", p.batch);
    run(FUZZ_VERSION(isa, actnorm_kernel<T>)(), forward, pool.executor);
    genfuse::ActnormBackward<T> b;
    b.forward = p;
    if (by_y) b.grad_y = grad_y.data();
    if (by_log) b.grad_log_abs_det = grad_log.data();
    if (by_x) b.grad_x = results.add("grad_x", p.batch * whole);
    b.grad_log_scale = results.add("grad_log_scale", p.channels);
    b.grad_bias = results.add("grad_bias", p.channels);
    run(FUZZ_VERSION(isa, actnorm_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

template <class T>
void dequantize_case_of(Random& random, std::string& description) {
  genfuse::Dequantize<T> d;
  const int64_t rows = random.size();
  d.row = random.chance(0.9) ? random.size() : 1000 + random.below(4000);
  d.count = rows * d.row;
  d.levels = static_cast<T>(random.pick({2, 32, 256}));
  d.alpha = static_cast<T>(random.pick({0.01, 0.05}));
  d.seed = random.bits();
  d.offset = random.bits();
  Buffer<uint8_t> bytes(d.count);
  Buffer<T> x(d.count, random), u(d.count, random), grad_y(d.count, random), grad_log(rows, random);
  for (int64_t i = 0; i < d.count; ++i) {
    bytes.data()[i] = static_cast<uint8_t>(random.below(static_cast<int64_t>(d.levels)));
    x.data()[i] = static_cast<T>(bytes.data()[i]);
    u.data()[i] = static_cast<T>(0.999 * random.uniform());
  }
  if (random.chance(0.5)) {
    d.bytes = bytes.data();
  } else {
    d.x = {x.data(), d.count};
  }
  if (random.chance(0.5)) d.u = {u.data(), d.count};
  const bool by_y = random.chance(0.9), by_log = random.chance(0.9);
  description = "dequantize " + std::to_string(rows) + " x " + std::to_string(d.row);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Dequantize<T> forward = d;
    forward.y = results.add("y", d.count);
    forward.log_abs_det = results.add("log_abs_det", rows);
    run(FUZZ_VERSION(isa, dequantize_kernel<T>)(), forward, pool.executor);
    genfuse::DequantizeBackward<T> b;
    b.forward = d;
    if (by_y) b.grad_y = grad_y.data();
    if (by_log) b.grad_log_abs_det = grad_log.data();
    b.grad = results.add("grad", d.count);
    run(FUZZ_VERSION(isa, dequantize_backward_kernel<T>)(), b, pool.executor);
    genfuse::LogitQuantize<T> l;  // of numbers in the middle of a level, wherever that is computed
    Buffer<T> middle(d.count);
    for (int64_t i = 0; i < d.count; ++i) {
      const double v = (static_cast<double>(bytes.data()[i]) + 0.5) / static_cast<double>(d.levels);
      const double q = static_cast<double>(d.alpha) + (1 - 2 * static_cast<double>(d.alpha)) * v;
      middle.data()[i] = static_cast<T>(std::log(q / (1 - q)));
    }
    l.count = d.count;
    l.y = middle.data();
    l.levels = d.levels;
    l.alpha = d.alpha;
    l.x = results.add("level", d.count);
    run(FUZZ_VERSION(isa, logit_quantize_kernel<T>)(), l, pool.executor);
    for (int64_t i = 0; i < d.count; ++i) {
      if (l.x[i] != x.data()[i]) throw Failure{"level " + std::to_string(i) + " does not come back"};
    }
    return results;
  });
}

}  // namespace

void coupling_case(Random& random, std::string& description) {
  random.chance(0.5) ? coupling_case_of<float>(random, description) : coupling_case_of<double>(random, description);
}
void actnorm_case(Random& random, std::string& description) {
  random.chance(0.5) ? actnorm_case_of<float>(random, description) : actnorm_case_of<double>(random, description);
}
void dequantize_case(Random& random, std::string& description) {
  random.chance(0.5) ? dequantize_case_of<float>(random, description) : dequantize_case_of<double>(random, description);
}

}  // namespace fuzz

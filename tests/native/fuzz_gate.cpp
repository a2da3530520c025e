#include "fuzz.h"
#include "masked_conv/gate.h"

namespace fuzz {
namespace {

// Rows of [channels, inner] numbers, some way apart or the same one again and again.
template <class T>
struct Rows {
  int64_t row, stride;
  Buffer<T> buffer;

  Rows(int64_t outer, int64_t row_, Random& random)
      : row(row_),
        stride(random.chance(0.7)   ? row_
               : random.chance(0.5) ? 0
                                    : row_ + 3),
        buffer(stride * (outer - 1) + row_, random) {
    for (int64_t i = 0; i < buffer.count; ++i) buffer.data()[i] *= T(4);
  }
  genfuse::ChannelRows<T> read() const { return {buffer.data(), stride}; }
};

struct Sizes {
  int64_t groups, group, channels, inner;

  explicit Sizes(Random& random)
      : groups(random.size()), group(random.chance(0.5) ? 1 : random.size()), channels(random.size()), inner(1) {
    if (random.chance(0.05)) channels = 1030;
    if (random.chance(0.6)) inner = random.chance(0.9) ? random.size() : 1000 + random.below(2000);
    if (groups * group * channels * inner > 100000) groups = 1;
    if (groups * group * channels * inner > 100000) group = 1;
  }
};

template <class T>
void gate_case_of(Random& random, std::string& description) {
  const Sizes sizes(random);
  genfuse::Gate<T> p;
  p.outer = sizes.groups * sizes.group;
  p.channels = sizes.channels;
  p.inner = sizes.inner;
  p.linear = random.chance(0.5);
  p.group = sizes.group;
  const int64_t half = p.channels * p.inner, wide = 2 * p.channels;
  const Rows<T> x(p.outer, 2 * half, random), full(p.outer, 2 * half, random), residual(p.outer, half, random);
  const Rows<T> grad_y(p.outer, half, random);
  Buffer<T> bias(wide, random), rows(sizes.groups * wide, random);
  p.x = x.read();
  const bool has_bias = random.chance(0.5), has_rows = random.chance(0.5);
  p.bias = optional(has_bias, bias);
  p.rows = optional(has_rows, rows);
  if (!has_rows && random.chance(0.5)) p.full = full.read();
  if (random.chance(0.5)) p.residual = residual.read();
  const bool of_bias = has_bias && random.chance(0.8), of_rows = has_rows && random.chance(0.8);
  description = "gate " + std::to_string(sizes.groups) + " x " + std::to_string(sizes.group) + " x 2 * " +
                std::to_string(p.channels) + " x " + std::to_string(p.inner) + (has_bias ? ", bias" : "") +
                (has_rows ? ", rows" : "");
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Gate<T> forward = p;
    forward.y = results.add("y", p.outer * half);
    run(FUZZ_VERSION(isa, gate_kernel<T>)(), forward, pool.executor);
    genfuse::GateBackward<T> b;
    b.forward = p;
    b.grad_y = grad_y.read();
    b.grad_x = results.add("grad_x", p.outer * 2 * half);
    if (of_bias) b.grad_bias = results.add("grad_bias", wide);
    if (of_rows) b.grad_rows = results.add("grad_rows", sizes.groups * wide);
    run(FUZZ_VERSION(isa, gate_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

template <class T>
void concat_elu_case_of(Random& random, std::string& description) {
  const Sizes sizes(random);
  genfuse::ConcatElu<T> p;
  p.outer = sizes.groups * sizes.group;
  p.channels = sizes.channels;
  p.inner = sizes.inner;
  const int64_t row = p.channels * p.inner;
  const Rows<T> x(p.outer, row, random), grad_y(p.outer, 2 * row, random);
  p.x = x.read();
  description = "concat_elu " + std::to_string(p.outer) + " x " + std::to_string(row);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::ConcatElu<T> forward = p;
    forward.y = results.add("y", p.outer * 2 * row);
    run(FUZZ_VERSION(isa, concat_elu_kernel<T>)(), forward, pool.executor);
    genfuse::ConcatEluBackward<T> b;
    b.forward = p;
    b.grad_y = grad_y.read();
    b.grad_x = results.add("grad_x", p.outer * row);
    run(FUZZ_VERSION(isa, concat_elu_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

}  // namespace

void gate_case(Random& random, std::string& description) {
  random.chance(0.5) ? gate_case_of<float>(random, description) : gate_case_of<double>(random, description);
}
void concat_elu_case(Random& random, std::string& description) {
  random.chance(0.5) ? concat_elu_case_of<float>(random, description) : concat_elu_case_of<double>(random, description);
}

}  // namespace fuzz

// Random cases of the channels' matrix.
#include "flow/conv1x1.h"
#include "fuzz.h"

namespace fuzz {
namespace {

template <class T>
void conv1x1_case_of(Random& random, std::string& description) {
  genfuse::Conv1x1<T> p;
  p.batch = random.chance(0.1) ? 0 : 1 + random.below(20);
  p.inputs = random.chance(0.05) ? 0 : random.size();
  p.outputs = random.size();
  p.places = random.chance(0.1) ? 257 + random.below(300) : random.size();
  const int64_t in = p.batch * p.inputs * p.places, out = p.batch * p.outputs * p.places;
  Buffer<T> x(in, random), weight(p.outputs * p.inputs, random), bias(p.outputs, random), grad(out, random);
  p.x = x.data();
  p.weight = weight.data();
  p.bias = optional(random.chance(0.7), bias);
  const bool by_x = random.chance(0.8), by_weight = random.chance(0.8), by_bias = random.chance(0.8);
  description = "conv1x1 " + std::to_string(p.batch) + " x " + std::to_string(p.inputs) + " -> " +
                std::to_string(p.outputs) + " x " + std::to_string(p.places);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Conv1x1<T> forward = p;
    forward.y = results.add("y", out);
    run(FUZZ_VERSION(isa, conv1x1_kernel<T>)(), forward, pool.executor);
    genfuse::Conv1x1Backward<T> b;
    b.forward = p;
    b.grad_y = grad.data();
    if (by_x) b.grad_x = results.add("grad_x", in);
    if (by_weight) b.grad_weight = results.add("grad_weight", p.outputs * p.inputs);
    if (by_bias) b.grad_bias = results.add("grad_bias", p.outputs);
    run(FUZZ_VERSION(isa, conv1x1_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

}  // namespace

void conv1x1_case(Random& random, std::string& description) {
  random.chance(0.5) ? conv1x1_case_of<float>(random, description) : conv1x1_case_of<double>(random, description);
}

}  // namespace fuzz

#include "flow/autoregressive_plan.h"
#include "flow/masked_linear.h"
#include "fuzz.h"

namespace fuzz {
namespace {

// Degrees by chance: few and many values, sorted and not, far apart.
std::vector<int64_t> some_degrees(Random& random, int64_t count, int64_t low, int64_t high) {
  std::vector<int64_t> degrees(static_cast<size_t>(count));
  for (int64_t& degree : degrees) degree = low + random.below(high - low + 1);
  if (random.chance(0.4)) std::sort(degrees.begin(), degrees.end());
  return degrees;
}

template <class T>
void masked_linear_case_of(Random& random, std::string& description) {
  genfuse::MaskedLinear<T> p;
  p.rows = random.chance(0.1) ? 200 + random.below(900) : random.size();
  p.inputs = random.chance(0.1) ? 500 + random.below(200) : random.size();
  p.outputs = random.size();
  const bool strict = random.chance(0.5);
  const int64_t high = random.pick<int64_t>({1, 4, 40, int64_t{1} << 40});
  const auto in_degrees = some_degrees(random, p.inputs, 0, high);
  const auto out_degrees = some_degrees(random, p.outputs, random.chance(0.3) ? high : 0, high);
  const auto in_order = genfuse::order_of_degrees(in_degrees.data(), p.inputs);
  const auto out_order = genfuse::order_of_degrees(out_degrees.data(), p.outputs);
  const genfuse::Sight sight(in_degrees.data(), in_order, out_degrees.data(), out_order, strict);
  Buffer<T> x(p.rows * p.inputs, random), weight(p.outputs * p.inputs, random), bias(p.outputs, random);
  Buffer<T> grad(p.rows * p.outputs, random);
  for (int64_t o = 0; o < p.outputs; ++o) {  // what is dead must not be read
    for (int64_t i = 0; i < p.inputs; ++i) {
      const int64_t own = out_degrees[static_cast<size_t>(o)], other = in_degrees[static_cast<size_t>(i)];
      if (strict ? other >= own : other > own) weight.data()[o * p.inputs + i] = std::numeric_limits<T>::quiet_NaN();
    }
  }
  p.x = x.data();
  p.weight = weight.data();
  p.bias = optional(random.chance(0.7), bias);
  p.in_order = in_order.data();
  p.out_order = out_order.data();
  p.in_sorted = std::is_sorted(in_order.begin(), in_order.end());
  p.out_sorted = std::is_sorted(out_order.begin(), out_order.end());
  p.live = sight.live.data();
  p.first = sight.first.data();
  description =
      "masked linear " + std::to_string(p.rows) + " x " + std::to_string(p.inputs) + " to " + std::to_string(p.outputs);
  const bool by_x = random.chance(0.8), by_weight = random.chance(0.8), by_bias = random.chance(0.8);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::MaskedLinear<T> forward = p;
    forward.y = results.add("y", p.rows * p.outputs);
    run(FUZZ_VERSION(isa, masked_linear_kernel<T>)(), forward, pool.executor);
    genfuse::MaskedLinearBackward<T> b;
    b.forward = p;
    b.grad_y = grad.data();
    if (by_x) b.grad_x = results.add("grad_x", p.rows * p.inputs);
    if (by_weight) b.grad_weight = results.add("grad_weight", p.outputs * p.inputs);
    if (by_bias) b.grad_bias = results.add("grad_bias", p.outputs);
    run(FUZZ_VERSION(isa, masked_linear_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

template <class T>
void autoregressive_case_of(Random& random, std::string& description) {
  const int64_t B = random.chance(0.1) ? 100 + random.below(200) : random.size(), D = 1 + random.below(7);
  const auto transform = static_cast<int64_t>(random.below(genfuse::kColumnTransforms));
  const int64_t kind = transform == 0 ? random.below(genfuse::kScaleKinds) : transform == 2 ? random.below(3) : 0;
  const int64_t P = transform == 0 ? 2 : transform == 1 ? 1 : 3 * (1 + random.below(9)) - 1;
  std::vector<int64_t> program{transform, kind, P, random.below(2), random.below(2)};
  const int64_t high = random.pick<int64_t>({1, 3, D, 100});
  for (const int64_t degree : some_degrees(random, D, 1, high)) program.push_back(degree);
  const int64_t layers = 1 + random.below(5);
  std::vector<int64_t> degrees, begins, sizes{D};
  for (int64_t l = 0; l < layers; ++l) {
    const bool last = l + 1 == layers;
    int64_t units = last ? D * P : random.size(), residual = -1;
    for (int64_t other = 0; other < l; ++other) {
      if (!last && random.chance(0.4)) {
        residual = other;
        units = sizes[static_cast<size_t>(other) + 1];
      }
    }
    begins.push_back(static_cast<int64_t>(degrees.size()));
    if (!last) {
      auto own = some_degrees(random, units, -1, high + 2);
      for (size_t i = 0; residual >= 0 && i < own.size(); ++i) {
        own[i] = std::max(own[i], degrees[static_cast<size_t>(begins[static_cast<size_t>(residual)]) + i]);
      }
      degrees.insert(degrees.end(), own.begin(), own.end());
    }
    const int64_t source = random.chance(0.7) ? l - 1 : random.below(l + 1) - 1;
    sizes.push_back(units);
    for (const int64_t field :
         {units, source, random.below(genfuse::kActivations), random.below(2), random.below(2), residual}) {
      program.push_back(field);
    }
  }
  const std::vector<double> constants{
      2, random.pick({0.0, 1e-3}), -5, transform == 0 && kind == 7 ? 1e-3 : 3, 3, 1e-3, 1e-3, 1e-3, 1};
  genfuse::AutoregressivePlan<T> plan(B, D, program, constants, degrees.data(), static_cast<int64_t>(degrees.size()));
  Buffer<T> u(B * D, random), parameters(plan.parameters, random), added(B * plan.additions, random);
  for (int64_t i = 0; i < parameters.count; ++i) parameters.data()[i] *= T(0.3);
  for (size_t l = 0; l < plan.layers.size(); ++l) {  // what is dead must not be read
    const auto& layer = plan.layers[l];
    const genfuse::AutoregressiveOrder& source = plan.p.order_of(plan.views[static_cast<size_t>(layer.view)].source);
    for (int64_t j = 0; j < layer.units.count; ++j) {
      for (int64_t k = layer.live[j]; k < source.count; ++k) {
        parameters.data()[plan.weight_at[l] + layer.units.order[j] * source.count + source.order[k]] =
            std::numeric_limits<T>::quiet_NaN();
      }
    }
  }
  Buffer<T> grad_x(B * D, random), grad_log(B, random);
  plan.place(parameters.data(), added.data());
  plan.p.u = u.data();
  description = "autoregressive " + std::to_string(B) + " x " + std::to_string(D) + ", transform " +
                std::to_string(transform) + ", " + std::to_string(kind) + ", " + std::to_string(layers) + " layers";
  const bool by_x = random.chance(0.8), by_log = random.chance(0.8), by_u = random.chance(0.8);
  const bool of_layers = random.chance(0.8);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Autoregressive<T> forward = plan.p;
    forward.x = results.add("x", B * D);
    forward.log_abs_det = results.add("log_abs_det", B);
    run(FUZZ_VERSION(isa, autoregressive_kernel<T>)(), forward, pool.executor);
    genfuse::AutoregressiveBackward<T> b;
    b.forward = forward;
    b.grad_x = optional(by_x, grad_x);
    b.grad_log_abs_det = optional(by_log, grad_log);
    if (by_u) b.grad_u = results.add("grad_u", B * D);
    std::vector<T*> grad_layers(plan.layers.size()), values(plan.views.size());
    for (size_t l = 0; of_layers && l < grad_layers.size(); ++l) {
      grad_layers[l] = results.add("grad_layer", B * plan.layers[l].units.count);
    }
    for (size_t i = 0; of_layers && i < values.size(); ++i) {
      values[i] = results.add("values", B * plan.p.order_of(plan.views[i].source).count);
    }
    b.grad_layers = grad_layers.data();
    b.values = values.data();
    run(FUZZ_VERSION(isa, autoregressive_backward_kernel<T>)(), b, pool.executor);
    return results;
  });
}

}  // namespace

void masked_linear_case(Random& random, std::string& description) {
  random.chance(0.5) ? masked_linear_case_of<float>(random, description)
                     : masked_linear_case_of<double>(random, description);
}
void autoregressive_case(Random& random, std::string& description) {
  random.chance(0.5) ? autoregressive_case_of<float>(random, description)
                     : autoregressive_case_of<double>(random, description);
}

}  // namespace fuzz

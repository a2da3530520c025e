#include "flow/autoregressive.h"

#include <deque>
#include <limits>

#include "common/torch_glue.h"
#include "flow/degrees.h"
#include "flow/masked_linear.h"

namespace genfuse {
namespace {

// program: transform, its kind, parameters of a column, whether the scale comes first, whether a column's parameters
// lie together; the columns' degrees; then for each layer units, source, activation, has_bias, has_add, residual.
constexpr int64_t kHeader = 5, kFields = 6;
// offset, eps, low, clamp, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale
constexpr size_t kConstants = 9;

struct Order {
  std::vector<int64_t> degrees, order, place, ends;
  AutoregressiveOrder as_argument() const {
    return {static_cast<int64_t>(order.size()), order.data(), place.data(), ends.data(),
            std::is_sorted(order.begin(), order.end())};
  }
  void arrange() {
    order = order_of_degrees(degrees.data(), static_cast<int64_t>(degrees.size()));
    place = places_of(order);
  }
};

// A call's plan: everything in order of its degrees.
template <class T>
struct Call {
  Tensor u, parameters, degrees;
  OptionalTensor additions;
  Order columns;
  std::deque<Order> orders;  // of the layers
  std::deque<Sight> sights;  // of the layers
  std::deque<std::vector<int64_t>> sums;
  std::vector<AutoregressiveLayer<T>> layers;
  std::vector<AutoregressiveView> views;
  std::vector<int64_t> weight_at, bias_at, add_at;  // offsets; -1 where a layer has none
  int64_t added = 0;
  Autoregressive<T> p;

  Call(const Tensor& u_, const Tensor& parameters_, const OptionalTensor& additions_, const Tensor& degrees_,
       const std::vector<int64_t>& program, const std::vector<double>& constants) {
    STD_TORCH_CHECK(u_.dim() == 2, "u must have shape [B, D], got ", shape_of(u_));
    const int64_t B = u_.size(0), D = u_.size(1), size = static_cast<int64_t>(program.size());
    STD_TORCH_CHECK(size >= kHeader + D + kFields && (size - kHeader - D) % kFields == 0, "program must hold ", kHeader,
                    " integers, the degrees of ", D, " columns and ", kFields, " integers for each layer, got ", size);
    STD_TORCH_CHECK(constants.size() == kConstants, "constants must hold ", kConstants, " numbers, got ",
                    constants.size());
    const ScalarType dtype = u_.scalar_type();
    u = dense("u", u_, kScalar<T>);
    STD_TORCH_CHECK(parameters_.dim() == 1, "parameters must have one dimension, got ", shape_of(parameters_));
    parameters = prepared("parameters", parameters_, {parameters_.size(0)}, dtype, kScalar<T>);
    STD_TORCH_CHECK(degrees_.dim() == 1 && degrees_.is_cpu() && degrees_.scalar_type() == ScalarType::Long,
                    "degrees must be an int64 tensor of one dimension on the CPU");
    degrees = torch::stable::contiguous(degrees_);
    p.batch = B;
    p.u = read<T>(u);
    header(program, constants);
    columns.degrees.assign(program.begin() + kHeader, program.begin() + kHeader + D);
    for (const int64_t degree : columns.degrees) {
      STD_TORCH_CHECK(degree > std::numeric_limits<int64_t>::min(), "a column's degree must have a number below it");
    }
    columns.arrange();
    std::vector<int64_t> limits;  // the degree of each group
    for (int64_t j = 0; j < D; ++j) {
      const int64_t degree = columns.degrees[static_cast<size_t>(columns.order[static_cast<size_t>(j)])];
      if (limits.empty() || degree != limits.back()) {
        limits.push_back(degree);
        columns.ends.push_back(j);
      }
      columns.ends.back() = j + 1;
    }
    p.groups = static_cast<int64_t>(limits.size());
    p.columns = columns.as_argument();
    arrange_layers(program, limits);
    if (additions_.has_value()) {
      additions = prepared("additions", *additions_, {B, added}, dtype, kScalar<T>);
    } else {
      STD_TORCH_CHECK(added == 0, "additions must be given: the program has ", added, " columns of them");
    }
    for (size_t l = 0; l < layers.size(); ++l) {
      layers[l].weight = read<T>(parameters) + weight_at[l];
      if (bias_at[l] >= 0) layers[l].bias = read<T>(parameters) + bias_at[l];
      if (add_at[l] >= 0) layers[l].add = read<T>(additions) + add_at[l];
      layers[l].add_stride = added;
    }
    p.layers = layers.data();
    p.layer_count = static_cast<int64_t>(layers.size());
    p.views = views.data();
    p.view_count = static_cast<int64_t>(views.size());
  }

 private:
  void header(const std::vector<int64_t>& program, const std::vector<double>& constants) {
    const int64_t transform = program[0], kind = program[1], P = program[2];
    STD_TORCH_CHECK(transform >= 0 && transform < kColumnTransforms, "program has the unknown transform ", transform);
    p.transform = static_cast<ColumnTransform>(transform);
    p.parameters = P;
    p.scale_first = program[3] != 0;
    const auto number = [&](size_t i) { return static_cast<T>(constants[i]); };
    if (p.transform == ColumnTransform::affine) {
      STD_TORCH_CHECK(kind >= 0 && kind < kScaleKinds, "program has the unknown scale ", kind);
      STD_TORCH_CHECK(P == 2, "an affine transform has 2 parameters, program says ", P);
      p.scale = {static_cast<ScaleKind>(kind), number(0), number(1), number(2), number(3)};
    } else if (p.transform == ColumnTransform::additive) {
      STD_TORCH_CHECK(P == 1, "an additive transform has 1 parameter, program says ", P);
    } else {
      const int64_t bins = (P + 1) / 3;
      STD_TORCH_CHECK(kind >= 0 && kind < 3, "program has the unknown normalizer ", kind);
      STD_TORCH_CHECK(P == 3 * bins - 1 && bins >= 1 && bins <= kSplineMaxBins,
                      "a spline has 3 K - 1 parameters with 1 to ", kSplineMaxBins, " bins, program says ", P);
      SplineOptions<T>& o = p.spline;
      o.normalizer = static_cast<SplineNormalizer>(kind);
      o.inverse = true;
      o.left = o.bottom = -number(4);
      o.right = o.top = number(4);
      o.min_width = number(5);
      o.min_height = number(6);
      o.min_derivative = number(7);
      o.logit_scale = number(8);
      o.bins = static_cast<int>(bins);
    }
  }

  const Order& order_of(int64_t source) const { return source < 0 ? columns : orders[static_cast<size_t>(source)]; }

  void arrange_layers(const std::vector<int64_t>& program, const std::vector<int64_t>& limits) {
    const int64_t D = p.columns.count, P = p.parameters;
    const int64_t count = (static_cast<int64_t>(program.size()) - kHeader - D) / kFields;
    const bool columns_first = program[4] != 0;
    int64_t at = 0, unit = 0;
    for (int64_t l = 0; l < count; ++l) {
      const int64_t* field = program.data() + kHeader + D + l * kFields;
      const int64_t units = field[0], source = field[1], activation = field[2], residual = field[5];
      const bool last = l + 1 == count;
      STD_TORCH_CHECK(units >= 0 && source >= -1 && source < l && residual >= -1 && residual < l && activation >= 0 &&
                          activation < kActivations,
                      "program describes layer ", l, " by numbers out of range");
      Order& own = orders.emplace_back();
      if (last) {
        STD_TORCH_CHECK(units == D * P, "the last layer must have ", P, " units for each of ", D, " columns, got ",
                        units);
        own.order.resize(static_cast<size_t>(units));
        own.degrees.resize(static_cast<size_t>(units));
        for (int64_t j = 0; j < D; ++j) {
          const int64_t column = columns.order[static_cast<size_t>(j)];
          for (int64_t k = 0; k < P; ++k) {
            const int64_t number = columns_first ? column * P + k : k * D + column;
            own.order[static_cast<size_t>(j * P + k)] = number;
            own.degrees[static_cast<size_t>(number)] = columns.degrees[static_cast<size_t>(column)] - 1;
          }
        }
        own.place = places_of(own.order);
      } else {
        STD_TORCH_CHECK(unit + units <= degrees.numel(), "degrees must hold one for each unit of all layers but the ",
                        "last, got ", degrees.numel());
        const auto* from = read<int64_t>(degrees) + unit;
        own.degrees.assign(from, from + units);
        own.arrange();
        unit += units;
      }
      size_t place = 0;
      for (const int64_t limit : limits) {
        while (place < own.order.size() && own.degrees[static_cast<size_t>(own.order[place])] < limit) ++place;
        own.ends.push_back(static_cast<int64_t>(place));
      }
      const Order& below = order_of(source);
      const Sight& sight = sights.emplace_back(below.degrees.data(), below.order, own.degrees.data(), own.order, false);
      if (residual >= 0) {
        const Order& other = orders[static_cast<size_t>(residual)];
        STD_TORCH_CHECK(other.order.size() == own.order.size(), "layer ", l, " has ", units,
                        " units, its residual layer ", residual, " has ", other.order.size());
        for (size_t i = 0; i < own.degrees.size(); ++i) {
          STD_TORCH_CHECK(other.degrees[i] <= own.degrees[i], "unit ", i, " of layer ", l, " has degree ",
                          own.degrees[i], ", below that of its residual, ", other.degrees[i]);
        }
      }
      AutoregressiveLayer<T> layer;
      layer.units = own.as_argument();
      layer.residual = residual;
      layer.live = sight.live.data();
      layer.first = sight.first.data();
      auto& begin = sums.emplace_back(sight.live.size() + 1);
      for (size_t i = 0; i < sight.live.size(); ++i) begin[i + 1] = begin[i] + sight.live[i];
      layer.begin = begin.data();
      auto& back = sums.emplace_back(sight.first.size() + 1);
      for (size_t k = 0; k < sight.first.size(); ++k) back[k + 1] = back[k] + units - sight.first[k];
      layer.transposed_begin = back.data();
      layer.view = view_of({source, static_cast<Activation>(activation)});
      layers.push_back(layer);
      const int64_t inputs = static_cast<int64_t>(below.order.size());
      weight_at.push_back(at);
      at += units * inputs;
      bias_at.push_back(field[3] != 0 ? at : -1);
      at += field[3] != 0 ? units : 0;
      add_at.push_back(field[4] != 0 ? added : -1);
      added += field[4] != 0 ? units : 0;
    }
    STD_TORCH_CHECK(at == parameters.numel(), "parameters must hold the ", at, " numbers of the program, got ",
                    parameters.numel());
    STD_TORCH_CHECK(unit == degrees.numel(), "degrees must hold one for each of ", unit, " units, got ",
                    degrees.numel());
  }

  int64_t view_of(AutoregressiveView view) {
    for (size_t i = 0; i < views.size(); ++i) {
      if (views[i].source == view.source && views[i].activation == view.activation) return static_cast<int64_t>(i);
    }
    views.push_back(view);
    return static_cast<int64_t>(views.size()) - 1;
  }
};

std::tuple<Tensor, Tensor> autoregressive_inverse(const Tensor& u, const Tensor& parameters,
                                                  const OptionalTensor& additions, const Tensor& degrees,
                                                  const std::vector<int64_t>& program,
                                                  const std::vector<double>& constants) {
  return with_compute_type("u", u, [&]<class T>(T) -> std::tuple<Tensor, Tensor> {
    Call<T> call(u, parameters, additions, degrees, program, constants);
    Tensor x = empty_like(u, kScalar<T>), log_abs_det = empty({call.p.batch}, kScalar<T>);
    call.p.x = data<T>(x);
    call.p.log_abs_det = data<T>(log_abs_det);
    if (call.p.groups == 0) torch::stable::zero_(log_abs_det);
    if (x.numel() > 0) run_kernel(GENFUSE_DISPATCH(autoregressive_kernel<T>)(), call.p);
    return {to_type(x, u.scalar_type()), log_abs_det};
  });
}

std::tuple<Tensor, Tensor, Tensor> autoregressive_inverse_backward(
    const OptionalTensor& grad_x, const OptionalTensor& grad_log_abs_det, const Tensor& u, const Tensor& parameters,
    const OptionalTensor& additions, const Tensor& degrees, const Tensor& x, const std::vector<int64_t>& program,
    const std::vector<double>& constants, int64_t needs) {
  return with_compute_type("u", u, [&]<class T>(T) -> std::tuple<Tensor, Tensor, Tensor> {
    Call<T> call(u, parameters, additions, degrees, program, constants);
    const int64_t B = call.p.batch, D = call.p.columns.count;
    const ScalarType compute = kScalar<T>, dtype = u.scalar_type();
    Tensor solution = prepared("x", x, {B, D}, dtype, compute);
    if (dtype != compute && B > 0 && D > 0) {  // the solution as it was before it was rounded
      solution = empty({B, D}, compute);
      const Tensor log_abs_det = empty({B}, compute);
      call.p.x = data<T>(solution);
      call.p.log_abs_det = data<T>(log_abs_det);
      run_kernel(GENFUSE_DISPATCH(autoregressive_kernel<T>)(), call.p);
    }
    call.p.x = data<T>(solution);
    AutoregressiveBackward<T> b;
    OptionalTensor by_x, by_log;
    if (grad_x.has_value()) by_x = prepared("grad_x", *grad_x, {B, D}, dtype, compute);
    if (grad_log_abs_det.has_value()) by_log = prepared("grad_log_abs_det", *grad_log_abs_det, {B}, compute, compute);
    b.grad_x = read<T>(by_x);
    b.grad_log_abs_det = read<T>(by_log);
    const auto wanted = [&](int bit, const OptionalTensor& like) {
      return (needs >> bit & 1) != 0 && like.has_value() ? empty_like(*like, compute) : nothing(compute);
    };
    const Tensor grad_u = wanted(0, u), grad_parameters = wanted(1, parameters), grad_additions = wanted(2, additions);
    const bool to_parameters = (needs & 2) != 0, to_additions = (needs & 4) != 0 && additions.has_value();
    if (B == 0 || D == 0) {
      for (Tensor t : {grad_u, grad_parameters, grad_additions}) torch::stable::zero_(t);
      return {to_type(grad_u, dtype), to_type(grad_parameters, dtype), to_type(grad_additions, dtype)};
    }
    const size_t L = call.layers.size();
    std::vector<OptionalTensor> of_layers(L), of_views(call.views.size());
    std::vector<T*> layers(L), views(call.views.size());
    for (size_t l = 0; l < L; ++l) {
      if (!to_parameters && !(to_additions && call.add_at[l] >= 0)) continue;
      of_layers[l] = empty({B, call.layers[l].units.count}, compute);
      layers[l] = data<T>(*of_layers[l]);
    }
    for (size_t i = 0; i < views.size(); ++i) {
      if (!to_parameters) continue;
      of_views[i] = empty({B, call.p.order_of(call.views[i].source).count}, compute);
      views[i] = data<T>(*of_views[i]);
    }
    b.forward = call.p;
    b.grad_u = (needs & 1) != 0 ? data<T>(grad_u) : nullptr;
    b.grad_layers = layers.data();
    b.values = views.data();
    run_kernel(GENFUSE_DISPATCH(autoregressive_backward_kernel<T>)(), b);
    for (size_t l = 0; l < L && to_parameters; ++l) {
      const AutoregressiveLayer<T>& layer = call.layers[l];
      const AutoregressiveOrder& source = call.p.order_of(call.views[static_cast<size_t>(layer.view)].source);
      MaskedLinearBackward<T> product;
      MaskedLinear<T>& m = product.forward;
      m.rows = B;
      m.inputs = source.count;
      m.outputs = layer.units.count;
      m.x = views[static_cast<size_t>(layer.view)];
      m.weight = layer.weight;
      m.in_order = source.order;
      m.out_order = layer.units.order;
      m.in_sorted = source.sorted;
      m.out_sorted = layer.units.sorted;
      m.live = layer.live;
      m.first = layer.first;
      product.grad_y = layers[l];
      product.grad_weight = data<T>(grad_parameters) + call.weight_at[l];
      if (call.bias_at[l] >= 0) product.grad_bias = data<T>(grad_parameters) + call.bias_at[l];
      if (m.outputs > 0) run_kernel(GENFUSE_DISPATCH(masked_linear_backward_kernel<T>)(), product);
    }
    for (size_t l = 0; l < L && to_additions; ++l) {
      if (call.add_at[l] < 0) continue;
      const int64_t units = call.layers[l].units.count;
      for (int64_t r = 0; r < B; ++r) {
        std::copy(layers[l] + r * units, layers[l] + (r + 1) * units,
                  data<T>(grad_additions) + r * call.added + call.add_at[l]);
      }
    }
    return {to_type(grad_u, dtype), to_type(grad_parameters, dtype), to_type(grad_additions, dtype)};
  });
}

}  // namespace
}  // namespace genfuse

STABLE_TORCH_LIBRARY_IMPL(genfuse, CPU, m) {
  m.impl("autoregressive_inverse", TORCH_BOX(&genfuse::autoregressive_inverse));
  m.impl("autoregressive_inverse_backward", TORCH_BOX(&genfuse::autoregressive_inverse_backward));
}

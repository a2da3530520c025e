// The plan of an inverse, made of the numbers that describe a network: everything in order of its degrees. Made by
// those who call the kernels; what does not fit together is refused here, so that no kernel reads or writes out of
// bounds.
#pragma once

#include <deque>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "flow/autoregressive.h"
#include "flow/degrees.h"

namespace genfuse {

template <class... Parts>
inline void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// program: transform, its kind, parameters of a column, whether the scale comes first, whether a column's parameters
// lie together; the columns' degrees; then for each layer units, source, activation, has_bias, has_add, residual.
inline constexpr int64_t kProgramHeader = 5, kProgramFields = 6;
// offset, eps, low, clamp, tail_bound, min_bin_width, min_bin_height, min_derivative, logit_scale
inline constexpr size_t kConstants = 9;

struct DegreeOrder {
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

template <class T>
struct AutoregressivePlan {
  DegreeOrder columns;
  std::deque<DegreeOrder> orders;  // of the layers
  std::deque<Sight> sights;        // of the layers
  std::deque<std::vector<int64_t>> sums;
  std::vector<AutoregressiveLayer<T>> layers;
  std::vector<AutoregressiveView> views;
  std::vector<int64_t> weight_at, bias_at, add_at;  // offsets; -1 where a layer has none
  int64_t parameters = 0, additions = 0;            // how many numbers those are, the latter for each row
  Autoregressive<T> p;

  AutoregressivePlan(const AutoregressivePlan&) = delete;  // `p` points into it

  // degrees: of the units of all layers but the last, `units` of them.
  AutoregressivePlan(int64_t batch, int64_t D, const std::vector<int64_t>& program,
                     const std::vector<double>& constants, const int64_t* degrees, int64_t units) {
    const int64_t size = static_cast<int64_t>(program.size());
    require(size >= kProgramHeader + D + kProgramFields && (size - kProgramHeader - D) % kProgramFields == 0,
            "program must hold ", kProgramHeader, " integers, the degrees of ", D, " columns and ", kProgramFields,
            " integers for each layer, got ", size);
    require(constants.size() == kConstants, "constants must hold ", kConstants, " numbers, got ", constants.size());
    p.batch = batch;
    header(program, constants);
    columns.degrees.assign(program.begin() + kProgramHeader, program.begin() + kProgramHeader + D);
    for (const int64_t degree : columns.degrees) {
      require(degree > std::numeric_limits<int64_t>::min(), "a column's degree must have a number below it");
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
    arrange_layers(program, limits, degrees, units);
    p.layers = layers.data();
    p.layer_count = static_cast<int64_t>(layers.size());
    p.views = views.data();
    p.view_count = static_cast<int64_t>(views.size());
  }

  // Where weights, biases and additions lie: one after the other.
  void place(const T* flat, const T* added) {
    for (size_t l = 0; l < layers.size(); ++l) {
      layers[l].weight = flat + weight_at[l];
      layers[l].bias = bias_at[l] >= 0 ? flat + bias_at[l] : nullptr;
      layers[l].add = add_at[l] >= 0 ? added + add_at[l] : nullptr;
      layers[l].add_stride = additions;
    }
  }

 private:
  void header(const std::vector<int64_t>& program, const std::vector<double>& constants) {
    const int64_t transform = program[0], kind = program[1], P = program[2];
    require(transform >= 0 && transform < kColumnTransforms, "program has the unknown transform ", transform);
    p.transform = static_cast<ColumnTransform>(transform);
    p.parameters = P;
    p.scale_first = program[3] != 0;
    const auto number = [&](size_t i) { return static_cast<T>(constants[i]); };
    if (p.transform == ColumnTransform::affine) {
      require(kind >= 0 && kind < kScaleKinds, "program has the unknown scale ", kind);
      require(P == 2, "an affine transform has 2 parameters, program says ", P);
      p.scale = {static_cast<ScaleKind>(kind), number(0), number(1), number(2), number(3)};
    } else if (p.transform == ColumnTransform::additive) {
      require(P == 1, "an additive transform has 1 parameter, program says ", P);
    } else {
      const int64_t bins = (P + 1) / 3;
      require(kind >= 0 && kind < 3, "program has the unknown normalizer ", kind);
      require(P == 3 * bins - 1 && bins >= 1 && bins <= kSplineMaxBins, "a spline has 3 K - 1 parameters with 1 to ",
              kSplineMaxBins, " bins, program says ", P);
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

  const DegreeOrder& order_of(int64_t source) const {
    return source < 0 ? columns : orders[static_cast<size_t>(source)];
  }

  void arrange_layers(const std::vector<int64_t>& program, const std::vector<int64_t>& limits, const int64_t* degrees,
                      int64_t all_units) {
    const int64_t D = p.columns.count, P = p.parameters;
    const int64_t count = (static_cast<int64_t>(program.size()) - kProgramHeader - D) / kProgramFields;
    const bool columns_first = program[4] != 0;
    int64_t &at = parameters, &added = additions, unit = 0;
    for (int64_t l = 0; l < count; ++l) {
      const int64_t* field = program.data() + kProgramHeader + D + l * kProgramFields;
      const int64_t units = field[0], source = field[1], activation = field[2], residual = field[5];
      const bool last = l + 1 == count;
      require(units >= 0 && source >= -1 && source < l && residual >= -1 && residual < l && activation >= 0 &&
                  activation < kActivations,
              "program describes layer ", l, " by numbers out of range");
      DegreeOrder& own = orders.emplace_back();
      if (last) {
        require(units == D * P, "the last layer must have ", P, " units for each of ", D, " columns, got ", units);
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
        require(unit + units <= all_units, "degrees must hold one for each unit of all layers but the last, got ",
                all_units);
        const int64_t* from = degrees + unit;
        own.degrees.assign(from, from + units);
        own.arrange();
        unit += units;
      }
      size_t place = 0;
      for (const int64_t limit : limits) {
        while (place < own.order.size() && own.degrees[static_cast<size_t>(own.order[place])] < limit) ++place;
        own.ends.push_back(static_cast<int64_t>(place));
      }
      const DegreeOrder& below = order_of(source);
      const Sight& sight = sights.emplace_back(below.degrees.data(), below.order, own.degrees.data(), own.order, false);
      if (residual >= 0) {
        const DegreeOrder& other = orders[static_cast<size_t>(residual)];
        require(other.order.size() == own.order.size(), "layer ", l, " has ", units, " units, its residual layer ",
                residual, " has ", other.order.size());
        for (size_t i = 0; i < own.degrees.size(); ++i) {
          require(other.degrees[i] <= own.degrees[i], "unit ", i, " of layer ", l, " has degree ", own.degrees[i],
                  ", below that of its residual, ", other.degrees[i]);
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
    require(unit == all_units, "degrees must hold one for each of ", unit, " units, got ", all_units);
  }

  int64_t view_of(AutoregressiveView view) {
    for (size_t i = 0; i < views.size(); ++i) {
      if (views[i].source == view.source && views[i].activation == view.activation) return static_cast<int64_t>(i);
    }
    views.push_back(view);
    return static_cast<int64_t>(views.size()) - 1;
  }
};

}  // namespace genfuse

#include <algorithm>
#include <limits>

#include "flow/spline.h"
#include "fuzz.h"

namespace fuzz {
namespace {

using genfuse::SplineEnds;
using genfuse::SplineKind;
using genfuse::SplineNormalizer;

// Where the parameters of `elements` elements lie: side by side, one plane for each parameter, or neither; in one run
// or in several with gaps between them. The gaps are poison.
template <class T>
struct Layout {
  genfuse::SplineParameters<T> where;  // without its data
  const char* name = "";

  Layout(int64_t elements, int count, bool dense, Random& random) {
    where.count = count;
    where.period = elements;
    where.run = elements;
    const int64_t gap = dense ? 0 : random.pick<int64_t>({0, 0, 1, 5, 17});
    const int64_t wide = count + gap;
    int64_t runs = 1;
    for (int64_t n : {2, 3, 5}) {
      if (elements % n == 0 && random.chance(0.3)) runs = n;
    }
    where.run = elements / runs;
    switch (random.below(dense ? 2 : 3)) {
      case 0:
        name = "elements";
        where.step = 1;
        where.stride = wide;
        where.run_stride = where.run * wide + gap;
        break;
      case 1:  // [runs, count, run], as of an image
        name = "planes";
        where.stride = 1;
        where.step = where.run + gap;
        where.run_stride = where.step * wide;
        break;
      default:
        name = "strided";
        where.step = 2;
        where.stride = 2 * wide + 1;
        where.run_stride = where.run * where.stride + gap;
        break;
    }
    if (runs == 1) where.run_stride = 0;
    where.extent = 0;
    if (elements > 0 && count > 0) where.extent = where.offset(elements - 1) + (count - 1) * where.step + 1;
  }

  genfuse::SplineParameters<T> at(T* data) const {
    genfuse::SplineParameters<T> p = where;
    p.data = data;
    return p;
  }
};

template <class T>
struct Part {
  Layout<T> layout;
  Buffer<T> buffer;  // poison between the parameters

  Part(int64_t elements, int count, Random& random)
      : layout(elements, count, false, random), buffer(layout.where.extent) {}

  T& value(int64_t element, int j) {
    const auto& p = layout.where;
    return buffer.data()[p.offset(element % p.period) + j * p.step];
  }
  genfuse::SplineParameters<const T> read() const {
    const auto& p = layout.where;
    return {buffer.data(), p.count, p.period, p.run, p.run_stride, p.stride, p.step, p.extent};
  }
};

template <class T>
T poison() {
  T value;
  std::memset(static_cast<void*>(&value), 0xff, sizeof(T));
  return value;
}

// The parameters of every element in order; throws if a gap was written to.
template <class T>
void unpack(const genfuse::SplineParameters<T>& p, const Buffer<T>& from, T* to) {
  const T untouched = poison<T>();
  Buffer<T> rest(from.count);
  std::copy(from.data(), from.data() + from.count, rest.data());
  for (int64_t e = 0; e < p.period; ++e) {
    for (int j = 0; j < p.count; ++j) {
      const int64_t at = p.offset(e) + j * p.step;
      to[e * p.count + j] = from.data()[at];
      rest.data()[at] = untouched;
    }
  }
  for (int64_t i = 0; i < rest.count; ++i) {
    if (std::memcmp(&rest.data()[i], &untouched, sizeof(T)) != 0) throw Failure{"a gap between gradients was written"};
  }
}

template <class T>
void spline_case_of(Random& random, std::string& description) {
  genfuse::Spline<T> p;
  auto& o = p.options;
  o.kind = random.chance(0.5) ? SplineKind::rational_quadratic : static_cast<SplineKind>(random.below(4));
  const bool rational = o.kind == SplineKind::rational_quadratic;
  o.normalizer = rational ? static_cast<SplineNormalizer>(random.below(4)) : SplineNormalizer::softmax;
  o.ends = static_cast<SplineEnds>(random.below(3));
  o.tails = random.chance(0.6);
  o.inverse = random.chance(0.5);
  if (random.chance(0.5)) {
    o.left = o.bottom = static_cast<T>(-3);
    o.right = o.top = static_cast<T>(3);
  } else {
    o.left = static_cast<T>(-1.5);
    o.top = static_cast<T>(4);
  }
  o.bins = random.chance(0.3)    ? 8
           : random.chance(0.05) ? genfuse::kSplineMaxBins
                                 : 1 + static_cast<int>(random.below(20));
  if (o.kind == SplineKind::quadratic && o.bins == 1) o.bins = 2;
  const bool large = o.bins == genfuse::kSplineMaxBins;
  o.min_width = static_cast<T>(random.pick({0.0, 1e-3, 0.5 / o.bins}));
  o.min_height = static_cast<T>(random.pick({0.0, 1e-3, 0.5 / o.bins}));
  o.min_derivative = static_cast<T>(random.pick({1e-3, 0.1}));
  o.logit_scale = static_cast<T>(random.pick({1.0, 0.5}));
  if (o.normalizer == SplineNormalizer::none) o.logit_scale = 1;

  const int64_t row = random.size(), rows = large ? 1 + random.below(3) : random.size();
  const int64_t count = large ? rows * row : random.chance(0.1) ? 40 * rows * row : rows * row;
  p.count = count;
  p.row = random.chance(0.5) ? row : 1;
  const bool packed = random.chance(0.5);

  // x: inside, at the ends, and outside if that may be.
  const T low = o.inverse ? o.bottom : o.left, high = o.inverse ? o.top : o.right;
  Buffer<T> x(random.chance(0.8) ? count : row);
  for (int64_t i = 0; i < x.count; ++i) {
    const double place = random.uniform();
    x.data()[i] = static_cast<T>(low + (high - low) * place);
    if (random.chance(0.1)) x.data()[i] = random.chance(0.5) ? low : high;
    if (o.tails && random.chance(0.1)) x.data()[i] = static_cast<T>(random.pick({-50.0, -4.5, 4.5, 1e30}));
  }
  p.x = {x.data(), x.count};

  const int counts[3] = {packed ? o.parameters() : o.widths(), packed ? 0 : o.heights(), packed ? 0 : o.derivatives()};
  std::vector<Part<T>> parts;
  for (int k = 0; k < 3; ++k) parts.emplace_back(random.chance(0.8) ? count : row, counts[k], random);
  const double spread = random.pick({0.5, 2.0});
  for (int k = 0; k < 3; ++k) {
    for (int64_t e = 0; e < parts[k].layout.where.period; ++e) {
      double total[2] = {0, 0};  // of widths and heights, which "none" wants as probabilities
      for (int j = 0; j < counts[k]; ++j) {
        T& value = parts[k].value(e, j);
        value = static_cast<T>(spread * (2 * random.uniform() - 1));
        if (o.normalizer == SplineNormalizer::none) {
          value = static_cast<T>(std::exp(static_cast<double>(value)));
          if (j < (packed ? 2 * o.bins : o.bins) && k < 2) total[j / o.bins] += static_cast<double>(value);
        }
      }
      if (o.normalizer != SplineNormalizer::none || k == 2) continue;
      for (int j = 0; j < std::min(counts[k], (packed ? 2 : 1) * o.bins); ++j) {
        parts[k].value(e, j) /= static_cast<T>(total[j / o.bins]);
      }
    }
    p.parameters[k] = parts[k].read();
  }
  Buffer<T> grad_y(count, random), grad_log(count / p.row, random);
  const int wanted = static_cast<int>(random.below(16));
  const bool from_y = random.chance(0.8), from_log = !from_y || random.chance(0.8);

  // Gradients lie in layouts of their own.
  std::vector<Layout<T>> to;
  for (int k = 0; k < 3; ++k) to.emplace_back(count, counts[k], false, random);

  description = "spline of kind " + std::to_string(static_cast<int64_t>(o.kind)) + ", normalizer " +
                std::to_string(static_cast<int64_t>(o.normalizer)) + ", ends " +
                std::to_string(static_cast<int64_t>(o.ends)) + (o.inverse ? ", inverse" : "") +
                (o.tails ? "" : ", no tails") + ", " + std::to_string(o.bins) + " bins, " + std::to_string(count) +
                " elements in rows of " + std::to_string(p.row) + (packed ? ", packed " : ", separate ") +
                parts[0].layout.name;

  // With every number there is in x and the parameters: nothing is read or written where it may not be, NaN in x gives
  // NaN, and a lane is its own.
  const T nan = std::numeric_limits<T>::quiet_NaN(), infinite = std::numeric_limits<T>::infinity();
  Buffer<T> wild(count);
  for (int64_t i = 0; i < count; ++i) {
    wild.data()[i] = x.data()[i % x.count];
    if (random.chance(0.2)) wild.data()[i] = random.pick({nan, infinite, -infinite, std::numeric_limits<T>::max()});
  }
  std::vector<Part<T>> unruly;
  for (int k = 0; k < 3; ++k) {
    unruly.emplace_back(count, counts[k], random);
    for (int64_t e = 0; e < count; ++e) {
      for (int j = 0; j < counts[k]; ++j) {
        unruly[k].value(e, j) = static_cast<T>(
            random.pick({0.0, 1.0, -1e30, 1e30, static_cast<double>(nan), static_cast<double>(infinite)}));
      }
    }
  }

  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::Spline<T> forward = p;
    forward.y = results.add("y", count);
    forward.log_slope = results.add("log_slope", count / p.row);
    run(FUZZ_VERSION(isa, spline_kernel<T>)(), forward, pool.executor);
    const auto backward = [&](const genfuse::Spline<T>& of, Results<T>* found) {
      genfuse::SplineBackward<T> b;
      b.forward = of;
      b.grad_y = optional(from_y, grad_y);
      b.grad_log_slope = optional(from_log, grad_log);
      Buffer<T> grad_x(count);
      if ((wanted & 1) != 0) b.grad_x = found != nullptr ? found->add("grad_x", count) : grad_x.data();
      std::vector<Buffer<T>> gradients;
      for (int k = 0; k < 3; ++k) {
        gradients.emplace_back(to[k].where.extent);
        if ((wanted >> (k + 1) & 1) != 0) b.grad_parameters[k] = to[k].at(gradients[k].data());
      }
      run(FUZZ_VERSION(isa, spline_backward_kernel<T>)(), b, pool.executor);
      for (int k = 0; k < 3; ++k) {
        if (found == nullptr || (wanted >> (k + 1) & 1) == 0 || counts[k] == 0) continue;
        static const char* const names[] = {"grad_widths", "grad_heights", "grad_derivatives"};
        unpack(to[k].where, gradients[k], found->add(names[k], count * counts[k]));
      }
    };
    backward(p, &results);

    genfuse::Spline<T> other = p;
    Buffer<T> y(count), log_slope(count);
    other.row = 1;
    other.x = {wild.data(), count};
    other.y = y.data();
    other.log_slope = log_slope.data();
    run(FUZZ_VERSION(isa, spline_kernel<T>)(), other, pool.executor);
    for (int64_t i = 0; i < count; ++i) {
      const T given = wild.data()[i], clean = x.data()[i % x.count];
      const bool outside = !(given >= low && given <= high);
      const std::string where = "y of " + std::to_string(given) + " is " + std::to_string(y.data()[i]);
      if (given == clean && y.data()[i] != forward.y[i]) throw Failure{where + ", another lane's number changed it"};
      if (outside && o.tails && given == given && y.data()[i] != given) throw Failure{where + " in the tails"};
      if (outside && o.tails && given == given && log_slope.data()[i] != 0)
        throw Failure{where + ", its slope is not 1"};
      if ((given != given || (outside && !o.tails)) &&
          (y.data()[i] == y.data()[i] || log_slope.data()[i] == log_slope.data()[i])) {
        throw Failure{where + " and should be NaN"};
      }
    }
    other.row = p.row;
    backward(other, nullptr);
    for (int k = 0; k < 3; ++k) other.parameters[k] = unruly[k].read();
    run(FUZZ_VERSION(isa, spline_kernel<T>)(), other, pool.executor);
    backward(other, nullptr);
    return results;
  });
}

}  // namespace

void spline_case(Random& random, std::string& description) {
  random.chance(0.5) ? spline_case_of<float>(random, description) : spline_case_of<double>(random, description);
}

}  // namespace fuzz

#include "fuzz.h"
#include "masked_conv/ancestral_plan.h"

namespace fuzz {
namespace {

constexpr double kMostBytes = 3e7;  // a program that a changed number has made larger is planned, and not run

// Draws a program as python/genfuse/reference/masked_conv/ancestral.py encodes one.
template <class T>
struct Writer {
  struct Value {
    int64_t channels, factor, by_rows, own;
  };
  Random& random;
  int64_t batch, channels, height, width, sub_pixels, head, levels, components = 0;
  std::vector<Value> values;
  std::vector<int64_t> instructions;
  int64_t count = 0;
  std::vector<Buffer<T>> memory;
  std::vector<genfuse::PixelTensor<T>> tensors;

  explicit Writer(Random& random_) : random(random_), batch(random.chance(0.5) ? 1 : random.size()) {
    head = random.below(4);
    channels = head == 3 ? random.pick<int64_t>({1, 3}) : 1 + random.below(4);
    sub_pixels = head != 3 && random.chance(0.5) ? channels : 1;
    height = 1 + random.below(6);
    width = 1 + random.below(6);
    levels = head == 2 ? 2 : head == 3 ? random.pick<int64_t>({2, 256}) : random.pick<int64_t>({1, 2, 3, 9, 33});
    components = head == 3 ? 1 + random.below(3) : 0;
    values.push_back({channels, 1, 0, 1});
  }

  // The place of a new tensor, for each image or the same for all.
  int64_t tensor(std::vector<int64_t> sizes, bool may_be_of_batch) {
    if (may_be_of_batch && random.chance(0.5)) sizes.insert(sizes.begin(), batch);
    int64_t n = 1;
    for (const int64_t size : sizes) n *= size;
    memory.emplace_back(n, random);
    tensors.push_back({memory.back().data(), sizes});
    return static_cast<int64_t>(tensors.size()) - 1;
  }
  void put(int64_t code, const Value& made, const std::vector<int64_t>& arguments) {
    instructions.insert(instructions.end(), {code, static_cast<int64_t>(arguments.size()) + 1, ++count});
    instructions.insert(instructions.end(), arguments.begin(), arguments.end());
    values.push_back(made);
  }
  int64_t any() { return random.below(static_cast<int64_t>(values.size())); }
  // A value of these sizes, or -1.
  int64_t like(int64_t wanted, int64_t factor) {
    for (int tries = 0; tries < 4; ++tries) {
      const int64_t v = any();
      if (values[static_cast<size_t>(v)].channels == wanted && values[static_cast<size_t>(v)].factor == factor)
        return v;
    }
    return -1;
  }
  const Value& at(int64_t v) const { return values[static_cast<size_t>(v)]; }

  void conv(int64_t x, int64_t outputs, bool is_head) {
    const Value in = at(x);
    const bool transposed = !is_head && in.factor > 1 && random.chance(0.5);
    const int64_t stride = transposed || (!is_head && in.factor < 4 && random.chance(0.25)) ? 2 : 1;
    const int64_t step = transposed ? 1 : 1 + random.below(2), rows = 1 + random.below(3),
                  columns = 1 + random.below(4);
    const int64_t oy = transposed ? random.below(2) : -step * (rows - 1) - random.below(2);
    const int64_t ox = transposed ? random.below(2) : -step * random.below(columns + 1) + random.below(2);
    const bool alone = in.own && sub_pixels == 1;
    std::vector<int64_t> taps;
    bool whole = true;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        const int64_t dy = transposed ? -((i + oy) / 2) : oy + step * i;
        const int64_t dx = transposed ? -((j + ox) / 2) : ox + step * j;
        if (!(dy < 0 || in.by_rows || dx < 0 || (dx == 0 && !alone)) || random.chance(0.1)) continue;
        taps.insert(taps.end(), {i, j});
        whole = whole && (in.by_rows || dy < 0);
      }
    }
    const int64_t factor = transposed ? in.factor / 2 : in.factor * stride;
    const int64_t other = is_head || random.chance(0.6) ? -1 : like(outputs, factor);
    if (other >= 0) whole = whole && at(other).by_rows;
    const int64_t weight = tensor({outputs, in.channels, rows, columns}, false);
    const int64_t bias = random.chance(0.5) ? -1 : tensor({outputs}, true);
    std::vector<int64_t> arguments{x, other, weight, bias, random.below(5), transposed, oy, ox, step, stride};
    arguments.push_back(static_cast<int64_t>(taps.size()) / 2);
    arguments.insert(arguments.end(), taps.begin(), taps.end());
    put(1, {outputs, factor, whole, other >= 0 && at(other).own}, arguments);
  }

  void instruction() {
    const int64_t x = any();
    const Value in = at(x);
    switch (random.below(8)) {
      case 0: {
        const int64_t own = 1 + random.below(3);
        put(0, {own, 1, 1, 0}, {tensor({own, height, width}, true)});
        break;
      }
      case 1:
        if (in.channels % 2 == 0) {
          const int64_t other = like(in.channels / 2, in.factor), half = in.channels / 2;
          const Value made{half, in.factor, in.by_rows && (other < 0 || at(other).by_rows),
                           in.own || (other >= 0 && at(other).own)};
          put(2, made, {x, other, random.chance(0.5) ? -1 : tensor({in.channels}, true), random.below(2)});
        }
        break;
      case 2: {
        const int64_t kind = random.below(6);
        if (in.channels < 40)
          put(3, {kind == 5 ? 2 * in.channels : in.channels, in.factor, in.by_rows, in.own}, {x, kind});
        break;
      }
      case 3: {
        const int64_t other = like(in.channels, in.factor);
        if (other >= 0) {
          put(4, {in.channels, in.factor, in.by_rows && at(other).by_rows, in.own || at(other).own}, {x, other});
        }
        break;
      }
      case 4: {
        const int64_t key = like(in.channels, in.factor), value = any(), heads = random.pick<int64_t>({1, 1, 2, 3});
        if (key < 0 || at(value).factor != in.factor || in.channels % heads != 0 || at(value).channels % heads != 0)
          break;
        const bool strict = random.chance(0.5);
        put(5, {at(value).channels, in.factor, 0, in.own || (!strict && (at(key).own || at(value).own))},
            {x, key, value, heads, strict});
        break;
      }
      default:
        conv(x, random.chance(0.9) ? 1 + random.below(20) : random.pick<int64_t>({64, 65, 130}), false);
    }
  }

  std::vector<int64_t> program() {
    const int64_t length = random.below(12);
    for (int64_t i = 0; i < length; ++i) instruction();
    int64_t x = any();
    while (at(x).factor != 1) x = any();
    const int64_t outputs = head == 3   ? (channels == 3 ? 10 : 3) * components
                            : head == 2 ? channels
                                        : channels * levels;
    conv(x, outputs, true);
    std::vector<int64_t> all{channels, height,    width,      sub_pixels,
                             head,     levels,    components, head == 3 ? random.below(channels == 3 ? 3 : 4) : 0,
                             count,    count + 1, count};
    for (const Value& v : values) all.insert(all.end(), {v.channels, v.factor, v.by_rows});
    all.insert(all.end(), instructions.begin(), instructions.end());
    return all;
  }
};

template <class T>
void ancestral_case_of(Random& random, std::string& description) {
  Writer<T> writer(random);
  std::vector<int64_t> program = writer.program();
  const bool broken = random.chance(0.5);
  if (broken) {  // any of its numbers but the image's size, which the caller compares with u
    for (int64_t changes = 1 + random.below(2); changes > 0; --changes) {
      const auto at = static_cast<size_t>(3 + random.below(static_cast<int64_t>(program.size()) - 3));
      program[at] = random.chance(0.5)
                        ? program[at] + random.pick<int64_t>({-1, 1})
                        : random.pick<int64_t>({-1, 0, 1, 2, 5, 40, 1 << 20, int64_t{1} << 40, INT64_MIN});
    }
    if (random.chance(0.1)) program.resize(static_cast<size_t>(random.below(static_cast<int64_t>(program.size()))));
  }
  description = std::string(broken ? "broken " : "") + "program of " + std::to_string(writer.batch) + " images:";
  for (const int64_t number : program) description += " " + std::to_string(number);
  const std::vector<double> constants{0.5, -0.25, -7.0};
  std::unique_ptr<genfuse::PixelPlan<T>> plan;
  try {
    plan = std::make_unique<genfuse::PixelPlan<T>>(writer.batch, writer.tensors, program, constants);
  } catch (const std::runtime_error& refused) {
    if (!broken) throw Failure{std::string("the plan refuses it: ") + refused.what()};
    return;
  }
  genfuse::Ancestral<T>& p = plan->p;
  const int64_t places = p.height * p.width, outputs = p.values[p.head_value].channels;
  const double size = static_cast<double>(p.image_storage) * static_cast<double>(p.batch) +
                      static_cast<double>(p.packed) + static_cast<double>(p.levels);
  if (size * sizeof(T) > kMostBytes) return;
  Buffer<T> u(p.batch * p.draws * places);
  Buffer<int64_t> given(p.batch * p.channels * places);
  for (int64_t i = 0; i < u.count; ++i) u.data()[i] = static_cast<T>(0.999 * random.uniform());
  for (int64_t i = 0; i < given.count; ++i) given.data()[i] = random.below(2 * p.levels) - p.levels;
  const bool has_given = random.chance(0.7);
  p.u = u.data();
  p.given = optional(has_given, given);
  // The instruction sets round differently, and a pixel at the border of two levels changes all that follow: so each is
  // compared with itself.
  for (size_t isa = 0; isa < usable_isas(); ++isa) {
    std::vector<int64_t> first;
    std::vector<T> first_outputs;
    for (const Pool& pool : pools()) {
      Buffer<int64_t> levels(p.batch * p.channels * places);
      Buffer<T> recorded(p.batch * outputs * places);
      p.out = levels.data();
      p.outputs = recorded.data();
      run(FUZZ_VERSION(isa, ancestral_kernel<T>)(), p, pool.executor);
      for (int64_t i = 0; i < levels.count; ++i) {
        if (levels.data()[i] < -1 || levels.data()[i] >= p.levels || (!broken && levels.data()[i] < 0)) {
          throw Failure{std::string(pool.name) + ": level " + std::to_string(levels.data()[i])};
        }
        if (has_given && given.data()[i] >= 0 && levels.data()[i] != given.data()[i])
          throw Failure{"given, and changed"};
      }
      const std::vector<int64_t> found(levels.data(), levels.data() + levels.count);
      const std::vector<T> found_outputs(recorded.data(), recorded.data() + recorded.count);
      if (pool.executor.threads == 1) {
        first = found;
        first_outputs = found_outputs;
      } else if (found != first || (!broken && found_outputs != first_outputs)) {
        throw Failure{std::string(pool.name) + " against 1 thread: other pixels"};
      }
    }
  }
}

}  // namespace

void ancestral_case(Random& random, std::string& description) {
  random.chance(0.5) ? ancestral_case_of<float>(random, description) : ancestral_case_of<double>(random, description);
}

}  // namespace fuzz

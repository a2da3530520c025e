// The plan of a sampler, made of the numbers that describe a network (python/genfuse/reference/masked_conv/ancestral.py
// has their layout). Made by those who call the kernel; what does not fit together is refused here, so that no kernel
// reads or writes out of bounds, nor a value before it is known.
#pragma once

#include <algorithm>
#include <deque>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "masked_conv/ancestral.h"

namespace genfuse {

template <class T>
struct PixelTensor {
  const T* data = nullptr;
  std::vector<int64_t> sizes;
};

template <class T>
class PixelPlan {
 public:
  static constexpr size_t kHeader = 11, kConstants = 3;
  Ancestral<T> p;

  PixelPlan(const PixelPlan&) = delete;  // `p` points into it

  PixelPlan(int64_t batch, const std::vector<PixelTensor<T>>& tensors, const std::vector<int64_t>& program,
            const std::vector<double>& constants)
      : tensors_(tensors), program_(program) {
    check(program.size() >= kHeader, "program must hold at least ", kHeader, " integers, got ", program.size());
    check(constants.size() == kConstants, "constants must hold ", kConstants, " numbers, got ", constants.size());
    p.batch = batch;
    p.channels = bounded(next(), 1, kMost, "channels");
    p.height = bounded(next(), 1, kMost, "height");
    p.width = bounded(next(), 1, kMost, "width");
    p.sub_pixels = next();
    check(p.sub_pixels == 1 || p.sub_pixels == p.channels, "program draws ", p.sub_pixels, " of ", p.channels,
          " channels at a time");
    p.head = static_cast<PixelHead>(bounded(next(), 0, kPixelHeads - 1, "head"));
    p.levels = bounded(next(), 1, int64_t{1} << 20, "number of levels");
    p.components = next();
    p.layout = bounded(next(), 0, kPixelLayouts - 1, "layout");
    p.head_value = next();
    const int64_t values = bounded(next(), 2, kMost, "number of values");
    const int64_t instructions = bounded(next(), 1, kMost, "number of instructions");
    check(values == instructions + 1, "program has ", values, " values of ", instructions, " instructions");
    p.scale = static_cast<T>(constants[0]);
    p.shift = static_cast<T>(constants[1]);
    p.log_scale_min = static_cast<T>(constants[2]);
    read_values(values);
    for (int64_t i = 0; i < instructions; ++i) read_instruction(i + 1);
    check(at_ == program.size(), "program has ", program.size() - at_, " integers too many");
    read_head();
    place();
    p.values = values_.data();
    p.value_count = values;
    p.instructions = instructions_.data();
    p.instruction_count = instructions;
  }

 private:
  static constexpr int64_t kMost = int64_t{1} << 20;  // of any size: products of three stay below 2^63

  template <class... Parts>
  static void check(bool holds, const Parts&... parts) {
    if (holds) return;
    std::ostringstream message;
    (message << ... << parts);
    throw std::runtime_error(message.str());
  }
  static int64_t bounded(int64_t value, int64_t least, int64_t most, const char* what) {
    check(value >= least && value <= most, "program has a ", what, " of ", value, ", not between ", least, " and ",
          most);
    return value;
  }
  int64_t next() {
    check(at_ < program_.size(), "program ends too early");
    return program_[at_++];
  }
  // A value made before the one that is being made.
  int64_t earlier(int64_t made) {
    const int64_t value = next();
    check(value >= 0 && value < made, "program uses value ", value, " before it is made");
    return value;
  }
  PixelValue& value(int64_t index) { return values_[static_cast<size_t>(index)]; }

  const PixelTensor<T>& tensor(int64_t index, const char* what) {
    check(index >= 0 && index < static_cast<int64_t>(tensors_.size()), "program has no tensor ", index, " for a ",
          what);
    return tensors_[static_cast<size_t>(index)];
  }
  // A tensor of `sizes`, or one of them for each image: its distance from image to image.
  const T* of_image(int64_t index, const std::vector<int64_t>& sizes, const char* what, int64_t& image_stride) {
    const PixelTensor<T>& t = tensor(index, what);
    int64_t count = 1;
    for (const int64_t size : sizes) count *= size;
    std::vector<int64_t> each = sizes;
    each.insert(each.begin(), p.batch);
    check(t.sizes == sizes || t.sizes == each, "program has a ", what, " of the wrong shape");
    image_stride = t.sizes == each ? count : 0;
    return t.data;
  }

  void read_values(int64_t count) {
    check(program_.size() - at_ >= static_cast<size_t>(3 * count), "program ends too early");
    values_.resize(static_cast<size_t>(count));
    for (PixelValue& v : values_) {
      v.channels = bounded(next(), 1, kMost, "number of channels");
      v.factor = bounded(next(), 1, kMost, "factor");
      v.by_rows = next() != 0;
      check((v.factor & (v.factor - 1)) == 0, "program has the factor ", v.factor, ", which is no power of 2");
      v.height = (p.height + v.factor - 1) / v.factor;
      v.width = (p.width + v.factor - 1) / v.factor;
    }
    check(values_[0].channels == p.channels && values_[0].factor == 1 && !values_[0].by_rows,
          "program's first value is not the image");
    own_.resize(values_.size());
    own_[0] = true;
  }

  void same(const PixelValue& a, const PixelValue& b, const char* what) {
    check(a.channels == b.channels && a.factor == b.factor, "program has a ", what, " of another size");
  }
  // The value that is being made depends at a pixel on that pixel itself if the other does.
  void inherits(int64_t made, int64_t from) {
    if (own_[static_cast<size_t>(from)]) own_[static_cast<size_t>(made)] = true;
  }
  // What follows from `from` alone is known for a row at once only if that is.
  void follows(const PixelValue& out, const PixelValue& from) {
    check(!out.by_rows || from.by_rows, "program wants a row of what is known by pixels only");
  }

  void read_instruction(int64_t made) {
    PixelInstruction<T> in;
    in.op = static_cast<PixelOp>(bounded(next(), 0, kPixelOps - 1, "instruction"));
    const int64_t count = next();
    const size_t begin = at_;
    check(next() == made, "program makes values out of order");
    in.out = made;
    PixelValue& out = value(made);
    switch (in.op) {
      case PixelOp::constant:
        in.tensor = of_image(next(), {out.channels, out.height, out.width}, "constant", in.image_stride);
        check(out.factor == 1, "program has a constant at less than the image's size");
        break;
      case PixelOp::conv:
        read_conv(in, made);
        break;
      case PixelOp::gate: {
        in.in = earlier(made);
        in.other = next();
        const int64_t condition = next();
        in.linear = bounded(next(), 0, 1, "gate") == 1;
        const PixelValue& x = value(in.in);
        check(x.channels == 2 * out.channels && x.factor == out.factor, "program has a gate of another size");
        follows(out, x);
        inherits(made, in.in);
        read_other(in, made);
        if (condition >= 0) in.tensor = of_image(condition, {x.channels}, "condition", in.image_stride);
        break;
      }
      case PixelOp::activation: {
        in.in = earlier(made);
        in.activation = static_cast<PixelActivation>(bounded(next(), 0, kPixelActivations - 1, "activation"));
        const PixelValue& x = value(in.in);
        const int64_t times = in.activation == PixelActivation::concat_elu ? 2 : 1;
        check(out.channels == times * x.channels && x.factor == out.factor,
              "program has an activation of another size");
        follows(out, x);
        inherits(made, in.in);
        break;
      }
      case PixelOp::add:
        in.in = earlier(made);
        in.other = next();
        same(value(in.in), out, "sum");
        follows(out, value(in.in));
        inherits(made, in.in);
        check(in.other >= 0, "program has a sum of one");
        read_other(in, made);
        break;
      case PixelOp::attention: {
        in.in = earlier(made);
        in.key = earlier(made);
        in.value = earlier(made);
        in.heads = bounded(next(), 1, kMost, "number of heads");
        in.strict = next() != 0;
        PixelValue &q = value(in.in), &k = value(in.key), &v = value(in.value);
        same(q, k, "key");
        same(v, out, "attended value");
        check(q.factor == v.factor && q.channels % in.heads == 0 && v.channels % in.heads == 0 && !out.by_rows,
              "program has an attention whose sizes do not fit");
        inherits(made, in.in);
        if (!in.strict) inherits(made, in.key), inherits(made, in.value);
        k.rows = k.height;
        v.rows = v.height;
        p.attended = std::max(p.attended, q.height * q.width);
        break;
      }
    }
    check(count == static_cast<int64_t>(at_ - begin), "program has an instruction of ", at_ - begin,
          " arguments that says it has ", count);
    in.own = own_[static_cast<size_t>(made)];
    instructions_.push_back(in);
  }

  void read_other(PixelInstruction<T>& in, int64_t made) {
    if (in.other < 0) return;
    check(in.other < made, "program uses value ", in.other, " before it is made");
    same(value(in.other), value(made), "sum");
    follows(value(made), value(in.other));
    inherits(made, in.other);
  }

  void read_conv(PixelInstruction<T>& in, int64_t made) {
    PixelValue& out = value(made);
    in.in = earlier(made);
    in.other = next();
    const PixelTensor<T>& weight = tensor(next(), "weight");
    const int64_t bias = next();
    in.activation = static_cast<PixelActivation>(bounded(next(), 0, kPixelActivations - 2, "activation"));
    const bool transposed = next() != 0;
    const int64_t oy = bounded(next(), -kMost, kMost, "offset"), ox = bounded(next(), -kMost, kMost, "offset");
    const int64_t step = bounded(next(), 1, kMost, "dilation"), stride = bounded(next(), 1, 2, "stride");
    const int64_t taps = bounded(next(), 0, kMost, "number of taps");
    PixelValue& x = value(in.in);
    check(weight.sizes.size() == 4 && weight.sizes[0] == out.channels && weight.sizes[1] == x.channels,
          "program has a weight of the wrong shape");
    in.weight = weight.data;
    const int64_t rows = weight.sizes[2], columns = weight.sizes[3];
    in.kernel = rows * columns;
    in.outputs = out.channels;
    in.inputs = x.channels;
    if (bias >= 0) in.bias = of_image(bias, {out.channels}, "bias", in.image_stride);
    read_other(in, made);
    if (transposed) {
      check(stride == 2 && step == 1 && x.factor == 2 * out.factor,
            "program has a transposed convolution of another size");
      in.up = 2;
    } else {
      check(out.factor == stride * x.factor, "program has a convolution of another size");
      in.stride = stride;
    }
    struct Tap {
      int64_t phase, dy, dx, place;
    };
    std::vector<Tap> all;
    const auto halve = [](int64_t n) { return (n - (n & 1)) / 2; };  // rounded down
    for (int64_t t = 0; t < taps; ++t) {
      const int64_t i = bounded(next(), 0, rows - 1, "tap"), j = bounded(next(), 0, columns - 1, "tap");
      Tap tap{0, oy + step * i, ox + step * j, i * columns + j};
      if (transposed) {
        const int64_t sy = oy + i, sx = ox + j;
        tap = {2 * (sy & 1) + (sx & 1), -halve(sy), -halve(sx), tap.place};
      }
      const bool own = own_[static_cast<size_t>(in.in)] && p.sub_pixels == 1;
      check(tap.dy < 0 || (tap.dy == 0 && (x.by_rows || tap.dx < 0 || (tap.dx == 0 && !own))),
            "program has a tap that looks into the future");
      check(!out.by_rows || x.by_rows || tap.dy < 0, "program wants a row of what is known by pixels only");
      if (tap.dy <= -x.height || tap.dx <= -x.width || tap.dx >= x.width) continue;  // sees nothing but zeros
      x.rows = std::max(x.rows, 1 - tap.dy);
      all.push_back(tap);
    }
    // Those that are known with the row first; neighbours side by side.
    const auto by_row = [&](const Tap& t) { return x.by_rows || t.dy < 0; };
    std::stable_sort(all.begin(), all.end(), [&](const Tap& a, const Tap& b) {
      if (a.phase != b.phase) return a.phase < b.phase;
      if (by_row(a) != by_row(b)) return by_row(a);
      return a.dy != b.dy ? a.dy < b.dy : a.dx < b.dx;
    });
    std::vector<int64_t>& places = places_.emplace_back();
    const int64_t padded = (in.outputs + kPixelPad - 1) / kPixelPad * kPixelPad;
    for (int64_t phase = 0; phase < in.up * in.up; ++phase) {
      std::vector<PixelRun>& runs = runs_.emplace_back();
      int64_t code = 0;  // of the last tap of the run
      for (size_t t = 0; t < all.size(); ++t) {
        const Tap& tap = all[t];
        const int64_t of_phase = in.up == 2 ? tap.phase : 0;
        const int64_t wanted = in.up == 2 ? 2 * (phase / 2) + phase % 2 : 0;
        if (of_phase != wanted) continue;
        const bool rows_first = by_row(tap);
        if (!runs.empty() && runs.back().dy == tap.dy && code + 1 == tap.dx &&
            (rows_first == (static_cast<int64_t>(runs.size()) <= in.row_runs[phase]))) {
          runs.back().taps += 1;
        } else {
          runs.push_back({tap.dy, tap.dx, 1, 0, static_cast<int64_t>(places.size()), 0});
          if (rows_first) in.row_runs[phase] += 1;
        }
        code = tap.dx;
        places.push_back(tap.place);
      }
      for (PixelRun& run : runs) {
        run.depth = run.taps * in.inputs;
        run.packed = p.packed;
        p.packed += run.depth * padded;
        // Position k = 0 sees column dx, the last one stride * k + dx + taps - 1.
        const int64_t last = (out.width - 1 - phase % in.up) / in.up;
        if (out.width - 1 < phase % in.up) continue;
        x.left = std::max(x.left, -run.dx);
        x.pitch = std::max(x.pitch, in.stride * last + run.dx + run.taps - x.width);  // zeros to the right, for now
      }
      in.run_count[phase] = static_cast<int64_t>(runs.size());
      in.runs[phase] = runs.data();
    }
    in.places = places.data();
    sums_.emplace_back(instructions_.size(), out.width * padded);
  }

  void read_head() {
    check(p.head_value > 0 && p.head_value < static_cast<int64_t>(values_.size()), "program has no value ",
          p.head_value);
    const PixelValue& v = value(p.head_value);
    check(!own_[static_cast<size_t>(p.head_value)], "program has a head that depends on the pixel that it is to draw");
    int64_t wanted = p.channels * p.levels;
    p.draws = p.channels;
    if (p.head == PixelHead::bernoulli) {
      check(p.levels == 2, "program has a Bernoulli head of ", p.levels, " levels");
      wanted = p.channels;
    } else if (p.head == PixelHead::mixture) {
      check(p.channels == 1 || p.channels == 3, "program has a mixture of ", p.channels, " channels");
      check(p.sub_pixels == 1, "program has a mixture that is drawn channel by channel");
      check((p.levels & (p.levels - 1)) == 0 && p.levels >= 2 && p.levels <= 65536, "program has a mixture of ",
            p.levels, " levels");
      wanted = (p.channels == 3 ? 10 : 3) * bounded(p.components, 1, kMost, "number of components");
      p.draws = p.channels + 1;
    }
    check(v.channels == wanted && v.factor == 1, "program has a head of ", v.channels, " channels, not ", wanted);
  }

  void place() {
    int64_t size = 0;
    const auto take = [&](int64_t n) {
      const int64_t begin = size;
      size += (n + kPixelPad - 1) / kPixelPad * kPixelPad;
      return begin;
    };
    for (PixelValue& v : values_) {
      v.rows = std::min(v.rows, v.height);
      v.pitch = v.left + v.width + v.pitch;
      v.offset = take(v.size());
    }
    for (const auto& [instruction, n] : sums_) instructions_[instruction].sums = take(n);
    p.image_storage = size;
  }

  const std::vector<PixelTensor<T>>& tensors_;
  const std::vector<int64_t>& program_;
  size_t at_ = 0;
  std::vector<PixelValue> values_;
  std::vector<bool> own_;  // whether a value depends at a pixel on that pixel, not known before it is drawn
  std::vector<PixelInstruction<T>> instructions_;
  std::deque<std::vector<int64_t>> places_;
  std::deque<std::vector<PixelRun>> runs_;
  std::vector<std::pair<size_t, int64_t>> sums_;
};

}  // namespace genfuse

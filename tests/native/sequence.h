// Random sequences and regularisers, which all recurrent kernels share.
#pragma once

#include "fuzz.h"
#include "recurrent/sequence.h"

namespace fuzz {

struct SequenceCase {
  genfuse::Sequence seq;
  genfuse::Regularizers reg;
  std::vector<int64_t> batch_sizes;
  std::unique_ptr<bool[]> resets;
  int64_t x_count = 0;  // elements that x spans

  explicit SequenceCase(Random& random) {
    const bool large = random.chance(0.05);
    seq.steps = random.chance(0.05) ? 0 : large ? 20 + random.below(40) : 1 + random.below(7);
    seq.batch = random.chance(0.05) ? 0 : large ? 10 + random.below(30) : 1 + random.below(9);
    seq.input = random.chance(0.05) ? 0 : random.size();
    seq.hidden = random.size();
    seq.state = seq.hidden;
    seq.reverse = random.chance(0.3);
    const bool packed = seq.steps > 0 && seq.batch > 0 && random.chance(0.3);
    if (packed) {
      int64_t active = seq.batch;
      for (int64_t t = 0; t < seq.steps; ++t) {
        batch_sizes.push_back(active);
        seq.rows += active;
        if (random.chance(0.4)) active = 1 + random.below(active);
      }
      seq.batch_sizes = batch_sizes.data();
      seq.x_batch = seq.input + (random.chance(0.3) ? random.below(5) : 0);
      x_count = seq.rows > 0 ? (seq.rows - 1) * seq.x_batch + seq.input : 0;
    } else {
      seq.rows = seq.steps * seq.batch;
      const int64_t row = seq.input + (random.chance(0.3) ? random.below(5) : 0);
      const int layout = static_cast<int>(random.below(4));
      seq.x_step = layout == 0 ? row : layout == 1 ? 0 : seq.batch * row;  // batch first, expanded over time, dense
      seq.x_batch = layout == 0 ? seq.steps * row : row;
      if (seq.rows > 0) x_count = (seq.steps - 1) * seq.x_step + (seq.batch - 1) * seq.x_batch + seq.input;
      if (random.chance(0.3)) {
        resets.reset(new bool[static_cast<size_t>(seq.rows)]);
        for (int64_t i = 0; i < seq.rows; ++i) resets[i] = random.chance(0.3);
        seq.resets = resets.get();
      }
    }
    reg.zoneout_h = random.probability();
    reg.zoneout_c = random.probability();
    reg.weight_drop = random.probability();
    reg.input_dropout = random.probability();
    reg.output_dropout = random.probability();
    reg.training = random.chance(0.7);
    reg.seed = random.bits();
    reg.offset = random.bits();
  }

  std::string text() const {
    char line[400];
    std::snprintf(
        line, sizeof line,
        "T=%lld B=%lld I=%lld H=%lld S=%lld rows=%lld%s%s%s x strides %lld %lld, zoneout %g %g, weight drop %g, "
        "dropout %g %g%s",
        static_cast<long long>(seq.steps), static_cast<long long>(seq.batch), static_cast<long long>(seq.input),
        static_cast<long long>(seq.hidden), static_cast<long long>(seq.state), static_cast<long long>(seq.rows),
        seq.batch_sizes ? " packed" : "", seq.resets ? " resets" : "", seq.reverse ? " reverse" : "",
        static_cast<long long>(seq.x_step), static_cast<long long>(seq.x_batch), reg.zoneout_h, reg.zoneout_c,
        reg.weight_drop, reg.input_dropout, reg.output_dropout, reg.training ? ", training" : "");
    return line;
  }
};

}  // namespace fuzz

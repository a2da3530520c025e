// What every recurrent kernel is told about its sequence and its regularisers. Plain data: no torch, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace genfuse {

// Rows are time-major: row(t, b) = t * batch + b, or, packed (batch_sizes given), the row of PackedSequence.data.
struct Sequence {
  int64_t steps = 0, batch = 0;
  int64_t input = 0;                     // I, features of x
  int64_t hidden = 0;                    // H, units
  int64_t state = 0;                     // features of h: H, or P with a projection
  int64_t rows = 0;                      // steps * batch, or the sum of batch_sizes
  const int64_t* batch_sizes = nullptr;  // [steps], not increasing, or null
  const bool* resets = nullptr;          // [steps, batch], dense only, or null
  int64_t x_step = 0, x_batch = 0;       // element strides of x; packed: x_batch is the row stride
  bool reverse = false;

  int64_t active(int64_t t) const { return batch_sizes == nullptr ? batch : batch_sizes[t]; }
};

// Philox streams, added to the offset.
enum : uint64_t { kStreamZoneoutH = 0, kStreamZoneoutC = 1, kStreamWeight = 2, kStreamInput = 3, kStreamOutput = 4 };

struct Regularizers {
  double zoneout_h = 0, zoneout_c = 0, weight_drop = 0, input_dropout = 0, output_dropout = 0;
  bool training = false;
  uint64_t seed = 0, offset = 0;

  bool drops_weights() const { return training && weight_drop > 0; }
  bool masks_input() const { return training && input_dropout > 0; }
  bool masks_output() const { return training && output_dropout > 0; }
};

}  // namespace genfuse

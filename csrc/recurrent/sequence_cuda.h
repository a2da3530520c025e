// The persistent recurrence on CUDA: what its launches are told, and how a layer is laid out over the device. Plain
// data and prototypes: no torch. The time loop runs inside one cooperative kernel; each block owns a few units, keeps
// their rows (forward) or columns (backward) of the recurrent weights in shared memory for the whole sequence, and
// the blocks meet at one grid barrier a step. Dense sequences; float32 or bfloat16, accumulated in float32.
#pragma once

#include <cstdint>

namespace genfuse {

#ifndef GENFUSE_PERSISTENT_THREADS  // tests/cuda_host runs smaller blocks
#define GENFUSE_PERSISTENT_THREADS 256
#endif
constexpr int kPersistentThreads = GENFUSE_PERSISTENT_THREADS;
constexpr int kRowTile = 8;  // batch rows that a warp works on at a time

struct DeviceLimits {
  int multiprocessors = 0;
  int64_t shared_per_block = 0;  // with opt-in
  bool cooperative = false;
};

// How the recurrence of one layer is spread over the device.
struct PersistentPlan {
  const char* objection = nullptr;  // why it cannot run; then nothing else is set
  int blocks = 0;
  int units = 0;   // units that a block owns
  int depth = 0;   // hidden size padded to a multiple of 128, so that a warp reads four values a lane without a tail
  int rows = 0;    // forward: batch rows staged in shared memory at a time, a multiple of kRowTile
  int staged = 0;  // backward: gates staged at a time, a divisor of their number
  int64_t shared_bytes = 0;
};

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

inline PersistentPlan persistent_plan(int64_t hidden, int64_t batch, int gates, int weight_bytes, bool backward,
                                      const DeviceLimits& device) {
  PersistentPlan plan;
  if (!device.cooperative) {
    plan.objection = "the device has no cooperative launch";
    return plan;
  }
  if (hidden > 1 << 16 || batch > 1 << 20) {
    plan.objection = "hidden_size or the batch is too large for the persistent kernel";
    return plan;
  }
  const int64_t depth = round_up(hidden, 128);
  const int64_t units = (hidden + device.multiprocessors - 1) / device.multiprocessors;
  plan.depth = static_cast<int>(depth);
  plan.units = static_cast<int>(units);
  plan.blocks = static_cast<int>((hidden + units - 1) / units);
  if (!backward) {
    const int64_t fixed = units * gates * depth * weight_bytes + round_up(batch * units * 4, 16);
    const int64_t most = (device.shared_per_block - fixed) / (depth * 4) / kRowTile * kRowTile;
    const int64_t wanted = round_up(batch, kRowTile);
    plan.rows = static_cast<int>(most < wanted ? most : wanted);
    plan.shared_bytes = fixed + plan.rows * depth * 4;
    if (plan.rows >= kRowTile) return plan;
  } else {
    const int64_t padded = round_up(units, 4);
    const int64_t fixed =
        padded * gates * depth * weight_bytes + 2 * round_up(batch * units * 4, 16) + gates * padded * kRowTile * 4;
    for (int staged = gates; staged >= 1; --staged) {
      if (gates % staged != 0) continue;
      plan.staged = staged;
      plan.shared_bytes = fixed + staged * kRowTile * depth * 4;
      if (plan.shared_bytes <= device.shared_per_block) return plan;
    }
  }
  plan.objection = "the recurrent weights and states do not fit into the device's shared memory";
  return plan;
}

// What both cells have in common. T: float or BFloat16.
template <class T>
struct PersistentSequence {
  PersistentPlan plan;
  int64_t steps = 0, batch = 0, hidden = 0;
  bool reverse = false;
  const bool* resets = nullptr;  // [steps, batch]
  const int64_t* rng = nullptr;  // (seed, offset), where a zoneout draws
  double zoneout_h = 0, zoneout_c = 0;
  bool training = false;
  const float* output_mask = nullptr;  // [batch, hidden]
  const T* w_hh = nullptr;             // [gates * hidden, hidden]
};

template <class T>
struct PersistentForward : PersistentSequence<T> {
  const float* xp = nullptr;       // [rows, gates * hidden]: W_ih x
  const float* bias_ih = nullptr;  // [gates * hidden]
  const float* bias_hh = nullptr;
  const float* h0 = nullptr;  // [batch, hidden]
  const float* c0 = nullptr;  // LSTM
  float* exchange = nullptr;  // [2, batch, hidden]
  T* y = nullptr;             // [rows, hidden]
  float* h_n = nullptr;
  float* c_n = nullptr;
  float* gates = nullptr;          // [rows, 4 hidden], or null; may be xp itself for the LSTM
  float* cells = nullptr;          // LSTM: [rows, hidden], or null
  float* hidden_states = nullptr;  // h before the output mask, or null
};

template <class T>
struct PersistentBackward : PersistentSequence<T> {
  const T* grad_y = nullptr;        // [rows, hidden] or null
  const float* grad_h_n = nullptr;  // [batch, hidden] or null
  const float* grad_c_n = nullptr;
  const float* gates = nullptr;  // [rows, 4 hidden]
  const float* cells = nullptr;  // LSTM
  const float* c0 = nullptr;
  const float* hidden_states = nullptr;  // GRU: h before the output mask, float32; null: y
  const T* y = nullptr;
  const float* h0 = nullptr;
  T* grad_gates = nullptr;   // [rows, 4 hidden]: LSTM i, f, g, o; GRU r, z, n (input part), hn
  float* grad_h0 = nullptr;  // [batch, hidden]
  float* grad_c0 = nullptr;
};

// Results: a CUDA error code, 0 for success.
template <class T>
int launch_lstm_forward(const PersistentForward<T>& arguments, void* stream);
template <class T>
int launch_lstm_backward(const PersistentBackward<T>& arguments, void* stream);
template <class T>
int launch_gru_forward(const PersistentForward<T>& arguments, void* stream);
template <class T>
int launch_gru_backward(const PersistentBackward<T>& arguments, void* stream);

// out[i] = x[i] * (u >= p) / (1 - p) under the mask's element i % period; x null: ones.
template <class T>
struct Dropout {
  const T* x = nullptr;
  T* out = nullptr;
  int64_t count = 0, period = 1;
  double p = 0;
  const int64_t* rng = nullptr;
  uint64_t stream = 0;  // of random numbers
};
template <class T>
int launch_dropout(const Dropout<T>& arguments, void* stream);

// The state that each row of a dense sequence starts from, [steps * batch, hidden]; 0 where it is reset.
template <class T>
struct PreviousStates {
  const float* kept = nullptr;  // h before the output mask, float32; null: y
  const T* y = nullptr;
  const float* h0 = nullptr;
  const bool* resets = nullptr;
  T* out = nullptr;
  int64_t steps = 0, batch = 0, hidden = 0;
  bool reverse = false;
};
template <class T>
int launch_previous_states(const PreviousStates<T>& arguments, void* stream);

DeviceLimits device_limits(int device);
const char* error_text(int error);

}  // namespace genfuse

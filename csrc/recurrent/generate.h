// The decoding loop of a recurrent language model: embedding, layers, output head, sampling rule, next step. float32.
#pragma once

#include "common/isa.h"
#include "common/kernel.h"
#include "recurrent/sequence.h"

namespace genfuse {

enum class Cell { lstm, layer_norm_lstm, gru };

// Contiguous, as in lstm.h and gru.h; null where the cell has none.
struct GenerateLayer {
  int64_t input = 0, hidden = 0;
  const float *w_ih = nullptr, *w_hh = nullptr, *b_ih = nullptr, *b_hh = nullptr;
  const float *ln_ih = nullptr, *ln_hh = nullptr, *ln_c_weight = nullptr, *ln_c_bias = nullptr;
};

struct Generate {
  Cell cell = Cell::lstm;
  int64_t batch = 0, prompt_length = 0, length = 0, vocab = 0;
  const GenerateLayer* layers = nullptr;
  int64_t layer_count = 0;
  const float* embedding = nullptr;    // [vocab, layers[0].input]
  const float* head_weight = nullptr;  // [vocab, last hidden]
  const float* head_bias = nullptr;    // [vocab] or null
  const int64_t* prompt = nullptr;     // [batch, prompt_length], within [0, vocab)
  const float* h0 = nullptr;           // [batch, sum of hidden]
  const float* c0 = nullptr;
  const float* u = nullptr;  // [batch, length], or null: element (row << 32) + step of (seed, offset)
  uint64_t seed = 0, offset = 0;
  double temperature = 1, top_p = 1, eps = 1e-5, zoneout_h = 0, zoneout_c = 0;
  int64_t top_k = 0;  // 0: off
  bool bf16_weights = false;
  int64_t* tokens = nullptr;   // [batch, length]
  float* log_probs = nullptr;  // [batch, length]
  float* h_n = nullptr;
  float* c_n = nullptr;

  int64_t state_size() const {
    int64_t n = 0;
    for (int64_t l = 0; l < layer_count; ++l) n += layers[l].hidden;
    return n;
  }
};

GENFUSE_DECLARE(KernelOf<Generate> generate_kernel())

}  // namespace genfuse

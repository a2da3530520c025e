// The decoding loop on CUDA: embedding, layers, output head, sampling rule and next step in one cooperative kernel, so
// that a token costs its arithmetic and a few grid barriers instead of dozens of launches. Plain data: no torch.
#pragma once

#include <cstdint>

#include "recurrent/sequence_cuda.h"

namespace genfuse {

constexpr int kGenerateThreads = kPersistentThreads;
constexpr int kMaxGenerateLayers = 16;
constexpr int64_t kGenerateScratchBytes = 8 * kGenerateThreads + 512;

enum class CudaCell : int { lstm, layer_norm_lstm, gru };

// W: float or BFloat16, what the products read; everything else is float32.
template <class W>
struct CudaGenerateLayer {
  int64_t input = 0, hidden = 0;
  int64_t offset = 0;  // of its units in h0, c0, h_n, c_n
  const W *w_ih = nullptr, *w_hh = nullptr;
  const float *b_ih = nullptr, *b_hh = nullptr;
  const float *ln_ih = nullptr, *ln_hh = nullptr, *ln_c_weight = nullptr, *ln_c_bias = nullptr;
};

template <class W>
struct CudaGenerate {
  CudaCell cell = CudaCell::lstm;
  int64_t batch = 0, prompt_length = 0, length = 0, vocab = 0, state = 0;  // state: the layers' units together
  int layer_count = 0;
  CudaGenerateLayer<W> layers[kMaxGenerateLayers];
  const float* embedding = nullptr;  // [vocab, layers[0].input]
  const W* head_weight = nullptr;    // [vocab, last hidden]
  const float* head_bias = nullptr;
  const int64_t* prompt = nullptr;  // [batch, prompt_length]; a token outside [0, vocab) is taken as the nearest
  const float* h0 = nullptr;        // [batch, state]
  const float* c0 = nullptr;
  const float* u = nullptr;      // [batch, length], or null: element (row << 32) + step of rng
  const int64_t* rng = nullptr;  // (seed, offset) on the device
  float temperature = 1;
  double top_p = 1;
  int64_t top_k = 0;
  float eps = 1e-5f, zoneout_h = 0, zoneout_c = 0;
  // Workspace, not initialised:
  float* h = nullptr;       // [2, batch, state]
  float* logits = nullptr;  // [batch, vocab]
  float* raw = nullptr;     // layer norm: [2, batch, 4 * largest hidden], W_ih x and W_hh h
  // Results:
  int64_t* tokens = nullptr;   // [batch, length]
  float* log_probs = nullptr;  // [batch, length]
  float* h_n = nullptr;        // [batch, state]
  float* c_n = nullptr;        // [batch, state]; the cell state while the kernel runs
};

// Bytes of dynamic shared memory: scratch for sums over a block and, with layer norm, one layer's cells.
inline int64_t generate_shared_bytes(int64_t largest_hidden, bool layer_norm) {
  return kGenerateScratchBytes + (layer_norm ? round_up(largest_hidden * 2 * 4, 16) : 0);
}

// Why the kernel cannot serve a model, or null.
inline const char* generate_objection(int64_t largest_hidden, int64_t layers, bool layer_norm,
                                      const DeviceLimits& device) {
  if (!device.cooperative) return "the device has no cooperative launch";
  if (layers > kMaxGenerateLayers) return "the model has more than 16 layers";
  if (generate_shared_bytes(largest_hidden, layer_norm) > device.shared_per_block) {
    return "the largest layer does not fit into the device's shared memory";
  }
  return nullptr;
}

template <class W>
int launch_generate(const CudaGenerate<W>& arguments, int64_t largest_hidden, int multiprocessors, void* stream);

}  // namespace genfuse

// Cached ancestral sampling of images: the network as a list of instructions, and what the loop over pixels needs to
// know of each. Plain data: no torch, no Python. Laid out by PixelPlan (ancestral_plan.h).
//
// Every value is kept channels-last with the zeros that its taps see at both sides, and as many rows as its taps reach
// up, over and over: position (y, x) of an image lies at ((y % rows) * pitch + left + x) * channels.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

// The order of reference/masked_conv/ancestral.py.
enum class PixelOp : int64_t { constant, conv, gate, activation, add, attention };
enum class PixelActivation : int64_t { none, relu, elu, tanh, sigmoid, concat_elu };
enum class PixelHead : int64_t { categorical, categorical_outer, bernoulli, mixture };
inline constexpr int64_t kPixelOps = 6, kPixelActivations = 6, kPixelHeads = 4, kPixelLayouts = 4;

struct PixelValue {
  int64_t channels = 0, factor = 1, height = 0, width = 0;  // of the image's size / factor, rounded up
  int64_t rows = 1, left = 0, pitch = 0;  // kept rows; zeros before a row's first position; columns of a row
  bool by_rows = false;                   // known for a whole row when the rows above are drawn
  int64_t offset = 0;                     // in an image's storage
  int64_t size() const { return rows * pitch * channels; }
};

// Neighbouring taps of one row, which lie side by side: a product of depth taps * input channels.
struct PixelRun {
  int64_t dy = 0, dx = 0, taps = 0;
  int64_t depth = 0;   // taps * input channels
  int64_t first = 0;   // of the tap list
  int64_t packed = 0;  // offset of its weights among all packed ones
};

template <class T>
struct PixelInstruction {
  PixelOp op = PixelOp::constant;
  int64_t out = 0, in = 0, other = -1;  // values; other: what is added, the residual, the second summand
  bool own = false;                     // depends at a pixel on that pixel itself: complete when that is drawn
  PixelActivation activation = PixelActivation::none;
  bool linear = false;        // gate: a instead of tanh a
  const T* tensor = nullptr;  // constant; gate's condition
  int64_t image_stride = 0;   // of `tensor` or `bias` from image to image; 0: the same for all
  // conv: position k of a row or column sees stride * k + d; with `up` 2, of positions up * k + phase.
  const T *weight = nullptr, *bias = nullptr;
  int64_t kernel = 0, outputs = 0, inputs = 0;  // kernel: elements of weight for one pair of channels
  int64_t stride = 1, up = 1;
  const int64_t* places = nullptr;  // of each tap in weight's kernel
  const PixelRun* runs[4] = {};     // by phase 2 * (y % up) + x % up, the ones of the rows first
  int64_t row_runs[4] = {}, run_count[4] = {};
  int64_t sums = 0;  // offset in an image's storage: [width][round_up(outputs)] of bias and row part
  int64_t key = 0, value = 0, heads = 1;  // attention
  bool strict = false;
};

template <class T>
struct Ancestral {
  int64_t batch = 0, channels = 0, height = 0, width = 0, sub_pixels = 1;
  PixelHead head = PixelHead::categorical;
  int64_t levels = 0, components = 0, layout = 0, head_value = 0, draws = 0;
  T scale = 1, shift = 0, log_scale_min = 0;
  const PixelValue* values = nullptr;
  int64_t value_count = 0;
  const PixelInstruction<T>* instructions = nullptr;
  int64_t instruction_count = 0;
  int64_t image_storage = 0;       // elements of T for one image
  int64_t packed = 0;              // elements of T of all packed weights
  int64_t attended = 0;            // positions that an attention may see
  const T* u = nullptr;            // [batch, draws, height, width]
  const int64_t* given = nullptr;  // [batch, channels, height, width] or null; negative: to be drawn
  int64_t* out = nullptr;          // [batch, channels, height, width]
  T* outputs = nullptr;            // [batch, head's channels, height, width] or null
};

// Lanes of the widest vector: what sums are padded to.
inline constexpr int64_t kPixelPad = 16;

GENFUSE_DECLARE(template <class T> KernelOf<Ancestral<T>> ancestral_kernel())

}  // namespace genfuse

// A block draws an image after the other, all of its threads at one instruction at a time (ancestral_cpu.cpp says what
// is known when). A convolution's part that the rows above give is computed for a row of positions, an output to a
// thread and a few positions at a time, so that a weight is read for all of them; the part of a pixel is shared out
// over outputs and stretches of the depth. Weights, a megabyte or a few, come from the second-level cache.
//
// Sums are added in an order that depends on neither the batch nor the grid.
#include "masked_conv/ancestral_cuda.h"

#include "common/device.h"
#include "likelihood/mixture.h"

namespace genfuse {
namespace {

constexpr int kThreads = kPersistentThreads;
constexpr int kPositions = 4;  // of a row, that a thread computes at a time

__device__ inline int64_t padded(int64_t outputs) { return (outputs + kPixelPad - 1) / kPixelPad * kPixelPad; }

__device__ inline float activate(float x, PixelActivation kind) {
  switch (kind) {
    case PixelActivation::relu:
      return x < 0 ? 0.0f : x;
    case PixelActivation::elu:
      return x > 0 ? x : ::expm1f(x);
    case PixelActivation::tanh:
      return tanh(x);
    case PixelActivation::sigmoid:
      return sigmoid(x);
    default:
      return x;
  }
}

struct BlockSampler {
  const Ancestral<float>& p;
  const float* packed;
  float* storage;
  float* buffer;
  float* parts;  // shared, [kThreads]
  int64_t image;

  __device__ const PixelValue& value(int64_t index) const { return p.values[index]; }
  __device__ float* at(const PixelValue& v, int64_t y, int64_t x) const {
    return storage + v.offset + ((y % v.rows) * v.pitch + v.left + x) * v.channels;
  }

  __device__ void draw() {
    for (int64_t i = threadIdx.x; i < p.image_storage; i += kThreads) storage[i] = 0.0f;
    __syncthreads();
    for (int64_t y = 0; y < p.height; ++y) {
      for (int64_t i = 0; i < p.instruction_count; ++i) row(p.instructions[i], y);
      for (int64_t x = 0; x < p.width; ++x) {
        for (int64_t sub = 0; sub < p.sub_pixels; ++sub) {
          for (int64_t i = 0; i < p.instruction_count; ++i) {
            if (p.sub_pixels > 1 || !p.instructions[i].own) pixel(p.instructions[i], y, x);
          }
          if (p.sub_pixels > 1) {
            draw_channel(sub, y, x);
          } else if (p.head == PixelHead::mixture) {
            draw_components(y, x);
          } else {
            for (int64_t c = 0; c < p.channels; ++c) draw_channel(c, y, x);
          }
        }
        if (p.outputs != nullptr) record(y, x);
        for (int64_t i = 0; i < p.instruction_count; ++i) {
          if (p.instructions[i].own) pixel(p.instructions[i], y, x);
        }
      }
    }
  }

  // ---- what is known for a whole row; every thread comes to every barrier -------------------------------------------

  __device__ void row(const PixelInstruction<float>& in, int64_t image_row) {
    const PixelValue& out = value(in.out);
    if (image_row % out.factor != 0) return;
    const int64_t y = image_row / out.factor;
    if (in.op == PixelOp::conv) {
      for (int64_t px = 0; px < in.up; ++px) add_rows(in, out, y, px);
    } else if (in.op == PixelOp::constant) {
      for (int64_t i = threadIdx.x; i < out.width * out.channels; i += kThreads) {
        const int64_t c = i % out.channels, x = i / out.channels;
        at(out, y, x)[c] = in.tensor[image * in.image_stride + (c * out.height + y) * out.width + x];
      }
    } else if (out.by_rows) {
      for (int64_t i = threadIdx.x; i < out.width * out.channels; i += kThreads) {
        elementwise(in, out, y, i / out.channels, i % out.channels);
      }
    } else {
      return;
    }
    __syncthreads();
  }

  __device__ void add_rows(const PixelInstruction<float>& in, const PixelValue& out, int64_t y, int64_t px) {
    const PixelValue& from = value(in.in);
    const int64_t width = padded(in.outputs), phase = in.up == 2 ? 2 * (y % 2) + px : 0;
    const int64_t positions = (out.width - px + in.up - 1) / in.up;
    const int64_t groups = (positions + kPositions - 1) / kPositions;
    for (int64_t i = threadIdx.x; i < groups * in.outputs; i += kThreads) {
      const int64_t o = i % in.outputs, first = i / in.outputs * kPositions;
      float sum[kPositions];
#pragma unroll
      for (int k = 0; k < kPositions; ++k) sum[k] = in.bias != nullptr ? in.bias[image * in.image_stride + o] : 0.0f;
      for (int64_t n = 0; n < in.row_runs[phase]; ++n) {
        const PixelRun& run = in.runs[phase][n];
        const int64_t seen = in.stride * (y / in.up) + run.dy;
        if (seen < 0) continue;
        const float* weight = packed + run.packed + o;
        const float* x[kPositions];
#pragma unroll
        for (int k = 0; k < kPositions; ++k) {
          const int64_t position = first + k < positions ? first + k : positions - 1;
          x[k] = at(from, seen, in.stride * position + run.dx);
        }
        for (int64_t d = 0; d < run.depth; ++d) {
          const float w = weight[d * width];
#pragma unroll
          for (int k = 0; k < kPositions; ++k) sum[k] = fmaf(w, x[k][d], sum[k]);
        }
      }
#pragma unroll
      for (int k = 0; k < kPositions; ++k) {
        if (first + k >= positions) continue;
        const int64_t position = in.up * (first + k) + px;
        if (out.by_rows) {
          finish(in, out, y, position, o, sum[k]);
        } else {
          storage[in.sums + position * width + o] = sum[k];
        }
      }
    }
  }

  // ---- one pixel ---------------------------------------------------------------------------------------------------

  __device__ void pixel(const PixelInstruction<float>& in, int64_t image_row, int64_t image_column) {
    const PixelValue& out = value(in.out);
    if (out.by_rows || image_row % out.factor != 0 || image_column % out.factor != 0) return;
    const int64_t y = image_row / out.factor, x = image_column / out.factor;
    if (in.op == PixelOp::conv) {
      convolve(in, out, y, x);
    } else if (in.op == PixelOp::attention) {
      attend(in, out, y, x);
    } else {
      for (int64_t c = threadIdx.x; c < out.channels; c += kThreads) elementwise(in, out, y, x, c);
    }
    __syncthreads();
  }

  __device__ void convolve(const PixelInstruction<float>& in, const PixelValue& out, int64_t y, int64_t x) {
    const PixelValue& from = value(in.in);
    const int64_t width = padded(in.outputs), phase = in.up == 2 ? 2 * (y % 2) + x % 2 : 0;
    const int64_t columns = in.outputs < kThreads ? in.outputs : kThreads, slices = kThreads / columns;
    const int64_t slice = threadIdx.x / columns;
    for (int64_t begin = 0; begin < in.outputs; begin += columns) {
      const int64_t o = begin + threadIdx.x % columns;
      float sum = 0.0f;
      if (slice < slices && o < in.outputs) {
        for (int64_t n = in.row_runs[phase]; n < in.run_count[phase]; ++n) {
          const PixelRun& run = in.runs[phase][n];
          const int64_t seen = in.stride * (y / in.up) + run.dy;
          if (seen < 0) continue;
          const float* seen_from = at(from, seen, in.stride * (x / in.up) + run.dx);
          const float* weight = packed + run.packed + o;
          for (int64_t d = slice; d < run.depth; d += slices) sum = fmaf(weight[d * width], seen_from[d], sum);
        }
      }
      parts[threadIdx.x] = sum;
      __syncthreads();
      if (slice == 0 && o < in.outputs) {
        float total = storage[in.sums + x * width + o];
        for (int64_t s = 0; s < slices; ++s) total += parts[s * columns + threadIdx.x];
        finish(in, out, y, x, o, total);
      }
      __syncthreads();  // before the parts are written anew
    }
  }

  __device__ void finish(const PixelInstruction<float>& in, const PixelValue& out, int64_t y, int64_t x, int64_t o,
                         float sum) {
    if (in.other >= 0) sum += at(value(in.other), y, x)[o];
    at(out, y, x)[o] = activate(sum, in.activation);
  }

  __device__ void elementwise(const PixelInstruction<float>& in, const PixelValue& out, int64_t y, int64_t x,
                              int64_t c) {
    const float* from = at(value(in.in), y, x);
    const float* other = in.other < 0 ? nullptr : at(value(in.other), y, x);
    float* to = at(out, y, x);
    if (in.op == PixelOp::add) {
      to[c] = from[c] + other[c];
    } else if (in.op == PixelOp::gate) {
      float a = from[c], b = from[out.channels + c];
      if (in.tensor != nullptr) {
        const float* condition = in.tensor + image * in.image_stride;
        a += condition[c];
        b += condition[out.channels + c];
      }
      const float gated = (in.linear ? a : tanh(a)) * sigmoid(b);
      to[c] = other != nullptr ? gated + other[c] : gated;
    } else if (in.activation == PixelActivation::concat_elu) {
      const int64_t half = out.channels / 2;
      to[c] = activate(c < half ? from[c] : -from[c - half], PixelActivation::elu);
    } else {
      to[c] = activate(from[c], in.activation);
    }
  }

  // A sum or the largest of one number of each thread, in every thread, always in the same order.
  template <class Combine>
  __device__ float combined(float mine, Combine combine) {
    parts[threadIdx.x] = mine;
    __syncthreads();
    for (int half = kThreads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) {
        parts[threadIdx.x] = combine(parts[threadIdx.x], parts[threadIdx.x + half]);
      }
      __syncthreads();
    }
    const float all = parts[0];
    __syncthreads();
    return all;
  }

  __device__ float largest(float mine) {
    return combined(mine, [](float a, float b) { return b > a ? b : a; });
  }
  __device__ float total(float mine) {
    return combined(mine, [](float a, float b) { return a + b; });
  }

  __device__ void attend(const PixelInstruction<float>& in, const PixelValue& out, int64_t y, int64_t x) {
    const PixelValue &q = value(in.in), &k = value(in.key), &v = value(in.value);
    const int64_t seen = y * q.width + x + (in.strict ? 0 : 1);
    const int64_t width = q.channels / in.heads, wide = v.channels / in.heads;
    const float scale = static_cast<float>(1.0 / ::sqrt(static_cast<double>(width)));
    for (int64_t h = 0; h < in.heads; ++h) {
      float* to = at(out, y, x) + h * wide;
      const float* query = at(q, y, x) + h * width;
      float top = -INFINITY;
      for (int64_t j = threadIdx.x; j < seen; j += kThreads) {
        const float* key = at(k, j / q.width, j % q.width) + h * width;
        float score = 0.0f;
        for (int64_t c = 0; c < width; ++c) score = fmaf(query[c], key[c], score);
        buffer[j] = scale * score;
        top = buffer[j] > top ? buffer[j] : top;
      }
      top = largest(top);
      float share = 0.0f;
      for (int64_t j = threadIdx.x; j < seen; j += kThreads) {
        buffer[j] = exp(buffer[j] - top);
        share += buffer[j];
      }
      const float inverse = 1.0f / total(share);
      for (int64_t c = threadIdx.x; c < wide; c += kThreads) {
        float mean = 0.0f;
        for (int64_t j = 0; j < seen; ++j) {
          mean = fmaf(buffer[j], at(v, j / q.width, j % q.width)[h * wide + c], mean);
        }
        to[c] = seen > 0 ? inverse * mean : 0.0f;
      }
      __syncthreads();  // before the buffer is written anew
    }
  }

  // ---- draws -------------------------------------------------------------------------------------------------------

  __device__ float uniform(int64_t draw, int64_t y, int64_t x) const {
    return p.u[((image * p.draws + draw) * p.height + y) * p.width + x];
  }

  __device__ void put(int64_t c, int64_t y, int64_t x, int64_t level) {
    const int64_t index = ((image * p.channels + c) * p.height + y) * p.width + x;
    if (p.given != nullptr && p.given[index] >= 0) level = p.given[index];
    p.out[index] = level;
    at(value(0), y, x)[c] = static_cast<float>(level) * p.scale + p.shift;
  }

  // The first level at which the sum of weights, in float64, exceeds u times the total, as on the CPU.
  __device__ void draw_channel(int64_t c, int64_t y, int64_t x) {
    const float* head = at(value(p.head_value), y, x);
    if (p.head == PixelHead::bernoulli) {
      if (threadIdx.x == 0) {
        put(c, y, x, head[c] == head[c] ? (uniform(c, y, x) < sigmoid(head[c]) ? 1 : 0) : -1);
      }
      __syncthreads();
      return;
    }
    const bool outer = p.head == PixelHead::categorical_outer;
    const int64_t step = outer ? p.channels : 1;
    const float* logits = head + (outer ? c : c * p.levels);
    float top = -INFINITY;
    for (int64_t l = threadIdx.x; l < p.levels; l += kThreads) {
      const float logit = logits[l * step];
      top = logit > top ? logit : top;
    }
    top = largest(top);
    for (int64_t l = threadIdx.x; l < p.levels; l += kThreads) buffer[l] = exp(logits[l * step] - top);
    __syncthreads();
    if (threadIdx.x == 0) {
      double all = 0;
      for (int64_t l = 0; l < p.levels; ++l) all += static_cast<double>(buffer[l]);
      int64_t level = -1;
      if (all < INFINITY) {  // false for NaN
        const double threshold = static_cast<double>(uniform(c, y, x)) * all;
        double sum = 0;
        for (int64_t l = 0; l < p.levels; ++l) {
          sum += static_cast<double>(buffer[l]);
          if (buffer[l] > 0) level = l;  // the last one if u is so near 1 that the product was rounded up
          if (sum > threshold) break;
        }
      }
      put(c, y, x, level);
    }
    __syncthreads();
  }

  __device__ void draw_components(int64_t y, int64_t x) {
    if (threadIdx.x == 0) {
      float u[4], drawn[3];
      for (int64_t i = 0; i < p.draws; ++i) u[i] = uniform(i, y, x);
      int bits = 0;
      while ((int64_t{1} << bits) < p.levels) ++bits;
      draw_mixture<float>(at(value(p.head_value), y, x), 1, p.components, static_cast<int>(p.channels),
                          static_cast<MixtureLayout>(p.layout), p.log_scale_min, bits, true, u, drawn);
      for (int64_t c = 0; c < p.channels; ++c) {
        const float level = ::rintf((drawn[c] + 1.0f) * 0.5f * static_cast<float>(p.levels - 1));
        put(c, y, x, level >= 0 && level < static_cast<float>(p.levels) ? static_cast<int64_t>(level) : -1);
      }
    }
    __syncthreads();
  }

  __device__ void record(int64_t y, int64_t x) {
    const PixelValue& head = value(p.head_value);
    const float* from = at(head, y, x);
    for (int64_t c = threadIdx.x; c < head.channels; c += kThreads) {
      p.outputs[((image * head.channels + c) * p.height + y) * p.width + x] = from[c];
    }
    __syncthreads();  // before the head is written anew, or the storage cleared for another image
  }
};

__global__ void pack_kernel(CudaAncestral a) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (index >= a.sampler.packed) return;
  for (int64_t i = 0; i < a.sampler.instruction_count; ++i) {
    const PixelInstruction<float>& in = a.sampler.instructions[i];
    if (in.op != PixelOp::conv) continue;
    const int64_t width = padded(in.outputs);
    for (int64_t phase = 0; phase < in.up * in.up; ++phase) {
      for (int64_t n = 0; n < in.run_count[phase]; ++n) {
        const PixelRun& run = in.runs[phase][n];
        const int64_t place = index - run.packed;
        if (place < 0 || place >= run.depth * width) continue;
        const int64_t o = place % width, c = place / width % in.inputs, tap = place / width / in.inputs;
        const int64_t at = (o * in.inputs + c) * in.kernel + in.places[run.first + tap];
        a.packed[index] = o < in.outputs ? in.weight[at] : 0.0f;
        return;
      }
    }
  }
}

__global__ void __launch_bounds__(kThreads) ancestral_kernel(CudaAncestral a) {
  float* parts = reinterpret_cast<float*>(shared_memory());
  for (int64_t image = blockIdx.x; image < a.sampler.batch; image += gridDim.x) {
    BlockSampler{
        a.sampler, a.packed, a.storage + blockIdx.x * a.sampler.image_storage, a.buffer + blockIdx.x * a.buffer_size,
        parts,     image}
        .draw();
  }
}

}  // namespace

int launch_ancestral(const CudaAncestral& a, void* stream) {
  const int error = launch_elements(&pack_kernel, a.sampler.packed, stream, a);
  if (error != 0) return error;
  return launch_cooperative(&ancestral_kernel, a.blocks, kThreads, kThreads * static_cast<int64_t>(sizeof(float)),
                            stream, a);
}

}  // namespace genfuse

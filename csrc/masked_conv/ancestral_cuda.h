// Cached ancestral sampling on CUDA: the loop over an image's pixels in one persistent kernel, a block for each image.
// Plain data: no torch.
#pragma once

#include <cstdint>

#include "masked_conv/ancestral.h"
#include "recurrent/sequence_cuda.h"

namespace genfuse {

// What `sampler` points to lies on the device, as do the tables of its values, instructions, runs and places.
struct CudaAncestral {
  Ancestral<float> sampler;
  float* packed = nullptr;   // [sampler.packed]: of each run [depth][outputs, padded]
  float* storage = nullptr;  // [blocks][image_storage]
  float* buffer = nullptr;   // [blocks][buffer_size]: scores of an attention, weights of levels
  int64_t buffer_size = 0;
  int blocks = 0;
};

int launch_ancestral(const CudaAncestral& arguments, void* stream);

}  // namespace genfuse

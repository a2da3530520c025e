// A convolution over the pixels before its own in raster order, of stride 1. Plain data: no torch, no Python.
#pragma once

#include <cstdint>

#include "common/isa.h"
#include "common/kernel.h"

namespace genfuse {

// In the order of MASKS in python/genfuse/reference/masked_conv/conv.py.
enum class ConvMask : int64_t { a, b, vertical_a, vertical_b, horizontal_a, horizontal_b };

struct ImageStrides {
  int64_t batch = 0, channel = 1, row = 0, column = 0;  // channel or column is 1
};

template <class T>
struct MaskedConv2d {
  int64_t batch = 0, inputs = 1, outputs = 1, height = 0, width = 0;
  int64_t out_height = 0, out_width = 0;  // at least 1, as is the batch where gradients are asked for
  int64_t kernel_h = 1, kernel_w = 1, padding_h = 0, padding_w = 0, dilation_h = 1, dilation_w = 1;
  int64_t groups = 1, channel_groups = 1;
  bool interleaved = false;  // channel c is of channel group c % G, and not c G / C
  ConvMask mask = ConvMask::b;
  const T* x = nullptr;  // [batch][inputs][height][width], by strides
  ImageStrides x_strides;
  const T *weight = nullptr, *bias = nullptr;  // [outputs][inputs / groups][kernel_h][kernel_w], [outputs]
  T* y = nullptr;                              // dense, [batch][outputs][out_height][out_width] or channels last
  bool y_channels_last = false;
};

template <class T>
struct MaskedConv2dBackward {
  MaskedConv2d<T> forward;
  const T* grad_y = nullptr;
  ImageStrides grad_y_strides;
  bool grad_x_channels_last = false;
  T *grad_x = nullptr, *grad_weight = nullptr, *grad_bias = nullptr;  // dense; null if not wanted
};

GENFUSE_DECLARE(template <class T> KernelOf<MaskedConv2d<T>> masked_conv2d_kernel())
GENFUSE_DECLARE(template <class T> KernelOf<MaskedConv2dBackward<T>> masked_conv2d_backward_kernel())

}  // namespace genfuse

// What a CUDA kernel uses of its device, in one place, so that tests/cuda_host can compile the same kernel source as
// plain C++ and run a grid's threads as host threads: block and grid barriers, shuffles and shared memory go through
// here, everything else is ordinary C++.
#pragma once

#include <cstdint>

#include "common/device_types.h"
#include "common/math.h"

#ifdef GENFUSE_CUDA_ON_HOST
#include "cuda_on_host.h"
#else
#include <cooperative_groups.h>
#include <cuda_runtime.h>

namespace genfuse {

// All threads of a cooperative launch; what was written before is seen after.
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char genfuse_shared_memory[];
  return genfuse_shared_memory;
}

// Reads what other blocks have written during this kernel: past the first-level cache, which is not coherent.
__device__ inline float load_fresh(const float* p) { return __ldcg(p); }
__device__ inline int64_t load_fresh(const int64_t* p) {
  return static_cast<int64_t>(__ldcg(reinterpret_cast<const long long*>(p)));
}

// Launches return a CUDA error code, 0 for success. A cooperative one must fit on the device all at once, which is what
// makes the grid barrier safe.
template <class... Arguments>
int launch_cooperative(void (*kernel)(Arguments...), int blocks, int threads, int64_t shared_bytes, void* stream,
                       Arguments... arguments) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (error != cudaSuccess) return error;
  void* parameters[] = {&arguments...};
  return cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                                     dim3(static_cast<unsigned>(threads)), parameters,
                                     static_cast<size_t>(shared_bytes), static_cast<cudaStream_t>(stream));
}

// One thread for each of `count` elements.
template <class Arguments>
int launch_elements(void (*kernel)(Arguments), int64_t count, void* stream, const Arguments& arguments) {
  if (count == 0) return 0;
  constexpr int threads = 256;
  kernel<<<static_cast<unsigned>((count + threads - 1) / threads), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      arguments);
  return cudaGetLastError();
}

}  // namespace genfuse
#endif

namespace genfuse {

constexpr int kWarp = 32;
constexpr unsigned kFullWarp = 0xffffffffu;

__device__ inline float load_fresh(const BFloat16* p) {
#ifdef GENFUSE_CUDA_ON_HOST
  return to_float(*p);
#else
  return to_float(BFloat16{__ldcg(reinterpret_cast<const unsigned short*>(p))});
#endif
}

// Four neighbours in one access; p is aligned to their size.
__device__ inline void load4(const float* p, float (&v)[4]) {
  const float4 x = *reinterpret_cast<const float4*>(p);
  v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
}
__device__ inline void load4(const BFloat16* p, float (&v)[4]) {
  const uint2 x = *reinterpret_cast<const uint2*>(p);
  v[0] = to_float(BFloat16{static_cast<uint16_t>(x.x)});
  v[1] = to_float(BFloat16{static_cast<uint16_t>(x.x >> 16)});
  v[2] = to_float(BFloat16{static_cast<uint16_t>(x.y)});
  v[3] = to_float(BFloat16{static_cast<uint16_t>(x.y >> 16)});
}

}  // namespace genfuse

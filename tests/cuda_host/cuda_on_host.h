// CUDA's execution model on host threads, enough for the kernels of csrc: every thread of a grid is a thread, barriers
// and shuffles meet as they do on the device, and shared memory is an allocation of exactly the size that the launch
// asks for, filled with NaN. So AddressSanitizer sees an access out of bounds, ThreadSanitizer a missing barrier, and a
// barrier that some threads never reach is a test that hangs (and is stopped) rather than a device that does.
#pragma once

#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
// One instance a block: which is what a block's threads share here, too, because a block's threads are handed it.
#define GENFUSE_SHARED static thread_local

struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_host {

class Barrier {
 public:
  explicit Barrier(int size) : size_(size) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const uint64_t mine = phase_;
    if (++arrived_ == size_) {
      arrived_ = 0;
      ++phase_;
      changed_.notify_all();
    } else {
      changed_.wait(lock, [&] { return phase_ != mine; });
    }
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int size_, arrived_ = 0;
  uint64_t phase_ = 0;
};

struct Warp {
  explicit Warp(int size) : barrier(size) {}
  Barrier barrier;
  uint64_t slots[32] = {};
};

struct Block {
  Block(int threads, size_t shared_bytes, size_t static_bytes) : barrier(threads), statics(new char[static_bytes]) {
    for (int t = 0; t < threads; t += 32) warps.push_back(std::make_unique<Warp>(threads - t < 32 ? threads - t : 32));
    // Vector loads want 16 bytes, and so does CUDA.
    shared = static_cast<char*>(::operator new(shared_bytes, std::align_val_t(16)));
    std::memset(shared, 0xff, shared_bytes);
    std::memset(statics.get(), 0xff, static_bytes);
  }
  ~Block() { ::operator delete(shared, std::align_val_t(16)); }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  char* shared;
  std::unique_ptr<char[]> statics;
};

inline thread_local Block* block = nullptr;
inline thread_local Barrier* grid = nullptr;

inline void launch(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel,
                   size_t static_bytes = 1) {
  Barrier all(blocks * threads);
  std::vector<std::unique_ptr<Block>> made;
  for (int b = 0; b < blocks; ++b) made.push_back(std::make_unique<Block>(threads, shared_bytes, static_bytes));
  std::vector<std::thread> running;
  for (int b = 0; b < blocks; ++b) {
    for (int t = 0; t < threads; ++t) {
      running.emplace_back([&, b, t] {
        threadIdx.x = static_cast<unsigned>(t);
        blockIdx.x = static_cast<unsigned>(b);
        blockDim.x = static_cast<unsigned>(threads);
        gridDim.x = static_cast<unsigned>(blocks);
        block = made[static_cast<size_t>(b)].get();
        grid = &all;
        kernel();
      });
    }
  }
  for (auto& thread : running) thread.join();
}

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = *block->warps[threadIdx.x / 32];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  warp.slots[threadIdx.x % 32] = bits;
  warp.barrier.wait();
  bits = warp.slots[from];
  warp.barrier.wait();  // before anyone overwrites a slot
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_host

inline void __syncthreads() { cuda_host::block->barrier.wait(); }
inline void __syncwarp() { cuda_host::block->warps[threadIdx.x / 32]->barrier.wait(); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_host::exchange(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::exchange(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}

namespace genfuse {

inline void grid_barrier() { cuda_host::grid->wait(); }
inline char* shared_memory() { return cuda_host::block->shared; }
inline float load_fresh(const float* p) { return *p; }
inline int64_t load_fresh(const int64_t* p) { return *p; }

}  // namespace genfuse

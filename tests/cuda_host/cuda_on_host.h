// CUDA's execution model on the host, enough for the kernels of csrc: barriers and shuffles meet as they do on the
// device, and shared memory is an allocation of exactly the size that the launch asks for, filled with NaN.
//
// A grid's threads run either as fibers of one thread, in lockstep from barrier to barrier and in an order that the
// test chooses (for AddressSanitizer: accesses out of bounds; a result that depends on the order is a race; a barrier
// that some thread never reaches ends the program), or, with GENFUSE_HOST_THREADS, as threads (for ThreadSanitizer:
// what a missing barrier leaves unordered).
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#ifdef GENFUSE_HOST_THREADS
#include <condition_variable>
#include <mutex>
#include <thread>
#else
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define GENFUSE_FIBER_ASAN 1
#endif
#endif

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct float4 {
  float x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace cuda_host {

struct Barrier;
struct Block;

// A thread of the grid.
struct Self {
  Dim3 thread, block_index, block_size, grid_size;
  Block* block = nullptr;
  Barrier* grid = nullptr;
};

#ifdef GENFUSE_HOST_THREADS

inline thread_local Self self;
inline Self& me() { return self; }

struct Barrier {
  explicit Barrier(int count) : size(count) {}
  void wait() {
    std::unique_lock<std::mutex> lock(mutex);
    const uint64_t mine = phase;
    if (++arrived == size) {
      arrived = 0;
      ++phase;
      changed.notify_all();
    } else {
      changed.wait(lock, [&] { return phase != mine; });
    }
  }
  std::mutex mutex;
  std::condition_variable changed;
  int size, arrived = 0;
  uint64_t phase = 0;
};

inline void run_all(std::vector<Self>& threads, const std::function<void()>& kernel) {
  std::vector<std::thread> running;
  for (const Self& thread : threads) {
    running.emplace_back([&] {
      self = thread;
      kernel();
    });
  }
  for (auto& thread : running) thread.join();
}

#else

enum class Order { forward, backward };
inline Order order = Order::forward;

struct Fiber {
  static constexpr size_t kStack = 256 << 10;
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  void* fake_stack = nullptr;
  Self* self = nullptr;
  bool done = false;
};

inline ucontext_t scheduler;
inline void* scheduler_fake_stack = nullptr;
inline const void* scheduler_stack = nullptr;
inline size_t scheduler_stack_size = 0;
inline Fiber* current = nullptr;
inline const std::function<void()>* body = nullptr;
inline bool progress = false;

inline Self& me() { return *current->self; }

inline void to_scheduler(bool last) {
#ifdef GENFUSE_FIBER_ASAN
  __sanitizer_start_switch_fiber(last ? nullptr : &current->fake_stack, scheduler_stack, scheduler_stack_size);
#endif
  (void)last;
  Fiber* const mine = current;
  swapcontext(&mine->context, &scheduler);
#ifdef GENFUSE_FIBER_ASAN
  __sanitizer_finish_switch_fiber(mine->fake_stack, &scheduler_stack, &scheduler_stack_size);
#endif
}

struct Barrier {
  explicit Barrier(int count) : size(count) {}
  void wait() {
    const uint64_t mine = phase;
    if (++arrived == size) {
      arrived = 0;
      ++phase;
      progress = true;
    }
    while (phase == mine) to_scheduler(false);
  }
  int size, arrived = 0;
  uint64_t phase = 0;
};

inline void enter() {
#ifdef GENFUSE_FIBER_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  (*body)();
  current->done = progress = true;
  to_scheduler(true);
}

inline void run_all(std::vector<Self>& threads, const std::function<void()>& kernel) {
  std::vector<Fiber> fibers(threads.size());
  body = &kernel;
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.self = &threads[order == Order::forward ? i : fibers.size() - 1 - i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  for (size_t left = fibers.size(); left > 0;) {
    progress = false;
    for (Fiber& fiber : fibers) {
      if (fiber.done) continue;
      current = &fiber;
#ifdef GENFUSE_FIBER_ASAN
      __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack.get(), Fiber::kStack);
#endif
      swapcontext(&scheduler, &fiber.context);
#ifdef GENFUSE_FIBER_ASAN
      __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr);
#endif
      left -= fiber.done ? 1 : 0;
    }
    if (!progress) {
      std::fputs("a barrier that not every thread reaches\n", stderr);
      std::abort();
    }
  }
}

#endif

struct Warp {
  explicit Warp(int size) : barrier(size) {}
  Barrier barrier;
  uint64_t slots[32] = {};
};

struct Block {
  Block(int threads, size_t shared_bytes) : barrier(threads) {
    for (int t = 0; t < threads; t += 32) warps.push_back(std::make_unique<Warp>(threads - t < 32 ? threads - t : 32));
    // Vector loads want 16 bytes, and so does CUDA.
    shared = static_cast<char*>(::operator new(shared_bytes, std::align_val_t(16)));
    std::memset(shared, 0xff, shared_bytes);
  }
  ~Block() { ::operator delete(shared, std::align_val_t(16)); }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
  char* shared;
};

inline void launch(int blocks, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  Barrier all(blocks * threads);
  std::vector<std::unique_ptr<Block>> made;
  std::vector<Self> selves;
  for (int b = 0; b < blocks; ++b) {
    made.push_back(std::make_unique<Block>(threads, shared_bytes));
    for (int t = 0; t < threads; ++t) {
      Self one;
      one.thread.x = static_cast<unsigned>(t);
      one.block_index.x = static_cast<unsigned>(b);
      one.block_size.x = static_cast<unsigned>(threads);
      one.grid_size.x = static_cast<unsigned>(blocks);
      one.block = made.back().get();
      one.grid = &all;
      selves.push_back(one);
    }
  }
  run_all(selves, kernel);
}

template <class T>
T exchange(T value, int from) {
  static_assert(sizeof(T) <= 8);
  Warp& warp = *me().block->warps[me().thread.x / 32];
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  warp.slots[me().thread.x % 32] = bits;
  warp.barrier.wait();
  bits = warp.slots[from];
  warp.barrier.wait();  // before anyone overwrites a slot
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_host

#define threadIdx (cuda_host::me().thread)
#define blockIdx (cuda_host::me().block_index)
#define blockDim (cuda_host::me().block_size)
#define gridDim (cuda_host::me().grid_size)

inline void __syncthreads() { cuda_host::me().block->barrier.wait(); }
template <class T>
T __shfl_sync(unsigned, T value, int from) {
  return cuda_host::exchange(value, from);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return cuda_host::exchange(value, static_cast<int>(threadIdx.x % 32) ^ mask);
}

namespace genfuse {

inline void grid_barrier() { cuda_host::me().grid->wait(); }
inline char* shared_memory() { return cuda_host::me().block->shared; }
inline float load_fresh(const float* p) { return *p; }
inline int64_t load_fresh(const int64_t* p) { return *p; }

template <class... Arguments>
int launch_cooperative(void (*kernel)(Arguments...), int blocks, int threads, int64_t shared_bytes, void*,
                       Arguments... arguments) {
  cuda_host::launch(blocks, threads, static_cast<size_t>(shared_bytes), [&] { kernel(arguments...); });
  return 0;
}

template <class Arguments>
int launch_elements(void (*kernel)(Arguments), int64_t count, void*, const Arguments& arguments) {
  constexpr int threads = 32;
  if (count > 0)
    cuda_host::launch(static_cast<int>((count + threads - 1) / threads), threads, 1, [&] { kernel(arguments); });
  return 0;
}

}  // namespace genfuse

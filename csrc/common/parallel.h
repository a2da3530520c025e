// Threads for kernels. The pool is the caller's (torch's own, through torch_glue.h; std::thread in the pybind11
// module): an Executor says how to run a function on it. Team turns one such run into a group of threads that live
// for a whole sequence and meet at barriers, because a fork and join per time step would cost more than the step.
//
// No pool promises that its tasks run at the same time (a nested region may run them one after the other). So a team
// is made of whoever has arrived: the first to come waits for the others a bounded time, then closes the door; a
// late-comer finds it closed and returns. Kernels share the work out by team size only after that, and no result
// depends on the size.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>

#include "common/math.h"

#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
#include <immintrin.h>
#endif

namespace genfuse {

struct Executor {
  int threads = 1;
  // Calls body(context, begin, end) for disjoint ranges that cover [0, n), on up to `threads` threads.
  void (*run)(int64_t n, void (*body)(void* context, int64_t begin, int64_t end), void* context) = nullptr;
};

GENFUSE_NAMESPACE {

inline void cpu_relax() {
#if defined(__x86_64__) || defined(_M_X64) || defined(__i386__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield" ::: "memory");
#endif
}

// Spins, then yields: on an oversubscribed machine the thread waited for may need this very core.
template <class Done>
inline void spin_until(Done done) {
  for (int spins = 0; !done(); ++spins) {
    if (spins < 8192) {
      cpu_relax();
    } else {
      std::this_thread::yield();
    }
  }
}

// Counter barrier for `size` threads; each keeps its own phase count.
struct Barrier {
  std::atomic<uint32_t> arrived{0};
  char pad0[60];
  std::atomic<uint32_t> phase{0};
  char pad1[60];

  void wait(int size) {
    if (size == 1) return;
    const uint32_t mine = phase.load(std::memory_order_acquire);
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size)) {
      arrived.store(0, std::memory_order_relaxed);
      phase.store(mine + 1, std::memory_order_release);
    } else {
      spin_until([&] { return phase.load(std::memory_order_acquire) != mine; });
    }
  }
};

struct Range {
  int64_t begin, end;
};

// Part `index` of [0, n) cut into `parts` pieces whose sizes differ by at most one.
GENFUSE_HD Range split(int64_t n, int64_t parts, int64_t index) {
  const int64_t size = n / parts, rest = n % parts;
  const int64_t begin = index * size + (index < rest ? index : rest);
  return {begin, begin + size + (index < rest ? 1 : 0)};
}

// One thread's view of the team.
struct Member {
  int rank, size;
  Barrier* barrier;
  void wait() const { barrier->wait(size); }
  Range share(int64_t n) const { return split(n, size, rank); }
};

template <class F>
struct TeamRun {
  F& body;
  int64_t expected;
  Barrier barrier;
  // Low half: members; high half: slots of [0, expected) taken; top bit: closed.
  std::atomic<uint64_t> door{0};
  static constexpr uint64_t kClosed = uint64_t{1} << 63;

  static void enter(void* context, int64_t begin, int64_t end) {
    auto& team = *static_cast<TeamRun*>(context);
    uint64_t seen = team.door.load(std::memory_order_acquire);
    do {
      if (seen & kClosed) return;
    } while (!team.door.compare_exchange_weak(seen, seen + 1 + (static_cast<uint64_t>(end - begin) << 32),
                                              std::memory_order_acq_rel));
    const int rank = static_cast<int>(seen & 0xffffffffu);
    if (rank == 0) {
      const auto all = static_cast<uint64_t>(team.expected);
      auto slots = [&] { return team.door.load(std::memory_order_acquire) >> 32; };
      if (slots() != all) {
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(20);
        spin_until([&] { return slots() == all || std::chrono::steady_clock::now() > deadline; });
      }
      team.door.fetch_or(kClosed, std::memory_order_acq_rel);
    } else {
      spin_until([&] { return (team.door.load(std::memory_order_acquire) & kClosed) != 0; });
    }
    const int size = static_cast<int>(team.door.load(std::memory_order_acquire) & 0xffffffffu);
    team.body(Member{rank, size, &team.barrier});
  }
};

// Runs body(Member) on a team of at most `threads` threads, and returns when all are done.
template <class F>
inline void run_team(const Executor& executor, int threads, F&& body) {
  if (threads > executor.threads) threads = executor.threads;
  TeamRun<F> team{body, threads, {}, {}};
  if (threads <= 1 || executor.run == nullptr) {
    body(Member{0, 1, &team.barrier});
    return;
  }
  executor.run(threads, &TeamRun<F>::enter, &team);
}

}  // namespace GENFUSE_ISA
}  // namespace genfuse

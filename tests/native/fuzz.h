// What every fuzzed kernel needs: random choices, buffers of exactly the size that was promised (so that a sanitizer
// sees the first byte beyond), poisoned memory, thread pools, and a run of the same case on every instruction set and
// number of threads.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/isa.h"
#include "common/kernel.h"
#include "common/parallel.h"

// A kernel's version for an instruction set given as a number, as in genfuse::Isa.
#if GENFUSE_X86
#define FUZZ_VERSION(isa, function) \
  ((isa) == 2 ? &genfuse::avx512::function : (isa) == 1 ? &genfuse::avx2::function : &genfuse::baseline::function)
#else
#define FUZZ_VERSION(isa, function) ((void)(isa), &genfuse::baseline::function)
#endif

namespace fuzz {

struct Random {
  std::mt19937_64 bits;
  explicit Random(uint64_t seed) : bits(seed) {}

  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool chance(double p) { return uniform() < p; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[below(static_cast<int64_t>(choices.size()))];
  }
  // Mostly around the widths of vectors and tiles, where loops have their edges.
  int64_t size() {
    return chance(0.8) ? pick<int64_t>({1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33}) : 1 + below(80);
  }
  double probability() { return chance(0.6) ? 0 : pick({0.1, 0.5, 0.9}); }
};

// Exactly `count` elements on the heap; NaN until written.
template <class T>
struct Buffer {
  std::unique_ptr<T[]> memory;
  int64_t count = 0;

  explicit Buffer(int64_t n) : memory(new T[static_cast<size_t>(n)]), count(n) {
    std::memset(static_cast<void*>(memory.get()), 0xff, static_cast<size_t>(n) * sizeof(T));
  }
  Buffer(int64_t n, Random& random) : Buffer(n) {
    for (int64_t i = 0; i < n; ++i) memory[i] = static_cast<T>(2 * random.uniform() - 1);
  }
  T* data() const { return memory.get(); }
};

// Memory for inputs that may be absent.
template <class T>
const T* optional(bool wanted, Buffer<T>& buffer) {
  return wanted ? buffer.data() : nullptr;
}

using Body = void (*)(void* context, int64_t begin, int64_t end);

// One thread per task, all at the same time.
inline void run_threads(int64_t n, Body body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t i = 1; i < n; ++i) threads.emplace_back([=] { body(context, i, i + 1); });
  if (n > 0) body(context, 0, 1);
  for (std::thread& thread : threads) thread.join();
}

// What a pool does that has no thread to spare.
inline void run_one_by_one(int64_t n, Body body, void* context) {
  for (int64_t i = 0; i < n; ++i) body(context, i, i + 1);
}

struct Pool {
  const char* name;
  genfuse::Executor executor;
};

inline std::vector<Pool> pools() {
  return {{"1 thread", {1, nullptr}},
          {"2 threads", {2, run_threads}},
          {"3 threads", {3, run_threads}},
          {"3 tasks one by one", {3, run_one_by_one}}};
}

// The number of instruction sets that this CPU can run, out of those compiled: the first of {baseline, avx2, avx512}.
inline size_t usable_isas() { return static_cast<size_t>(genfuse::isa()) + 1; }

template <class Arguments>
void run(const genfuse::KernelOf<Arguments>& kernel, const Arguments& arguments, const genfuse::Executor& executor) {
  const size_t bytes = kernel.workspace(arguments, executor.threads);
  char* workspace = static_cast<char*>(::operator new(bytes, std::align_val_t(64)));
  std::memset(workspace, 0xff, bytes);
  kernel.run(arguments, workspace, executor);
  ::operator delete(workspace, std::align_val_t(64));
}

// The results of one run, by name.
template <class T>
struct Results {
  struct Entry {
    std::string name;
    Buffer<T> buffer;
  };
  std::vector<Entry> entries;

  T* add(const char* name, int64_t count) { return entries.emplace_back(Entry{name, Buffer<T>(count)}).buffer.data(); }
};

struct Failure {
  std::string what;
};

template <class T>
void check_written(const Results<T>& results, const std::string& where) {
  for (const auto& entry : results.entries) {
    for (int64_t i = 0; i < entry.buffer.count; ++i) {
      if (!std::isfinite(entry.buffer.data()[i])) {
        throw Failure{where + ": " + entry.name + "[" + std::to_string(i) +
                      "] was not written, or comes from what was not"};
      }
    }
  }
}

// Equal to `tolerance` relative to 1 + |value|; 0: the same bits.
template <class T>
void check_equal(const Results<T>& a, const Results<T>& b, double tolerance, const std::string& where) {
  for (size_t k = 0; k < a.entries.size(); ++k) {
    const auto &left = a.entries[k].buffer, &right = b.entries[k].buffer;
    for (int64_t i = 0; i < left.count; ++i) {
      const double x = left.data()[i], y = right.data()[i];
      if (std::abs(x - y) > tolerance * (1 + std::abs(x))) {
        char text[80];
        std::snprintf(text, sizeof text, "[%lld] is %.17g and %.17g", static_cast<long long>(i), x, y);
        throw Failure{where + ": " + a.entries[k].name + text};
      }
    }
  }
}

// Runs `one(isa, pool)` -> Results for every instruction set and pool: everything is written, the number of threads
// changes no bit, and, in float64, the instruction sets agree to rounding.
template <class T, class One>
void run_everywhere(One one) {
  static const char* const names[] = {"baseline", "avx2", "avx512"};
  std::vector<Results<T>> first;
  for (size_t isa = 0; isa < usable_isas(); ++isa) {
    for (const Pool& pool : pools()) {
      const std::string where = std::string(names[isa]) + ", " + pool.name;
      Results<T> results = one(isa, pool);
      check_written(results, where);
      if (pool.executor.threads == 1) {
        if (isa > 0 && sizeof(T) == 8) check_equal(first[0], results, 1e-8, where + " against baseline");
        first.push_back(std::move(results));
      } else {
        check_equal(first[isa], results, 0, where + " against 1 thread");
      }
    }
  }
}

// Each draws a case, describes it, runs it, and throws a Failure.
void lstm_case(Random& random, std::string& description);
void gru_case(Random& random, std::string& description);
void generate_case(Random& random, std::string& description);
void noise_case(Random& random, std::string& description);
void gaussian_case(Random& random, std::string& description);
void relaxed_case(Random& random, std::string& description);
void categorical_case(Random& random, std::string& description);
void quantize_case(Random& random, std::string& description);
void nll_case(Random& random, std::string& description);
void mixture_case(Random& random, std::string& description);
void categorical_nll_case(Random& random, std::string& description);
void coupling_case(Random& random, std::string& description);
void actnorm_case(Random& random, std::string& description);
void dequantize_case(Random& random, std::string& description);
void spline_case(Random& random, std::string& description);
void conv1x1_case(Random& random, std::string& description);
void gate_case(Random& random, std::string& description);
void concat_elu_case(Random& random, std::string& description);
void ancestral_case(Random& random, std::string& description);
void masked_conv2d_case(Random& random, std::string& description);
void masked_linear_case(Random& random, std::string& description);
void autoregressive_case(Random& random, std::string& description);

}  // namespace fuzz

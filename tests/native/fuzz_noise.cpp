#include "fuzz.h"
#include "sampling/noise.h"

namespace fuzz {
namespace {

template <class T>
void one_case(Random& random, std::string& description) {
  genfuse::NoiseFill<T> fill;
  fill.seed = random.bits();
  fill.offset = random.bits();
  fill.noise = static_cast<genfuse::Noise>(sizeof(T) == 8 && !std::is_floating_point_v<T> ? 0 : 1 + random.below(4));
  fill.uniform_bits = random.pick({24, 11, 8});
  // Around a group's size, and large enough for several threads.
  fill.count = random.chance(0.9) ? random.size() * random.size() : 60000 + random.below(100000);
  description = "noise " + std::to_string(static_cast<int64_t>(fill.noise)) + " count " + std::to_string(fill.count);
  run_everywhere<T>([&](size_t isa, const Pool& pool) {
    Results<T> results;
    genfuse::NoiseFill<T> mine = fill;
    mine.out = results.add("out", fill.count);
    run(FUZZ_VERSION(isa, noise_kernel<T>)(), mine, pool.executor);
    for (int64_t i = 0; !std::is_floating_point_v<T> && i < fill.count; ++i) {
      if (mine.out[i] < 0) throw Failure{"out[" + std::to_string(i) + "] was not written"};
    }
    return results;
  });
}

}  // namespace

void noise_case(Random& random, std::string& description) {
  switch (random.below(3)) {
    case 0:
      return one_case<float>(random, description);
    case 1:
      return one_case<double>(random, description);
    default:
      return one_case<int64_t>(random, description);
  }
}

}  // namespace fuzz

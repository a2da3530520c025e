// fuzz [seed [cases]]: random cases for each kernel in turn. Prints the case that fails and the command that repeats
// it.
#include <chrono>

#include "fuzz.h"

namespace {

struct Kernel {
  const char* name;
  void (*one_case)(fuzz::Random& random, std::string& description);
};

constexpr Kernel kKernels[] = {
    {"lstm", fuzz::lstm_case},
    {"gru", fuzz::gru_case},
    {"generate", fuzz::generate_case},
};

}  // namespace

int main(int count, char** arguments) {
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const uint64_t cases = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 200;
  for (const Kernel& kernel : kKernels) {
    for (uint64_t i = seed; i < seed + cases; ++i) {
      fuzz::Random random(i);
      std::string description;
      try {
        kernel.one_case(random, description);
      } catch (const fuzz::Failure& failure) {
        std::printf("%s: %s\n  case: %s\n  again: fuzz %llu 1\n", kernel.name, failure.what.c_str(),
                    description.c_str(), static_cast<unsigned long long>(i));
        return 1;
      }
    }
    std::printf("%s: %llu cases on %zu instruction sets\n", kernel.name, static_cast<unsigned long long>(cases),
                fuzz::usable_isas());
  }
  return 0;
}

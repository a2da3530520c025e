// fuzz [seed [cases]]: random cases for each kernel in turn. Prints the case that fails, and how to repeat it.
#include <sanitizer/common_interface_defs.h>

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
    {"noise", fuzz::noise_case},
    {"gaussian", fuzz::gaussian_case},
    {"relaxed", fuzz::relaxed_case},
    {"categorical", fuzz::categorical_case},
    {"quantize", fuzz::quantize_case},
    {"nll", fuzz::nll_case},
    {"mixture", fuzz::mixture_case},
    {"categorical_nll", fuzz::categorical_nll_case},
    {"coupling", fuzz::coupling_case},
    {"actnorm", fuzz::actnorm_case},
    {"dequantize", fuzz::dequantize_case},
    {"spline", fuzz::spline_case},
    {"conv1x1", fuzz::conv1x1_case},
    {"gate", fuzz::gate_case},
    {"concat_elu", fuzz::concat_elu_case},
    {"ancestral", fuzz::ancestral_case},
    {"masked_conv2d", fuzz::masked_conv2d_case},
    {"masked_linear", fuzz::masked_linear_case},
    {"autoregressive", fuzz::autoregressive_case},
};

// The case that is running. A sanitizer that finds something ends the program, so it must be told what to print.
const char* current_kernel = "";
unsigned long long current_seed = 0;
std::string description;

void print_case() {
  std::fprintf(stderr, "%s: %s\n  again: fuzz %llu 1\n", current_kernel, description.c_str(), current_seed);
}

}  // namespace

int main(int count, char** arguments) {
  const unsigned long long seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 1;
  const unsigned long long cases = count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 200;
  __sanitizer_set_death_callback(print_case);
  for (const Kernel& kernel : kKernels) {
    current_kernel = kernel.name;
    for (current_seed = seed; current_seed < seed + cases; ++current_seed) {
      fuzz::Random random(current_seed);
      try {
        kernel.one_case(random, description);
      } catch (const fuzz::Failure& failure) {
        std::fprintf(stderr, "%s\n", failure.what.c_str());
        print_case();
        return 1;
      }
    }
    std::printf("%s: %llu cases on %zu instruction sets\n", kernel.name, cases, fuzz::usable_isas());
    std::fflush(stdout);
  }
  return 0;
}

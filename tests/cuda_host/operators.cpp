// The CUDA operators with their kernels on host threads, for tensors on the CPU: torch.ops.genfuse_cuda.* as they are,
// but for the device and the name (genfuse_cuda_host). So the code between torch and the kernels can be compared with
// the reference, too.
#include <cstdlib>

#include "masked_conv/ancestral_cuda.cu"
#include "recurrent/generate_cuda.cu"
#include "recurrent/gru_cuda.cu"
#include "recurrent/lstm_cuda.cu"

namespace genfuse {

// A small device: a few blocks, and little enough shared memory for a limit to be within reach.
DeviceLimits device_limits(int) { return {3, 64 << 10, true}; }
const char* error_text(int) { return "an error"; }

}  // namespace genfuse

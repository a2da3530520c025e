// genfuse._C: what needs no torch. Build info, CPU features, and entry points for arrays of NumPy or anything that
// speaks DLPack. Tensors go through the operators in library.cpp instead, where dispatch, autograd and torch.compile
// see them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "common/isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Native part of genfuse that does not need torch.";

  m.def(
      "build_info",
      [] {
        py::dict info;
        info["version"] = GENFUSE_VERSION;
        info["compiler"] = GENFUSE_COMPILER;
        info["build_type"] = GENFUSE_BUILD_TYPE;
        info["torch_headers"] = GENFUSE_TORCH_HEADERS;
        info["torch_oldest"] = "2.11";
        info["isas"] = genfuse::compiled_isas();
        const std::string cuda = GENFUSE_CUDA_VERSION;
        info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
        info["cuda_archs"] = GENFUSE_CUDA_ARCHS;
        return info;
      },
      "What was built: version, compiler, the torch whose headers were used, instruction sets, CUDA (None: not "
      "built).");
  m.def("cpu_features", &genfuse::cpu_features, "What this CPU can do, of what the kernels could use.");
  m.def("isa", [] { return std::string(genfuse::isa_name(genfuse::isa())); }, "The instruction set in use.");
}

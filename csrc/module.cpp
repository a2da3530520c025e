// genfuse._C: what needs no torch. Build info, CPU features, and entry points for arrays of NumPy or of anything that
// speaks DLPack. Tensors go through the operators in library.cpp instead, where dispatch, autograd and torch.compile
// see them.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <new>
#include <optional>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "common/isa.h"
#include "common/parallel.h"
#include "recurrent/lstm.h"
#include "sampling/noise.h"

namespace py = pybind11;

namespace {

// ---- arrays in
// --------------------------------------------------------------------------------------------------------

using Shape = std::initializer_list<py::ssize_t>;

std::string text_of(const py::array& array) { return py::str(py::tuple(array.attr("shape"))); }

std::string text_of(Shape shape) {
  py::list list;
  for (py::ssize_t n : shape) list.append(n);
  return py::str(py::tuple(list));
}

// NumPy's view of any array; copies only what is neither NumPy's nor speaks DLPack.
py::array array_of(const char* name, const py::object& object) {
  if (py::isinstance<py::array>(object)) return py::reinterpret_borrow<py::array>(object);
  const py::module_ numpy = py::module_::import("numpy");
  try {
    return numpy.attr(py::hasattr(object, "__dlpack__") ? "from_dlpack" : "asarray")(object);
  } catch (const py::error_already_set& error) {
    throw py::type_error(std::string(name) + " must be a NumPy array or speak DLPack on the CPU: " + error.what());
  }
}

// Contiguous, of the given shape and of the dtype of x.
template <class T>
py::array_t<T> contiguous(const char* name, const py::object& object, Shape shape) {
  const py::array array = array_of(name, object);
  if (!py::isinstance<py::array_t<T>>(array)) {
    throw py::type_error(std::string(name) + " must have the dtype of x, " +
                         py::str(py::dtype::of<T>()).cast<std::string>() + ", got " +
                         py::str(array.dtype()).cast<std::string>());
  }
  bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
  py::ssize_t i = 0;
  for (py::ssize_t n : shape) same = same && array.shape(i++) == n;
  if (!same)
    throw py::value_error(std::string(name) + " must have shape " + text_of(shape) + ", got " + text_of(array));
  return py::array_t<T, py::array::c_style | py::array::forcecast>(array);
}

template <class T>
std::optional<py::array_t<T>> contiguous_if(const char* name, const py::object& object, Shape shape) {
  if (object.is_none()) return std::nullopt;
  return contiguous<T>(name, object, shape);
}

template <class T>
const T* data(const std::optional<py::array_t<T>>& array) {
  return array ? array->data() : nullptr;
}

// ---- running a kernel
// -------------------------------------------------------------------------------------------------

using Body = void (*)(void* context, int64_t begin, int64_t end);

// A thread for each task; tasks for which the system has none are run here, which kernels are ready for.
void run_threads(int64_t n, Body body, void* context) {
  std::vector<std::thread> threads;
  int64_t started = 1;
  try {
    for (; started < n; ++started) threads.emplace_back(body, context, started, started + 1);
  } catch (const std::system_error&) {
  }
  if (n > 0) body(context, 0, 1);
  if (started < n) body(context, started, n);
  for (std::thread& thread : threads) thread.join();
}

template <class Arguments>
void run_kernel(const genfuse::KernelOf<Arguments>& kernel, const Arguments& arguments, int threads) {
  constexpr std::align_val_t kAlignment{64};
  const genfuse::Executor executor{threads, threads > 1 ? run_threads : nullptr};
  char* workspace = static_cast<char*>(::operator new(kernel.workspace(arguments, threads), kAlignment));
  {
    py::gil_scoped_release release;
    kernel.run(arguments, workspace, executor);
  }
  ::operator delete(workspace, kAlignment);
}

// ---- LSTM
// -------------------------------------------------------------------------------------------------------------

struct LstmOptions {
  py::object bias_ih, bias_hh, weight_hr, ln_ih, ln_hh, ln_c_weight, ln_c_bias, resets;
  double eps, zoneout_h, zoneout_c;
  bool reverse;
  int threads;
};

template <class T>
py::tuple lstm_forward(py::array x, const py::object& h0_in, const py::object& c0_in, const py::object& w_ih_in,
                       const py::object& w_hh_in, const LstmOptions& options) {
  const py::ssize_t steps = x.shape(0), batch = x.shape(1), input = x.shape(2);
  const py::array c0_any = array_of("c0", c0_in), h0_any = array_of("h0", h0_in);
  if (c0_any.ndim() != 2 || c0_any.shape(1) == 0) {
    throw py::value_error("c0 must have shape (B, H) with H > 0, got " + text_of(c0_any));
  }
  const bool projected = !options.weight_hr.is_none();
  if (projected && (h0_any.ndim() != 2 || h0_any.shape(1) == 0)) {
    throw py::value_error("h0 must have shape (B, P) with P > 0, got " + text_of(h0_any));
  }
  const py::ssize_t H = c0_any.shape(1), S = projected ? h0_any.shape(1) : H;

  // Kernels take any strides but the last, in whole elements.
  constexpr auto size = static_cast<py::ssize_t>(sizeof(T));
  if ((input > 1 && x.strides(2) != size) || x.strides(0) % size != 0 || x.strides(1) % size != 0) {
    x = py::array_t<T, py::array::c_style | py::array::forcecast>(x);
  }
  const auto h0 = contiguous<T>("h0", h0_any, {batch, S});
  const auto c0 = contiguous<T>("c0", c0_any, {batch, H});
  const auto w_ih = contiguous<T>("weight_ih", w_ih_in, {4 * H, input});
  const auto w_hh = contiguous<T>("weight_hh", w_hh_in, {4 * H, S});
  const auto b_ih = contiguous_if<T>("bias_ih", options.bias_ih, {4 * H});
  const auto b_hh = contiguous_if<T>("bias_hh", options.bias_hh, {4 * H});
  const auto w_hr = contiguous_if<T>("weight_hr", options.weight_hr, {S, H});
  const auto ln_ih = contiguous_if<T>("ln_ih_weight", options.ln_ih, {4 * H});
  const auto ln_hh = contiguous_if<T>("ln_hh_weight", options.ln_hh, {4 * H});
  const auto ln_c_weight = contiguous_if<T>("ln_c_weight", options.ln_c_weight, {H});
  const auto ln_c_bias = contiguous_if<T>("ln_c_bias", options.ln_c_bias, {H});
  const bool layer_norm = ln_ih.has_value();
  if (ln_hh.has_value() != layer_norm || ln_c_weight.has_value() != layer_norm || ln_c_bias.has_value() != layer_norm) {
    throw py::value_error("ln_ih_weight, ln_hh_weight, ln_c_weight and ln_c_bias must be given together");
  }
  std::optional<py::array_t<bool>> resets;
  if (!options.resets.is_none()) {
    const py::array array = array_of("resets", options.resets);
    if (!py::isinstance<py::array_t<bool>>(array)) throw py::type_error("resets must be an array of bool");
    if (array.ndim() != 2 || array.shape(0) != steps || array.shape(1) != batch) {
      throw py::value_error("resets must have shape " + text_of({steps, batch}) + ", got " + text_of(array));
    }
    resets = py::array_t<bool, py::array::c_style | py::array::forcecast>(array);
  }

  py::array_t<T> y({steps, batch, S}), h_n({batch, S}), c_n({batch, H});
  genfuse::LstmForward<T> args;
  args.seq.steps = steps;
  args.seq.batch = batch;
  args.seq.input = input;
  args.seq.hidden = H;
  args.seq.state = S;
  args.seq.rows = steps * batch;
  args.seq.resets = data(resets);
  args.seq.x_step = x.strides(0) / size;
  args.seq.x_batch = x.strides(1) / size;
  args.seq.reverse = options.reverse;
  args.reg.zoneout_h = options.zoneout_h;
  args.reg.zoneout_c = options.zoneout_c;
  args.eps = options.eps;
  args.x = static_cast<const T*>(x.data());
  args.h0 = h0.data();
  args.c0 = c0.data();
  args.w_ih = w_ih.data();
  args.w_hh = w_hh.data();
  args.b_ih = data(b_ih);
  args.b_hh = data(b_hh);
  args.w_hr = data(w_hr);
  args.ln_ih = data(ln_ih);
  args.ln_hh = data(ln_hh);
  args.ln_c_weight = data(ln_c_weight);
  args.ln_c_bias = data(ln_c_bias);
  args.y = y.mutable_data();
  args.h_n = h_n.mutable_data();
  args.c_n = c_n.mutable_data();
  run_kernel(GENFUSE_DISPATCH(lstm_kernels<T>)().forward, args, options.threads);
  return py::make_tuple(y, h_n, c_n);
}

py::tuple lstm_forward_any(const py::object& x_in, const py::object& h0, const py::object& c0, const py::object& w_ih,
                           const py::object& w_hh, const LstmOptions& options) {
  const py::array x = array_of("x", x_in);
  const bool single = py::isinstance<py::array_t<float>>(x);
  if (!single && !py::isinstance<py::array_t<double>>(x)) {
    throw py::type_error("x must be an array of float32 or float64, got " + py::str(x.dtype()).cast<std::string>());
  }
  if (x.ndim() != 3) throw py::value_error("x must have shape (T, B, I), got " + text_of(x));
  if (options.threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(options.threads));
  for (double p : {options.zoneout_h, options.zoneout_c}) {
    if (!(p >= 0 && p <= 1))
      throw py::value_error("zoneout must be a probability between 0 and 1, got " + std::to_string(p));
  }
  return single ? lstm_forward<float>(x, h0, c0, w_ih, w_hh, options)
                : lstm_forward<double>(x, h0, c0, w_ih, w_hh, options);
}

// ---- random numbers
// ---------------------------------------------------------------------------------------------------

uint64_t word64(const char* name, const py::int_& value) {
  const bool negative = PyObject_RichCompareBool(value.ptr(), py::int_(0).ptr(), Py_LT) == 1;
  const uint64_t word =
      negative ? static_cast<uint64_t>(PyLong_AsLongLong(value.ptr())) : PyLong_AsUnsignedLongLong(value.ptr());
  if (PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw py::value_error(std::string(name) + " must fit 64 bits, got " + py::str(value).cast<std::string>());
  }
  return word;
}

template <class T>
py::array philox_fill(const std::vector<py::ssize_t>& shape, genfuse::NoiseFill<T> args, int threads) {
  py::array_t<T> out(shape);
  args.out = out.mutable_data();
  args.count = out.size();
  run_kernel(GENFUSE_DISPATCH(noise_kernel<T>)(), args, threads);
  return out;
}

py::array philox(const std::vector<py::ssize_t>& shape, const py::int_& seed, const py::int_& offset,
                 const std::string& noise, const py::object& dtype, int threads) {
  static const std::vector<std::string> noises{"bits", "uniform", "normal", "gumbel", "logistic"};
  const auto kind = std::find(noises.begin(), noises.end(), noise) - noises.begin();
  if (kind == genfuse::kNoises) {
    throw py::value_error("noise must be bits, uniform, normal, gumbel or logistic, got " + noise);
  }
  for (const py::ssize_t size : shape) {
    if (size < 0)
      throw py::value_error("shape must not hold negative sizes, got " + py::str(py::cast(shape)).cast<std::string>());
  }
  if (threads < 1) throw py::value_error("threads must be at least 1, got " + std::to_string(threads));
  const auto draw = [&]<class T>(T) {
    genfuse::NoiseFill<T> args;
    args.noise = static_cast<genfuse::Noise>(kind);
    args.seed = word64("seed", seed);
    args.offset = word64("offset", offset);
    return philox_fill(shape, args, threads);
  };
  const py::dtype wanted =
      dtype.is_none() ? (kind == 0 ? py::dtype::of<int64_t>() : py::dtype::of<float>()) : py::dtype::from_args(dtype);
  if (kind == 0 && wanted.is(py::dtype::of<int64_t>())) return draw(int64_t{});
  if (kind != 0 && wanted.is(py::dtype::of<float>())) return draw(float{});
  if (kind != 0 && wanted.is(py::dtype::of<double>())) return draw(double{});
  throw py::type_error("dtype must be " + std::string(kind == 0 ? "int64" : "float32 or float64") + ", got " +
                       py::str(wanted).cast<std::string>());
}

py::dict build_info() {
  py::dict info;
  info["version"] = GENFUSE_VERSION;
  info["compiler"] = GENFUSE_COMPILER;
  info["build_type"] = GENFUSE_BUILD_TYPE;
  info["torch_headers"] = GENFUSE_TORCH_HEADERS;
  info["torch_oldest"] = GENFUSE_TORCH_OLDEST;
  info["isas"] = genfuse::compiled_isas();
  const std::string cuda = GENFUSE_CUDA_VERSION;
  info["cuda"] = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda));
  info["cuda_archs"] = GENFUSE_CUDA_ARCHS;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The native part of genfuse that does not need torch.";

  m.def("build_info", &build_info,
        "What was built: version, compiler, the torch whose headers were used, instruction sets, CUDA (None: not "
        "built).");
  m.def("cpu_features", &genfuse::cpu_features, "What this CPU can do, of what the kernels could use.");
  m.def("isa", [] { return genfuse::isa_name(genfuse::isa()); }, "The instruction set in use.");

  m.def(
      "lstm_forward",
      [](const py::object& x, const py::object& h0, const py::object& c0, const py::object& weight_ih,
         const py::object& weight_hh, py::object bias_ih, py::object bias_hh, py::object weight_hr,
         py::object ln_ih_weight, py::object ln_hh_weight, py::object ln_c_weight, py::object ln_c_bias, double eps,
         py::object resets, double zoneout_h, double zoneout_c, bool reverse, int threads) {
        return lstm_forward_any(x, h0, c0, weight_ih, weight_hh,
                                {std::move(bias_ih), std::move(bias_hh), std::move(weight_hr), std::move(ln_ih_weight),
                                 std::move(ln_hh_weight), std::move(ln_c_weight), std::move(ln_c_bias),
                                 std::move(resets), eps, zoneout_h, zoneout_c, reverse, threads});
      },
      py::arg("x"), py::arg("h0"), py::arg("c0"), py::arg("weight_ih"), py::arg("weight_hh"),
      py::arg("bias_ih") = py::none(), py::arg("bias_hh") = py::none(), py::arg("weight_hr") = py::none(),
      py::kw_only(), py::arg("ln_ih_weight") = py::none(), py::arg("ln_hh_weight") = py::none(),
      py::arg("ln_c_weight") = py::none(), py::arg("ln_c_bias") = py::none(), py::arg("eps") = 1e-5,
      py::arg("resets") = py::none(), py::arg("zoneout_h") = 0.0, py::arg("zoneout_c") = 0.0,
      py::arg("reverse") = false, py::arg("threads") = 1,
      R"(One LSTM layer over a whole sequence, for inference, on arrays: NumPy's, or any that speak DLPack on the CPU.

Args:
    x: [T, B, I], float32 or float64, which all other arrays must share.
    h0, c0: [B, H] initial states; with `weight_hr`, h0 is [B, P].
    weight_ih, weight_hh: [4H, I] and [4H, H or P], torch's layout and gate order (i, f, g, o).
    bias_ih, bias_hh: [4H] or None.
    weight_hr: [P, H], a projection, or None.
    ln_ih_weight, ln_hh_weight, ln_c_weight, ln_c_bias: layer norm (arXiv 1607.06450), all or none; [4H], [4H], [H], [H].
    eps: layer norm's.
    resets: [T, B] bool: the state is zero before these steps.
    zoneout_h, zoneout_c: probabilities of arXiv 1606.01305, whose expectation inference takes.
    reverse: go from the last step to the first.
    threads: how many threads to use.

Returns:
    y [T, B, H or P], h_n, c_n: NumPy arrays. The numbers are those of genfuse.ops.lstm.

Raises:
    TypeError, ValueError: naming the argument, what was given and what is wanted.

Example:
    >>> import numpy as np
    >>> from genfuse import _C
    >>> x, h, w_ih, w_hh = (np.ones(s, np.float32) for s in [(5, 2, 3), (2, 4), (16, 3), (16, 4)])
    >>> y, h_n, c_n = _C.lstm_forward(x, h, h, w_ih, w_hh)
    >>> y.shape
    (5, 2, 4)
)");

  m.def("philox", &philox, py::arg("shape"), py::arg("seed"), py::arg("offset") = 0, py::kw_only(),
        py::arg("noise") = "uniform", py::arg("dtype") = py::none(), py::arg("threads") = 1,
        R"(Random numbers by address: element e of the stream (seed, offset), as genfuse.ops.philox_* draw them.

Args:
    shape: of the result.
    seed, offset: 64 bits each, negative numbers in two's complement.
    noise: "bits", "uniform", "normal", "gumbel" or "logistic".
    dtype: float32 (the default) or float64; int64 for bits.
    threads: how many threads to use.

Returns:
    A NumPy array.

Raises:
    TypeError, ValueError: naming the argument.

Example:
    >>> from genfuse import _C
    >>> _C.philox([2], 0, noise="normal")
    array([ 0.9911377, -0.9246626], dtype=float32)
)");
}

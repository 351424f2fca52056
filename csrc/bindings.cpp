// Module cramfast._C. Python hands over addresses and sizes (kernels/extension.py has checked them) and the device tag;
// nothing here knows a tensor. The interpreter lock is released while an operator runs.
// With CRAMFAST_EMULATED the module is _emulated: the CUDA operators of one architecture on csrc/emulator.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "accumulate.h"
#include "adamw.h"
#include "attention.h"
#include "cpu_dispatch.h"
#include "cross_entropy.h"
#include "empty_launch.h"
#include "glu.h"
#include "layernorm.h"
#include "layernorm_glu.h"
#ifdef CRAMFAST_EMULATED
#include "emulator/global_memory.h"
#include "emulator/machine.h"
#else
#include "build_info.h"
#include "code_path.h"
#endif

namespace py = pybind11;
using namespace cramfast;

namespace {

using Address = std::uintptr_t;  // 0 stands for a missing optional tensor
using Size = std::int64_t;

#ifdef CRAMFAST_EMULATED
using CallGuard = emulator::GuardedCall;  // keeps the lock: the emulator is one machine
#else
using CallGuard = py::gil_scoped_release;
#endif

template <class T>
T* at(Address address) {
#ifdef CRAMFAST_EMULATED
  address = emulator::guarded(address);
#endif
  return reinterpret_cast<T*>(address);
}

DType dtype_of(int code) { return static_cast<DType>(code); }

template <class Device>
void bind_layernorm(py::module_& m) {
  m.def(
      "layernorm_fwd",
      [](Device device, Address x, Address residual, Address weight, Address bias, Address y, Address stream,
         Address mean, Address rstd, Size rows, Size width, float eps, int dtype) {
        layernorm_fwd(device, {at<void>(x), at<void>(residual), at<float>(weight), at<float>(bias), at<void>(y),
                               at<void>(stream), at<float>(mean), at<float>(rstd), rows, width, eps, dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
  m.def(
      "layernorm_bwd",
      [](Device device, Address dy, Address dstream, Address stream, Address mean, Address rstd, Address weight,
         Address dx, Address partial, Address dweight, Address dbias, Size rows, Size width, int dtype) {
        layernorm_bwd(device,
                      {at<void>(dy), at<void>(dstream), at<void>(stream), at<float>(mean), at<float>(rstd),
                       at<float>(weight), at<void>(dx), at<float>(partial), at<float>(dweight), at<float>(dbias), rows,
                       width, dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
}

template <class Device>
void bind_glu(py::module_& m) {
  m.def(
      "glu_fwd",
      [](Device device, Address x, Address h, Size rows, Size features, int activation, int dtype) {
        glu_fwd(device, {at<void>(x), at<void>(h), rows, features, static_cast<Activation>(activation),
                         dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
  m.def(
      "glu_bwd",
      [](Device device, Address dh, Address x, Address dx, Size rows, Size features, int activation, int dtype) {
        glu_bwd(device, {at<void>(dh), at<void>(x), at<void>(dx), rows, features, static_cast<Activation>(activation),
                         dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
}

template <class Device>
void bind_attention(py::module_& m) {
  m.def(
      "attention_fwd",
      [](Device device, Address qkv, Address cu_seqlens, Address cos, Address sin, Address out, Address lse,
         Size tokens, Size sequences, Size heads, Size head_width, Size max_seqlen, Size window, int dtype) {
        attention_fwd(device, {at<void>(qkv), at<std::int32_t>(cu_seqlens), at<float>(cos), at<float>(sin),
                               at<void>(out), at<float>(lse), tokens, sequences, heads, head_width, max_seqlen, window,
                               dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
  m.def(
      "attention_bwd",
      [](Device device, Address dout, Address qkv, Address out, Address lse, Address cu_seqlens, Address cos,
         Address sin, Address delta, Address dqkv, Size tokens, Size sequences, Size heads, Size head_width,
         Size max_seqlen, Size window, int dtype) {
        attention_bwd(device, {at<void>(dout), at<void>(qkv), at<void>(out), at<float>(lse),
                               at<std::int32_t>(cu_seqlens), at<float>(cos), at<float>(sin), at<float>(delta),
                               at<void>(dqkv), tokens, sequences, heads, head_width, max_seqlen, window,
                               dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
}

template <class Device>
void bind_cross_entropy(py::module_& m) {
  m.def(
      "cross_entropy",
      [](Device device, Address logits, Address target, Address loss, Size rows, Size vocabulary, float z_loss,
         float gain, bool write_gradient, int dtype) {
        cross_entropy(device, {at<void>(logits), at<std::int64_t>(target), at<float>(loss), rows, vocabulary, z_loss,
                               gain, write_gradient, dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
}

template <class Device>
void bind_adamw(py::module_& m) {
  m.def(
      "adamw",
      [](Device device, Address master, Address grad, Address exp_avg, Address exp_avg_sq, Address half,
         Address segment_end, Address segment_decay, Address segment_lr, Address scalars, Address partial, Size size,
         Size half_size, Size segments, double beta1, double beta2, double eps, double max_norm, int half_dtype) {
        adamw(device, {at<float>(master), at<float>(grad), at<float>(exp_avg), at<float>(exp_avg_sq), at<void>(half),
                       at<std::int64_t>(segment_end), at<float>(segment_decay), at<float>(segment_lr),
                       at<float>(scalars), at<double>(partial), size, half_size, segments, beta1, beta2, eps, max_norm,
                       dtype_of(half_dtype)});
      },
      py::call_guard<CallGuard>());
}

// Rows or elements of scratch that Python allocates for a call.
template <class Device>
void bind_workspaces(py::module_& m) {
  m.def("layernorm_partials", [](Device device, Size rows) { return layernorm_partials(device, rows); });
  m.def("adamw_partials", [](Device device, Size size) { return adamw_partials(device, size); });
}

void bind_layernorm_glu(py::module_& m) {
  m.def(
      "layernorm_glu_fwd",
      [](Cuda device, Address x, Address residual, Address norm_weight, Address norm_bias, Address weight, Address h,
         Address stream, Address mean, Address rstd, Address gates, Address folded, Address correction, Size rows,
         Size width, Size features, int activation, float eps, int dtype) {
        layernorm_glu_fwd(device,
                          {at<void>(x), at<void>(residual), at<float>(norm_weight), at<float>(norm_bias),
                           at<void>(weight), at<void>(h), at<void>(stream), at<float>(mean), at<float>(rstd),
                           at<void>(gates), at<void>(folded), at<float>(correction), rows, width, features,
                           static_cast<Activation>(activation), eps, dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
  m.def("layernorm_glu_folded", &layernorm_glu_folded);
}

template <class Device>
void bind_operators(py::module_& m) {
  bind_layernorm<Device>(m);
  bind_glu<Device>(m);
  bind_attention<Device>(m);
  bind_cross_entropy<Device>(m);
  bind_adamw<Device>(m);
  bind_workspaces<Device>(m);
}

void bind_cuda(py::module_& m) {
  // module_local: the emulated modules stand beside _C in one process.
  py::class_<Cuda>(m, "Cuda", py::module_local())
      .def(py::init([](Address stream) { return Cuda{reinterpret_cast<void*>(stream)}; }), py::arg("stream"));
  m.def("empty_launch", &empty_launch, py::call_guard<CallGuard>());
  bind_operators<Cuda>(m);
  bind_layernorm_glu(m);
  m.attr("cuda_operators") = py::make_tuple("layernorm", "glu", "layernorm_glu", "attention", "cross_entropy", "adamw");
}

#ifdef CRAMFAST_EMULATED
void bind_emulator(py::module_& m) {
  m.def("register_tensor", &emulator::register_tensor);
  m.def("set_seed", &emulator::set_seed);
  m.def("ignore_site", &emulator::ignore_site);
  m.def("sites", [] {
    py::list all;
    for (const std::string& site : emulator::sites()) all.append(site);
    return all;
  });
  m.attr("architecture") = CRAMFAST_EMULATED;
}
#else
void bind_accumulate(py::module_& m) {
  m.def(
      "accumulate",
      [](Cpu device, Address sum, Address values, Size size, int dtype) {
        accumulate(device, {at<float>(sum), at<void>(values), size, dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
  m.def(
      "accumulate_rows",
      [](Cpu device, Address sum, Address ids, Address values, Size rows, Size width, int dtype) {
        accumulate_rows(device, {at<float>(sum), at<std::int32_t>(ids), at<void>(values), rows, width,
                                 dtype_of(dtype)});
      },
      py::call_guard<CallGuard>());
}
#endif

}  // namespace

#ifdef CRAMFAST_EMULATED
PYBIND11_MODULE(_emulated, m) {
  bind_cuda(m);
  bind_emulator(m);
  m.attr("layernorm_max_width") = layernorm_max_width;
}
#else
PYBIND11_MODULE(_C, m) {
  py::class_<Cpu>(m, "Cpu").def(py::init<int>(), py::arg("threads"));
  m.def("cpu_isa", &cpu_isa);
  m.attr("layernorm_max_width") = layernorm_max_width;
  bind_operators<Cpu>(m);
  bind_accumulate(m);
  m.attr("cuda_architectures") = py::str(CRAMFAST_CUDA_ARCHITECTURES).attr("split")();
  m.attr("cuda_toolkit") = CRAMFAST_CUDA_TOOLKIT;
  m.attr("cuda_missing") = CRAMFAST_CUDA_MISSING;
#ifdef CRAMFAST_CUDA
  bind_cuda(m);
  m.def("cuda_code_path", &cuda_code_path);
  m.def("cuda_versions", [] {
    const CudaVersions versions = cuda_versions();
    return py::make_tuple(versions.driver, versions.runtime);
  });
  m.attr("cuda") = true;
#else
  m.attr("cuda_operators") = py::make_tuple();
  m.attr("cuda") = false;
#endif
}
#endif

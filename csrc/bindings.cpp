// The Python module `_C`. It takes addresses, sizes and stream handles as integers, and so needs no torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "temporal_attention.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

int size(int64_t value) {
    if (value < 0 || value > INT_MAX) {
        throw std::invalid_argument("shape: got " + std::to_string(value) + ", must be 0 to 2^31 - 1");
    }
    return static_cast<int>(value);
}

void bind_temporal_attention(uintptr_t qkv, const std::array<int64_t, 5>& qkv_strides,
                             const std::array<int64_t, 6>& shape, const std::string& dtype, uintptr_t q_weight,
                             uintptr_t k_weight, uintptr_t cos, uintptr_t sin, float eps, float softmax_scale,
                             uintptr_t out, int device, uintptr_t stream) {
    if (shape[3] != 3) {
        throw std::invalid_argument("shape: dimension 3 is " + std::to_string(shape[3]) + ", must be 3 (q, k, v)");
    }
    TemporalAttentionParams params{};
    params.qkv = pointer<const void>(qkv);
    params.stride_b = qkv_strides[0];
    params.stride_t = qkv_strides[1];
    params.stride_s = qkv_strides[2];
    params.stride_qkv = qkv_strides[3];
    params.stride_h = qkv_strides[4];
    params.batch = size(shape[0]);
    params.frames = size(shape[1]);
    params.tokens = size(shape[2]);
    params.heads = size(shape[4]);
    params.head_dim = size(shape[5]);
    params.q_weight = pointer<const void>(q_weight);
    params.k_weight = pointer<const void>(k_weight);
    params.cos = pointer<const float>(cos);
    params.sin = pointer<const float>(sin);
    params.eps = eps;
    params.softmax_scale = softmax_scale;
    params.out = pointer<void>(out);
    temporal_attention(params, dtype, device, pointer<void>(stream));
}

py::dict build_info() {
    py::list architectures;
    std::stringstream list(PAB_CUDA_ARCHS);
    for (std::string name; std::getline(list, name, ',');) architectures.append(name);
    py::dict info;
    info["cuda"] = PAB_CUDA_VERSION;
    info["architectures"] = architectures;
    info["compiler"] = PAB_CXX_COMPILER;
    info["kernels"] = py::make_tuple("temporal_attention");
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA kernels of pab_kernels, on addresses. pab_kernels.ops is the way in.";
    m.def("temporal_attention", &bind_temporal_attention, py::kw_only(), py::arg("qkv"), py::arg("qkv_strides"),
          py::arg("shape"), py::arg("dtype"), py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"),
          py::arg("eps"), py::arg("softmax_scale"), py::arg("out"), py::arg("device"), py::arg("stream"),
          "Self-attention along T on qkv [B, T, S, 3, H, D]: strides in elements, addresses in bytes, 0 for none.\n\n"
          "Raises ValueError that names an unsupported argument, RuntimeError when the launch fails.");
    m.def("build_info", &build_info, "CUDA version, architectures, host compiler and kernels of this build.");
}

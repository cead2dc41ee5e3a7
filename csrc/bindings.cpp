// The Python module `_C`. It takes addresses, sizes and stream handles as integers, and so needs no torch headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <climits>
#include <sstream>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "copy_rows.h"
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
                             uintptr_t out, int device, uintptr_t stream, uintptr_t out_scale) {
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
    params.out_scale = pointer<const float>(out_scale);
    temporal_attention(params, dtype, device, pointer<void>(stream));
}

AttentionOperand operand(uintptr_t address, const std::array<int64_t, 3>& strides) {
    return {pointer<const void>(address), strides[0], strides[1], strides[2]};
}

void bind_attention(uintptr_t q, const std::array<int64_t, 3>& q_strides, uintptr_t k,
                    const std::array<int64_t, 3>& k_strides, uintptr_t v, const std::array<int64_t, 3>& v_strides,
                    const std::array<int64_t, 5>& shape, const std::string& dtype, uintptr_t kv_len,
                    float softmax_scale, uintptr_t q_weight, uintptr_t k_weight, uintptr_t key_scales,
                    int key_scales_pitch, float eps, uintptr_t cos, uintptr_t sin, int pair_stride, uintptr_t out,
                    int device, uintptr_t stream, uintptr_t out_scale) {
    AttentionParams params{};
    params.q = operand(q, q_strides);
    params.k = operand(k, k_strides);
    params.v = operand(v, v_strides);
    params.batch = size(shape[0]);
    params.queries = size(shape[1]);
    params.keys = size(shape[2]);
    params.heads = size(shape[3]);
    params.head_dim = size(shape[4]);
    params.kv_len = pointer<const int>(kv_len);
    params.softmax_scale = softmax_scale;
    params.q_weight = pointer<const void>(q_weight);
    params.k_weight = pointer<const void>(k_weight);
    params.key_scales = pointer<const float>(key_scales);
    params.key_scales_pitch = key_scales_pitch;
    params.eps = eps;
    params.cos = pointer<const float>(cos);
    params.sin = pointer<const float>(sin);
    params.pair_stride = pair_stride;
    params.out = pointer<void>(out);
    params.out_scale = pointer<const float>(out_scale);
    attention(params, dtype, device, pointer<void>(stream));
}

void bind_fp8_attention(uintptr_t q, uintptr_t k, uintptr_t v, uintptr_t q_scale, uintptr_t k_scale, uintptr_t v_scale,
                        uintptr_t v_center, const std::array<int64_t, 4>& shape, int columns, int pitch, int block,
                        const std::string& dtype, float softmax_scale, uintptr_t out, int device, uintptr_t stream) {
    Fp8AttentionParams params{};
    params.q = pointer<const void>(q);
    params.k = pointer<const void>(k);
    params.v = pointer<const void>(v);
    params.q_scale = pointer<const float>(q_scale);
    params.k_scale = pointer<const float>(k_scale);
    params.v_scale = pointer<const float>(v_scale);
    params.v_center = pointer<const float>(v_center);
    params.batch = size(shape[0]);
    params.tokens = size(shape[1]);
    params.heads = size(shape[2]);
    params.head_dim = size(shape[3]);
    params.columns = columns;
    params.block = block;
    params.pitch = pitch;
    params.softmax_scale = softmax_scale;
    params.out = pointer<void>(out);
    fp8_attention(params, dtype, device, pointer<void>(stream));
}

void bind_copy_rows(uintptr_t to, const std::array<int64_t, 2>& to_strides, uintptr_t source,
                    const std::array<int64_t, 2>& source_strides, const std::array<int64_t, 3>& shape, int device,
                    uintptr_t stream) {
    CopyRowsParams params{};
    params.to = pointer<void>(to);
    params.source = pointer<const void>(source);
    params.to_block = to_strides[0];
    params.to_row = to_strides[1];
    params.source_block = source_strides[0];
    params.source_row = source_strides[1];
    params.blocks = shape[0];
    params.rows = shape[1];
    params.width = shape[2];
    copy_rows(params, device, pointer<void>(stream));
}

py::dict build_info() {
    py::list architectures;
    std::stringstream list(PAB_CUDA_ARCHS);
    for (std::string name; std::getline(list, name, ',');) architectures.append(name);
    py::dict info;
    info["cuda"] = PAB_CUDA_VERSION;
    info["architectures"] = architectures;
    info["compiler"] = PAB_CXX_COMPILER;
    info["kernels"] = py::make_tuple("temporal_attention", "attention", "fp8_attention");
    return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "CUDA kernels of pab_kernels, on addresses. pab_kernels.ops is the way in.";
    m.def("temporal_attention", &bind_temporal_attention, py::kw_only(), py::arg("qkv"), py::arg("qkv_strides"),
          py::arg("shape"), py::arg("dtype"), py::arg("q_weight"), py::arg("k_weight"), py::arg("cos"), py::arg("sin"),
          py::arg("eps"), py::arg("softmax_scale"), py::arg("out"), py::arg("device"), py::arg("stream"),
          py::arg("out_scale") = 0,
          "Self-attention along T on qkv [B, T, S, 3, H, D]: strides in elements, addresses in bytes, 0 for none. With "
          "out_scale [B, T, S], alike for all of T, out is e4m3 times that.\n\n"
          "Raises ValueError that names an unsupported argument, RuntimeError when the launch fails.");
    m.def("attention", &bind_attention, py::kw_only(), py::arg("q"), py::arg("q_strides"), py::arg("k"),
          py::arg("k_strides"), py::arg("v"), py::arg("v_strides"), py::arg("shape"), py::arg("dtype"),
          py::arg("kv_len"), py::arg("softmax_scale"), py::arg("q_weight"), py::arg("k_weight"), py::arg("key_scales"),
          py::arg("key_scales_pitch"), py::arg("eps"), py::arg("cos"), py::arg("sin"), py::arg("pair_stride"),
          py::arg("out"), py::arg("device"), py::arg("stream"), py::arg("out_scale") = 0,
          "Attention on Hopper, q [B, Lq, H, D] on k and v [B, Lk, H, D]: strides of B, L, H in elements, shape "
          "(B, Lq, Lk, H, D), addresses in bytes, 0 for none. RMSNorm takes weights [D] and key_scales "
          "[B, H, pitch], 1 / rms of each key; rotary embedding (cos and sin [Lq, D / 2]) is of the queries alone. "
          "With out_scale [B, Lq], alike for all of Lq, out is e4m3 times that.\n\n"
          "Raises ValueError that names an unsupported argument, RuntimeError when the launch fails.");
    m.def(
        "fp8_attention", &bind_fp8_attention, py::kw_only(), py::arg("q"), py::arg("k"), py::arg("v"),
        py::arg("q_scale"), py::arg("k_scale"), py::arg("v_scale"), py::arg("v_center"), py::arg("shape"),
        py::arg("columns"), py::arg("pitch"), py::arg("block"), py::arg("dtype"), py::arg("softmax_scale"),
        py::arg("out"), py::arg("device"), py::arg("stream"),
        "Self-attention on Hopper in e4m3, on rows as triton_ops/quantize_qkv.py writes them: shape (B, N, H, D), "
        "columns of a row of q and k, tokens of a row of v, tokens that share a scale of v, addresses in bytes, dtype "
        "of out.\n\n"
        "Raises ValueError that names an unsupported argument, RuntimeError when the launch fails.");
    m.def("copy_rows", &bind_copy_rows, py::kw_only(), py::arg("to"), py::arg("to_strides"), py::arg("source"),
          py::arg("source_strides"), py::arg("shape"), py::arg("device"), py::arg("stream"),
          "Copy by the copy engines: shape (blocks, rows, bytes of a row), strides of blocks and rows in bytes.\n\n"
          "Raises ValueError that names an unsupported argument, RuntimeError when the launch fails.");
    m.def("build_info", &build_info, "CUDA version, architectures, host compiler and kernels of this build.");
}

// Checks, tensor maps and launch of attention in e4m3 on Hopper.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "attention.h"
#include "attention_fp8.cuh"
#include "checks.h"
#include "hopper_host.h"

namespace {

void check_arguments(const Fp8AttentionParams& p, const std::string& dtype) {
    check_half_precision(dtype);
    check(p.head_dim == 96 || p.head_dim == 128, "shape",
          "head_dim is " + std::to_string(p.head_dim) + ", must be 96 or 128");
    check(p.batch >= 1 && p.tokens >= 1 && p.heads >= 1, "shape", "all sizes must be at least 1");
    check(static_cast<double>(p.batch) * p.heads * (p.tokens / 64 + 1) < INT32_MAX, "shape",
          "B * H * N is too large for 32-bit tile numbers");
    check(p.columns >= p.head_dim && p.columns <= 128 && p.columns % 16 == 0, "columns",
          "is " + std::to_string(p.columns) + ", must be head_dim, up to a multiple of 16");
    check(p.pitch >= p.tokens && p.pitch % 16 == 0, "pitch",
          "is " + std::to_string(p.pitch) + ", must be the tokens, up to a multiple of 16");
    check(p.block >= 128 && p.block <= (1 << 20) && (p.block & (p.block - 1)) == 0, "block",
          "is " + std::to_string(p.block) + ", must be 128 times a power of two, to 2^20");
    check(std::isfinite(p.softmax_scale) && p.softmax_scale > 0, "softmax_scale", "must be finite and positive");
    const void* pointers[] = {p.q, p.k, p.v, p.q_scale, p.k_scale, p.v_scale, p.v_center, p.out};
    const char* names[] = {"q", "k", "v", "q_scale", "k_scale", "v_scale", "v_center", "out"};
    for (int i = 0; i < 8; ++i) {
        check(pointers[i] != nullptr, names[i], "got a null pointer");
        check_aligned(names[i], pointers[i]);
    }
}

// A tensor of bytes, its sizes from the last to the first, in boxes of 128 columns and `rows` of the third.
CUtensorMap byte_map(const void* data, int64_t columns, int64_t second, int64_t second_stride, int64_t third,
                     int64_t third_stride, int64_t batch, int rows) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(second),
                                static_cast<cuuint64_t>(third), static_cast<cuuint64_t>(batch)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(second_stride), static_cast<cuuint64_t>(third_stride),
                                  static_cast<cuuint64_t>(columns * second * third)};
    return encode_tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, data, sizes, strides, 128, rows, CU_TENSOR_MAP_SWIZZLE_128B,
                             CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

template <typename P>
void launch(const Fp8AttentionParams& p, int multiprocessors, cudaStream_t stream) {
    AttentionArgs args{};
    const int64_t row = p.columns * p.heads, head = static_cast<int64_t>(p.pitch) * p.head_dim;
    args.q = byte_map(p.q, p.columns, p.heads, p.columns, p.tokens, row, p.batch, P::rows);
    args.k = byte_map(p.k, p.columns, p.heads, p.columns, p.tokens, row, p.batch, P::keys);
    args.v = byte_map(p.v, p.pitch, p.heads, head, p.head_dim, p.pitch, p.batch, P::D);
    args.q_scale = p.q_scale;
    args.k_scale = p.k_scale;
    args.v_scale = p.v_scale;
    args.v_center = p.v_center;
    while (P::keys << args.block_log2 < p.block) ++args.block_log2;
    args.out = p.out;
    args.queries = p.tokens;
    args.keys = p.tokens;
    args.heads = p.heads;
    args.row_tiles = (p.tokens + P::rows - 1) / P::rows;
    args.tiles = args.row_tiles * p.heads * p.batch;
    args.scale_log2 = p.softmax_scale * static_cast<float>(M_LOG2E);
    const auto kernel = attention_fp8_kernel<P>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::shared_bytes),
          "fp8_attention: cudaFuncSetAttribute");
    kernel<<<std::min(args.tiles, multiprocessors), P::threads, P::shared_bytes, stream>>>(args);
    check(cudaGetLastError(), "fp8_attention: launch");
}

template <typename Out>
void launch_for(const Fp8AttentionParams& p, int multiprocessors, cudaStream_t stream) {
    if (p.head_dim == 96) {
        launch<Fp8Plan<Out, 96>>(p, multiprocessors, stream);
    } else {
        launch<Fp8Plan<Out, 128>>(p, multiprocessors, stream);
    }
}

}  // namespace

void fp8_attention(const Fp8AttentionParams& params, const std::string& dtype, int device, void* stream) {
    check_arguments(params, dtype);
    const DeviceGuard guard(device);
    const int multiprocessors = hopper_multiprocessors(device);
    const auto run = dtype == "bfloat16" ? launch_for<__nv_bfloat16> : launch_for<__half>;
    run(params, multiprocessors, static_cast<cudaStream_t>(stream));
}

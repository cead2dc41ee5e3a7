// Checks and launch of temporal attention.
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>

#include "checks.h"
#include "hopper_host.h"
#include "temporal_attention.cuh"
#include "temporal_sm90.cuh"

namespace {

void check_arguments(const TemporalAttentionParams& p, const std::string& dtype) {
    check_half_precision(dtype);
    check(p.head_dim == 64 || p.head_dim == 72 || p.head_dim == 96 || p.head_dim == 128, "shape",
          "head_dim is " + std::to_string(p.head_dim) + ", must be 64, 72, 96 or 128");
    check(p.frames >= 1 && p.frames <= kMaxFrames, "shape",
          "T is " + std::to_string(p.frames) + ", must be 1 to " + std::to_string(kMaxFrames));
    check(p.batch >= 1 && p.batch <= 65535, "shape", "B is " + std::to_string(p.batch) + ", must be 1 to 65535");
    check(p.tokens >= 1 && p.heads >= 1 && static_cast<int64_t>(p.tokens) * p.heads < (1 << 30), "shape",
          "S is " + std::to_string(p.tokens) + " and H is " + std::to_string(p.heads) +
              ", must be at least 1 with a product under 2^30");
    check(p.qkv != nullptr, "qkv", "got a null pointer");
    check(p.out != nullptr, "out", "got a null pointer");
    check((p.cos == nullptr) == (p.sin == nullptr), "cos, sin", "got one of them, must be both or neither");
    check_aligned("qkv", p.qkv);
    check_aligned("q_weight", p.q_weight);
    check_aligned("k_weight", p.k_weight);
    check_aligned("cos", p.cos);
    check_aligned("sin", p.sin);
    check_aligned("out", p.out);
    const int sizes[] = {p.batch, p.frames, p.tokens, 3, p.heads};
    const int64_t strides[] = {p.stride_b, p.stride_t, p.stride_s, p.stride_qkv, p.stride_h};
    for (int i = 0; i < 5; ++i) {
        check(sizes[i] == 1 || strides[i] % 8 == 0, "qkv_strides",
              "stride " + std::to_string(i) + " is " + std::to_string(strides[i]) +
                  ", must be a multiple of 8 elements, for loads of 16 bytes");
    }
}

// Of the output as [batch, frame, token, head, column], in boxes of a warp's frames of one head.
CUtensorMap output_map(const TemporalAttentionParams& p) {
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.heads),
                                static_cast<cuuint64_t>(p.tokens), static_cast<cuuint64_t>(p.frames),
                                static_cast<cuuint64_t>(p.batch)};
    cuuint64_t strides[4] = {2 * sizes[0]};
    for (int i = 1; i < 4; ++i) strides[i] = strides[i - 1] * sizes[i];
    const cuuint32_t box[] = {static_cast<cuuint32_t>(p.head_dim), 1, 1, kTile, 1};
    return encode_tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT16, p.out, sizes, strides, box, CU_TENSOR_MAP_SWIZZLE_NONE,
                             CU_TENSOR_MAP_L2_PROMOTION_NONE);
}

template <typename Elem, int D, int kTiles, Prepare kPrepare>
void launch_sm90(const TemporalAttentionParams& p, int multiprocessors, cudaStream_t stream) {
    using P = StreamedPlan<D, kTiles>;
    const int64_t blocks = (static_cast<int64_t>(p.batch) * p.tokens * p.heads + P::sequences - 1) / P::sequences;
    const int grid = static_cast<int>(std::min<int64_t>(blocks, P::blocks * multiprocessors));
    const auto kernel = temporal_sm90_kernel<Elem, D, kTiles, kPrepare>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::shared_bytes),
          "temporal_attention: cudaFuncSetAttribute");
    kernel<<<grid, dim3(32, kTiles, P::sequences), P::shared_bytes, stream>>>(
        output_map(p), p, p.softmax_scale * static_cast<float>(M_LOG2E));
    check(cudaGetLastError(), "temporal_attention: launch");
}

// Whether Hopper's kernel serves: it was faster where queries and keys are prepared, and without that to 32 frames. It
// does not write e4m3.
bool streams(const TemporalAttentionParams& p) {
    const bool prepared = p.cos != nullptr || p.q_weight != nullptr || p.k_weight != nullptr;
    return p.out_scale == nullptr && p.head_dim == 72 && p.frames > kTile &&
           p.frames <= (prepared ? kStreamedTiles : 2) * kTile && p.softmax_scale > 0;
}

// `hopper`: its multiprocessors, 0 of another GPU.
template <typename Elem, int D, Prepare kPrepare>
void launch(const TemporalAttentionParams& p, int hopper, cudaStream_t stream) {
    if constexpr (D == 72) {
        if (hopper > 0 && streams(p)) {
            if (p.frames <= 2 * kTile) return launch_sm90<Elem, D, 2, kPrepare>(p, hopper, stream);
            if constexpr (kPrepare != Prepare::nothing) {
                if (p.frames <= 3 * kTile) return launch_sm90<Elem, D, 3, kPrepare>(p, hopper, stream);
                return launch_sm90<Elem, D, 4, kPrepare>(p, hopper, stream);
            }
        }
    }
    const int tiles = (p.frames + kTile - 1) / kTile;
    const int sequences = std::max(1, kWarps / tiles);
    const dim3 block(32, tiles, sequences);
    const dim3 grid((p.tokens * p.heads + sequences - 1) / sequences, p.batch);
    const float scale_log2 = p.softmax_scale * static_cast<float>(M_LOG2E);
    if (tiles == 1) {
        temporal_attention_kernel<Elem, D, true, kPrepare><<<grid, block, 0, stream>>>(p, scale_log2);
    } else {
        const auto kernel = temporal_attention_kernel<Elem, D, false, kPrepare>;
        const int bytes = sequences * tiles * 4 * D * static_cast<int>(sizeof(uint4));
        if (bytes > 48 * 1024) {  // more than a block gets unasked
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                  "temporal_attention: cudaFuncSetAttribute");
        }
        kernel<<<grid, block, bytes, stream>>>(p, scale_log2);
    }
    check(cudaGetLastError(), "temporal_attention: launch");
}

template <typename Elem, int D>
void launch(const TemporalAttentionParams& p, int hopper, cudaStream_t stream) {
    if (p.cos != nullptr) {
        launch<Elem, D, Prepare::rope>(p, hopper, stream);
    } else if (p.q_weight != nullptr || p.k_weight != nullptr) {
        launch<Elem, D, Prepare::norm>(p, hopper, stream);
    } else {
        launch<Elem, D, Prepare::nothing>(p, hopper, stream);
    }
}

template <typename Elem>
void launch(const TemporalAttentionParams& p, int hopper, cudaStream_t stream) {
    switch (p.head_dim) {
        case 64: return launch<Elem, 64>(p, hopper, stream);
        case 72: return launch<Elem, 72>(p, hopper, stream);
        case 96: return launch<Elem, 96>(p, hopper, stream);
        case 128: return launch<Elem, 128>(p, hopper, stream);
    }
}

}  // namespace

void temporal_attention(const TemporalAttentionParams& params, const std::string& dtype, int device, void* stream) {
    check_arguments(params, dtype);
    const DeviceGuard guard(device);
    const auto run = dtype == "bfloat16" ? launch<__nv_bfloat16> : launch<__half>;
    run(params, multiprocessors_of_hopper(device), static_cast<cudaStream_t>(stream));
}

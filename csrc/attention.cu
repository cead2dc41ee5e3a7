// Checks, tensor maps and launch of attention on Hopper.
#include <cuda_runtime.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <type_traits>

#include "attention.h"
#include "attention_sm90.cuh"
#include "checks.h"
#include "hopper_host.h"

namespace {

void check_operand(const char* name, const AttentionOperand& x, int batch, int tokens, int heads) {
    check(x.data != nullptr, name, "got a null pointer");
    check_aligned(name, x.data);
    const int sizes[] = {batch, tokens, heads};
    const int64_t strides[] = {x.stride_b, x.stride_n, x.stride_h};
    for (int i = 0; i < 3; ++i) {
        check(sizes[i] == 1 || (strides[i] > 0 && strides[i] % 8 == 0 && strides[i] < int64_t{1} << 39), name,
              "stride " + std::to_string(i) + " is " + std::to_string(strides[i]) +
                  ", must be a positive multiple of 8 elements under 2^39, for the tensor copies");
    }
}

void check_arguments(const AttentionParams& p, const std::string& dtype) {
    check_half_precision(dtype);
    check(p.head_dim == 72 || p.head_dim == 96 || p.head_dim == 128, "shape",
          "head_dim is " + std::to_string(p.head_dim) + ", must be 72, 96 or 128");
    check(p.batch >= 1 && p.queries >= 1 && p.keys >= 1 && p.heads >= 1, "shape", "all sizes must be at least 1");
    check(static_cast<double>(p.batch) * p.heads * (p.queries / 64 + 1) < INT32_MAX, "shape",
          "B * H * Lq is too large for 32-bit tile numbers");
    check((p.cos == nullptr) == (p.sin == nullptr), "cos, sin", "got one of them, must be both or none");
    check(p.cos == nullptr || (p.head_dim == 96 && p.pair_stride == 16), "pair_stride",
          "is " + std::to_string(p.pair_stride) + " at head_dim " + std::to_string(p.head_dim) +
              ", rotary embedding must have 16 at head_dim 96");
    check(std::isfinite(p.softmax_scale), "softmax_scale", "must be finite");
    const bool norm = p.q_weight != nullptr;
    check(norm == (p.k_weight != nullptr) && norm == (p.key_scales != nullptr), "q_weight, k_weight, key_scales",
          "got some of them, must be all or none");
    check(!norm || p.cos == nullptr, "cos", "got tables and norm weights, must be one of them");
    check(!norm || (p.key_scales_pitch >= p.keys && p.key_scales_pitch % 4 == 0), "key_scales",
          "has " + std::to_string(p.key_scales_pitch) + " a head, must be the keys, up to a multiple of 4");
    check_aligned("q_weight", p.q_weight);
    check_aligned("k_weight", p.k_weight);
    check_aligned("key_scales", p.key_scales);
    check_aligned("cos", p.cos);
    check_aligned("sin", p.sin);
    check(p.out_scale == nullptr || dtype == "bfloat16", "out_scale", "given for " + dtype + ", must be for bfloat16");
    check(p.out != nullptr, "out", "got a null pointer");
    check_aligned("out", p.out);
    check_operand("q", p.q, p.batch, p.queries, p.heads);
    check_operand("k", p.k, p.batch, p.keys, p.heads);
    check_operand("v", p.v, p.batch, p.keys, p.heads);
}

// From so many keys on a load also brings the rest of its 256 bytes into L2. On an H100 that gained 7% at 3600 keys and
// lost 6 to 12% at 300 to 1590.
constexpr int prefetched_keys = 2048;

// Boxes of `rows` tokens and `columns` columns of one head, swizzled over the bytes of a row.
template <typename Elem>
CUtensorMap tensor_map(const AttentionOperand& x, const AttentionParams& p, int tokens, int rows, int columns) {
    const auto bytes = [](int size, int64_t stride) { return static_cast<cuuint64_t>(size == 1 ? 16 : 2 * stride); };
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(p.head_dim), static_cast<cuuint64_t>(p.heads),
                                static_cast<cuuint64_t>(tokens), static_cast<cuuint64_t>(p.batch)};
    const cuuint64_t strides[] = {bytes(p.heads, x.stride_h), bytes(tokens, x.stride_n), bytes(p.batch, x.stride_b)};
    const CUtensorMapDataType type =
        std::is_same_v<Elem, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const CUtensorMapSwizzle swizzle = columns == 64   ? CU_TENSOR_MAP_SWIZZLE_128B
                                       : columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                       : CU_TENSOR_MAP_SWIZZLE_32B;
    return encode_tensor_map(
        type, x.data, sizes, strides, columns, rows, swizzle,
        p.keys < prefetched_keys ? CU_TENSOR_MAP_L2_PROMOTION_NONE : CU_TENSOR_MAP_L2_PROMOTION_L2_256B);
}

template <typename P>
void launch(const AttentionParams& p, int multiprocessors, cudaStream_t stream) {
    using Elem = typename P::Elem;
    AttentionArgs args;
    args.q = tensor_map<Elem>(p.q, p, p.queries, P::rows, 64);
    args.q_tail = tensor_map<Elem>(p.q, p, p.queries, P::rows, P::tail);
    args.k = tensor_map<Elem>(p.k, p, p.keys, P::half, 64);
    args.k_tail = tensor_map<Elem>(p.k, p, p.keys, P::half, P::tail);
    args.v = tensor_map<Elem>(p.v, p, p.keys, P::half, P::value_width);
    args.out = p.out;
    args.out_scale = p.out_scale;
    args.kv_len = p.kv_len;
    args.queries = p.queries;
    args.keys = p.keys;
    args.heads = p.heads;
    args.q_weight = p.q_weight;
    args.k_weight = p.k_weight;
    if constexpr (P::norm) {
        const int64_t pitch = p.key_scales_pitch;
        const cuuint64_t sizes[] = {static_cast<cuuint64_t>(p.keys), static_cast<cuuint64_t>(p.heads), 1,
                                    static_cast<cuuint64_t>(p.batch)};
        const cuuint64_t strides[] = {static_cast<cuuint64_t>(4 * pitch), 16,
                                      static_cast<cuuint64_t>(4 * pitch * p.heads)};
        args.key_scales = encode_tensor_map(CU_TENSOR_MAP_DATA_TYPE_FLOAT32, p.key_scales, sizes, strides, P::keys, 1,
                                            CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE);
    }
    args.cos = p.cos;
    args.sin = p.sin;
    args.eps = p.eps;
    args.row_tiles = (p.queries + P::rows - 1) / P::rows;
    args.tiles = args.row_tiles * p.heads * p.batch;
    // Not zero, for that times minus infinity is no number.
    args.scale_log2 = std::max(std::fabs(p.softmax_scale) * static_cast<float>(M_LOG2E), FLT_MIN);
    args.flip = p.softmax_scale < 0 ? 0x80008000u : 0;
    const auto kernel = attention_sm90_kernel<P>;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, P::shared_bytes),
          "attention: cudaFuncSetAttribute");
    kernel<<<std::min(args.tiles, multiprocessors), P::threads, P::shared_bytes, stream>>>(args);
    check(cudaGetLastError(), "attention: launch");
}

// Of the plans that were timed, the best. At head_dim 72 two boxes of v in 64 columns, the second mostly padding, came
// faster than three in 32, and three consumers than two with overlap; at 96 and 128 it is the other way round. Three
// with overlap are faster where keys have factors, and many steps.
template <typename Elem, bool kNorm, bool kE4m3>
void launch_best(const AttentionParams& p, int multiprocessors, cudaStream_t stream) {
    if (p.head_dim == 72 && kNorm && p.keys > 640) {
        launch<Plan<Elem, 72, 3, 64, kNorm, kNorm, kE4m3>>(p, multiprocessors, stream);
    } else if (p.head_dim == 72) {
        launch<Plan<Elem, 72, 3, 64, false, kNorm, kE4m3>>(p, multiprocessors, stream);
    } else if (p.head_dim == 96) {
        launch<Plan<Elem, 96, 2, 32, true, kNorm, kE4m3>>(p, multiprocessors, stream);
    } else {
        launch<Plan<Elem, 128, 2, 64, true, kNorm, kE4m3>>(p, multiprocessors, stream);
    }
}

template <typename Elem, bool kE4m3>
void launch_best(const AttentionParams& p, int multiprocessors, cudaStream_t stream) {
    if (p.q_weight != nullptr) {
        launch_best<Elem, true, kE4m3>(p, multiprocessors, stream);
    } else {
        launch_best<Elem, false, kE4m3>(p, multiprocessors, stream);
    }
}

}  // namespace

void attention(const AttentionParams& params, const std::string& dtype, int device, void* stream) {
    check_arguments(params, dtype);
    const DeviceGuard guard(device);
    const int multiprocessors = hopper_multiprocessors(device);
    const bool e4m3 = params.out_scale != nullptr;
    const auto run = dtype == "float16" ? launch_best<__half, false>
                     : e4m3             ? launch_best<__nv_bfloat16, true>
                                        : launch_best<__nv_bfloat16, false>;
    run(params, multiprocessors, static_cast<cudaStream_t>(stream));
}

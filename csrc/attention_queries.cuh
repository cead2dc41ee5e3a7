// Queries of attention on Hopper: into the registers that wgmma takes them from, and normed or rotated there.
#pragma once

#include <cmath>

#include "attention_plan.cuh"
#include "mma.cuh"

// Where 16 bytes of a row lie in a box of `pitch` bytes a row: the swizzle.
__device__ __forceinline__ uint32_t swizzled(uint32_t row, uint32_t pitch, uint32_t byte) {
    const uint32_t offset = row * pitch + byte;
    return offset ^ (offset >> 7 & (pitch / 16 - 1)) << 4;
}

// The fragments of this warpgroup's 64 queries.
template <typename P>
__device__ __forceinline__ void load_queries(uint32_t (&q)[P::k_steps][4], uint32_t base, int group) {
    const int lane = threadIdx.x % 32;
    const int row = group * P::group_rows + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
    for (int step = 0; step < P::k_steps; ++step) {
        const uint32_t offset = swizzled(row, step < 4 ? 128 : 2 * P::tail, step % 4 * 32 + lane / 16 * 16);
        load_matrices(q[step], base + step / 4 * P::rows * 128 + offset);
    }
}

// RMSNorm of the queries, and what can be taken out of the keys (their weights) and of the softmax (its scale). In
// float32, rounded once.
template <typename P>
__device__ __forceinline__ void norm_queries(uint32_t (&q)[P::k_steps][4], const AttentionArgs& args) {
    using Elem = typename P::Elem;
    const int c = threadIdx.x % 4;
    float factor[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 4 * P::k_steps; ++i) {
        const float2 x = unpack<Elem>(q[i / 4][i % 4]);
        factor[i % 2] = fmaf(x.x, x.x, fmaf(x.y, x.y, factor[i % 2]));
    }
    const float scale = args.flip == 0 ? args.scale_log2 : -args.scale_log2;
#pragma unroll
    for (int r = 0; r < 2; ++r) factor[r] = rsqrtf(quad_sum(factor[r]) / P::D + args.eps) * scale;
#pragma unroll
    for (int i = 0; i < P::D / 8; ++i) {
        const auto weight = [&](const void* of) {
            return unpack<Elem>(__ldg(reinterpret_cast<const uint32_t*>(static_cast<const Elem*>(of) + 8 * i) + c));
        };
        const float2 a = weight(args.q_weight), b = weight(args.k_weight);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            uint32_t& word = q[i / 2][i % 2 * 2 + r];
            const float2 x = unpack<Elem>(word);
            word = pack<Elem>(x.x * factor[r] * (a.x * b.x), x.y * factor[r] * (a.y * b.y));
        }
    }
}

// Rotary embedding of the queries whose first of this lane is number `row`, and the sign of the softmax scale.
template <typename P>
__device__ __forceinline__ void rotate_queries(uint32_t (&q)[P::k_steps][4], const AttentionArgs& args, int row) {
    using Elem = typename P::Elem;
    const int c = threadIdx.x % 4;
    if constexpr (P::pair_stride == 16) {
        if (args.cos != nullptr) {
#pragma unroll
            for (int i = 0; i < P::D / 4; ++i) {  // pairs of words, a step of k apart
                const int step = i / 4 * 2, word = i % 4;
                const int token = min(row + 8 * (word % 2), args.queries - 1);
                const int64_t angle = static_cast<int64_t>(token) * (P::D / 2) + step * 8 + word / 2 * 8 + 2 * c;
                const float2 cos = __ldg(reinterpret_cast<const float2*>(args.cos + angle));
                const float2 sin = __ldg(reinterpret_cast<const float2*>(args.sin + angle));
                const float2 x = unpack<Elem>(q[step][word]), y = unpack<Elem>(q[step + 1][word]);
                q[step][word] = pack<Elem>(x.x * cos.x - y.x * sin.x, x.y * cos.y - y.y * sin.y);
                q[step + 1][word] = pack<Elem>(y.x * cos.x + x.x * sin.x, y.y * cos.y + x.y * sin.y);
            }
        }
    }
#pragma unroll
    for (int i = 0; i < 4 * P::k_steps; ++i) q[i / 4][i % 4] ^= args.flip;
}

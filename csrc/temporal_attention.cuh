// Self-attention along T for every (batch, token, head), read straight out of the QKV GEMM's output.
//
// The work is memory bound, so every byte is read once, 16 bytes a lane, into the registers where the tensor cores
// want it (rows.cuh says how); only T > 16 uses shared memory. A warp owns 16 frames of one (b, s, h) and loads their
// q, k and v rows at once, which keeps about 7 KB in flight a warp.
#pragma once

#include "rows.cuh"
#include "temporal_attention.h"

constexpr int kTile = 16;  // frames a warp
constexpr int kMaxFrames = 128;
constexpr int kWarps = 4;  // a block, where T allows

// What happens to q and k before they meet. Each step taken at run time costs registers, so these are compiled apart.
enum class Prepare { nothing, norm, rope };  // rope: with or without norm

// What a warp knows of 16 keys: rows g and g + 8 of k, and the B fragments of v, two words a tile. D / 2 words in all.
template <int D>
struct KeysAndValues {
    uint32_t k[2][Row<D>::words];
    uint32_t v[2 * Columns<D>::tiles];

    __device__ __forceinline__ uint32_t& word(int i) {
        return i < D / 4 ? k[i / Row<D>::words][i % Row<D>::words] : v[i - D / 4];
    }
};

// 1 / RMS of rows g and g + 8. The sums of squares are the diagonal of x @ x^T, which the tensor cores have time for.
template <typename Elem, int D>
__device__ __forceinline__ void inverse_rms(float (&inverse)[2], const uint32_t (&x)[2][Row<D>::words], float eps,
                                            int g) {
    float d[2][4] = {};
    multiply_rows<Elem, D>(d, x, x);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        // Column g of row g + 8 * r is with lane c = g / 2 of these four.
        const float sum = __shfl_sync(0xffffffffu, g % 2 ? d[r][2 * r + 1] : d[r][2 * r], 4 * g + g / 2);
        inverse[r] = rsqrtf(sum * (1.f / D) + eps);
    }
}

template <typename Elem, bool kRope>
__device__ __forceinline__ void prepare_pair(uint32_t& word, float inverse, uint32_t weight, float cos, float sin) {
    const float2 x = unpack<Elem>(word);
    const float2 w = unpack<Elem>(weight);
    const float even = x.x * (inverse * w.x);
    const float odd = x.y * (inverse * w.y);
    word = kRope ? pack<Elem>(even * cos - odd * sin, odd * cos + even * sin) : pack<Elem>(even, odd);
}

// RMSNorm and RoPE of rows t[0] and t[1] of q and k, in float32 and rounded once. A norm that is absent is the identity
// here (weight 1), which costs arithmetic and no memory traffic.
template <typename Elem, int D, bool kRope>
__device__ __forceinline__ void prepare(const TemporalAttentionParams& p, uint32_t (&q)[2][Row<D>::words],
                                        uint32_t (&k)[2][Row<D>::words], const int (&t)[2], int g, int c) {
    const bool norm_q = p.q_weight != nullptr, norm_k = p.k_weight != nullptr;
    const uint32_t one = pack<Elem>(1.f, 1.f);
    float q_inverse[2] = {1.f, 1.f}, k_inverse[2] = {1.f, 1.f};
    if (norm_q) inverse_rms<Elem, D>(q_inverse, q, p.eps, g);
    if (norm_k) inverse_rms<Elem, D>(k_inverse, k, p.eps, g);
#pragma unroll
    for (int i = 0; i < Row<D>::chunks; ++i) {
        const int column = 32 * i + 8 * c;
        uint4 qw = make_uint4(one, one, one, one), kw = qw;
        if (norm_q) qw = load<uint4>(static_cast<const Elem*>(p.q_weight) + column);
        if (norm_k) kw = load<uint4>(static_cast<const Elem*>(p.k_weight) + column);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float4 cos = {}, sin = {};
            if constexpr (kRope) {
                cos = load<float4>(p.cos + t[r] * (D / 2) + column / 2);
                sin = load<float4>(p.sin + t[r] * (D / 2) + column / 2);
            }
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const float cos_w = (&cos.x)[w], sin_w = (&sin.x)[w];
                prepare_pair<Elem, kRope>(q[r][4 * i + w], q_inverse[r], (&qw.x)[w], cos_w, sin_w);
                prepare_pair<Elem, kRope>(k[r][4 * i + w], k_inverse[r], (&kw.x)[w], cos_w, sin_w);
            }
        }
    }
    if constexpr (Row<D>::tail) {
        constexpr int last = Row<D>::words - 1;
        const int column = D - 8 + 2 * c;
        const uint32_t qw = norm_q ? load<uint32_t>(static_cast<const Elem*>(p.q_weight) + column) : one;
        const uint32_t kw = norm_k ? load<uint32_t>(static_cast<const Elem*>(p.k_weight) + column) : one;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float cos = 0.f, sin = 0.f;
            if constexpr (kRope) {
                cos = load<float>(p.cos + t[r] * (D / 2) + column / 2);
                sin = load<float>(p.sin + t[r] * (D / 2) + column / 2);
            }
            prepare_pair<Elem, kRope>(q[r][last], q_inverse[r], qw, cos, sin);
            prepare_pair<Elem, kRope>(k[r][last], k_inverse[r], kw, cos, sin);
        }
    }
}

// The running softmax of rows g and g + 8: maximum, this lane's share of the sum, and the unnormalised output.
template <int D>
struct Softmax {
    float max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {};
    float out[Columns<D>::tiles][4] = {};
};

// Attend to 16 keys, of which the first `keys` exist. `kOnly`: there are no others, so nothing needs rescaling.
template <typename Elem, int D, bool kOnly>
__device__ __forceinline__ void attend(Softmax<D>& state, const uint32_t (&q)[2][Row<D>::words],
                                       const KeysAndValues<D>& kv, int keys, float scale_log2, int c) {
    float scores[2][4] = {};
    multiply_rows<Elem, D>(scores, q, kv.k);
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            scores[n][i] = 8 * n + 2 * c + i % 2 < keys ? scores[n][i] * scale_log2 : -INFINITY;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float *s0 = scores[0] + 2 * r, *s1 = scores[1] + 2 * r;
        const float max = fmaxf(state.max[r], quad_max(fmaxf(fmaxf(s0[0], s0[1]), fmaxf(s1[0], s1[1]))));
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            s0[i] = exp2_approx(s0[i] - max);
            s1[i] = exp2_approx(s1[i] - max);
        }
        if constexpr (!kOnly) {
            const float correction = exp2_approx(state.max[r] - max);
            state.max[r] = max;
            state.sum[r] *= correction;
#pragma unroll
            for (int n = 0; n < Columns<D>::tiles; ++n) {
                state.out[n][2 * r] *= correction;
                state.out[n][2 * r + 1] *= correction;
            }
        }
        state.sum[r] += (s0[0] + s0[1]) + (s1[0] + s1[1]);
    }
    // The scores lie as the A operand of the next product wants them: nothing moves between lanes.
    const uint32_t a0 = pack<Elem>(scores[0][0], scores[0][1]), a1 = pack<Elem>(scores[0][2], scores[0][3]);
    const uint32_t a2 = pack<Elem>(scores[1][0], scores[1][1]), a3 = pack<Elem>(scores[1][2], scores[1][3]);
#pragma unroll
    for (int n = 0; n < Columns<D>::tiles; ++n) {
        mma_k16<Elem>(state.out[n], a0, a1, a2, a3, kv.v[2 * n], kv.v[2 * n + 1]);
    }
}

// Blocks that a multiprocessor should hold: as many as the registers of that head_dim allow without spilling.
constexpr int min_blocks(int head_dim, bool one_tile) {
    if (one_tile) return head_dim <= 72 ? 4 : head_dim <= 96 ? 3 : 2;
    return head_dim <= 72 ? 2 : 1;
}

// Block (32 lanes, tiles of 16 frames, sequences): a warp a tile. With one tile nothing is shared. With more, each warp
// leaves its k and V fragments in shared memory in the order in which its lanes hold them, free of bank conflicts.
//
// Frames beyond T read the last frame again, and sequences beyond the last one read the last: cheaper than predicates
// and zeros. Keys beyond T are masked, and what they would contribute is finite; rows beyond T are not stored.
template <typename Elem, int D, bool kOneTile, Prepare kPrepare>
__global__ void __launch_bounds__(32 * (kOneTile ? kWarps : kMaxFrames / kTile), min_blocks(D, kOneTile))
    temporal_attention_kernel(const TemporalAttentionParams p, float scale_log2) {
    const int lane = threadIdx.x, g = lane / 4, c = lane % 4;
    const int first = kOneTile ? 0 : kTile * threadIdx.y;
    const unsigned index = blockIdx.x * blockDim.z + threadIdx.z;  // of (token, head): neighbours read neighbours
    const unsigned sequence = min(index, p.tokens * p.heads - 1u);
    const unsigned token = sequence / p.heads, head = sequence % p.heads;

    const char* query = static_cast<const char*>(p.qkv) +
                        sizeof(Elem) * (blockIdx.y * p.stride_b + token * p.stride_s + head * p.stride_h);
    const int64_t stride_t = sizeof(Elem) * p.stride_t, stride_qkv = sizeof(Elem) * p.stride_qkv;
    const auto frame = [&](int row) { return min(first + row, p.frames - 1); };

    const int t[2] = {frame(g), frame(g + 8)};
    uint32_t q[2][Row<D>::words];
    KeysAndValues<D> kv;
    ValueRows<D> values;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        load_row<D>(q[r], query + t[r] * stride_t, c);
        load_row<D>(kv.k[r], query + t[r] * stride_t + stride_qkv, c);
    }
    load_values(values, [&](int row) { return query + frame(row) * stride_t + 2 * stride_qkv; }, g, c);
    value_fragments<D>(kv.v, values);
    if constexpr (kPrepare != Prepare::nothing) {
        prepare<Elem, D, kPrepare == Prepare::rope>(p, q, kv.k, t, g, c);
    }

    Softmax<D> state;
    if constexpr (kOneTile) {
        attend<Elem, D, true>(state, q, kv, p.frames, scale_log2, c);
    } else {
        extern __shared__ uint4 shared[];  // [sequences, tiles, D / 8, lanes]
        uint4* tile = shared + threadIdx.z * blockDim.y * (4 * D) + lane;
#pragma unroll
        for (int i = 0; i < D / 8; ++i) {
            tile[threadIdx.y * (4 * D) + 32 * i] =
                make_uint4(kv.word(4 * i), kv.word(4 * i + 1), kv.word(4 * i + 2), kv.word(4 * i + 3));
        }
        __syncthreads();
#pragma unroll 1
        for (int keys = p.frames; keys > 0; keys -= kTile, tile += 4 * D) {
#pragma unroll
            for (int i = 0; i < D / 8; ++i) {
                const uint4 x = tile[32 * i];
                kv.word(4 * i) = x.x, kv.word(4 * i + 1) = x.y, kv.word(4 * i + 2) = x.z, kv.word(4 * i + 3) = x.w;
            }
            attend<Elem, D, false>(state, q, kv, keys, scale_log2, c);
        }
    }

    const bool e4m3 = p.out_scale != nullptr;
    const float scale = e4m3 ? p.out_scale[blockIdx.y * static_cast<int64_t>(p.frames) * p.tokens + token] : 1.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const float inverse = __fdividef(1.f, quad_sum(state.sum[r]) * scale);  // the sum is between 1 and T
        if (first + g + 8 * r < p.frames && index == sequence) {
            const int64_t row = (blockIdx.y * static_cast<int64_t>(p.frames) + t[r]) * p.tokens + token;
            const int64_t at = (row * p.heads + head) * D;
            if (e4m3) {
                store_row_e4m3<D>(static_cast<uint8_t*>(p.out) + at, state.out, r, inverse, c);
            } else {
                store_row<Elem, D>(static_cast<Elem*>(p.out) + at, state.out, r, inverse, c);
            }
        }
    }
}

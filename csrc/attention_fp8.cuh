// Self-attention on Hopper (sm_90a) with both products in e4m3: attention_sm90.cuh without turns, but:
//   - Rows come quantised (triton_ops/quantize_qkv.py): a scale for each query, for the keys of a step and for the
//     values of a block of steps. Those of queries and keys go into the factor of the scores. What was taken out of all
//     values is added to the result, with the mean of what rounding took.
//   - Scores are summed up in float16, which holds them, and so are weights until they are rounded: half the
//     instructions and half the registers of float32. So there are registers for three consumers, which hide the
//     latency of each other's softmax, but none for their queries, which stay in shared memory.
//   - wgmma wants values as [D, keys]. They come transposed, and the keys of every 16 in the order in which a lane has
//     its weights: 0, 1, 8, 9, 2, 3, 10, 11 and so on.
//   - The tensor cores add e4m3 products with some 14 bits. Sums of many keys would lose what is small beside them, so
//     those of each block are added up in float32, in shared memory, multiplied by the scale of its values.
//   - Weights must be at most 448. A row's start at about 8 at most; where a lane's sum of a step's weights shows that
//     one may be too large, the step's are computed again, with an offset that makes the largest about 8.
#pragma once

#include "attention_fp8_plan.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

// Two weights from their exponents.
__device__ __forceinline__ uint32_t exp2_halves(uint32_t x) {
    uint32_t y;  // ex2.approx.f16x2 would put the two together for each use
    asm("{\n.reg .b16 a, b;\n.reg .b32 low, high;\nmov.b32 {a, b}, %1;\n"
        "ex2.approx.f16 a, a;\nex2.approx.f16 b, b;\ncvt.u32.u16 low, a;\ncvt.u32.u16 high, b;\n"
        "prmt.b32 %0, low, high, 0x5410;\n}"
        : "=r"(y)
        : "r"(x));
    return y;
}
__device__ __forceinline__ __half2 as_halves(uint32_t x) {
    return *reinterpret_cast<const __half2*>(&x);
}
__device__ __forceinline__ uint32_t as_word(__half2 x) {
    return *reinterpret_cast<const uint32_t*>(&x);
}
// Four values in e4m3, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_e4m3(uint32_t low, uint32_t high) {
    uint16_t a, b;
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(a) : "r"(low));
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(b) : "r"(high));
    return static_cast<uint32_t>(b) << 16 | a;
}

template <typename P>
struct Fp8Consumer {
    using Elem = __nv_fp8_e4m3;
    using Out = typename P::Out;
    static constexpr int N = P::keys;
    using Scores = uint32_t[N / 4];  // float16: of 8 columns two of row g, then two of row g + 8
    using Sums = float[P::D / 2];
    using Weights = uint32_t[N / 32][4];
    using Pair = __half2[2];              // of rows g and g + 8
    static constexpr float most = 448.f;  // of e4m3
    static constexpr float top = 3.f;     // weights start at about 2^top: a lane's 32 of a row are less than `most`
    // What the steps of a tile share. They go from the last keys to the first.
    struct Progress {
        float offset[2] = {-INFINITY, -INFINITY};  // of the softmax, taken off every exponent of the row
        float norm[2] = {};                        // this lane's share of the sum of weights
        float q_scale[2];
        const float *k_scale, *v_scale;  // of this head
        int step, last, block_log2, last_block;
        // Of the values of a step: whether their product starts a block's sums, and whether sums were kept before them.
        __device__ __forceinline__ bool first(int step) const {
            return step == last || (step + 1 & (1 << block_log2) - 1) == 0;
        }
        __device__ __forceinline__ bool any(int step) const {
            return step >> block_log2 < last_block;
        }
    };

    const AttentionArgs& args;
    const Shared<P>& shared;
    const int group;
    Cursor<P::stages> k_cursor{}, v_cursor{};
    uint32_t q_phase = 0;

    // All lanes must have seen what they waited for, or a late one could miss that phase.
    __device__ __forceinline__ void release(uint32_t barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
    }

    // Starts scores = q @ k^T.
    __device__ __forceinline__ void start_scores(Scores& scores) const {
        barrier_wait(shared.k_full(k_cursor.stage), k_cursor.phase);
        const Matrix q = matrix<128>(shared.q + group * P::group_rows * 128);
        const Matrix k = matrix<128>(shared.k(k_cursor.stage));
        pin_registers(scores);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < P::k_steps; ++i) wgmma_half(scores, q.at(i * 32), k.at(i * 32), i > 0);
        wgmma_commit();
    }
    // When all but the last `pending` products are done.
    template <int pending>
    __device__ __forceinline__ void finish_scores(Scores& scores) {
        wgmma_wait<pending>();
        pin_registers(scores);
        release(shared.k_empty(k_cursor.stage));
        k_cursor.advance();
    }
    // Starts sums += weights @ v, or sums = weights @ v of the first step of a block.
    __device__ __forceinline__ void start_sums(Sums& sums, Weights& weights, bool first) const {
        barrier_wait(shared.v_full(v_cursor.stage), v_cursor.phase);
        const Matrix v = matrix<128>(shared.v(v_cursor.stage));
        pin_registers(sums);
#pragma unroll
        for (int i = 0; i < N / 32; ++i) pin_registers(weights[i]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < N / 32; ++i) wgmma<Elem, P::D, 0>(sums, weights[i], v.at(i * 32), i > 0 || !first);
        wgmma_commit();
    }
    __device__ __forceinline__ void finish_sums(Sums& sums, Weights& weights) {
        wgmma_wait();
        pin_registers(sums);
#pragma unroll
        for (int i = 0; i < N / 32; ++i) pin_registers(weights[i]);
        release(shared.v_empty(v_cursor.stage));
        v_cursor.advance();
    }

    // The factor of a step's scores, a float16 value that is not zero.
    static __device__ __forceinline__ float factor(float q_scale, float k_scale) {
        return __half2float(__float2half_rn(fmaxf(q_scale * k_scale, 0x1p-24f)));
    }
    // Scores are at most 65025 (triton_ops/quantize_qkv.py). Where float16 would hold a row's offset to more than 4,
    // the row's scores are all made smaller: `q_scale` is, by what the largest scale of keys says.
    __device__ __forceinline__ void limit(Progress& at) const {
        float largest = 0.f;
        for (int step = threadIdx.x % 32; step <= at.last; step += 32)
            largest = fmaxf(largest, __ldg(at.k_scale + step));
#pragma unroll
        for (int i = 16; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, i));
#pragma unroll
        for (int r = 0; r < 2; ++r) at.q_scale[r] = fminf(at.q_scale[r], 0.25f / largest);
    }
    // Raises the offsets, float16 values, where a weight is above 2^top; `decay` is what follows for sums.
    static __device__ __forceinline__ void follow(const Scores& scores, const float (&scale)[2], float (&offset)[2],
                                                  float (&decay)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            __half2 x = as_halves(scores[r]);
#pragma unroll
            for (int i = r + 2; i < N / 4; i += 2) x = __hmax2(x, as_halves(scores[i]));
            const float largest = quad_max(fmaxf(__low2float(x), __high2float(x))) * scale[r] - top;
            const float raised = fmaxf(offset[r], __half2float(__float2half_rn(largest)));
            decay[r] = exp2_approx(offset[r] - raised);
            offset[r] = raised;
        }
    }
    // Weights of a step; `norm` is this lane's share of their sum.
    static __device__ __forceinline__ void weigh(const Scores& scores, const float (&scale)[2],
                                                 const float (&offset)[2], Weights& weights, float (&norm)[2]) {
        const Pair by{__float2half2_rn(scale[0]), __float2half2_rn(scale[1])};
        const Pair shift{__float2half2_rn(-offset[0]), __float2half2_rn(-offset[1])};
        Pair sums[2];  // in two parts, for few digits are lost in sums of few
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const auto weigh = [&](uint32_t x) {
                    return exp2_halves(as_word(__hfma2(as_halves(x), by[r], shift[r])));
                };
                const uint32_t a = weigh(scores[4 * i + r]), b = weigh(scores[4 * i + 2 + r]);
                const __half2 both = __hadd2(as_halves(a), as_halves(b));
                sums[i % 2][r] = i < 2 ? both : __hadd2(sums[i % 2][r], both);
                weights[i / 2][i % 2 * 2 + r] = pack_e4m3(a, b);
            }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const __half2 sum = __hadd2(sums[0][r], sums[1][r]);
            norm[r] = __low2float(sum) + __high2float(sum);
        }
    }

    // What this lane keeps in shared memory: four sums at a time, from the i-th on.
    __device__ __forceinline__ uint32_t kept(int i) const {
        const uint32_t start = shared.again(0) + 4 * again_words + 15;
        return start / 16 * 16 + (i / 4 * 128 * P::consumers + threadIdx.x - 128) * 16;
    }
    // sums * scale + what is kept, if anything is.
    __device__ __forceinline__ float4 added(const Sums& sums, int i, float scale, bool any) const {
        float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
        if (any) x = load_shared<float4>(kept(i));
        x.x = fmaf(sums[i], scale, x.x), x.y = fmaf(sums[i + 1], scale, x.y);
        x.z = fmaf(sums[i + 2], scale, x.z), x.w = fmaf(sums[i + 3], scale, x.w);
        return x;
    }
    __device__ __forceinline__ void multiply_sums(Sums& sums, const float (&decay)[2], bool any) const {
#pragma unroll
        for (int i = 0; i < P::D / 2; ++i) sums[i] *= decay[i / 2 % 2];
        if (!any) return;
#pragma unroll
        for (int i = 0; i < P::D / 2; i += 4) {
            float4 x = load_shared<float4>(kept(i));
            x.x *= decay[0], x.y *= decay[0], x.z *= decay[1], x.w *= decay[1];
            store_shared(kept(i), x);
        }
    }

    // A step but the last one, beside the product of the weights before.
    __device__ __forceinline__ void attend_step(Scores& scores, Weights& before, Weights& weights, Sums& sums,
                                                Progress& at) {
        float scale[2], decay[2], norm[2];
        const int step = at.step;
        const float by = __ldg(at.v_scale + (step + 1 >> at.block_log2)), k_scale = __ldg(at.k_scale + step);
        start_scores(scores);
        start_sums(sums, before, at.first(step + 1));
        finish_scores<1>(scores);
        if (step == 0) release(shared.q_empty());
#pragma unroll
        for (int r = 0; r < 2; ++r) scale[r] = factor(at.q_scale[r], k_scale);
        weigh(scores, scale, at.offset, weights, norm);
        const bool changed = __any_sync(0xffffffffu, fmaxf(norm[0], norm[1]) > most);  // a weight may be
        if (changed) {
            follow(scores, scale, at.offset, decay);
            weigh(scores, scale, at.offset, weights, norm);
        }
        finish_sums(sums, before);
        if (changed) {
            multiply_sums(sums, decay, at.any(step + 1));
            at.norm[0] *= decay[0], at.norm[1] *= decay[1];
        }
        at.norm[0] += norm[0], at.norm[1] += norm[1];
        if (at.first(step)) {
#pragma unroll
            for (int i = 0; i < P::D / 2; i += 4) store_shared(kept(i), added(sums, i, by, at.any(step + 1)));
        }
        --at.step;
    }

    // What is left of a tile: the product of its last weights.
    __device__ __forceinline__ void end(Weights& weights, Sums& sums, const Progress& at) {
        start_sums(sums, weights, at.first(0));
        finish_sums(sums, weights);
        const float by = __ldg(at.v_scale);
#pragma unroll
        for (int i = 0; i < P::D / 2; i += 4) {
            const float4 x = added(sums, i, by, at.any(0));
            sums[i] = x.x, sums[i + 1] = x.y, sums[i + 2] = x.z, sums[i + 3] = x.w;
        }
    }

    __device__ __forceinline__ void attend(const Tile& tile, Sums& sums, Progress& at) {
        Scores scores;
        Weights even_weights, odd_weights;
        const int pair = tile.batch * args.heads + tile.head;
        at.last = tile.steps - 1;
        at.block_log2 = args.block_log2;
        at.last_block = at.last >> args.block_log2;
        at.k_scale = args.k_scale + static_cast<int64_t>(pair) * tile.steps;
        at.v_scale = args.v_scale + static_cast<int64_t>(pair) * (at.last_block + 1);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = min(first_row(tile) + 8 * r, args.queries - 1);
            at.q_scale[r] = args.scale_log2 * __ldg(args.q_scale + (static_cast<int64_t>(pair) * args.queries + row));
        }
        limit(at);
        barrier_wait(shared.q_full(), q_phase);
        q_phase ^= 1;
        at.step = at.last;
        start_scores(scores);
        float scale[2], decay[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) scale[r] = factor(at.q_scale[r], __ldg(at.k_scale + at.last));
        finish_scores<0>(scores);
        if (at.last == 0) release(shared.q_empty());
        const int valid = args.keys - at.last * N;
        if (valid < N) mask_scores(scores, valid);
        follow(scores, scale, at.offset, decay);
        weigh(scores, scale, at.offset, even_weights, at.norm);
        --at.step;
#pragma unroll 1
        while (at.step >= 1) {
            attend_step(scores, even_weights, odd_weights, sums, at);
            attend_step(scores, odd_weights, even_weights, sums, at);
        }
        if (at.step == 0) {
            attend_step(scores, even_weights, odd_weights, sums, at);
            end(odd_weights, sums, at);
        } else {
            end(even_weights, sums, at);
        }
    }

    // Keys from `valid` on do not count.
    static __device__ __forceinline__ void mask_scores(Scores& scores, int valid) {
        constexpr uint32_t minus_infinity = 0xfc00;
        const int column = 2 * (threadIdx.x % 4);
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            if (column + i / 2 * 8 >= valid) scores[i] = scores[i] & 0xffff0000u | minus_infinity;
            if (column + i / 2 * 8 + 1 >= valid) scores[i] = scores[i] & 0xffffu | minus_infinity << 16;
        }
    }

    __device__ __forceinline__ int first_row(const Tile& tile) const {
        return tile.row + group * P::group_rows + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    }

    __device__ __forceinline__ void store(const Tile& tile, const Sums& sums, const Progress& at) const {
        const int c = threadIdx.x % 4;
        const float* center =
            args.v_center + (static_cast<int64_t>(tile.batch) * args.heads + tile.head) * P::D + 2 * c;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float inverse = __fdividef(1.f, quad_sum(at.norm[r]));
            const int row = first_row(tile) + 8 * r;
            const int64_t token = static_cast<int64_t>(tile.batch) * args.queries + row;
            Out* target = static_cast<Out*>(args.out) + (token * args.heads + tile.head) * P::D;
            const auto word = [&](int i) {
                const float2 mean = __ldg(reinterpret_cast<const float2*>(center + 8 * i));
                return pack<Out>(fmaf(sums[4 * i + 2 * r], inverse, mean.x),
                                 fmaf(sums[4 * i + 2 * r + 1], inverse, mean.y));
            };
#pragma unroll
            for (int i = 0; i + 4 <= P::D / 8; i += 4) {
                uint32_t w[4] = {word(i), word(i + 1), word(i + 2), word(i + 3)};
                transpose_quad(w[0], w[1], w[2], w[3]);
                if (row < args.queries) {
                    *reinterpret_cast<uint4*>(target + 8 * (i + c)) = make_uint4(w[0], w[1], w[2], w[3]);
                }
            }
            if (P::D % 32 != 0 && row < args.queries) {
                *reinterpret_cast<uint32_t*>(target + P::D - 8 + 2 * c) = word(P::D / 8 - 1);
            }
        }
    }

    __device__ __forceinline__ void run() {
        for_tiles(args, shared, false, [&](const Tile& tile, int) {
            Sums sums;
            Progress at;
            attend(tile, sums, at);
            store(tile, sums, at);
        });
    }
};

template <typename P>
__global__ void __launch_bounds__(P::threads, 1) attention_fp8_kernel(const __grid_constant__ AttentionArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t raw[];
    const Shared<P> shared{(shared_address(raw) + 1023) / 1024 * 1024};
    init_shared(shared);
    if (threadIdx.x < 128) {
        shrink_registers<P::producer_registers>();
        if (uniform(threadIdx.x / 32) == 0) {
            Fp8Producer<P> producer{args, shared};
            for_tiles(args, shared, false, [&](const Tile& tile, int) { producer.bring(tile); });
        }
    } else {
        grow_registers<P::consumer_registers>();
        Fp8Consumer<P> consumer{args, shared, uniform(threadIdx.x / 128) - 1};
        consumer.run();
    }
#else
    __trap();  // code for another architecture; the launch checks that it is not asked for
#endif
}

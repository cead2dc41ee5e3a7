// Self-attention on Hopper (sm_90a) with both products in e4m3: attention_sm90.cuh, overlapped, without turns, but:
//   - Rows come quantised (triton_ops/quantize_qkv.py): a scale for each query, for the keys of a step and for the
//     values of a block of steps. Those of queries and keys go into the factor of the scores. What was taken out of all
//     values is added to the result.
//   - wgmma wants values as [D, keys]. They come transposed, and the keys of every 16 in the order in which a lane has
//     its weights: 0, 1, 8, 9, 2, 3, 10, 11 and so on.
//   - The tensor cores add e4m3 products with some 14 bits. Sums of many keys would lose what is small beside them, so
//     those of each block are added up in float32, in shared memory, multiplied by the scale of its values.
//   - Weights must be at most 448. They start at 4 at most; where a lane's sum of a step's weights shows that one could
//     be too large, all are made smaller, with what they are added to.
#pragma once

#include "attention_plan.cuh"
#include "attention_queries.cuh"
#include "attention_softmax.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

// `Out`: what the result is rounded to.
template <typename Out_, int D_, int kConsumers>
struct Fp8Plan {
    using Elem = __nv_fp8_e4m3;
    using Out = Out_;
    static constexpr int D = D_, keys = 128, stages = 3, consumers = kConsumers;
    static constexpr int threads = 128 * (consumers + 1);
    static constexpr int consumer_registers = consumers == 2 ? 240 : 160, producer_registers = consumers == 2 ? 24 : 32;
    static constexpr bool loads_queries = consumers == 2;  // three have no registers for them
    static constexpr int group_rows = 64, rows = group_rows * consumers;
    static constexpr int k_steps = (D + 31) / 32;
    // A row of q or k is a box of 128 columns, zeros where there are fewer; a row of v the 128 keys of a step.
    static constexpr int q_bytes = rows * 128, k_bytes = keys * 128, v_bytes = D * 128;
    static constexpr int factors_bytes = 0;
    static constexpr int sums_bytes = 4 * rows * D;
    static constexpr int shared_bytes =
        1024 + q_bytes + stages * (k_bytes + v_bytes) + 8 * (3 + 4 * stages) + 4 * again_words + sums_bytes;
};

// One warp, of which one thread works.
template <typename P>
struct Fp8Producer {
    const AttentionArgs& args;
    const Shared<P>& shared;
    Cursor<P::stages> cursor{};
    uint32_t q_phase = 1;

    __device__ __forceinline__ void bring(const Tile& tile) {
        const bool leader = threadIdx.x == 0;
        barrier_wait(shared.q_empty(), q_phase);
        q_phase ^= 1;
        if (leader) {
            barrier_expect(shared.q_full(), P::q_bytes);
            load_box(shared.q, args.q, shared.q_full(), 0, tile.head, tile.row, tile.batch);
        }
        for (int step = tile.steps - 1; step >= 0; --step) {
            const int s = cursor.stage;
            barrier_wait(shared.k_empty(s), cursor.phase ^ 1);
            if (leader) {
                barrier_expect(shared.k_full(s), P::k_bytes);
                load_box(shared.k(s), args.k, shared.k_full(s), 0, tile.head, step * P::keys, tile.batch);
            }
            barrier_wait(shared.v_empty(s), cursor.phase ^ 1);
            if (leader) {
                barrier_expect(shared.v_full(s), P::v_bytes);
                load_box(shared.v(s), args.v, shared.v_full(s), step * P::keys, tile.head, 0, tile.batch);
            }
            cursor.advance();
            __syncwarp();  // no lane may be a phase behind
        }
    }

    __device__ __forceinline__ void run(bool again) {
        for_tiles(args, shared, again, [&](const Tile& tile, int) { bring(tile); });
    }
};

template <typename P>
struct Fp8Consumer {
    using Elem = typename P::Elem;
    using Out = typename P::Out;
    using Queries = uint32_t[P::k_steps][4];
    using Sums = float[P::D / 2];
    using Weights = uint32_t[P::keys / 32][4];
    static constexpr int N = P::keys;
    static constexpr float top = 2.f;  // weights start at 2^top at most
    const AttentionArgs& args;
    const Shared<P>& shared;
    const int group;
    Cursor<P::stages> cursor{};
    uint32_t q_phase = 0;

    // All lanes must have seen what they waited for, or a late one could miss that phase.
    __device__ __forceinline__ void release(uint32_t barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
    }
    __device__ __forceinline__ void load(Queries& q) const {
        const int lane = threadIdx.x % 32;
        const int row = group * P::group_rows + threadIdx.x / 32 % 4 * 16 + lane % 16;
#pragma unroll
        for (int i = 0; i < P::k_steps; ++i)
            load_matrices(q[i], shared.q + swizzled(row, 128, i * 32 + lane / 16 * 16));
    }

    // Starts scores = q @ k^T.
    __device__ __forceinline__ void multiply_keys(float (&scores)[N / 2], const Queries& q) const {
        const Matrix k = matrix<128>(shared.k(cursor.stage));
        const Matrix rows = matrix<128>(shared.q + group * P::group_rows * 128);
        pin_registers(scores);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < P::k_steps; ++i) {
            if constexpr (P::loads_queries) {
                wgmma<Elem, N, 0>(scores, q[i], k.at(i * 32), i > 0);
            } else {
                wgmma_shared(scores, rows.at(i * 32), k.at(i * 32), i > 0);
            }
        }
        wgmma_commit();
    }
    // Starts sums += weights @ v, or sums = weights @ v of the first step of a block.
    __device__ __forceinline__ void multiply_values(Sums& sums, Weights& weights, int stage, bool first) const {
        const Matrix v = matrix<128>(shared.v(stage));
        pin_registers(sums);
#pragma unroll
        for (int i = 0; i < N / 32; ++i) pin_registers(weights[i]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < N / 32; ++i) wgmma<Elem, P::D, 0>(sums, weights[i], v.at(i * 32), i > 0 || !first);
        wgmma_commit();
    }
    __device__ __forceinline__ void finish_values(Sums& sums, Weights& weights, int stage) const {
        wgmma_wait();
        pin_registers(sums);
#pragma unroll
        for (int i = 0; i < N / 32; ++i) pin_registers(weights[i]);
        release(shared.v_empty(stage));
    }

    // Scores to exponents of the weights, with an offset that follows the largest score.
    static __device__ __forceinline__ void follow_scores(float (&scores)[N / 2], Softmax& softmax, float (&decay)[2],
                                                         const float (&scale)[2]) {
        constexpr float slack = 6.f;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float largest = scores[2 * r];
#pragma unroll
            for (int i = 2 * r; i < N / 2; i += 4) largest = fmaxf(largest, fmaxf(scores[i], scores[i + 1]));
            largest = quad_max(largest) * scale[r] - top;
            decay[r] = 1.f;
            if (largest - softmax.offset[r] > slack) {
                decay[r] = exp2_approx(softmax.offset[r] - largest);
                softmax.offset[r] = largest;
            }
        }
        shift_scores(scores, softmax, scale);
    }
    static __device__ __forceinline__ void shift_scores(float (&scores)[N / 2], const Softmax& softmax,
                                                        const float (&scale)[2]) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) scores[i] = fmaf(scores[i], scale[i / 2 % 2], -softmax.offset[i / 2 % 2]);
    }
    // Exponents to weights in float32; `norm` is their sum, of this step alone.
    static __device__ __forceinline__ void exponentiate(float (&scores)[N / 2], float (&norm)[2][2]) {
#pragma unroll
        for (int i = 0; i < N / 2; ++i) {
            scores[i] = exp2_approx(scores[i]);
            float& sum = norm[i / 2 % 2][i % 2];
            sum = i < 4 ? scores[i] : sum + scores[i];
        }
    }
    static __device__ __forceinline__ bool are_large(const float (&norm)[2][2]) {
        const float most = fmaxf(fmaxf(norm[0][0], norm[0][1]), fmaxf(norm[1][0], norm[1][1]));
        return __any_sync(0xffffffffu, most > 448.f);
    }
    // Divides the weights of rows that have one above 448 / 4, and the sums of weights, so that 2^top is the largest.
    static __device__ __forceinline__ void shrink(float (&scores)[N / 2], float (&norm)[2][2], Softmax& softmax,
                                                  float (&decay)[2]) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float most = 0.f;
#pragma unroll
            for (int i = 2 * r; i < N / 2; i += 4) most = fmaxf(most, fmaxf(scores[i], scores[i + 1]));
            most = quad_max(most);
            const int exponent = static_cast<int>(__float_as_uint(most) >> 23) - 127;
            const int excess = most > 112.f ? min(exponent - static_cast<int>(top), 126) : 0;
            decay[r] = __int_as_float((127 - excess) << 23);
            softmax.offset[r] += excess;
#pragma unroll
            for (int i = 0; i < 2; ++i) norm[r][i] *= decay[r], softmax.norm[r][i] *= decay[r];
        }
#pragma unroll
        for (int i = 0; i < N / 2; ++i) scores[i] *= decay[i / 2 % 2];
    }
    static __device__ __forceinline__ void round(const float (&scores)[N / 2], Weights& weights) {
#pragma unroll
        for (int i = 0; i < N / 16; ++i) {  // of 16 keys
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float* s = scores + 8 * i + 2 * r;
                weights[i / 2][i % 2 * 2 + r] = pack_e4m3(s[0], s[1], s[4], s[5]);
            }
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

    template <bool follow>
    __device__ __forceinline__ void attend(const Tile& tile, Sums& sums, Softmax& softmax) {
        float scores[N / 2], decay[2], scale[2], q_scale[2], norm[2][2];
        Weights weights;
        Queries q;
        const int pair = tile.batch * args.heads + tile.head, steps = (args.keys + N - 1) / N;
        const int last_block = steps - 1 >> args.block_log2, within_block = (1 << args.block_log2) - 1;
        const auto k_scale = [&](int step) { return __ldg(args.k_scale + (pair * steps + step)); };
        const auto v_scale = [&](int block) { return __ldg(args.v_scale + (pair * (last_block + 1) + block)); };
        // Of the values of a step: whether their product starts a block's sums, and whether sums were kept before them.
        const auto first = [&](int step) { return step == steps - 1 || (step + 1 & within_block) == 0; };
        const auto any = [&](int step) { return step >> args.block_log2 < last_block; };
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = min(first_row(tile) + 8 * r, args.queries - 1);
            q_scale[r] = args.scale_log2 * __ldg(args.q_scale + (static_cast<int64_t>(pair) * args.queries + row));
        }
        barrier_wait(shared.q_full(), q_phase);
        q_phase ^= 1;
        if constexpr (P::loads_queries) {
            load(q);
            fence_async();
            release(shared.q_empty());
        }
        barrier_wait(shared.k_full(cursor.stage), cursor.phase);
        multiply_keys(scores, q);
        float factor = k_scale(steps - 1);
        wgmma_wait();
        pin_registers(scores);
        release(shared.k_empty(cursor.stage));
        const int valid = args.keys - (steps - 1) * N;
        if (valid < N) mask_scores<N>(scores, valid);
        scale[0] = q_scale[0] * factor, scale[1] = q_scale[1] * factor;
        follow_scores(scores, softmax, decay, scale);
        exponentiate(scores, softmax.norm);
        round(scores, weights);
        factor = k_scale(max(steps - 2, 0));
#pragma unroll 1
        for (int step = steps - 2; step >= 0; --step) {
            const int stage = cursor.stage;
            const uint32_t phase = cursor.phase;
            cursor.advance();
            // Scales that are needed later: those of this step's values and the next step's keys.
            const float by = v_scale(step + 1 >> args.block_log2), next = k_scale(max(step - 1, 0));
            barrier_wait(shared.k_full(cursor.stage), cursor.phase);
            multiply_keys(scores, q);
            barrier_wait(shared.v_full(stage), phase);
            multiply_values(sums, weights, stage, first(step + 1));
            wgmma_wait<1>();
            pin_registers(scores);
            release(shared.k_empty(cursor.stage));
            scale[0] = q_scale[0] * factor, scale[1] = q_scale[1] * factor;
            factor = next;
            bool changed;
            if constexpr (follow) {
                follow_scores(scores, softmax, decay, scale);
                changed = __any_sync(0xffffffffu, decay[0] != 1.f || decay[1] != 1.f);
#pragma unroll
                for (int i = 0; i < 4; ++i) softmax.norm[i / 2][i % 2] *= decay[i / 2];
            } else {
                shift_scores(scores, softmax, scale);
            }
            exponentiate(scores, norm);
            pin_registers(scores);
            if constexpr (!follow) {
                changed = are_large(norm);
                if (changed) shrink(scores, norm, softmax, decay);
            }
            finish_values(sums, weights, stage);
            if (changed) multiply_sums(sums, decay, any(step + 1));
#pragma unroll
            for (int i = 0; i < 4; ++i) softmax.norm[i / 2][i % 2] += norm[i / 2][i % 2];
            round(scores, weights);
            if (first(step)) {
#pragma unroll
                for (int i = 0; i < P::D / 2; i += 4) store_shared(kept(i), added(sums, i, by, any(step + 1)));
            }
        }
        if constexpr (!P::loads_queries) release(shared.q_empty());
        barrier_wait(shared.v_full(cursor.stage), cursor.phase);
        multiply_values(sums, weights, cursor.stage, first(0));
        finish_values(sums, weights, cursor.stage);
        cursor.advance();
        const float by = v_scale(0);
#pragma unroll
        for (int i = 0; i < P::D / 2; i += 4) {
            const float4 x = added(sums, i, by, any(0));
            sums[i] = x.x, sums[i + 1] = x.y, sums[i + 2] = x.z, sums[i + 3] = x.w;
        }
    }

    __device__ __forceinline__ int first_row(const Tile& tile) const {
        return tile.row + group * P::group_rows + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    }

    __device__ __forceinline__ void store(const Tile& tile, const Sums& sums, const Softmax& softmax) const {
        const int c = threadIdx.x % 4;
        const float* center =
            args.v_center + (static_cast<int64_t>(tile.batch) * args.heads + tile.head) * P::D + 2 * c;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float inverse = __fdividef(1.f, quad_sum(softmax.norm[r][0] + softmax.norm[r][1]));
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

    template <bool follow>
    __device__ __forceinline__ void run(bool again) {
        cursor.stage = uniform(cursor.stage);  // as in attention_sm90.cuh
        cursor.phase = uniform(cursor.phase);
        for_tiles(args, shared, again, [&](const Tile& tile, int number) {
            Sums sums;
            Softmax softmax;
            attend<follow>(tile, sums, softmax);
            if constexpr (!follow) {
                // A weight that was infinite has made its row's offset useless.
                float norm = 0.f;
                for (int i = 0; i < 4; ++i) norm += softmax.norm[i / 2][i % 2];
                if (!__all_sync(0xffffffffu, norm < INFINITY) && threadIdx.x % 32 == 0) {
                    or_shared(shared.again(number), 1u << number % 32);
                }
            }
            store(tile, sums, softmax);
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
            producer.run(false);
            barrier_wait(shared.said(), 0);
            producer.run(true);
        }
    } else {
        grow_registers<P::consumer_registers>();
        Fp8Consumer<P> consumer{args, shared, uniform(threadIdx.x / 128) - 1};
        consumer.template run<false>(false);
        consumer.release(shared.said());
        barrier_wait(shared.said(), 0);
        consumer.template run<true>(true);
    }
#else
    __trap();  // code for another architecture; the launch checks that it is not asked for
#endif
}

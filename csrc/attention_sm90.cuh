// Attention forward on Hopper (sm_90a) for head_dim 72, 96, 128: flash attention (arXiv:2307.08691) on TMA and wgmma,
// with warpgroups that take turns as in FlashAttention-3 (arXiv:2407.08608).
//
// A block stays on its multiprocessor and goes through tiles of 128 or 192 queries of one head, the tiles of a head one
// after the other over the blocks, so that its keys and values stay in L2. Its warpgroups:
//   - the producer, of which one thread works: it has the copy engine bring the queries, then the keys and values of
//     the head in steps of `keys`, into a ring of `stages` stages. Every stage has a barrier that says full and one
//     that says empty, for keys and values apart;
//   - two or three consumers of 64 queries each, which share the keys and values. They take turns at their first
//     product, so that while one is at its softmax, the others keep the tensor cores busy.
//
// A consumer keeps in registers: its queries (as the left side of wgmma), scores [64, keys], sums [64, D]. A step is
//   scores = q @ k^T;  weights = exp2(scores * scale - offset);  sums += weights @ v,
// where the weights, rounded to 16 bits, are already laid out as the left side of the second product. The queries are
// in registers so that the producer can bring the next tile's while this one is computed; there, RMSNorm and rotary
// embedding of the queries cost next to nothing. A tile's result is stored while the next one's first product runs.
// With two consumers there are registers for one more thing: a step's softmax beside the second product of the step
// before (`overlapped`).
//
// The card's power is the limit: at 700 W its clock gives way, and every instruction that is saved makes the rest
// faster. So in bfloat16 the offset of a row is the largest score of the tile's first step, for all steps: a later
// score may be larger by 2^64 before anything overflows, and no digits are lost, for weights and sums are floating
// point. Where that happens, or anything else is not finite, a bit is set, and when the block is done, it computes such
// tiles again with an offset that follows the largest score.
//
// RMSNorm of the keys is a factor for each, by which its scores are multiplied; it comes with the keys, computed
// before.
//
// head_dim 72 is the point: a library pads it to 96 or 128. Here q @ k^T takes five steps of 16 columns, 80 in all, and
// weights @ v has exactly 72 columns. The tensor maps say that a row has 72 columns, so the copy engine fills what a
// box has beyond with zeros. A row of q or k is a box of 64 columns and one of the rest, 16, 32 or 64, so that the
// swizzled rows are of 128 and 32, 64 or 128 bytes; a row of v is in boxes of one width, for one product takes all of
// them.
//
// Steps go from the last keys to the first: then only the first step has keys to mask. Where at most half of its keys
// exist, it is computed at half its width, but for the overlapped.
#pragma once

#include "attention_output.cuh"
#include "attention_plan.cuh"
#include "attention_producer.cuh"
#include "attention_queries.cuh"
#include "attention_softmax.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

template <typename P>
struct Consumer {
    using Elem = typename P::Elem;
    using Queries = uint32_t[P::k_steps][4];
    using Sums = float[P::D / 2];
    static constexpr int N = P::keys;
    const AttentionArgs& args;
    const Shared<P>& shared;
    const int group;
    Cursor<P::stages> cursor{};
    uint32_t q_phase = 0;
    Tile done{};                   // whose result is not stored yet; row is beyond the last query where there is none
    uint32_t result[2][P::D / 8];  // of rows g and g + 8, packed

    // All lanes must have seen what they waited for, or a late one could miss that phase.
    __device__ __forceinline__ void release(uint32_t barrier) const {
        __syncwarp();
        if (threadIdx.x % 32 == 0) barrier_arrive(barrier);
    }
    __device__ __forceinline__ void take_turn() const {
        named_sync(1 + group, 256);
    }
    __device__ __forceinline__ void pass_turn() const {
        named_arrive(1 + (group + 1) % P::consumers, 256);
    }

    // Starts scores[64, n] = q @ k^T.
    template <int n>
    __device__ __forceinline__ void multiply_keys(float (&scores)[n / 2], const Queries& q) const {
        const Matrix wide = matrix<128>(shared.k(cursor.stage));
        const Matrix tail = matrix<2 * P::tail>(shared.k(cursor.stage) + P::keys * 128);
        pin_registers(scores);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < P::k_steps; ++i) {
            wgmma<Elem, n, 0>(scores, q[i], (i < 4 ? wide : tail).at(i % 4 * 32), i > 0);
        }
        wgmma_commit();
    }

    // Starts sums[64, D] += weights[64, n] @ v.
    template <int n>
    __device__ __forceinline__ void multiply_values(Sums& sums, uint32_t (&weights)[n / 16][4], int stage) const {
        constexpr int pitch = 2 * P::value_width;
        const Matrix v = matrix<pitch>(shared.v(stage), P::keys * pitch);
        pin_registers(sums);
#pragma unroll
        for (int i = 0; i < n / 16; ++i) pin_registers(weights[i]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < n / 16; ++i) wgmma<Elem, P::D, 1>(sums, weights[i], v.at(i * 16 * pitch), 1);
        wgmma_commit();
    }

    // Waits for the sums, and hands the values back.
    template <int n>
    __device__ __forceinline__ void finish_values(Sums& sums, uint32_t (&weights)[n / 16][4], int stage) const {
        wgmma_wait();
        pin_registers(sums);
#pragma unroll
        for (int i = 0; i < n / 16; ++i) pin_registers(weights[i]);
        release(shared.v_empty(stage));
    }

    // Scores to exponents of the weights; hands the keys back. `first`: of a tile's first step, of which keys from
    // `valid` on do not count. `follow`: with an offset that follows the largest score; returns whether sums so far are
    // to be multiplied by `decay`.
    template <int n, bool first, bool follow>
    __device__ __forceinline__ bool offset_scores(float (&scores)[n / 2], Softmax& softmax, float (&decay)[2],
                                                  int valid) const {
        const uint32_t factors = shared.factors(cursor.stage);
        if constexpr (P::norm && (first || follow)) multiply_factors<n>(scores, factors);
        if constexpr (P::norm && !first && !follow) shift_normed<n>(scores, softmax, factors);
        if constexpr (P::norm) fence_async();  // the factors are read
        release(shared.k_empty(cursor.stage));
        if (first && valid < n) mask_scores<n>(scores, valid);
        const float scale = P::norm ? 1.f : args.scale_log2;
        if constexpr (first || follow) {
            follow_scores<n>(scores, softmax, decay, scale);
        } else if constexpr (!P::norm) {
            shift_scores<n>(scores, softmax, scale);
        }
        if constexpr (first || !follow) return false;
        const bool changed = __any_sync(0xffffffffu, decay[0] != 1.f || decay[1] != 1.f);
        if (changed) {
#pragma unroll
            for (int i = 0; i < 4; ++i) softmax.norm[i / 2][i % 2] *= decay[i / 2];
        }
        return changed;
    }
    static __device__ __forceinline__ void multiply_sums(Sums& sums, const float (&decay)[2]) {
#pragma unroll
        for (int i = 0; i < P::D / 2; ++i) sums[i] *= decay[i / 2 % 2];
    }

    // The first product and the softmax of a step.
    template <int n, bool first, bool follow>
    __device__ __forceinline__ bool weigh(float (&scores)[n / 2], const Queries& q, Softmax& softmax, float (&decay)[2],
                                          int valid) {
        barrier_wait(shared.k_full(cursor.stage), cursor.phase);
        take_turn();
        multiply_keys<n>(scores, q);
        pass_turn();
        if constexpr (first) store();
        wgmma_wait();
        pin_registers(scores);
        return offset_scores<n, first, follow>(scores, softmax, decay, valid);
    }

    // A step, one thing after the other, on its first n keys.
    template <int n, bool first, bool follow>
    __device__ __forceinline__ void step(const Queries& q, Sums& sums, Softmax& softmax, int valid) {
        float scores[n / 2], decay[2];
        uint32_t weights[n / 16][4];
        if (weigh<n, first, follow>(scores, q, softmax, decay, valid)) multiply_sums(sums, decay);
        exponentiate<n>(scores, softmax);
        round_weights<Elem, n>(scores, weights);
        barrier_wait(shared.v_full(cursor.stage), cursor.phase);
        multiply_values<n>(sums, weights, cursor.stage);
        finish_values<n>(sums, weights, cursor.stage);
        cursor.advance();
    }

    // All steps of a tile, each one's softmax beside the second product of the one before.
    template <bool follow>
    __device__ __forceinline__ void overlapped(const Queries& q, Sums& sums, Softmax& softmax, int steps, int valid) {
        float scores[N / 2], decay[2];
        uint32_t weights[N / 16][4];
        weigh<N, true, follow>(scores, q, softmax, decay, valid);
        exponentiate<N>(scores, softmax);
        round_weights<Elem, N>(scores, weights);
#pragma unroll 1
        for (int i = 1; i < steps; ++i) {
            const int stage = cursor.stage;
            const uint32_t phase = cursor.phase;
            cursor.advance();
            barrier_wait(shared.k_full(cursor.stage), cursor.phase);
            take_turn();
            multiply_keys<N>(scores, q);
            barrier_wait(shared.v_full(stage), phase);
            multiply_values<N>(sums, weights, stage);
            pass_turn();
            wgmma_wait<1>();
            pin_registers(scores);
            const bool changed = offset_scores<N, false, follow>(scores, softmax, decay, N);
            exponentiate<N>(scores, softmax);
            pin_registers(scores);
            // A branch that depends on the weights, or the compiler puts them off until after the wait. It is never
            // taken: all of a warpgroup must wait in one place.
            if (__any_sync(0xffffffffu, softmax.norm[0][0] < 0.f)) {
                finish_values<N>(sums, weights, stage);
                multiply_sums(sums, decay);
            } else {
                finish_values<N>(sums, weights, stage);
                if (follow && changed) multiply_sums(sums, decay);
            }
            round_weights<Elem, N>(scores, weights);
        }
        barrier_wait(shared.v_full(cursor.stage), cursor.phase);
        multiply_values<N>(sums, weights, cursor.stage);
        finish_values<N>(sums, weights, cursor.stage);
        cursor.advance();
    }

    // A warpgroup whose rows lie beyond the last query only keeps the ring turning.
    __device__ __forceinline__ void pass(int steps) {
        for (int step = 0; step < steps; ++step) {
            take_turn();
            pass_turn();
            barrier_wait(shared.k_full(cursor.stage), cursor.phase);
            release(shared.k_empty(cursor.stage));
            barrier_wait(shared.v_full(cursor.stage), cursor.phase);
            release(shared.v_empty(cursor.stage));
            cursor.advance();
        }
    }

    __device__ __forceinline__ int first_row(const Tile& tile) const {
        return tile.row + group * P::group_rows + threadIdx.x / 32 % 4 * 16 + threadIdx.x % 32 / 4;
    }

    // Whether the offset did: nothing became too large.
    static __device__ __forceinline__ bool is_finite(const Sums& sums, const Softmax& softmax) {
        constexpr float most = 1.8e19f;  // 2^64
        float zero = 0.f;
#pragma unroll
        for (int i = 0; i < P::D / 2; ++i) zero = fmaf(sums[i], 0.f, zero);
        bool fine = zero == 0.f;
#pragma unroll
        for (int i = 0; i < 4; ++i) fine &= softmax.norm[i / 2][i % 2] < most;
        return __all_sync(0xffffffffu, fine);
    }

    __device__ __forceinline__ void finish(const Tile& tile, const Sums& sums, const Softmax& softmax) {
        done = tile;
        float scale = 1.f;
        if constexpr (P::e4m3) scale = args.out_scale[static_cast<int64_t>(tile.batch) * args.queries];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float norm = quad_sum(softmax.norm[r][0] + softmax.norm[r][1]) * scale;
            const float inverse = norm > 0.f ? __fdividef(1.f, norm) : 0.f;  // without keys, zeros
            if constexpr (P::e4m3) {
                pack_row_e4m3<P::D>(result[r], sums, r, inverse);
            } else {
                pack_row<Elem, P::D>(result[r], sums, r, inverse);
            }
        }
    }

    __device__ __forceinline__ void store() {
        const int c = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row(done) + 8 * r;
            const bool inside = row < args.queries;
            const int64_t token = static_cast<int64_t>(done.batch) * args.queries + row;
            const int64_t at = (token * args.heads + done.head) * P::D;
            if constexpr (P::e4m3) {
                store_packed_e4m3<P::D>(static_cast<uint8_t*>(args.out) + at, result[r], inside, c);
            } else {
                store_packed<Elem, P::D>(static_cast<Elem*>(args.out) + at, result[r], inside, c);
            }
        }
        done.row = args.queries;
    }

    template <bool follow>
    __device__ __forceinline__ void compute(const Tile& tile, int number) {
        Sums sums;
#pragma unroll
        for (int i = 0; i < P::D / 2; ++i) sums[i] = 0.f;
        Softmax softmax;
        if (tile.steps == 0) {
            store();
            finish(tile, sums, softmax);
            return;
        }
        barrier_wait(shared.q_full(), q_phase);
        q_phase ^= 1;
        if constexpr (!P::overlapped) {
            if (tile.row + group * P::group_rows >= args.queries) {
                release(shared.q_empty());
                pass(tile.steps);
                return;
            }
        }
        Queries q;
        load_queries<P>(q, shared.q, group);
        fence_async();
        release(shared.q_empty());
        if constexpr (P::norm) {
            norm_queries<P>(q, args);
        } else {
            rotate_queries<P>(q, args, first_row(tile));
        }
        const int valid = tile.keys - (tile.steps - 1) * P::keys;
        if constexpr (P::overlapped) {
            overlapped<follow>(q, sums, softmax, tile.steps, valid);
        } else {
            if (valid <= P::half) {
                step<P::half, true, follow>(q, sums, softmax, valid);
            } else {
                step<N, true, follow>(q, sums, softmax, valid);
            }
#pragma unroll 1
            for (int i = 1; i < tile.steps; ++i) step<N, false, follow>(q, sums, softmax, N);
        }
        if constexpr (!follow) {
            if (!is_finite(sums, softmax) && threadIdx.x % 32 == 0) or_shared(shared.again(number), 1u << number % 32);
        }
        finish(tile, sums, softmax);
    }

    template <bool follow>
    __device__ __forceinline__ void run(bool again) {
        // Which tiles are to be computed again, the compiler cannot know to be the same for all lanes; without these
        // two lines it then keeps the cursor, and what follows from it, out of uniform registers in the first run too.
        cursor.stage = uniform(cursor.stage);
        cursor.phase = uniform(cursor.phase);
        done.row = args.queries;
        for_tiles(args, shared, again, [&](const Tile& tile, int number) { compute<follow>(tile, number); });
        store();
    }
};

template <typename P>
__global__ void __launch_bounds__(P::threads, 1) attention_sm90_kernel(const __grid_constant__ AttentionArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t raw[];
    const Shared<P> shared{(shared_address(raw) + 1023) / 1024 * 1024};
    init_shared(shared);
    if (threadIdx.x < 128) {
        shrink_registers<P::producer_registers>();
        if (uniform(threadIdx.x / 32) == 0) {
            Producer<P> producer{args, shared};
            producer.run(false);
            if constexpr (P::fixed_offset) {
                barrier_wait(shared.said(), 0);
                producer.run(true);
            }
        }
    } else {
        grow_registers<P::consumer_registers>();
        Consumer<P> consumer{args, shared, uniform(threadIdx.x / 128) - 1};
        if (consumer.group == P::consumers - 1) consumer.pass_turn();  // the first turn is of group 0
        consumer.template run<!P::fixed_offset>(false);
        if constexpr (P::fixed_offset) {
            consumer.release(shared.said());
            barrier_wait(shared.said(), 0);
            consumer.template run<true>(true);
        }
    }
#else
    __trap();  // code for another architecture; the launch checks that it is not asked for
#endif
}

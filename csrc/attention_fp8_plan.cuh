// Of attention in e4m3 on Hopper (attention_fp8.cuh): the plan, and the producer.
#pragma once

#include "attention_plan.cuh"
#include "hopper.cuh"

// `Out`: what the result is rounded to.
template <typename Out_, int D_>
struct Fp8Plan {
    using Out = Out_;
    static constexpr int D = D_, keys = 128, stages = D > 96 ? 3 : 4, consumers = 3;
    static constexpr int threads = 128 * (consumers + 1);
    static constexpr int consumer_registers = 160, producer_registers = 32;
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
    Cursor<P::stages> k_cursor{}, v_cursor{};
    uint32_t q_phase = 1;

    __device__ __forceinline__ void bring_keys(const Tile& tile, int step) {
        const int s = k_cursor.stage;
        barrier_wait(shared.k_empty(s), k_cursor.phase ^ 1);
        if (threadIdx.x == 0) {
            barrier_expect(shared.k_full(s), P::k_bytes);
            load_box(shared.k(s), args.k, shared.k_full(s), 0, tile.head, step * P::keys, tile.batch);
        }
        k_cursor.advance();
        __syncwarp();  // no lane may be a phase behind
    }
    __device__ __forceinline__ void bring_values(const Tile& tile, int step) {
        const int s = v_cursor.stage;
        barrier_wait(shared.v_empty(s), v_cursor.phase ^ 1);
        if (threadIdx.x == 0) {
            barrier_expect(shared.v_full(s), P::v_bytes);
            load_box(shared.v(s), args.v, shared.v_full(s), step * P::keys, tile.head, 0, tile.batch);
        }
        v_cursor.advance();
        __syncwarp();
    }
    __device__ __forceinline__ void bring(const Tile& tile) {
        bring_keys(tile, tile.steps - 1);  // those of the tile before are not as long in use as its queries
        barrier_wait(shared.q_empty(), q_phase);
        q_phase ^= 1;
        if (threadIdx.x == 0) {
            barrier_expect(shared.q_full(), P::q_bytes);
            load_box(shared.q, args.q, shared.q_full(), 0, tile.head, tile.row, tile.batch);
        }
        __syncwarp();
        for (int step = tile.steps - 1; step >= 0; --step) {
            if (step > 0) bring_keys(tile, step - 1);  // wanted before these values
            bring_values(tile, step);
        }
    }
};

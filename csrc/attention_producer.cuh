// The producer of attention on Hopper: has the copy engine bring queries, keys and values.
#pragma once

#include "attention_plan.cuh"
#include "hopper.cuh"

// A box of rows of q or k, as rows `first` and on of the `kAll` rows at `target`.
template <typename P, int kAll>
__device__ __forceinline__ void load_rows(uint32_t target, int first, const CUtensorMap& map, const CUtensorMap& tail,
                                          uint32_t barrier, const Tile& tile, int token) {
    load_box(target + first * 128, map, barrier, 0, tile.head, token, tile.batch);
    load_box(target + kAll * 128 + first * 2 * P::tail, tail, barrier, 64, tile.head, token, tile.batch);
}

// One warp, of which one thread works.
template <typename P>
struct Producer {
    const AttentionArgs& args;
    const Shared<P>& shared;
    Cursor<P::stages> cursor{};
    uint32_t q_phase = 1;

    // All that the consumers need for a tile, in the order in which they need it.
    __device__ __forceinline__ void bring(const Tile& tile) {
        constexpr int pitch = 2 * P::value_width;
        const bool leader = threadIdx.x == 0;
        if (tile.steps == 0) return;
        barrier_wait(shared.q_empty(), q_phase);
        q_phase ^= 1;
        if (leader) {
            barrier_expect(shared.q_full(), P::q_bytes);
            load_rows<P, P::rows>(shared.q, 0, args.q, args.q_tail, shared.q_full(), tile, tile.row);
        }
        int halves = P::overlapped ? 2 : (tile.keys - (tile.steps - 1) * P::keys + P::half - 1) / P::half;
        for (int step = tile.steps - 1; step >= 0; --step) {
            const int s = cursor.stage, token = step * P::keys;
            barrier_wait(shared.k_empty(s), cursor.phase ^ 1);
            if (leader) {
                barrier_expect(shared.k_full(s), halves * P::half * P::key_row_bytes + P::factors_bytes);
                if constexpr (P::norm) {
                    load_box(shared.factors(s), args.key_scales, shared.k_full(s), token, tile.head, 0, tile.batch);
                }
                for (int row = 0; row < halves * P::half; row += P::half) {
                    load_rows<P, P::keys>(shared.k(s), row, args.k, args.k_tail, shared.k_full(s), tile, token + row);
                }
            }
            barrier_wait(shared.v_empty(s), cursor.phase ^ 1);
            if (leader) {
                barrier_expect(shared.v_full(s), halves * P::half * P::value_row_bytes);
                for (int row = 0; row < halves * P::half; row += P::half) {
#pragma unroll
                    for (int i = 0; i < P::value_boxes; ++i) {
                        load_box(shared.v(s) + (i * P::keys + row) * pitch, args.v, shared.v_full(s),
                                 i * P::value_width, tile.head, token + row, tile.batch);
                    }
                }
            }
            halves = 2;
            cursor.advance();
            __syncwarp();  // no lane may be a phase behind
        }
    }

    __device__ __forceinline__ void run(bool again) {
        for_tiles(args, shared, again, [&](const Tile& tile, int) { bring(tile); });
    }
};

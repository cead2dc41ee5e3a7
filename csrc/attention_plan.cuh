// What producer and consumers of attention on Hopper agree on: sizes, arguments, shared memory, the ring, the tiles.
#pragma once

#include <cuda_bf16.h>

#include <type_traits>

#include "hopper.cuh"

// Words of bits for the tiles of a block that are to be computed again.
constexpr int again_words = 32;

// What the kernel is compiled for. `overlapped`: a warpgroup's softmax runs beside its own products too. `norm`:
// RMSNorm of queries and keys, these by a factor for each, which the scores are multiplied by. `e4m3`: the result is,
// by a scale for each of the batch.
template <typename Elem_, int D_, int kConsumers, int kValueWidth, bool kOverlapped, bool kNorm, bool kE4m3>
struct Plan {
    using Elem = Elem_;
    static constexpr bool overlapped = kOverlapped, norm = kNorm, e4m3 = kE4m3;
    static constexpr int D = D_, consumers = kConsumers;
    static constexpr int keys = overlapped && consumers == 3 ? 96 : 128;  // of a step: what there are registers for
    static constexpr int stages = keys == 96 ? 3 : 2;
    // The first step's offset of the softmax for all; bfloat16 has the range of float32.
    static constexpr bool fixed_offset = std::is_same_v<Elem, __nv_bfloat16>;

    static constexpr int threads = 128 * (consumers + 1);
    static_assert(consumers == 2 || consumers == 3);
    static constexpr int consumer_registers = consumers == 2 ? 240 : 160;  // together with the producer's,
    static constexpr int producer_registers = consumers == 2 ? 24 : 32;    // the 64 Ki of a multiprocessor

    static constexpr int group_rows = 64;  // queries of a consumer: the height of wgmma
    static constexpr int rows = group_rows * consumers;
    static constexpr int half = keys / 2;            // keys of one box
    static constexpr int k_steps = (D + 15) / 16;    // of q @ k^T
    static constexpr int tail = 16 * (k_steps - 4);  // columns of the second box of a row of q or k
    static_assert(D % 8 == 0 && (tail == 16 || tail == 32 || tail == 64) && keys % 32 == 0);
    // Rotary embedding pairs columns so far apart, in each group of twice as many; then both are in one lane.
    static constexpr int pair_stride = D == 96 ? 16 : 0;  // 0: not supported
    static constexpr int value_width = kValueWidth;       // columns of a box of v
    static constexpr int value_boxes = (D + kValueWidth - 1) / kValueWidth;

    static constexpr int key_row_bytes = 2 * (64 + tail);
    static constexpr int value_row_bytes = 2 * value_width * value_boxes;
    static constexpr int q_bytes = rows * key_row_bytes;
    static constexpr int k_bytes = keys * key_row_bytes;
    static constexpr int v_bytes = keys * value_row_bytes;
    static_assert(q_bytes % 1024 == 0 && k_bytes % 1024 == 0 && v_bytes % 1024 == 0,
                  "swizzle repeats every 1024 bytes");
    static constexpr int factors_bytes = norm ? 4 * keys : 0;
    static constexpr int shared_bytes =
        1024 + q_bytes + stages * (k_bytes + v_bytes + factors_bytes) + 8 * (3 + 4 * stages) + 4 * again_words;
};

struct AttentionArgs {
    CUtensorMap q, q_tail, k, k_tail, v;  // [batch, token, head, column]; a box of one head
    void* out;                            // [B, Lq, H * D]
    const float* out_scale;               // [B, Lq], alike for all of b: what e4m3 in `out` is times; or nullptr
    const int* kv_len;                    // [B], or nullptr
    const void *q_weight, *k_weight;      // [D], of the RMSNorm
    CUtensorMap key_scales;               // [B, 1, H, Lk], 1 / rms of each key
    const float *cos, *sin;               // [Lq, D / 2], rotary embedding of the queries; or nullptr
    // Of e4m3 (attention_fp8.cuh): scales [B, H, Lq] of queries, [B, H, steps] of keys, [B, H, blocks of steps] of
    // values.
    const float *q_scale, *k_scale, *v_scale;
    const float* v_center;  // [B, H, D], to be added to the result
    int block_log2;         // of the steps of a block
    float eps;              // of the RMSNorm
    int queries, keys, heads;
    int row_tiles;     // tiles of one head
    int tiles;         // of all heads
    float scale_log2;  // positive, for exp2
    uint32_t flip;     // sign bits of two elements, for a negative softmax scale
};

// Shared memory: queries, the stages of keys, of values, of the keys' factors, barriers, bits of tiles.
template <typename P>
struct Shared {
    uint32_t q;
    __device__ __forceinline__ uint32_t k(int stage) const {
        return q + P::q_bytes + stage * P::k_bytes;
    }
    __device__ __forceinline__ uint32_t v(int stage) const {
        return q + P::q_bytes + P::stages * P::k_bytes + stage * P::v_bytes;
    }
    // The factors of the keys.
    __device__ __forceinline__ uint32_t factors(int stage) const {
        return v(P::stages) + stage * P::factors_bytes;
    }
    __device__ __forceinline__ uint32_t q_full() const {
        return factors(P::stages);
    }
    __device__ __forceinline__ uint32_t q_empty() const {
        return q_full() + 8;
    }
    // Whether the consumers have said which tiles are to be computed again.
    __device__ __forceinline__ uint32_t said() const {
        return q_full() + 16;
    }
    __device__ __forceinline__ uint32_t k_full(int stage) const {
        return q_full() + 24 + 32 * stage;
    }
    __device__ __forceinline__ uint32_t k_empty(int stage) const {
        return k_full(stage) + 8;
    }
    __device__ __forceinline__ uint32_t v_full(int stage) const {
        return k_full(stage) + 16;
    }
    __device__ __forceinline__ uint32_t v_empty(int stage) const {
        return k_full(stage) + 24;
    }
    // The word with the bit of a block's n-th tile; tiles share bits where there are many.
    __device__ __forceinline__ uint32_t again(int n) const {
        return k_full(P::stages) + n / 32 % again_words * 4;
    }
};

// Where producer and consumers are in the ring.
template <int kStages>
struct Cursor {
    int stage = 0;
    uint32_t phase = 0;
    __device__ __forceinline__ void advance() {
        if (++stage == kStages) {
            stage = 0;
            phase ^= 1;
        }
    }
};

struct Tile {
    int batch, head, row;  // row: its first query
    int keys, steps;
};

template <typename P>
__device__ __forceinline__ Tile tile_at(const AttentionArgs& args, int index) {
    Tile tile;
    const int group = index / args.row_tiles;
    // Turned from head to head. Otherwise a block may get the same place in every head, and one that always gets the
    // last, short tile waits for the others in the end.
    tile.row = (index - group * args.row_tiles + group / 2) % args.row_tiles * P::rows;
    tile.batch = group / args.heads;
    tile.head = group - tile.batch * args.heads;
    tile.keys = args.keys;
    if (args.kv_len != nullptr) tile.keys = uniform(max(0, min(args.kv_len[tile.batch], args.keys)));
    tile.steps = (tile.keys + P::keys - 1) / P::keys;
    return tile;
}

// All tiles of this block in turn, or only those whose bit is set: f(tile, number).
template <typename P, typename F>
__device__ __forceinline__ void for_tiles(const AttentionArgs& args, const Shared<P>& shared, bool again, const F& f) {
    if (again && !__any_sync(0xffffffffu, load_shared<uint32_t>(shared.again(32 * (threadIdx.x % 32))))) return;
    int number = 0;
    for (int index = blockIdx.x; index < args.tiles; index += gridDim.x, ++number) {
        if (again && !(uniform(load_shared<int>(shared.again(number))) >> number % 32 & 1)) continue;
        f(tile_at<P>(args, index), number);
    }
}

// Barriers, and bits of tiles. All threads of the block.
template <typename P>
__device__ __forceinline__ void init_shared(const Shared<P>& shared) {
    if (threadIdx.x == 0) {
        barrier_init(shared.q_full(), 1);
        barrier_init(shared.q_empty(), 4 * P::consumers);  // an arrival a warp
        barrier_init(shared.said(), 4 * P::consumers);
        for (int s = 0; s < P::stages; ++s) {
            barrier_init(shared.k_full(s), 1);
            barrier_init(shared.k_empty(s), 4 * P::consumers);
            barrier_init(shared.v_full(s), 1);
            barrier_init(shared.v_empty(s), 4 * P::consumers);
        }
        barrier_init_fence();
    }
    if (threadIdx.x < again_words) store_shared(shared.again(32 * threadIdx.x), 0u);
    __syncthreads();
}

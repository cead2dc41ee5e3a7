// Attention forward on Hopper (sm_90a) for head_dim 72 and 96: flash attention (arXiv:2307.08691) on TMA and wgmma,
// with warpgroups that take turns as in FlashAttention-3 (arXiv:2407.08608).
//
// A block stays on its multiprocessor and goes through tiles of 192 queries of one head, the tiles of a head one after
// the other over the blocks, so that its keys and values stay in L2. It has four warpgroups:
//   - the producer, of which one thread works: it has the copy engine bring 192 queries, then the keys and values of
//     the head in steps of `keys`, into a ring of `stages` stages. Every stage has a barrier that says full and one
//     that says empty, for keys and values apart;
//   - three consumers of 64 queries each, which share the keys and values. They take turns at their first product, so
//     that while one is at its softmax, the others keep the tensor cores busy.
//
// A consumer keeps in registers: its queries (as the left side of wgmma), scores [64, keys], sums [64, D]. A step is
//   scores = q @ k^T;  weights = exp2(scores * scale - offset);  sums = sums * decay + weights @ v,
// where the weights, rounded to 16 bits, are already laid out as the left side of the second product. The queries are
// in registers so that the producer can bring the next tile's while this one is computed; there, RMSNorm and rotary
// embedding of the queries cost next to nothing. A tile's result is stored while the next one's first product runs.
//
// RMSNorm of the keys is a factor for each, by which its scores are multiplied; it comes with the keys, computed
// before. Normed keys bound the scores, so that most often the softmax does without its offset, and without the largest
// score.
//
// head_dim 72 is the point: a library pads it to 96 or 128. Here q @ k^T takes five steps of 16 columns, 80 in all, and
// weights @ v has exactly 72 columns. The tensor maps say that a row has 72 columns, so the copy engine fills what a
// box has beyond with zeros. A row of q or k is a box of 64 columns and one of 16 (32 for head_dim 96), so that the
// swizzled rows are 128 and 32 (64) bytes; a row of v is in boxes of one width, for one product takes all of them.
//
// Steps go from the last keys to the first: then only the first step has keys to mask. Where at most half of its keys
// exist, it is computed at half its width.
#pragma once

#include "attention_plan.cuh"
#include "hopper.cuh"
#include "mma.cuh"
#include "wgmma.cuh"

// A box of rows of q or k, as rows `first` and on of the `kAll` rows at `target`.
template <typename P, int kAll>
__device__ __forceinline__ void load_rows(uint32_t target, int first, const CUtensorMap& map, const CUtensorMap& tail,
                                          uint32_t barrier, const Tile& tile, int token) {
    load_box(target + first * 128, map, barrier, 0, tile.head, token, tile.batch);
    load_box(target + kAll * 128 + first * 2 * P::tail, tail, barrier, 64, tile.head, token, tile.batch);
}

template <typename P>
__device__ __forceinline__ void produce(const AttentionArgs& args, const Shared<P>& shared) {
    constexpr int pitch = 2 * P::value_width;
    const bool leader = threadIdx.x == 0;
    Cursor<P::stages> cursor;
    uint32_t q_phase = 1;
    for (int index = blockIdx.x; index < args.tiles; index += gridDim.x) {
        const Tile tile = tile_at<P>(args, index);
        if (tile.steps == 0) continue;
        barrier_wait(shared.q_empty(), q_phase);
        q_phase ^= 1;
        if (leader) {
            barrier_expect(shared.q_full(), P::q_bytes);
            load_rows<P, P::rows>(shared.q, 0, args.q, args.q_tail, shared.q_full(), tile, tile.row);
        }
        int halves = (tile.keys - (tile.steps - 1) * P::keys + P::half - 1) / P::half;
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
}

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

// Whether the softmax of these queries and normed keys may do without an offset: a key is at most sqrt(D) long, so that
// a score is at most sqrt(D) times the length of the query, and its exp2 neither too large nor too small. bfloat16 has
// the range of float32.
template <typename P>
__device__ __forceinline__ bool are_bounded(const uint32_t (&q)[P::k_steps][4]) {
    if (std::is_same_v<typename P::Elem, __half>) return false;
    constexpr float most = 80.f;  // sums of 2^16 weights times values of up to 2^30 are finite then
    float squares[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < 4 * P::k_steps; ++i) {
        const float2 x = unpack<typename P::Elem>(q[i / 4][i % 4]);
        squares[i % 2] = fmaf(x.x, x.x, fmaf(x.y, x.y, squares[i % 2]));
    }
    return __all_sync(0xffffffffu, fmaxf(quad_sum(squares[0]), quad_sum(squares[1])) * P::D <= most * most);
}

// scores[64, N] = q @ k^T
template <typename P, int N>
__device__ __forceinline__ void multiply_keys(float (&scores)[N / 2], const uint32_t (&q)[P::k_steps][4], uint32_t k) {
    const Matrix wide = matrix<128>(k);
    const Matrix tail = matrix<2 * P::tail>(k + P::keys * 128);
#pragma unroll
    for (int step = 0; step < P::k_steps; ++step) {
        const uint64_t b = (step < 4 ? wide : tail).at(step % 4 * 32);
        wgmma<typename P::Elem, N, 0>(scores, q[step], b, step > 0);
    }
}

// sums[64, D] += weights[64, N] @ v, of the steps of 16 keys from kFrom to kTo
template <typename P, int N, int kFrom, int kTo>
__device__ __forceinline__ void multiply_values(float (&sums)[P::D / 2], const uint32_t (&weights)[N / 16][4],
                                                uint32_t v) {
    constexpr int pitch = 2 * P::value_width;
    const Matrix b = matrix<pitch>(v, P::keys * pitch);
#pragma unroll
    for (int step = kFrom; step < kTo; ++step) {
        wgmma<typename P::Elem, P::D, 1>(sums, weights[step], b.at(step * 16 * pitch), 1);
    }
}

// Of the rows g and g + 8 that a lane has a part of.
struct Softmax {
    float offset[2] = {-INFINITY, -INFINITY};  // largest score, scaled; up to 8 less than a later one
    float norm[2][2] = {};                     // this lane's share of the sum of weights, in two parts
};

// Scores to exponents of the weights, in place; `decay` is what the sums so far are to be multiplied by.
template <int N>
__device__ __forceinline__ void offset_scores(float (&scores)[N / 2], Softmax& softmax, float (&decay)[2],
                                              float scale) {
    constexpr float slack = 8.f;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        float a = scores[2 * r], b = scores[2 * r + 1];
#pragma unroll
        for (int i = 2 * r + 4; i < N / 2; i += 4) {
            a = fmaxf(a, scores[i]);
            b = fmaxf(b, scores[i + 1]);
        }
        // A weight of up to 2^8 does no harm, and most steps then leave the sums as they are.
        const float largest = quad_max(fmaxf(a, b)) * scale;
        decay[r] = 1.f;
        if (largest - softmax.offset[r] > slack) {
            decay[r] = exp2_approx(softmax.offset[r] - largest);
            softmax.offset[r] = largest;
        }
    }
#pragma unroll
    for (int i = 0; i < N / 2; ++i) scores[i] = fmaf(scores[i], scale, -softmax.offset[i / 2 % 2]);
}

// Exponents to weights, of the keys from kFrom to kTo.
template <typename Elem, int N, int kFrom, int kTo>
__device__ __forceinline__ void exponentiate(const float (&scores)[N / 2], uint32_t (&weights)[N / 16][4],
                                             Softmax& softmax) {
#pragma unroll
    for (int i = kFrom / 4; i < kTo / 4; ++i) {
        const float low = exp2_approx(scores[2 * i]), high = exp2_approx(scores[2 * i + 1]);
        softmax.norm[i % 2][0] += low;
        softmax.norm[i % 2][1] += high;
        weights[i / 4][i % 4] = pack<Elem>(low, high);
    }
}

template <typename P>
struct Consumer {
    using Elem = typename P::Elem;
    const AttentionArgs& args;
    const Shared<P>& shared;
    const int group;  // 0 to 2
    Cursor<P::stages> cursor{};
    uint32_t q_phase = 0;
    bool bounded = false;          // see are_bounded
    Tile done{};                   // whose result is not stored yet; row is beyond the last query where there is none
    uint32_t result[2][P::D / 8];  // of rows g and g + 8, laid out as sums

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

    // The k-th part of a step's second product, of weights that are made just before.
    template <int N, int kPart>
    __device__ __forceinline__ void add_values(const float (&scores)[N / 2], uint32_t (&weights)[N / 16][4],
                                               float (&sums)[P::D / 2], Softmax& softmax) {
        constexpr int steps = N / 16, from = steps * kPart / P::parts, to = steps * (kPart + 1) / P::parts;
        exponentiate<Elem, N, 16 * from, 16 * to>(scores, weights, softmax);
        if constexpr (kPart == 0) {
            barrier_wait(shared.v_full(cursor.stage), cursor.phase);
            pin_registers(sums);
        }
#pragma unroll
        for (int i = from; i < to; ++i) pin_registers(weights[i]);
        wgmma_fence();
        multiply_values<P, N, from, to>(sums, weights, shared.v(cursor.stage));
        wgmma_commit();
    }

    // One step, on its first N keys. Of a tile's first step, those from `valid` on do not count.
    template <int N, bool kFirst>
    __device__ __forceinline__ void step(const uint32_t (&q)[P::k_steps][4], float (&sums)[P::D / 2], Softmax& softmax,
                                         int valid) {
        float scores[N / 2], decay[2];
        uint32_t weights[N / 16][4];
        barrier_wait(shared.k_full(cursor.stage), cursor.phase);
        take_turn();
        pin_registers(scores);
        wgmma_fence();
        multiply_keys<P, N>(scores, q, shared.k(cursor.stage));
        wgmma_commit();
        pass_turn();
        if constexpr (kFirst) store();
        wgmma_wait();
        pin_registers(scores);
        if constexpr (P::norm) {
#pragma unroll
            for (int i = 0; i < N / 2; i += 4) {
                const float2 by = load_shared<float2>(shared.factors(cursor.stage) + 8 * (i + threadIdx.x % 4));
                scores[i] *= by.x, scores[i + 1] *= by.y;
                scores[i + 2] *= by.x, scores[i + 3] *= by.y;
            }
        }
        release(shared.k_empty(cursor.stage));
        if (kFirst && valid < N) {
            const int column = 2 * (threadIdx.x % 4);
#pragma unroll
            for (int i = 0; i < N / 2; ++i) {
                if (column + i / 4 * 8 + i % 2 >= valid) scores[i] = -INFINITY;
            }
        }
        if (!P::norm || !bounded) {
            offset_scores<N>(scores, softmax, decay, P::norm ? 1.f : args.scale_log2);
            // Asked here and not there: that costs registers, and nvcc 13.0 then serialises wgmma (warning C7512).
            if (!kFirst && __any_sync(0xffffffffu, decay[0] != 1.f || decay[1] != 1.f)) {
#pragma unroll
                for (int i = 0; i < P::D / 2; ++i) sums[i] *= decay[i / 2 % 2];
#pragma unroll
                for (int i = 0; i < 4; ++i) softmax.norm[i / 2][i % 2] *= decay[i / 2];
            }
        }
        add_values<N, 0>(scores, weights, sums, softmax);
        if constexpr (P::parts == 2) add_values<N, 1>(scores, weights, sums, softmax);
        wgmma_wait();
        pin_registers(sums);
#pragma unroll
        for (int i = 0; i < N / 16; ++i) pin_registers(weights[i]);
        release(shared.v_empty(cursor.stage));
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

    __device__ __forceinline__ void finish(const Tile& tile, const float (&sums)[P::D / 2], const Softmax& softmax) {
        done = tile;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float norm = quad_sum(softmax.norm[r][0] + softmax.norm[r][1]);
            const float inverse = norm > 0.f ? __fdividef(1.f, norm) : 0.f;  // without keys, zeros
#pragma unroll
            for (int i = 0; i < P::D / 8; ++i) {
                result[r][i] = pack<Elem>(sums[4 * i + 2 * r] * inverse, sums[4 * i + 2 * r + 1] * inverse);
            }
        }
    }

    // 16 bytes a lane, of head_dim 72 all but the last 8 columns: a sixth of the store instructions.
    __device__ __forceinline__ void store() {
        const int c = threadIdx.x % 4;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first_row(done) + 8 * r;
            const bool inside = row < args.queries;
            const int64_t token = static_cast<int64_t>(done.batch) * args.queries + row;
            Elem* target = static_cast<Elem*>(args.out) + (token * args.heads + done.head) * P::D;
            uint32_t(&w)[P::D / 8] = result[r];
#pragma unroll
            for (int i = 0; i + 4 <= P::D / 8; i += 4) {
                transpose_quad(w[i], w[i + 1], w[i + 2], w[i + 3]);
                if (inside) {
                    *reinterpret_cast<uint4*>(target + 8 * (i + c)) = make_uint4(w[i], w[i + 1], w[i + 2], w[i + 3]);
                }
            }
            if (P::D % 32 != 0 && inside) *reinterpret_cast<uint32_t*>(target + P::D - 8 + 2 * c) = w[P::D / 8 - 1];
        }
        done.row = args.queries;
    }

    __device__ __forceinline__ void run() {
        done.row = args.queries;
        if (group == P::consumers - 1) pass_turn();  // the first turn is of group 0
        for (int index = blockIdx.x; index < args.tiles; index += gridDim.x) {
            const Tile tile = tile_at<P>(args, index);
            float sums[P::D / 2];
#pragma unroll
            for (int i = 0; i < P::D / 2; ++i) sums[i] = 0.f;
            Softmax softmax;
            if (tile.steps > 0) {
                barrier_wait(shared.q_full(), q_phase);
                q_phase ^= 1;
                if (tile.row + group * P::group_rows >= args.queries) {
                    release(shared.q_empty());
                    pass(tile.steps);
                    continue;
                }
                uint32_t q[P::k_steps][4];
                load_queries<P>(q, shared.q, group);
                release(shared.q_empty());
                if constexpr (P::norm) {
                    norm_queries<P>(q, args);
                    bounded = are_bounded<P>(q);
                } else {
                    rotate_queries<P>(q, args, first_row(tile));
                }
                const int valid = tile.keys - (tile.steps - 1) * P::keys;
                if (valid <= P::half) {
                    step<P::half, true>(q, sums, softmax, valid);
                } else {
                    step<P::keys, true>(q, sums, softmax, valid);
                }
#pragma unroll 1
                for (int i = 1; i < tile.steps; ++i) step<P::keys, false>(q, sums, softmax, P::keys);
            } else {
                store();
            }
            finish(tile, sums, softmax);
        }
        store();
    }
};

template <typename P>
__global__ void __launch_bounds__(P::threads, 1) attention_sm90_kernel(const __grid_constant__ AttentionArgs args) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    extern __shared__ uint8_t raw[];
    const Shared<P> shared{(shared_address(raw) + 1023) / 1024 * 1024};
    if (threadIdx.x == 0) {
        barrier_init(shared.q_full(), 1);
        barrier_init(shared.q_empty(), 4 * P::consumers);  // an arrival a warp
        for (int s = 0; s < P::stages; ++s) {
            barrier_init(shared.k_full(s), 1);
            barrier_init(shared.k_empty(s), 4 * P::consumers);
            barrier_init(shared.v_full(s), 1);
            barrier_init(shared.v_empty(s), 4 * P::consumers);
        }
        barrier_init_fence();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        shrink_registers<P::producer_registers>();
        if (uniform(threadIdx.x / 32) == 0) produce<P>(args, shared);
    } else {
        grow_registers<P::consumer_registers>();
        Consumer<P>{args, shared, uniform(threadIdx.x / 128) - 1}.run();
    }
#else
    __trap();  // code for another architecture; the launch checks that it is not asked for
#endif
}

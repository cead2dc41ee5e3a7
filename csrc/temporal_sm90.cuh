// Self-attention along T on Hopper for head_dim 72 and 17 to 64 frames: temporal_attention.cuh with memory and
// arithmetic apart.
//
// There a warp waits for its own rows, and a multiprocessor has registers for 16 warps: too few to hide that wait
// behind the arithmetic of so many keys. Here a block stays on its multiprocessor, and while it computes a sequence,
// the next one's queries, keys and values are copied to shared memory as they lie (cp.async), rows of 144 bytes: those
// of 8 frames start in 8 different groups of banks, so ldmatrix reads them without conflicts. Frames beyond T are
// zeros.
//
// A warp owns 16 frames. It writes its prepared keys back for the others, and its output over its queries, from where
// the copy engine stores it. A row's scores all fit in registers, so there is one maximum and nothing to rescale; the
// rotary table of a lane's two frames stays there too.
//
// The copy engine could bring the rows too: 5 % slower at T 60, 2 % faster at T 30.
#pragma once

#include "hopper.cuh"
#include "temporal_attention.cuh"

constexpr int kStreamedTiles = 4;  // a sequence, at most

// `kTiles` tiles of 16 frames a sequence. Neighbouring heads share a block.
template <int D, int kTiles>
struct StreamedPlan {
    static_assert(D / 8 % 2 == 1, "rows would start in the same banks");
    static constexpr int sequences = 2;
    static constexpr int warps = kTiles * sequences;
    static constexpr int blocks = kTiles > 2 ? 2 : 4;  // a multiprocessor
    static constexpr int words = D / 8;      // 32-bit words a lane holds of a row, and chunks of 16 bytes in one
    static constexpr int lanes = 3 * words;  // that copy: of two sequences' queries, keys and values two chunks each
    static_assert(sequences == 2 && lanes <= 32);
    static constexpr int pitch = 2 * D;
    static constexpr int tensor_bytes = kTiles * kTile * pitch;  // queries, keys or values of a sequence
    static constexpr int stage_bytes = 3 * sequences * tensor_bytes;
    static_assert(tensor_bytes % 128 == 0 && kTile * pitch % 128 == 0, "as the copy engine wants its boxes");
    static constexpr int shared_bytes = 2 * stage_bytes + 2 * 4 * D + 2 * 8;  // then weights of norms, and barriers
};

__device__ __forceinline__ void store_box(const CUtensorMap& map, uint32_t source, int head, int token, int frame,
                                          int batch) {
    asm volatile(
        "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4, %5}], [%6];\n"
        "cp.async.bulk.commit_group;" ::"l"(&map),
        "r"(0), "r"(head), "r"(token), "r"(frame), "r"(batch), "r"(source)
        : "memory");
}

__device__ __forceinline__ void copy_16(uint32_t target, const void* source) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
}

// 16 rows as 2 x kWords matrices of 8 x 8: x[r][w] is columns 8w + 2c, 8w + 2c + 1 of row g + 8r, or, transposed, rows
// 2c + 8r, 2c + 8r + 1 of column 8w + g. `address`: of this lane's row (lane % 16) and chunk of 16 bytes (lane / 16).
template <int kWords, bool kTransposed>
__device__ __forceinline__ void load_tile(uint32_t (&x)[2][kWords], uint32_t address) {
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2) {
        if constexpr (kTransposed) {
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(x[0][w]), "=r"(x[1][w]), "=r"(x[0][w + 1]), "=r"(x[1][w + 1])
                         : "r"(address + 16 * w)
                         : "memory");
        } else {
            asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                         : "=r"(x[0][w]), "=r"(x[1][w]), "=r"(x[0][w + 1]), "=r"(x[1][w + 1])
                         : "r"(address + 16 * w)
                         : "memory");
        }
    }
    constexpr int last = kWords - 1;
    if constexpr (kWords % 2 && kTransposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(x[0][last]), "=r"(x[1][last])
                     : "r"(address + 16 * last)
                     : "memory");
    } else if constexpr (kWords % 2) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(x[0][last]), "=r"(x[1][last])
                     : "r"(address + 16 * last)
                     : "memory");
    }
}

// The counterpart.
template <int kWords>
__device__ __forceinline__ void store_tile(const uint32_t (&x)[2][kWords], uint32_t address) {
#pragma unroll
    for (int w = 0; w + 1 < kWords; w += 2) {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address + 16 * w),
                     "r"(x[0][w]), "r"(x[1][w]), "r"(x[0][w + 1]), "r"(x[1][w + 1])
                     : "memory");
    }
    if constexpr (kWords % 2) {
        constexpr int last = kWords - 1;
        asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};" ::"r"(address + 16 * last),
                     "r"(x[0][last]), "r"(x[1][last])
                     : "memory");
    }
}

// Rotary table of rows g and g + 8 at this lane's pairs.
template <int D>
struct Rotation {
    float cos[2][D / 8], sin[2][D / 8];
};

// RMSNorm and RoPE of rows g and g + 8, in float32 and rounded once. `weights`: address of this lane's first two.
template <typename Elem, int D, Prepare kPrepare>
__device__ __forceinline__ void prepare_rows(uint32_t (&x)[2][D / 8], const Rotation<D>& rotation, uint32_t weights,
                                             bool norm, float eps, int g) {
    float inverse[2] = {1.f, 1.f};
    if (norm) inverse_rms<Elem, D>(inverse, x, eps, g);
#pragma unroll
    for (int w = 0; w < D / 8; ++w) {
        const float2 weight = load_shared<float2>(weights + 32 * w);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 pair = unpack<Elem>(x[r][w]);
            const float even = pair.x * (inverse[r] * weight.x), odd = pair.y * (inverse[r] * weight.y);
            if constexpr (kPrepare == Prepare::rope) {
                const float cos = rotation.cos[r][w], sin = rotation.sin[r][w];
                x[r][w] = pack<Elem>(even * cos - odd * sin, odd * cos + even * sin);
            } else {
                x[r][w] = pack<Elem>(even, odd);
            }
        }
    }
}

struct SequencePlace {
    int batch, token, head;
};

// Block (32 lanes, tiles, sequences), as many of them as the GPU holds at once. `scale_log2` is positive.
template <typename Elem, int D, int kTiles, Prepare kPrepare>
__global__ void __launch_bounds__(32 * StreamedPlan<D, kTiles>::warps, StreamedPlan<D, kTiles>::blocks)
    temporal_sm90_kernel(const __grid_constant__ CUtensorMap out_map, const TemporalAttentionParams p,
                         float scale_log2) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
    using P = StreamedPlan<D, kTiles>;
    extern __shared__ __align__(1024) uint8_t staged[];
    const int lane = threadIdx.x, g = lane / 4, c = lane % 4, first = kTile * threadIdx.y, z = threadIdx.z;
    const uint32_t start = shared_address(staged), weights = start + 2 * P::stage_bytes, full = weights + 8 * D;
    const int thread = lane + 32 * (threadIdx.y + kTiles * z), threads = 32 * P::warps;

    if (thread == 0) {
        barrier_init(full, threads);
        barrier_init(full + 8, threads);
        barrier_init_fence();
    }
    for (int i = thread; i < 2 * P::stage_bytes / 16; i += threads) {  // for the frames beyond T
        store_shared(start + 16 * i, make_float4(0.f, 0.f, 0.f, 0.f));
    }
    if constexpr (kPrepare != Prepare::nothing) {
        for (int i = thread; i < 2 * D; i += threads) {
            const void* from = i < D ? p.q_weight : p.k_weight;
            const float w = from == nullptr ? 1.f : static_cast<float>(static_cast<const Elem*>(from)[i % D]);
            store_shared(weights + 4 * i, __float_as_uint(w));
        }
    }
    Rotation<D> rotation;
    if constexpr (kPrepare == Prepare::rope) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int at = min(first + g + 8 * r, p.frames - 1) * (D / 2) + c;
#pragma unroll
            for (int w = 0; w < D / 8; ++w)
                rotation.cos[r][w] = p.cos[at + 4 * w], rotation.sin[r][w] = p.sin[at + 4 * w];
        }
    }
    __syncthreads();

    // From a sequence to one `heads` and `tokens` further, without a division.
    const auto advance = [&](SequencePlace& at, int tokens, int heads) {
        at.head += heads, at.token += tokens;
        if (at.head >= p.heads) at.head -= p.heads, ++at.token;
        while (at.token >= p.tokens) at.token -= p.tokens, ++at.batch;
    };
    const int begin = blockIdx.x * P::sequences;
    SequencePlace here{begin / p.heads / p.tokens, begin / p.heads % p.tokens, begin % p.heads};  // of the first one
    const int step = gridDim.x * P::sequences, step_tokens = step / p.heads, step_heads = step % p.heads;
    // A warp copies half of its tile's frames of both sequences, a lane two chunks of 16 bytes of each frame: of
    // queries, keys or values. Rows of neighbouring heads are one piece then: by itself each shares a sector of 32
    // bytes with its neighbour, which would be fetched twice.
    const int copied = first + kTile / 2 * z, count = min(kTile / 2, p.frames - copied);
    const int64_t stride_t = sizeof(Elem) * p.stride_t;
    bool second[2];
    const char* lane_source[2];
    uint32_t lane_target[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int chunk = lane + i * P::lanes, tensor = chunk / (2 * P::words), word = chunk % P::words;
        second[i] = chunk / P::words % 2;
        lane_source[i] =
            static_cast<const char*>(p.qkv) + sizeof(Elem) * tensor * p.stride_qkv + 16 * word + copied * stride_t;
        lane_target[i] = start + (3 * second[i] + tensor) * P::tensor_bytes + copied * P::pitch + 16 * word;
    }
    const auto bring = [&](const SequencePlace& at, int s) {
        SequencePlace next = at;
        advance(next, 0, 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const SequencePlace place = second[i] ? next : at;
            if (place.batch >= p.batch || lane >= P::lanes) continue;
            const char* from = lane_source[i] + sizeof(Elem) * (place.batch * p.stride_b + place.token * p.stride_s +
                                                                place.head * p.stride_h);
            const uint32_t to = lane_target[i] + s * P::stage_bytes;
#pragma unroll
            for (int t = 0; t < kTile / 2; ++t, from += stride_t) {
                if (t < count) copy_16(to + t * P::pitch, from);
            }
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(full + 8 * s) : "memory");
    };
    bring(here, 0);

    const uint32_t row = (lane % 16) * P::pitch + lane / 16 * 16;  // for load_tile
    const int64_t sequences = static_cast<int64_t>(p.batch) * p.tokens * p.heads;
    uint32_t stage = 0, phase = 0;
    for (int64_t index = blockIdx.x * P::sequences; index < sequences; index += step) {
        const uint32_t base = start + stage * P::stage_bytes + 3 * z * P::tensor_bytes + row;
        const uint32_t own = base + first * P::pitch;
        barrier_wait(full + 8 * stage, phase);

        uint32_t q[2][P::words];
        if constexpr (kPrepare != Prepare::nothing) {
            uint32_t k[2][P::words];
            load_tile<P::words, false>(k, own + P::tensor_bytes);
            prepare_rows<Elem, D, kPrepare>(k, rotation, weights + 4 * D + 8 * c, p.k_weight != nullptr, p.eps, g);
            store_tile<P::words>(k, own + P::tensor_bytes);
        }
        load_tile<P::words, false>(q, own);
        if constexpr (kPrepare != Prepare::nothing) {
            prepare_rows<Elem, D, kPrepare>(q, rotation, weights + 8 * c, p.q_weight != nullptr, p.eps, g);
        }
        if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        __syncthreads();  // keys are prepared; of the other stage, all is read and stored
        SequencePlace current = here;
        if (z > 0) advance(current, 0, 1);
        advance(here, step_tokens, step_heads);
        bring(here, stage ^ 1);

        float scores[kTiles][2][4];
        float max[2] = {-INFINITY, -INFINITY}, sum[2] = {};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            uint32_t k[2][P::words];
            load_tile<P::words, false>(k, base + P::tensor_bytes + n * kTile * P::pitch);
#pragma unroll
            for (int i = 0; i < 8; ++i) scores[n][i / 4][i % 4] = 0.f;
            multiply_rows<Elem, D>(scores[n], q, k);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float& s = scores[n][i / 4][i % 4];
                if (n == kTiles - 1 && n * kTile + 8 * (i / 4) + 2 * c + i % 2 >= p.frames) s = -INFINITY;
                max[i / 2 % 2] = fmaxf(max[i / 2 % 2], s);
            }
        }
        max[0] = quad_max(max[0]) * scale_log2, max[1] = quad_max(max[1]) * scale_log2;

        float out[P::words][4] = {};
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
            uint32_t v[2][P::words], a[4];
            load_tile<P::words, true>(v, base + 2 * P::tensor_bytes + n * kTile * P::pitch);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float(&s)[4] = scores[n][i / 2];
                const float even = exp2_approx(fmaf(s[i % 2 * 2], scale_log2, -max[i % 2]));
                const float odd = exp2_approx(fmaf(s[i % 2 * 2 + 1], scale_log2, -max[i % 2]));
                sum[i % 2] += even + odd;
                a[i] = pack<Elem>(even, odd);
            }
#pragma unroll
            for (int w = 0; w < P::words; ++w) mma_k16<Elem>(out[w], a[0], a[1], a[2], a[3], v[0][w], v[1][w]);
        }

        // Between 1 and T.
        const float inverse[2] = {__fdividef(1.f, quad_sum(sum[0])), __fdividef(1.f, quad_sum(sum[1]))};
#pragma unroll
        for (int w = 0; w < P::words; ++w) {
            q[0][w] = pack<Elem>(out[w][0] * inverse[0], out[w][1] * inverse[0]);
            q[1][w] = pack<Elem>(out[w][2] * inverse[1], out[w][3] * inverse[1]);
        }
        store_tile<P::words>(q, own);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncwarp();
        if (lane == 0 && current.batch < p.batch) {
            store_box(out_map, own, current.head, current.token, first, current.batch);
        }
        stage ^= 1;
        phase ^= stage == 0;
    }
    if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
#else
    __trap();  // code for another architecture; the launch checks that it is not asked for
#endif
}

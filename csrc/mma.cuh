// Warp-level primitives of sm_80 and newer, for bf16 and fp16: the matrix products, the 8x8 transpose, exp2.
//
// In every fragment below lane = 4 * g + c, with g in 0..7 and c in 0..3. A 32-bit word is a pair of elements.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

template <typename Elem>
__device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (std::is_same_v<Elem, __nv_bfloat16>) {
        return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
    } else {
        return __half22float2(*reinterpret_cast<const __half2*>(&word));
    }
}

template <typename Elem>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<Elem, __nv_bfloat16>) {
        const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    } else {
        const __half2 pair = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&pair);
    }
}

// Four values in e4m3, the first in the lowest byte. Not below sm_89.
__device__ __forceinline__ uint32_t pack_e4m3(float a, float b, float c, float d) {
#if __CUDA_ARCH__ >= 890
    uint16_t low, high;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(b), "f"(a));
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(d), "f"(c));
    return static_cast<uint32_t>(high) << 16 | low;
#else
    __trap();  // the table of backends does not ask for it
    return 0;
#endif
}

// d[16, 8] += a[16, 16] @ b[16, 8]. This lane holds
//   a: rows g and g + 8 of columns (2c, 2c + 1), then of columns (2c + 8, 2c + 9)
//   b: rows (2c, 2c + 1), then rows (2c + 8, 2c + 9), of column g
//   d: row g of columns 2c, 2c + 1, then row g + 8 of the same
template <typename Elem>
__device__ __forceinline__ void mma_k16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
    if constexpr (std::is_same_v<Elem, __nv_bfloat16>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
}

// d[16, 8] += a[16, 8] @ b[8, 8]: the first halves of the fragments above.
template <typename Elem>
__device__ __forceinline__ void mma_k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    if constexpr (std::is_same_v<Elem, __nv_bfloat16>) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    } else {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    }
}

// An 8x8 matrix of which this lane holds (row g, columns 2c, 2c + 1) becomes (rows 2c, 2c + 1, column g).
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t word) {
    uint32_t transposed;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(word));
    return transposed;
}

__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Over the four lanes of equal g.
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}

// The words of four lanes of equal g as a 4x4 matrix, a row a lane, transposed: lane c gets word c of each.
__device__ __forceinline__ void transpose_quad(uint32_t& w0, uint32_t& w1, uint32_t& w2, uint32_t& w3) {
    const auto exchange = [](uint32_t& low, uint32_t& high, int distance) {
        const bool upper = threadIdx.x & distance;
        const uint32_t other = __shfl_xor_sync(0xffffffffu, upper ? low : high, distance);
        low = upper ? other : low;
        high = upper ? high : other;
    };
    exchange(w0, w1, 1);
    exchange(w2, w3, 1);
    exchange(w0, w2, 2);
    exchange(w1, w3, 2);
}

// A row of attention's result on its way out of wgmma's registers: in 16 bits, or in e4m3.
//
// Lane 4g + c holds columns 2c and 2c + 1 of every 8 columns. Four lanes transpose what they hold, so that each stores
// neighbouring columns: 8 of them, or in e4m3 twice 8 (a head of 72 bytes begins on a multiple of 8 only). Of head_dim
// 72 the last 8 columns are left over: each lane stores its two.
#pragma once

#include "mma.cuh"

// Rows g (r = 0) and g + 8 (r = 1) of sums [16, D], times `factor`. In e4m3 two words of 16 bits share one of `row`.
template <typename Elem, int D>
__device__ __forceinline__ void pack_row(uint32_t (&row)[D / 8], const float (&sums)[D / 2], int r, float factor) {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
        row[i] = pack<Elem>(sums[4 * i + 2 * r] * factor, sums[4 * i + 2 * r + 1] * factor);
    }
}

// Of every 64 columns, word i has those of tile i below, and those of tile i + 4 above.
template <int D>
__device__ __forceinline__ void pack_row_e4m3(uint32_t (&row)[D / 8], const float (&sums)[D / 2], int r, float factor) {
    const auto value = [&](int tile, int i) { return tile < D / 8 ? sums[4 * tile + 2 * r + i] * factor : 0.f; };
#pragma unroll
    for (int tile = 0; tile < D / 8; ++tile) {
        if (tile % 8 >= 4) continue;
        row[tile / 8 * 4 + tile % 4] =
            pack_e4m3(value(tile, 0), value(tile, 1), value(tile + 4, 0), value(tile + 4, 1));
    }
}

// To `target`, where lanes have a row (`inside`); all lanes take part.
template <typename Elem, int D>
__device__ __forceinline__ void store_packed(Elem* target, uint32_t (&row)[D / 8], bool inside, int c) {
#pragma unroll
    for (int i = 0; i + 4 <= D / 8; i += 4) {
        uint32_t* w = row + i;
        transpose_quad(w[0], w[1], w[2], w[3]);
        if (inside) *reinterpret_cast<uint4*>(target + 8 * (i + c)) = make_uint4(w[0], w[1], w[2], w[3]);
    }
    if (D % 32 != 0 && inside) *reinterpret_cast<uint32_t*>(target + D - 8 + 2 * c) = row[D / 8 - 1];
}

template <int D>
__device__ __forceinline__ void store_packed_e4m3(uint8_t* target, uint32_t (&row)[D / 8], bool inside, int c) {
#pragma unroll
    for (int i = 0; i + 4 <= D / 8; i += 8) {
        uint32_t* w = row + i / 2;
        transpose_quad(w[0], w[1], w[2], w[3]);
        const auto tile = [&](unsigned half) {
            return make_uint2(__byte_perm(w[0], w[1], half), __byte_perm(w[2], w[3], half));
        };
        if (inside) *reinterpret_cast<uint2*>(target + 8 * (i + c)) = tile(0x5410);
        if (i + 8 <= D / 8 && inside) *reinterpret_cast<uint2*>(target + 8 * (i + 4 + c)) = tile(0x7632);
    }
    if (D % 32 != 0 && inside) {
        *reinterpret_cast<uint16_t*>(target + D - 8 + 2 * c) = static_cast<uint16_t>(row[D / 64 * 4]);
    }
}

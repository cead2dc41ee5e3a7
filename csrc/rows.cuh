// How a warp holds 16 rows of D elements, so that it can load them 16 bytes a lane and multiply them without a shuffle.
//
// Two freedoms make 16-byte loads fit the mma fragments of mma.cuh:
//   - QK^T sums over D, so D may be taken in any order that q and k share. Lane (g, c) takes, of each 32 columns, the
//     8 contiguous ones at 8c, and these serve as two k16 steps.
//   - The columns of V may be dealt to the n8 tiles of PV in any order that the stores undo. Of each 64 columns, lane
//     (g, c) reads 8 contiguous ones in rows 2c, 2c + 1, 2c + 8, 2c + 9, one column for each of 8 tiles. It ends up
//     with 8 contiguous outputs, and a store instruction of the warp writes 64 contiguous bytes a row.
// head_dim 72 leaves 8 columns over: a k8 step, and one tile of V that is transposed in registers.
#pragma once

#include "mma.cuh"

// Which columns of a row this lane holds, in units of 32-bit words: D / 8 words, by chunks of 4 and then the tail.
template <int D>
struct Row {
    static_assert(D % 32 == 0 || D % 32 == 8, "one tail of 8 columns at most");
    static constexpr int chunks = D / 32;
    static constexpr bool tail = D % 32 != 0;
    static constexpr int words = D / 8;
};

// How the columns of V are dealt to n8 tiles: 8 tiles from each 64 columns, 4 from 32 more, 1 from the tail.
template <int D>
struct Columns {
    static constexpr int wide = D / 64;
    static constexpr bool half = D % 64 >= 32;
    static constexpr bool tail = D % 32 != 0;
    static constexpr int tiles = D / 8;
};

// An ordinary load, not __ldg: those the compiler moves down to their first use, past the branches of `prepare`, and a
// warp would wait for memory three times over.
template <typename Vector>
__device__ __forceinline__ Vector load(const void* address) {
    return *static_cast<const Vector*>(address);
}

// One row of q or k, from its address in bytes.
template <int D>
__device__ __forceinline__ void load_row(uint32_t (&words)[Row<D>::words], const char* row, int c) {
#pragma unroll
    for (int i = 0; i < Row<D>::chunks; ++i) {
        const uint4 x = load<uint4>(row + 64 * i + 16 * c);
        words[4 * i] = x.x, words[4 * i + 1] = x.y, words[4 * i + 2] = x.z, words[4 * i + 3] = x.w;
    }
    if constexpr (Row<D>::tail) words[Row<D>::words - 1] = load<uint32_t>(row + 2 * D - 16 + 4 * c);
}

// This lane's part of 16 rows of V, as loaded: four rows of 8 (or 4) columns, and rows g and g + 8 of the tail.
template <int D>
struct ValueRows {
    uint4 wide[Columns<D>::wide][4];
    uint2 half[4];
    uint32_t tail[2];
};

// `row_at(t)` is the address of row t.
template <int D, typename RowAt>
__device__ __forceinline__ void load_values(ValueRows<D>& v, RowAt row_at, int g, int c) {
    using Cols = Columns<D>;
    const int wide_chunk = g / 2 + 4 * (g % 2);  // so that the outputs of one store are neighbours
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const char* row = row_at(2 * c + i % 2 + 8 * (i / 2));
#pragma unroll
        for (int j = 0; j < Cols::wide; ++j) v.wide[j][i] = load<uint4>(row + 128 * j + 16 * wide_chunk);
        if constexpr (Cols::half) v.half[i] = load<uint2>(row + 128 * Cols::wide + 8 * g);
    }
    if constexpr (Cols::tail) {
#pragma unroll
        for (int i = 0; i < 2; ++i) v.tail[i] = load<uint32_t>(row_at(g + 8 * i) + 2 * D - 16 + 4 * c);
    }
}

// Two tiles' worth of B fragments out of one word (two columns) in each of four rows.
__device__ __forceinline__ void zip_rows(uint32_t* fragments, uint32_t r0, uint32_t r1, uint32_t r2, uint32_t r3) {
    fragments[0] = __byte_perm(r0, r1, 0x5410);
    fragments[1] = __byte_perm(r2, r3, 0x5410);
    fragments[2] = __byte_perm(r0, r1, 0x7632);
    fragments[3] = __byte_perm(r2, r3, 0x7632);
}

template <int D>
__device__ __forceinline__ void value_fragments(uint32_t* fragments, const ValueRows<D>& v) {
    using Cols = Columns<D>;
#pragma unroll
    for (int j = 0; j < Cols::wide; ++j) {
        const uint4(&r)[4] = v.wide[j];
        zip_rows(fragments + 16 * j, r[0].x, r[1].x, r[2].x, r[3].x);
        zip_rows(fragments + 16 * j + 4, r[0].y, r[1].y, r[2].y, r[3].y);
        zip_rows(fragments + 16 * j + 8, r[0].z, r[1].z, r[2].z, r[3].z);
        zip_rows(fragments + 16 * j + 12, r[0].w, r[1].w, r[2].w, r[3].w);
    }
    if constexpr (Cols::half) {
        zip_rows(fragments + 16 * Cols::wide, v.half[0].x, v.half[1].x, v.half[2].x, v.half[3].x);
        zip_rows(fragments + 16 * Cols::wide + 4, v.half[0].y, v.half[1].y, v.half[2].y, v.half[3].y);
    }
    if constexpr (Cols::tail) {
        fragments[2 * Cols::tiles - 2] = transpose_8x8(v.tail[0]);
        fragments[2 * Cols::tiles - 1] = transpose_8x8(v.tail[1]);
    }
}

// d[n] += a[16, D] @ b[n][8, D]^T for the two groups of 8 rows of b.
template <typename Elem, int D>
__device__ __forceinline__ void multiply_rows(float (&d)[2][4], const uint32_t (&a)[2][Row<D>::words],
                                              const uint32_t (&b)[2][Row<D>::words]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int w = 0; w + 1 < Row<D>::words; w += 2) {
            mma_k16<Elem>(d[n], a[0][w], a[1][w], a[0][w + 1], a[1][w + 1], b[n][w], b[n][w + 1]);
        }
        if constexpr (Row<D>::tail) {
            constexpr int last = Row<D>::words - 1;
            mma_k8<Elem>(d[n], a[0][last], a[1][last], b[n][last]);
        }
    }
}

// Row g + 8 * r of the outputs, undoing the order in which V's columns were dealt.
template <typename Elem, int D>
__device__ __forceinline__ void store_row(Elem* row, const float (&out)[Columns<D>::tiles][4], int r, float inverse,
                                          int c) {
    using Cols = Columns<D>;
    // Two n8 tiles' values of this lane in matrix column 2c + e.
    const auto pair = [&](int tile, int e) {
        return pack<Elem>(out[tile][2 * r + e] * inverse, out[tile + 1][2 * r + e] * inverse);
    };
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int j = 0; j < Cols::wide; ++j) {
            *reinterpret_cast<uint4*>(row + 64 * j + 32 * e + 8 * c) =
                make_uint4(pair(8 * j, e), pair(8 * j + 2, e), pair(8 * j + 4, e), pair(8 * j + 6, e));
        }
    }
    if constexpr (Cols::half) {
        constexpr int tile = 8 * Cols::wide;
        *reinterpret_cast<uint4*>(row + 64 * Cols::wide + 8 * c) =
            make_uint4(pair(tile, 0), pair(tile + 2, 0), pair(tile, 1), pair(tile + 2, 1));
    }
    if constexpr (Cols::tail) {
        const float* x = out[Cols::tiles - 1] + 2 * r;
        *reinterpret_cast<uint32_t*>(row + D - 8 + 2 * c) = pack<Elem>(x[0] * inverse, x[1] * inverse);
    }
}

// The same in e4m3, 8 bytes a lane and store.
template <int D>
__device__ __forceinline__ void store_row_e4m3(uint8_t* row, const float (&out)[Columns<D>::tiles][4], int r,
                                               float inverse, int c) {
    using Cols = Columns<D>;
    // Columns 2c + e of four tiles, of which two follow `first` and two `second`.
    const auto four = [&](int first, int second, int e, int f) {
        return pack_e4m3(out[first][2 * r + e] * inverse, out[first + 1][2 * r + e] * inverse,
                         out[second][2 * r + f] * inverse, out[second + 1][2 * r + f] * inverse);
    };
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int j = 0; j < 8 * Cols::wide; j += 8) {
            *reinterpret_cast<uint2*>(row + 8 * j + 32 * e + 8 * c) =
                make_uint2(four(j, j + 2, e, e), four(j + 4, j + 6, e, e));
        }
    }
    if constexpr (Cols::half) {
        constexpr int tile = 8 * Cols::wide;
        *reinterpret_cast<uint2*>(row + 64 * Cols::wide + 8 * c) =
            make_uint2(four(tile, tile + 2, 0, 0), four(tile, tile + 2, 1, 1));
    }
    if constexpr (Cols::tail) {
        const float* x = out[Cols::tiles - 1] + 2 * r;
        *reinterpret_cast<uint16_t*>(row + D - 8 + 2 * c) =
            static_cast<uint16_t>(pack_e4m3(x[0] * inverse, x[1] * inverse, 0.f, 0.f));
    }
}

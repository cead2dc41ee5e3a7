// wgmma of sm_90a: a warpgroup's asynchronous product d[64, N] (+)= a[64, K] @ b[K, N], a in registers and sums in
// float32, but for `wgmma_half`. K is 16 for elements of 16 bits and 32 for those of 8.
//
// Fragments: warp w of the warpgroup has rows 16w to 16w + 15. With lane = 4 * g + c, it holds of d, for each 8
// columns, row g of columns 2c, 2c + 1, then row g + 8 of the same; and of a what mma_k16 (mma.cuh) takes, or of 8 bits
// four columns where that takes two. b lies in shared memory, in boxes as the copy engine writes them: rows of `kPitch`
// bytes (32, 64 or 128), swizzled over as many bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

// Before the first product, and again when registers that a product takes have been written.
__device__ __forceinline__ void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until all committed products but the last `kPending` are done.
template <int kPending = 0>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving its own uses of these registers across.
template <int kCount, typename Word>
__device__ __forceinline__ void pin_registers(Word (&registers)[kCount]) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        if constexpr (std::is_same_v<Word, float>) {
            asm volatile("" : "+f"(registers[i])::"memory");
        } else {
            asm volatile("" : "+r"(registers[i])::"memory");
        }
    }
}

// The descriptor of b, in the two words that it consists of. Lengths in units of 16 bytes; the layout code is 1, 2, 3
// for a swizzle over 128, 64, 32 bytes. A step of k adds to the low word only: one instruction, where a warpgroup that
// computed each descriptor from an address would feed the tensor cores too slowly.
struct Matrix {
    uint32_t low, high;
    __device__ __forceinline__ uint64_t at(uint32_t bytes) const {
        return static_cast<uint64_t>(high) << 32 | (low + bytes / 16);
    }
};

// b at `address`, from a multiple of 8 rows on. `next_box` is how far the box of the next columns lies, where b is
// transposed and wider than one box.
template <int kPitch>
__device__ __forceinline__ Matrix matrix(uint32_t address, uint32_t next_box = 16) {
    constexpr uint32_t layout = kPitch == 128 ? 1 : kPitch == 64 ? 2 : 3;
    constexpr uint32_t eight_rows = 8 * kPitch / 16;
    return {next_box / 16 << 16 | address / 16, layout << 30 | eight_rows};
}

// The registers of d, as PTX names them and as operands of asm.
#define PAB_PTX_32                                                                                                   \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
    "%24, %25, %26, %27, %28, %29, %30, %31"
#define PAB_PTX_36 PAB_PTX_32 ", %32, %33, %34, %35"
#define PAB_PTX_48 PAB_PTX_36 ", %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define PAB_PTX_64 PAB_PTX_48 ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PAB_D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PAB_D16(i) PAB_D4(i), PAB_D4(i + 4), PAB_D4(i + 8), PAB_D4(i + 12)
#define PAB_D_32 PAB_D16(0), PAB_D16(16)
#define PAB_D_36 PAB_D_32, PAB_D4(32)
#define PAB_D_48 PAB_D_32, PAB_D16(32)
#define PAB_D_64 PAB_D_48, PAB_D16(48)

#define PAB_WGMMA_TYPED(n, k, type, D, A, B, P, flags, ...)                                                  \
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " P                                                       \
                 ", 0;\n"                                                                                    \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k" #k ".f32." type "." type " {" D "}, {" A "}, " B \
                 ", p, 1, 1" flags ";\n}"                                                                    \
                 : __VA_ARGS__                                                                               \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate), "n"(kTransposed))
#define PAB_WGMMA(n, D, A, B, P, T, ...)                                 \
    if constexpr (N == n && std::is_same_v<Elem, __nv_bfloat16>) {       \
        PAB_WGMMA_TYPED(n, 16, "bf16", D, A, B, P, ", " T, __VA_ARGS__); \
    } else if constexpr (N == n && std::is_same_v<Elem, __half>) {       \
        PAB_WGMMA_TYPED(n, 16, "f16", D, A, B, P, ", " T, __VA_ARGS__);  \
    } else if constexpr (N == n) {                                       \
        PAB_WGMMA_TYPED(n, 32, "e4m3", D, A, B, P, "", __VA_ARGS__);     \
    }

// d[64, 128] (+)= a[64, 32] @ b[32, 128] in e4m3 with both in shared memory, where a lies as b does. Sums are in
// float16, two of a row in a register.
#define PAB_H4(i) "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3])
__device__ __forceinline__ void wgmma_half(uint32_t (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile(
        "{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k32.f16.e4m3.e4m3 {" PAB_PTX_32 "}, %32, %33, p, 1, 1;\n}"
        : PAB_H4(0), PAB_H4(4), PAB_H4(8), PAB_H4(12), PAB_H4(16), PAB_H4(20), PAB_H4(24), PAB_H4(28)
        : "l"(a), "l"(b), "r"(accumulate));
}
#undef PAB_H4

// b is [N, K] in shared memory, or [K, N] where it is transposed, which only 16 bits can be. d is overwritten where
// `accumulate` is 0.
template <typename Elem, int N, int kTransposed>
__device__ __forceinline__ void wgmma(float (&d)[N / 2], const uint32_t (&a)[4], uint64_t b, int accumulate) {
    // clang-format off
    PAB_WGMMA(64, PAB_PTX_32, "%32, %33, %34, %35", "%36", "%37", "%38", PAB_D_32)
    PAB_WGMMA(72, PAB_PTX_36, "%36, %37, %38, %39", "%40", "%41", "%42", PAB_D_36)
    PAB_WGMMA(96, PAB_PTX_48, "%48, %49, %50, %51", "%52", "%53", "%54", PAB_D_48)
    PAB_WGMMA(128, PAB_PTX_64, "%64, %65, %66, %67", "%68", "%69", "%70", PAB_D_64)
    // clang-format on
}

#undef PAB_WGMMA
#undef PAB_WGMMA_TYPED
#undef PAB_PTX_32
#undef PAB_D_32
#undef PAB_PTX_36
#undef PAB_D_36
#undef PAB_PTX_48
#undef PAB_D_48
#undef PAB_PTX_64
#undef PAB_D_64
#undef PAB_D16
#undef PAB_D4

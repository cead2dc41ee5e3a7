// Softmax of attention on Hopper, on scores laid out as wgmma leaves them.
#pragma once

#include <cmath>

#include "hopper.cuh"
#include "mma.cuh"

// Of the rows g and g + 8 that a lane has a part of.
struct Softmax {
    float offset[2] = {-INFINITY, -INFINITY};  // taken off every exponent of the row
    float norm[2][2] = {};                     // this lane's share of the sum of weights, in two parts
};

// Of normed keys: their factors lie at `factors`.
template <int N>
__device__ __forceinline__ void multiply_factors(float (&scores)[N / 2], uint32_t factors) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        const float2 by = load_shared<float2>(factors + 8 * (i + threadIdx.x % 4));
        scores[i] *= by.x, scores[i + 1] *= by.y;
        scores[i + 2] *= by.x, scores[i + 3] *= by.y;
    }
}

// Scores to exponents of the weights, in place, with an offset that follows the largest score: it is up to `slack`
// less. `decay` is what the sums so far are to be multiplied by.
template <int N>
__device__ __forceinline__ void follow_scores(float (&scores)[N / 2], Softmax& softmax, float (&decay)[2],
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

// The same with the offset that there is: a sixth of the softmax's instructions less, and nothing to wait for.
template <int N>
__device__ __forceinline__ void shift_scores(float (&scores)[N / 2], const Softmax& softmax, float scale) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) scores[i] = fmaf(scores[i], scale, -softmax.offset[i / 2 % 2]);
}

// Of normed keys, whose queries have the scale.
template <int N>
__device__ __forceinline__ void shift_normed(float (&scores)[N / 2], const Softmax& softmax, uint32_t factors) {
#pragma unroll
    for (int i = 0; i < N / 2; i += 4) {
        const float2 by = load_shared<float2>(factors + 8 * (i + threadIdx.x % 4));
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            scores[i + 2 * r] = fmaf(scores[i + 2 * r], by.x, -softmax.offset[r]);
            scores[i + 2 * r + 1] = fmaf(scores[i + 2 * r + 1], by.y, -softmax.offset[r]);
        }
    }
}

// Keys from `valid` on do not count.
template <int N>
__device__ __forceinline__ void mask_scores(float (&scores)[N / 2], int valid) {
    const int column = 2 * (threadIdx.x % 4);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        if (column + i / 4 * 8 + i % 2 >= valid) scores[i] = -INFINITY;
    }
}

// Exponents to weights in float32, in place.
template <int N>
__device__ __forceinline__ void exponentiate(float (&scores)[N / 2], Softmax& softmax) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
        scores[i] = exp2_approx(scores[i]);
        softmax.norm[i / 2 % 2][i % 2] += scores[i];
    }
}

// Weights in 16 bits, as the left side of the second product.
template <typename Elem, int N>
__device__ __forceinline__ void round_weights(const float (&scores)[N / 2], uint32_t (&weights)[N / 16][4]) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) weights[i / 4][i % 4] = pack<Elem>(scores[2 * i], scores[2 * i + 1]);
}

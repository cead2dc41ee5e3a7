// The host's view of temporal attention: what the binding fills in and calls.
#pragma once

#include <cstdint>
#include <string>

// Strides count elements; the last dimension of qkv [B, T, S, 3, H, D] has stride 1.
struct TemporalAttentionParams {
    const void* qkv;
    int64_t stride_b, stride_t, stride_s, stride_qkv, stride_h;
    int batch, frames, tokens, heads, head_dim;
    const void* q_weight;  // RMSNorm weights [D], or nullptr
    const void* k_weight;
    const float* cos;  // RoPE tables [T, D / 2], or nullptr
    const float* sin;
    float eps;
    float softmax_scale;
    void* out;  // [B, T, S, H * D], contiguous
    // [B, T, S], alike for all frames of (b, s): then `out` is in e4m3, times that. Or nullptr: in the dtype of qkv.
    const float* out_scale;
};

// Throws std::invalid_argument that names the argument, or std::runtime_error when the launch fails.
void temporal_attention(const TemporalAttentionParams& params, const std::string& dtype, int device, void* stream);

// The host's view of attention on Hopper: what the binding fills in and calls.
#pragma once

#include <cstdint>
#include <string>

// A tensor [B, tokens, H, D]: strides count elements, that of the last dimension is 1.
struct AttentionOperand {
    const void* data;
    int64_t stride_b, stride_n, stride_h;
};

struct AttentionParams {
    AttentionOperand q, k, v;
    int batch, queries, keys, heads, head_dim;
    const int* kv_len;  // [B] on the device: keys that count; or nullptr
    float softmax_scale;
    // RMSNorm of queries and keys: weights [head_dim] in the dtype of q, and 1 / rms of each key, float32 [batch,
    // heads, key_scales_pitch]. All or none, and none together with rotary embedding.
    const void *q_weight, *k_weight;
    const float* key_scales;
    int key_scales_pitch;
    float eps;               // of the RMSNorm
    const float *cos, *sin;  // [queries, head_dim / 2], rotary embedding of the queries; or nullptr
    int pair_stride;         // distance of its pairs
    void* out;               // [B, queries, H * D], contiguous
    // [B, queries], one value for all of b: then `out` is in e4m3, times that. Or nullptr: `out` in the dtype of q.
    const float* out_scale;
};

// Throws std::invalid_argument that names the argument, or std::runtime_error when the launch fails.
void attention(const AttentionParams& params, const std::string& dtype, int device, void* stream);

// Self-attention on rows in e4m3, as triton_ops/quantize_qkv.py writes them; all contiguous.
struct Fp8AttentionParams {
    const void *q, *k;      // [batch, tokens, heads, columns], zeros from column head_dim on
    const void* v;          // [batch, heads, head_dim, pitch]: transposed, the tokens of every 16 in another order
    const float* q_scale;   // [batch, heads, tokens]
    const float* k_scale;   // [batch, heads, steps] of 128 tokens
    const float* v_scale;   // [batch, heads, blocks] of `block` tokens
    const float* v_center;  // [batch, heads, head_dim], added to the result
    int batch, tokens, heads, head_dim;
    int columns, pitch;
    int block;  // 128 times a power of two
    float softmax_scale;
    void* out;  // [batch, tokens, heads * head_dim], contiguous
};

// As `attention`; `dtype` is that of `out`.
void fp8_attention(const Fp8AttentionParams& params, const std::string& dtype, int device, void* stream);

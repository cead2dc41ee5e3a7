// The host's view of the copy of strided rows: what the binding fills in and calls.
#pragma once

#include <cstdint>

// `blocks` times `rows` rows of `width` bytes; strides count bytes.
struct CopyRowsParams {
    void* to;
    const void* source;
    int64_t to_block, to_row, source_block, source_row;
    int64_t blocks, rows, width;
};

// Throws std::invalid_argument that names the argument, or std::runtime_error when the launch fails.
void copy_rows(const CopyRowsParams& params, int device, void* stream);

// Copies strided rows by the copy engines, which leave the multiprocessors to what runs beside.
#include "checks.h"
#include "copy_rows.h"

void copy_rows(const CopyRowsParams& params, int device, void* stream) {
    check(params.width > 0 && params.to_row >= params.width && params.source_row >= params.width, "width",
          "got " + std::to_string(params.width) + ", must be positive and at most a row's stride");
    const DeviceGuard guard(device);
    for (int64_t block = 0; block < params.blocks; ++block) {
        check(
            cudaMemcpy2DAsync(static_cast<char*>(params.to) + block * params.to_block, params.to_row,
                              static_cast<const char*>(params.source) + block * params.source_block, params.source_row,
                              params.width, params.rows, cudaMemcpyDefault, static_cast<cudaStream_t>(stream)),
            "cudaMemcpy2DAsync");
    }
}

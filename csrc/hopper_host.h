// What the launches of Hopper's kernels share: tensor maps for the bulk tensor copy, and a look at the GPU.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "checks.h"

using Encode = decltype(&cuTensorMapEncodeTiled);

// A function of the driver, found at run time: so the build needs no driver.
inline Encode tensor_map_encoder() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found),
          "attention: cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found),
          "attention: cudaGetDriverEntryPoint");
#endif
    if (found != cudaDriverEntryPointSuccess)
        throw std::runtime_error("attention: no cuTensorMapEncodeTiled in driver");
    return reinterpret_cast<Encode>(function);
}

// Sizes, and the box, from the last dimension to the first; strides of all but the last, in bytes.
template <int kRank>
CUtensorMap encode_tensor_map(CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[kRank],
                              const cuuint64_t (&strides)[kRank - 1], const cuuint32_t (&box)[kRank],
                              CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion) {
    static const Encode function = tensor_map_encoder();
    cuuint32_t steps[kRank];
    for (cuuint32_t& step : steps) step = 1;
    CUtensorMap map;
    const CUresult error =
        function(&map, type, kRank, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                 swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (error != CUDA_SUCCESS) {
        throw std::runtime_error("attention: cuTensorMapEncodeTiled: error " + std::to_string(error));
    }
    return map;
}

// Of a 4-d tensor, boxes of `columns` in its first dimension and `rows` in its third.
inline CUtensorMap encode_tensor_map(CUtensorMapDataType type, const void* data, const cuuint64_t (&sizes)[4],
                                     const cuuint64_t (&strides)[3], int columns, int rows, CUtensorMapSwizzle swizzle,
                                     CUtensorMapL2promotion promotion) {
    const cuuint32_t box[] = {static_cast<cuuint32_t>(columns), 1, static_cast<cuuint32_t>(rows), 1};
    return encode_tensor_map(type, data, sizes, strides, box, swizzle, promotion);
}

// 0 where the compute capability is not 9.0.
inline int multiprocessors_of_hopper(int device) {
    int major = 0, minor = 0, multiprocessors = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "cudaDeviceGetAttribute");
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
    return major == 9 && minor == 0 ? multiprocessors : 0;
}

// The same, anything else refused.
inline int hopper_multiprocessors(int device) {
    const int multiprocessors = multiprocessors_of_hopper(device);
    check(multiprocessors > 0, "device", "compute capability must be 9.0");
    return multiprocessors;
}

// What the host side of every kernel does alike: checks that name the argument, errors of CUDA, the current device.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

inline void check(bool good, const char* name, const std::string& message) {
    if (!good) throw std::invalid_argument(std::string(name) + ": " + message);
}

inline void check(cudaError_t error, const char* call) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

inline void check_aligned(const char* name, const void* pointer) {
    check(reinterpret_cast<uintptr_t>(pointer) % 16 == 0, name, "address must be a multiple of 16 bytes");
}

inline void check_half_precision(const std::string& dtype) {
    check(dtype == "bfloat16" || dtype == "float16", "dtype", "got " + dtype + ", must be bfloat16 or float16");
}

// Makes `device` current, and puts back what was.
class DeviceGuard {
public:
    explicit DeviceGuard(int device) {
        check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (device == previous_) return;
        check(cudaSetDevice(device), "cudaSetDevice");
        changed_ = true;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(previous_);
    }

private:
    int previous_ = 0;
    bool changed_ = false;
};

"""Triton kernels: one module an op, kernel first, then its launcher.

Arguments come checked from `ops`. A file here may import `ops.quantized` and another kernel."""

"""Triton kernels: one module an op, kernel first, then its launcher."""

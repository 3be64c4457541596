"""Triton kernels, one file an operation, imported as `ddrf_fast.kernels`; that does not import triton."""

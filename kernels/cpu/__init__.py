"""Kernels for the CPU, compiled by Numba: each file holds a family of them, and `jit` says how they are compiled."""

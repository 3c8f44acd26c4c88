"""Kernels for CUDA devices, compiled by Numba, over arrays of any library that says where on the device they lie.

They have the names and signatures of those in `kernels/cpu`, and the same tests. NumPy's arrays are copied to the
device and back, which is for tests. Importing these files takes no GPU: kernels are compiled when first called.
"""

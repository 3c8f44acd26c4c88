"""Compiled twins of operations: arrays in, arrays out, never a Tensor.

A kernel has the signature of the operation that it stands in for, over raw arrays, and the operation's own NumPy code
is its reference. Module 16 attaches kernels to operations; nothing here is imported before a kernel is first used.
"""

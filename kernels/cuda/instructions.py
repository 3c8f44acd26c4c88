"""What a kernel cannot say in Python's words: numbers at an address, four products in one instruction, and a product
that is rounded before something is added to it. In the simulator, plain Python does the same.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinytorch.kernels.cuda.jit import SIMULATED, helper

__all__ = ["address", "dot4", "floats", "product"]


def address(array: Any) -> int:
    """Where an array begins: on the device for CuPy's, in the host's memory for NumPy's."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.data.ptr


if SIMULATED:  # whose kernels call any function
    import ctypes

    def floats(address, count):
        """The `count` float32 at an address. Here that is the host's memory, and an index too large is an error."""
        return np.frombuffer((ctypes.c_float * int(count)).from_address(int(address)), np.float32)

    def dot4(total, a, b):
        """total + the four products of two int32's bytes, each with a sign, modulo 2³²."""
        for shift in (0, 8, 16, 24):
            left, right = ((int(word) >> shift & 255 ^ 128) - 128 for word in (a, b))
            total += left * right
        return total

    def product(a, b):
        """a · b as a float32, whatever is added to it."""
        return a * b

else:
    from llvmlite import ir
    from numba import types
    from numba.cuda import libdevice
    from numba.cuda.extending import intrinsic

    @intrinsic
    def floats(typing, address, count):
        """The float32 at an address of the device's memory. Nobody checks that there are `count` of them."""

        def generate(context, b, signature, arguments):
            here = b.inttoptr(arguments[0], ir.FloatType().as_pointer(1))  # 1: the memory that all blocks see
            return b.addrspacecast(here, context.get_value_type(signature.return_type))

        return types.CPointer(types.float32)(types.int64, types.int64), generate

    @intrinsic
    def dot4(typing, total, a, b):
        """total + the four products of two int32's bytes, each with a sign, modulo 2³²."""
        word = ir.IntType(32)

        def generate(context, b, signature, arguments):
            total, *factors = arguments
            kind = ir.FunctionType(word, [word] * 3)
            return b.call(ir.InlineAsm(kind, "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r"), [*factors, total])

        return types.int32(types.int32, types.int32, types.int32), generate

    @helper
    def product(a, b):
        """a · b as a float32, whatever is added to it: `a * b + c` would be one instruction that rounds only once."""
        return libdevice.fmul_rn(a, b)

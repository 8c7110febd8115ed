"""Triton's interpreter with products that are the same on every machine.

It multiplies by numpy, whose library adds float32 in an order that depends on the processor and on
where a row lies in its tile: an image would have other bits in another place of a pack, and rows of
scores in the thousands other errors than on a chip. In float64 neither shows.
"""

import numpy as np


def sum_products_in_float64():
    """From now on, in this process."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    by_numpy = InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *options):
        if not {a.data.dtype, b.data.dtype, d.data.dtype} <= {np.dtype("f2"), np.dtype("f4")}:
            return by_numpy(self, a, b, d, *options)
        exact = np.matmul(a.data, b.data, dtype=np.float64)
        return TensorHandle(exact.astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot

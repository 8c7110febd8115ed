"""CuTe's notation of layouts, which the PTX ISA uses for wgmma: nested shapes and strides."""

import numpy as np


def flat(x):
    """The leaves of a nested tuple."""
    return [z for y in x for z in flat(y)] if isinstance(x, tuple) else [x]


def coordinates(index, shape):
    """Coordinates of linear indices, first mode fastest, nested as the shape is."""
    if not isinstance(shape, tuple):
        return index
    out = []
    for part in shape:
        size = int(np.prod(flat(part)))
        out.append(coordinates(index % size, part))
        index = index // size
    return tuple(out)


def offset(shape, stride, *index):
    """Where the elements at `index`, one per top-level mode, lie."""
    total = 0
    for i, part, step in zip(index, shape, stride, strict=True):
        steps = flat(step)
        total = total + sum(c * s for c, s in zip(flat(coordinates(i, part)), steps, strict=True))
    return total


def swizzle(width, byte):
    """Swizzle<B, 4, 3> on byte addresses: XOR the B bits above bit 7 into those above bit 4."""
    bits = {0: 0, 32: 1, 64: 2, 128: 3}[width]
    return byte ^ ((byte >> 7 & ((1 << bits) - 1)) << 4)


def canonical(mn_major, width, itemsize, rows, columns, leading, stride):
    """(shape, stride), in elements, of the row of the ISA's table "Canonical Layouts"."""
    t = 16 // itemsize
    lbo, sbo = leading // itemsize, stride // itemsize
    if not mn_major:
        if not width:
            return ((8, rows // 8), (t, columns // t)), ((1 * t, sbo), (1, lbo))
        return ((8, rows // 8), (t, columns // t)), ((width // 16 * t, sbo), (1, t))
    if not width:
        return ((t, 1, rows // t), (8, columns // 8)), ((1, t, sbo), (1 * t, lbo))
    w = width // 16
    return ((t, w, rows // (t * w)), (8, columns // 8)), ((1, t, lbo), (w * t, sbo))


def byte_addresses(shape, stride, width, start, rows, columns, itemsize):
    """[rows, columns] byte addresses of elements under a swizzle."""
    r, c = np.arange(rows)[:, None], np.arange(columns)[None, :]
    return swizzle(width, start + offset(shape, stride, r, c) * itemsize)

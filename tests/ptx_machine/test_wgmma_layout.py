"""Operands of wgmma against the ISA's layouts in CuTe's notation, and its figures of fragments."""

import functools

import numpy as np
import pytest
import torch

from ptx_machine.formats import ITEMSIZE, cut, decode, encode
from ptx_machine.wgmma_layout import (
    MatrixDescriptor,
    a_fragment,
    accumulator,
    accumulator_registers,
    operand_chunks,
    swizzle,
)
from tests.ptx_machine import cute

WIDTHS = (0, 32, 64, 128)


def elements(chunks, itemsize, mn_major):
    """[rows, columns] addresses of elements, from those of 16-byte chunks."""
    along = np.arange(16 // itemsize) * itemsize
    every = (chunks[..., None] + along).reshape(chunks.shape[0], -1)
    return every.T if mn_major else every


@pytest.mark.parametrize(
    "mn_major, itemsize, width, rows",
    [
        (mn_major, itemsize, width, rows)
        for mn_major, itemsize in ((False, 1), (False, 2), (False, 4), (True, 2))
        for width in WIDTHS
        for rows in (8, 64, 256)
        if rows >= (max(width, 16) // itemsize if mn_major else 8)
    ],
)
def test_operands_lie_as_the_canonical_layouts_say(mn_major, itemsize, width, rows):
    columns = 32 // itemsize
    leading, stride = 4096, 8192  # not what packs densely
    start = 3 * 1024 + (32 if width > 32 and not mn_major else 0)  # K advances inside the pattern
    shape, step = cute.canonical(mn_major, width, itemsize, rows, columns, leading, stride)
    want = cute.byte_addresses(shape, step, width, start, rows, columns, itemsize)
    descriptor = MatrixDescriptor(start, leading, stride, width)
    got = elements(operand_chunks(descriptor, rows, itemsize, mn_major), itemsize, mn_major)
    assert np.array_equal(got, want)


@pytest.mark.parametrize(
    "mn_major, width, itemsize, shape, stride, leading, step",
    [
        (False, 0, 4, ((8, 2), (4, 4)), ((4, 32), (1, 64)), 16, 8),
        (False, 32, 4, ((8, 2), (4, 4)), ((8, 64), (1, 4)), 1, 16),
        (True, 0, 2, ((8, 1, 2), (8, 2)), ((1, 8, 64), (8, 128)), 16, 8),
        (True, 32, 2, ((8, 2, 2), (8, 2)), ((1, 8, 128), (16, 256)), 16, 32),
        (True, 64, 2, ((8, 4, 2), (8, 2)), ((1, 8, 256), (32, 512)), 32, 64),
    ],
)
def test_worked_examples_of_the_isa(mn_major, width, itemsize, shape, stride, leading, step):
    """Layouts in elements, and the fields of the descriptor in units of 16 bytes."""
    descriptor = MatrixDescriptor(0, leading << 4, step << 4, width)
    bits = descriptor.encode()
    assert (bits >> 16 & 0x3FFF, bits >> 32 & 0x3FFF) == (leading, step)
    assert MatrixDescriptor.decode(bits) == descriptor
    rows, columns = int(np.prod(cute.flat(shape[0]))), 32 // itemsize  # of a single instruction
    want = cute.byte_addresses(shape, stride, width, 0, rows, columns, itemsize)
    got = elements(operand_chunks(descriptor, rows, itemsize, mn_major), itemsize, mn_major)
    assert np.array_equal(got, want)


def test_fields_of_a_descriptor():
    descriptor = MatrixDescriptor(0x3FFF0, 0x10, 0x400, 128, 5)
    bits = descriptor.encode()
    assert bits == 0x3FFF | 1 << 16 | 0x40 << 32 | 5 << 49 | 1 << 62
    assert MatrixDescriptor.decode(np.uint64(bits)) == descriptor
    assert [MatrixDescriptor.decode(n << 62).swizzle for n in range(4)] == [0, 128, 64, 32]
    with pytest.raises(ValueError, match="reserved bits 0x10000000000000"):
        MatrixDescriptor.decode(1 << 52)
    with pytest.raises(ValueError, match="multiples of 16"):
        MatrixDescriptor(8, 16, 16).encode()
    with pytest.raises(NotImplementedError, match="base offset"):
        operand_chunks(descriptor, 64, 2, False)
    with pytest.raises(ValueError, match="16 bits"):
        operand_chunks(MatrixDescriptor(0, 16, 16), 64, 4, True)


@pytest.mark.parametrize("width", WIDTHS[1:])
def test_swizzles_move_chunks_inside_their_rows(width):
    address = np.arange(32 * width)
    there = swizzle(address, width)
    assert np.array_equal(there, cute.swizzle(width, address))
    assert np.array_equal(np.sort(there), address)
    assert np.array_equal(swizzle(there, width), address)
    assert np.array_equal(there // width, address // width)


@functools.cache
def d_position(n):
    """(row, column) [128, n / 2] of a thread's elements of D: the ISA's figure, tile by tile."""
    row, column = np.empty((128, n // 2), int), np.empty((128, n // 2), int)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for tile in range(n // 8):
            for i, (down, right) in enumerate(((0, 0), (0, 1), (8, 0), (8, 1))):
                row[thread, 4 * tile + i] = 16 * warp + (lane >> 2) + down
                column[thread, 4 * tile + i] = 8 * tile + 2 * (lane & 3) + right
    return row, column


def a_position(itemsize):
    """(row, column) [128, 4, elements of a register] of A, as mma.m16n8k{8,16,32} has them."""
    per, k = 4 // itemsize, 32 // itemsize
    row, column = np.empty((128, 4, per), int), np.empty((128, 4, per), int)
    for thread in range(128):
        warp, lane = divmod(thread, 32)
        for register, (down, right) in enumerate(((0, 0), (8, 0), (0, k // 2), (8, k // 2))):
            row[thread, register] = 16 * warp + (lane >> 2) + down
            column[thread, register] = per * (lane & 3) + np.arange(per) + right
    return row, column


@pytest.mark.parametrize("n", range(8, 257, 8))
@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_fragments_of_d(n, kind):
    row, column = d_position(n)
    assert len(set(zip(row.ravel(), column.ravel(), strict=True))) == 64 * n
    itemsize = ITEMSIZE[kind]
    d = np.random.default_rng(0).permutation(64 * n).reshape(64, n).astype(f"u{itemsize}")
    registers = np.ascontiguousarray(d[row, column]).view(np.uint32)
    assert np.array_equal(accumulator(registers, 64, itemsize)[0], d)
    assert np.array_equal(accumulator_registers(d[None]), registers.T)
    by_warp = accumulator(registers[32:64], 16, itemsize)
    assert np.array_equal(by_warp[0], d[16:32]), "a warp alone has its 16 rows"


@pytest.mark.parametrize("kind", ["e4m3", "bf16", "tf32"])
def test_fragments_of_a(kind):
    itemsize = ITEMSIZE[kind]
    k = 32 // itemsize
    row, column = a_position(itemsize)
    assert len(set(zip(row.ravel(), column.ravel(), strict=True))) == 64 * k
    a = np.random.default_rng(0).integers(0, 256, (64, k)).astype(f"u{itemsize}")
    registers = np.ascontiguousarray(a[row, column]).reshape(128, -1).view(np.uint32)
    assert np.array_equal(a_fragment(registers, 64, kind)[0], a)
    assert np.array_equal(a_fragment(registers[96:], 16, kind)[0], a[48:])


def test_an_accumulator_rounded_in_place_is_a_fragment_of_a():
    """What attention relies on: 8 registers of scores make the 4 of A for 16 keys, in order."""
    d = np.random.default_rng(0).normal(size=(1, 64, 32)).astype(np.float32)
    registers = accumulator_registers(d).view(np.float32).T
    for block in range(2):
        halves = encode(np.ascontiguousarray(registers[:, 8 * block : 8 * block + 8]), "bf16")
        a = a_fragment(halves.view(np.uint32), 64, "bf16")
        assert np.array_equal(a[0], encode(d[0, :, 16 * block : 16 * block + 16].copy(), "bf16"))


def test_number_formats_are_those_of_torch():
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    for kind, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        got = decode(np.arange(65536).astype(np.uint16), kind)
        assert np.array_equal(got, every.view(dtype).double().numpy(), equal_nan=True)
    byte = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    for kind, dtype in (("e4m3", torch.float8_e4m3fn), ("e5m2", torch.float8_e5m2)):
        got = decode(np.arange(256).astype(np.uint8), kind)
        assert np.array_equal(got, byte.view(dtype).double().numpy(), equal_nan=True)
    assert decode(np.array([0x3F801FFF, 0x3F802000], np.uint32), "tf32").tolist() == [1, 1 + 2**-10]
    exact = np.array([1 + 2.0**-24, -1 - 3 * 2.0**-24, 2.0**-40, 0.0, np.inf, np.nan])
    want = np.float32([1, -1 - 2 * 2.0**-24, 2.0**-40, 0, np.inf, np.nan])
    assert np.array_equal(cut(exact), want, equal_nan=True), "towards zero"

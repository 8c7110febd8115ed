"""The Triton driver: arguments, messages, edited PTX, and releases that it does not know."""

import gc
import re
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

import ptx_machine
from ptx_machine.driver import Launcher


@triton.jit
def arguments(x, out, a, b, c, d, e: tl.constexpr, pair):
    i = tl.arange(0, 32)
    value = tl.load(x + i).to(tl.float32) + a + b.to(tl.float32) + c + d + e
    tl.store(out + i, value + pair[0] + tl.load(pair[1]))


@triton.jit
def shift(x, out, n, OFFSET: tl.constexpr):
    i = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(out + i, tl.load(x + i + OFFSET), mask=i < n)


def test_arguments_of_every_type(gpu):
    """Ints by their size, floats, constants, tuples; 1 is a constant, None no pointer."""
    x, out = torch.arange(32, dtype=torch.int16), torch.zeros(32)
    arguments[(1,)](x, out, 3, 2**40, 0.5, 1, 7, (10, torch.tensor([100.0])))
    assert torch.equal(out, x + (3 + 2.0**40 + 0.5 + 1 + 7 + 10 + 100))


def test_tensors_that_say_another_type(gpu):
    x, out = torch.arange(128, dtype=torch.int32), torch.zeros(128)
    shift[(2,)](triton.reinterpret(x, tl.float32), out, 128, OFFSET=0)
    assert torch.equal(out, x.view(torch.float32))


def test_clusters_are_refused():
    ptx_machine.install(90)
    with pytest.raises(NotImplementedError, match="shift: num_ctas=2: clusters"):
        shift[(2,)](torch.zeros(128), torch.zeros(128), 128, OFFSET=0, num_ctas=2)


def test_both_chips_in_turn():
    """The chip that was installed last is the one that kernels are compiled for."""
    for chip in (80, 90, 80):
        gpu = ptx_machine.install(chip)
        x, out = torch.randn(128), torch.zeros(128)
        shift[(2,)](x, out, 128, OFFSET=0)
        assert torch.equal(out, x)
        (program,) = gpu.programs.values()
        assert program.kernel.target.startswith(f"sm_{chip}")
        assert [name for name, _ in gpu.launches] == ["shift"] and gpu.instructions > 0


def test_kernels_that_are_dropped_say_nothing(gpu, monkeypatch):
    """Since Triton 3.8 a kernel asks the driver to unload it; what fails there has no caller."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", lambda error: said.append(error.exc_value))
    x, out = torch.randn(64), torch.zeros(64)
    kept = shift[(1,)](x, out, 64, OFFSET=0)
    assert torch.equal(out, x) and type(kept).__name__ == "CompiledKernel"
    module = weakref.ref(kept)
    shift.device_caches.clear()
    del kept
    gpu.programs.clear()
    gc.collect()
    assert module() is None and not said


def test_reads_past_the_end_are_named(gpu):
    """Views of one tensor: what is read of the storage beyond them is outside."""
    room = torch.zeros(256)
    x, out = room[:100], torch.zeros(128)
    with pytest.raises(ptx_machine.MemcheckError) as error:
        shift[(2,)](x, out, 128, OFFSET=0)
    text = str(error.value)
    assert text.startswith("shift: ld.global.") and "of x (400 bytes): outside" in text
    place = re.search(r"\[test_driver\.py:(\d+):\d+.*PTX line \d+\]", text)
    source = Path(__file__).read_text().splitlines()
    assert place
    line = int(place[1])  # Triton 3.8 says the line after
    assert any("tl.load(x + i + OFFSET)" in text for text in source[line - 2 : line])
    assert "program (1, 0, 0), warp " in text


def test_tensors_of_one_storage_are_one_region(gpu):
    """A kernel may walk from one row of a matrix to the next; the name is that of the tensor."""
    room = torch.arange(300, dtype=torch.float32)
    out = torch.zeros(64)
    shift[(1,)](room[::2], out, 64, OFFSET=100)
    assert torch.equal(out, room[100:164])
    with pytest.raises(ptx_machine.MemcheckError, match=r"byte -400 of x \(400 bytes\): outside"):
        shift[(1,)](room[100:200], room[200:], 64, OFFSET=-100)


def test_edited_ptx(gpu):
    """Edits hold as long as the context does."""
    x, out = torch.randn(128), torch.zeros(128)
    names = []

    def without_stores(name, text):
        names.append(name)
        return re.sub(r"^.*st\.global.*$", "", text, flags=re.M)

    with ptx_machine.edited(gpu, without_stores):
        shift[(2,)](x, out, 128, OFFSET=0)
    assert names == ["shift"] and not out.any()
    shift[(2,)](x, out, 128, OFFSET=0)
    assert torch.equal(out, x)


def test_orders_change_nothing(gpu):
    gpu.options.shuffle_ctas = gpu.options.shuffle_warps = True
    for seed in range(3):
        gpu.options.seed = seed
        x, out = torch.randn(640), torch.zeros(640)
        shift[(10,)](x, out, 640, OFFSET=0)
        assert torch.equal(out, x)


def test_programs_can_be_chosen(gpu):
    gpu.options.ctas = lambda name, grid: [1] if name == "shift" and grid == (3, 1, 1) else []
    x, out = torch.ones(192), torch.zeros(192)
    shift[(3,)](x, out, 192, OFFSET=0)
    assert out.nonzero().ravel().tolist() == list(range(64, 128))


def test_what_it_refuses():
    with pytest.raises(ValueError, match=r"capability is 70; known are \[80"):
        ptx_machine.install(70)


def test_a_protocol_that_is_not_known(gpu, monkeypatch):
    """A newer Triton may start kernels otherwise: that is said, not guessed."""
    launcher = Launcher(
        SimpleNamespace(signature={"x": "*fp32"}), SimpleNamespace(name="some_kernel")
    )
    with pytest.raises(
        ptx_machine.ProtocolError, match=r"Triton 3.*some_kernel.*11 values instead of"
    ):
        launcher(*range(11))
    x, out = torch.zeros(64), torch.zeros(64)
    more = re.compile(r"(\.visible \.entry shift\(\n)")
    extra = r"\1\t.param .u32 shift_param_extra,\n"
    with (
        ptx_machine.edited(gpu, lambda name, text: more.sub(extra, text)),
        pytest.raises(ptx_machine.ProtocolError, match=r"shift has parameters of \[4, 8, 8, "),
    ):
        shift[(1,)](x, out, 64, OFFSET=0)

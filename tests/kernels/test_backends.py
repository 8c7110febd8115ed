import pytest
import torch

from hrvlm_kernels import (
    PackedGrids,
    explain_backend,
    layer_norm_pixel_shuffle,
    normalize_patchify,
    pixel_shuffle_linear,
    residual_layer_norm,
    rope_2d,
    swiglu,
    varlen_attention,
)
from hrvlm_kernels.backends import BACKENDS, OPS, resolve
from tests.kernels.helpers import COMPILED

PACKED = PackedGrids.from_grids([(2, 2)], num_prefix_tokens=1)


def _call(op, backend, device="cpu", dtype=torch.float32):
    q = torch.ones(5, 2, 8, dtype=dtype, device=device)
    if op == "rope_2d":
        return rope_2d(q, q, PACKED.coords, torch.ones(2), backend=backend)[0]
    if op == "swiglu":
        return swiglu(q.flatten(1), q.flatten(1), backend=backend)
    if op == "residual_layer_norm":
        x, weight = q.flatten(1), torch.ones(16, dtype=dtype)
        return residual_layer_norm(x, x, weight, weight, backend=backend)[0]
    if op == "layer_norm_pixel_shuffle":
        weight = torch.ones(16, dtype=dtype)
        return layer_norm_pixel_shuffle(q.flatten(1), PACKED, 2, weight, backend=backend)
    if op == "normalize_patchify":
        image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8, device=device)
        return normalize_patchify(image, 2, (0.5,) * 3, (0.5,) * 3, dtype=dtype, backend=backend)[0]
    if op == "varlen_attention":
        return varlen_attention(q, q, q, PACKED, backend=backend)
    return pixel_shuffle_linear(
        q.flatten(1), PACKED, 2, torch.ones(3, 64, dtype=dtype), backend=backend
    )


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["auto", "sdpa", "eager"])
def test_torch_backends_run_on_the_cpu(op, backend):
    assert _call(op, backend).isfinite().all()


@pytest.mark.parametrize("op", OPS)
def test_an_unknown_backend_names_the_choices(op):
    with pytest.raises(ValueError, match=r"auto, triton, flash_attn, sdpa, eager; got 'cuda'"):
        _call(op, "cuda")


@pytest.mark.skipif(COMPILED, reason="ptx_machine takes CPU tensors")
@pytest.mark.parametrize("op", OPS)
def test_triton_on_the_cpu_without_the_interpreter_raises_and_says_why(op, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(
        RuntimeError, match=f"{op}: backend 'triton' can't run: the tensors are on the CPU"
    ):
        _call(op, "triton")


def test_flash_attn_on_the_cpu_raises_and_never_falls_back():
    with pytest.raises(RuntimeError, match="varlen_attention: backend 'flash_attn' can't run"):
        _call("varlen_attention", "flash_attn")


def test_flash_attn_names_attention_only():
    assert resolve("rope_2d", "flash_attn", torch.zeros(1)) == "eager"


def test_a_dtype_without_kernels_is_named(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match=r"not torch\.float64"):
        _call("rope_2d", "triton", dtype=torch.float64)
    assert _call("rope_2d", "auto", dtype=torch.float64).dtype == torch.float64


def test_auto_never_picks_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve("varlen_attention", "auto", torch.zeros(1)) == "sdpa"


def test_explain_backend_has_a_line_per_op_with_the_reason():
    for backend in BACKENDS:
        lines = explain_backend(backend, device="cpu").splitlines()
        assert [line.partition(":")[0] for line in lines] == list(OPS)
    assert "the tensors are on the CPU" in explain_backend(device="cpu")
    lines = explain_backend("flash_attn", device="cpu").splitlines()
    assert [line.partition(":")[0] for line in lines if "can't run" in line] == ["varlen_attention"]


def test_mismatched_inputs_are_named():
    q = torch.zeros(5, 2, 8)
    with pytest.raises(ValueError, match=r"q has 4 rows.*\(2, 2\).*has 5"):
        varlen_attention(q[:4], q[:4], q[:4], PACKED)
    with pytest.raises(ValueError, match="heads"):
        varlen_attention(q, q[:, :0], q[:, :0], PACKED)
    with pytest.raises(ValueError, match="one dtype"):
        varlen_attention(q, q.half(), q.half(), PACKED)
    with pytest.raises(ValueError, match=r"coords must be float32 \[5, 2\]"):
        rope_2d(q, q, PACKED.coords[:4], torch.ones(2))
    with pytest.raises(ValueError, match=r"inv_freq must be float32 \[2\]"):
        rope_2d(q, q, PACKED.coords, torch.ones(3))
    with pytest.raises(ValueError, match="multiple of 4"):
        rope_2d(q[..., :6], q[..., :6], PACKED.coords, torch.ones(2))
    with pytest.raises(ValueError, match=r"\[N, 64\]"):
        pixel_shuffle_linear(q.flatten(1), PACKED, 2, torch.ones(3, 32))
    with pytest.raises(ValueError, match=r"bias must be \[3\]"):
        pixel_shuffle_linear(q.flatten(1), PACKED, 2, torch.ones(3, 64), torch.ones(2))

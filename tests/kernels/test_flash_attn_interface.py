"""flash_attn_varlen_func, called as flash-attn documents it and as its users call it."""

import inspect

import pytest
import torch

from hrvlm_kernels import flash_attn_interface
from hrvlm_kernels.flash_attn_interface import flash_attn_varlen_func
from tests.kernels.attention_cases import check, make_case
from tests.kernels.helpers import gradients


def arguments(case):
    ends = case.packed.cu_seqlens.clone()
    return ends, ends, case.packed.max_seqlen, case.packed.max_seqlen


@pytest.fixture
def case():
    return make_case((16, 0, 40, 1), heads=4, kv_heads=2, head_dim=32, dtype=torch.float32)


@pytest.fixture
def readings(monkeypatch):
    """How often lengths were read back from the device."""
    counted = []
    original = flash_attn_interface.PackedGrids.from_cu_seqlens

    def counting(*args, **kwargs):
        counted.append(args)
        return original(*args, **kwargs)

    monkeypatch.setattr(flash_attn_interface.PackedGrids, "from_cu_seqlens", counting)
    return counted


def test_the_signature_is_that_of_flash_attn_2():
    """flash_attn/flash_attn_interface.py: names, order and defaults."""
    parameters = inspect.signature(flash_attn_varlen_func).parameters.values()
    assert [p.name for p in parameters if p.default is p.empty] == [
        "q", "k", "v", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    ]  # fmt: skip
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == {
        "dropout_p": 0.0,
        "softmax_scale": None,
        "causal": False,
        "window_size": (-1, -1),
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
        "return_attn_probs": False,
        "block_table": None,
    }
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in parameters)


def test_positional_call_forward_and_backward(case):
    args = arguments(case)
    check(case, gradients(lambda q, k, v: flash_attn_varlen_func(q, k, v, *args), case.inputs,
                          case.g))  # fmt: skip


def test_keyword_call(case):
    """As transformers calls it."""
    ends, _, longest, _ = arguments(case)
    out = flash_attn_varlen_func(
        *case.inputs, cu_seqlens_q=ends, cu_seqlens_k=ends.clone(), max_seqlen_q=longest,
        max_seqlen_k=longest, dropout_p=0.0, softmax_scale=32**-0.5, causal=False,
        window_size=[-1, -1], deterministic=True,
    )  # fmt: skip
    check(case, [out], ["out"])


def test_windows_are_more_sequences(case):
    """Qwen2.5-VL calls the same function with cu_window_seqlens in most layers."""
    windows = torch.tensor([0, 8, 16, 32, 48, 57], dtype=torch.int32)
    inputs = case.inputs
    out = flash_attn_varlen_func(*inputs, windows, windows, 16, 16)
    for start, end in ((0, 8), (8, 16), (16, 32), (32, 48), (48, 57)):
        alone = torch.tensor([0, end - start], dtype=torch.int32)
        part = (a[start:end] for a in inputs)
        torch.testing.assert_close(
            out[start:end], flash_attn_varlen_func(*part, alone, alone, 16, 16)
        )


@pytest.mark.parametrize(
    "option",
    [
        {"dropout_p": 0.1},
        {"causal": True},
        {"window_size": (64, 64)},
        {"softcap": 30.0},
        {"alibi_slopes": torch.ones(4)},
        {"return_attn_probs": True},
        {"block_table": torch.zeros(3, 1, dtype=torch.int32)},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_is_not_supported_raises(option, case):
    with pytest.raises(NotImplementedError, match=next(iter(option))):
        flash_attn_varlen_func(*case.inputs, *arguments(case), **option)


def test_cross_attention_raises(case):
    ends, _, longest, _ = arguments(case)
    other = torch.tensor([0, 17, 17, 56, 57], dtype=torch.int32)
    with pytest.raises(NotImplementedError, match="cu_seqlens_k must equal cu_seqlens_q"):
        flash_attn_varlen_func(*case.inputs, ends, other, longest, longest)


def test_wrong_lengths_raise(case):
    ends, _, longest, _ = arguments(case)
    with pytest.raises(ValueError, match="max_seqlen_k is 39, the longest sequence has 40"):
        flash_attn_varlen_func(*case.inputs, ends, ends, longest, 39)
    with pytest.raises(ValueError, match="q has 57 rows"):
        flash_attn_varlen_func(*case.inputs, ends[:-1], ends[:-1], longest, longest)
    with pytest.raises(ValueError, match="must start at 0"):
        flash_attn_varlen_func(*case.inputs, ends[1:], ends[1:], longest, longest)
    with pytest.raises(ValueError, match=r"cu_seqlens must be int32 \[B \+ 1\], got torch.float32"):
        flash_attn_varlen_func(*case.inputs, ends.float(), ends.float(), longest, longest)


def test_lengths_are_read_once_per_tensor(case, readings):
    args = arguments(case)
    for _ in range(3):
        flash_attn_varlen_func(*case.inputs, *args)
    assert len(readings) == 1
    flash_attn_varlen_func(*case.inputs, *arguments(case))
    assert len(readings) == 2


def test_lengths_are_read_again_after_a_change(case, readings):
    ends, _, longest, _ = arguments(case)
    before = flash_attn_varlen_func(*case.inputs, ends, ends, longest, longest)
    ends[1] = 8
    after = flash_attn_varlen_func(*case.inputs, ends, ends, 48, 48)
    assert len(readings) == 2
    assert not torch.equal(before, after)


def test_lengths_made_in_inference_mode(case, readings):
    with torch.inference_mode():
        args = arguments(case)
        for _ in range(2):
            out = flash_attn_varlen_func(*case.inputs, *args)
    assert len(readings) == 2
    check(case, [out.clone()], ["out"])


def test_the_cache_does_not_keep_tensors_alive(case):
    args = arguments(case)
    flash_attn_varlen_func(*case.inputs, *args)
    size = len(flash_attn_interface._layouts)
    del args
    assert len(flash_attn_interface._layouts) == size - 1

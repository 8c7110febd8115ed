"""FlexAttention's forward as Inductor would generate it for static shapes, without a GPU.

The installed template (torch/_inductor/kernel/flex/templates) is rendered with jinja2, its hooks
filled in as torch._inductor.select_algorithm does: sizes and strides as numbers, no score_mod, no
mask_mod, one entry of the block mask that stands for everything, as flex_attention(q, k, v) has it.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from functools import lru_cache
from typing import Any

import torch
import torch._inductor.kernel.flex as installed
import triton
from jinja2 import Environment
from torch import Tensor

from hrvlm_kernels.triton_kernels.tilings import Tiling

# Of its table (torch/_inductor/template_heuristics/triton.py), in bfloat16: by chip and D.
TILINGS = {
    (80, 64): Tiling(128, 64, 4, 3),
    (90, 64): Tiling(128, 128, 4, 3),
    (80, 128): Tiling(128, 64, 8, 3),
    (90, 128): Tiling(128, 64, 8, 3),
}
DEFAULT = Tiling(64, 64, 4, 3)  # of other D
_ARGUMENTS = (
    "Q", "K", "V", "LSE", "MAX", "KV_NUM_BLKS", "KV_IDX", "FULL_KV_NUM_BLKS", "FULL_KV_IDX", "OUT",
)  # fmt: skip
_EVERYTHING = 1 << 30


def _template() -> str:
    folder = os.path.join(os.path.dirname(str(installed.__file__)), "templates")
    parts = []
    for name in ("flex_attention", "utilities", "common"):
        with open(os.path.join(folder, f"{name}.py.jinja")) as file:
            parts.append(file.read())
    return "\n".join(parts)


def _render(tensors: dict[str, Tensor], options: dict[str, object]) -> str:
    """The Triton source for these tensors ([Z, H, N, D] and the tables of the block mask)."""
    defines = "\n".join(f"{name} : tl.constexpr = {value}" for name, value in options.items())
    names = ", ".join(f"arg_{name}" for name in _ARGUMENTS)

    def indent(text: str, levels: int) -> str:
        return text.replace("\n", "\n" + "    " * levels)

    def def_kernel(*_: str) -> str:
        body = "\n".join([defines, *(f"{n} = arg_{n}" for n in _ARGUMENTS)])
        return f"@triton.jit\ndef flex_attention({names}):\n    {indent(body, 1)}"

    def stride(name: str, axis: int | None = None) -> object:
        strides = tensors[name].stride()
        return strides[axis] if axis is not None else ", ".join(map(str, strides))

    def modification(subgraph_number: int, output_name: str, score: str, **_: object) -> str:
        return f"{output_name} = " + ("tl.full([1], True, tl.int1)" if subgraph_number else score)

    def store_output(indices: tuple[str, ...], value: str, mask: str, **_: object) -> str:
        pairs = zip(tensors["OUT"].stride(), indices, strict=True)
        place = " + ".join(f"{step} * {index}" for step, index in pairs)
        return f"tl.store(OUT + ({place}), {value}, {mask})"

    environment = Environment()
    environment.filters["indent_except_first"] = indent
    text = environment.from_string(_template()).render(
        def_kernel=def_kernel, stride=stride, size=lambda name, axis: tensors[name].shape[axis],
        gen_argdefs=lambda: names, gen_defines=lambda: defines, modification=modification,
        store_output=store_output, **options,
    )  # fmt: skip
    return f"import triton\nimport triton.language as tl\n\n{text}"


@lru_cache
def _kernel(source: str) -> Any:
    path = os.path.join(tempfile.mkdtemp(), "flex_rendered.py")
    with open(path, "w") as file:
        file.write(source)
    spec = importlib.util.spec_from_file_location("flex_rendered", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.flex_attention


def start(chip: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """softmax(q k' / sqrt(D)) v for q, k, v, out [n, H, D]; lse [H, n] in base 2."""
    n, heads, head_dim = q.shape
    tiling, padded = TILINGS.get((chip, head_dim), DEFAULT), triton.next_power_of_2(head_dim)
    tensors = {name: a.transpose(0, 1)[None] for name, a in zip("QKV", (q, k, v), strict=True)}
    tensors |= {"OUT": out.transpose(0, 1)[None], "LSE": lse}
    tensors["KV_NUM_BLKS"] = torch.ones(1, 1, 1, dtype=torch.int32)
    tensors["KV_IDX"] = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    options = {
        "FLOAT32_PRECISION": "'ieee'", "IS_DIVISIBLE": n % 128 == 0, "SM_SCALE": head_dim**-0.5,
        "GQA_SHARED_HEADS": 1, "HAS_FULL_BLOCKS": False, "OUTPUT_LOGSUMEXP": True,
        "OUTPUT_MAX": False, "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False,
        "BLOCKS_ARE_CONTIGUOUS": False, "SAFE_HEAD_DIM": head_dim == padded, "USE_TMA": False,
        "QK_HEAD_DIM": head_dim, "QK_HEAD_DIM_ROUNDED": padded, "V_HEAD_DIM": head_dim,
        "V_HEAD_DIM_ROUNDED": padded, "BLOCK_M": tiling.rows, "BLOCK_N": tiling.step,
        "SPARSE_Q_BLOCK_SIZE": _EVERYTHING, "SPARSE_KV_BLOCK_SIZE": _EVERYTHING,
        "INDEX_DTYPE": "tl.int32",
    }  # fmt: skip
    kernel = _kernel(_render(tensors, options))
    kernel[(triton.cdiv(n, tiling.rows), 1, heads)](
        *(tensors.get(name) for name in _ARGUMENTS),
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip

"""varlen_attention's kernels as they are shipped, to compile; companion of shipped.py."""

import torch

from hrvlm_kernels import varlen_attention_backward_triton as backward
from hrvlm_kernels import varlen_attention_triton as forward
from tests.kernels.shipped import NAMES, Job

HEAD_DIMS = (32, 64, 80, 96, 128)
_HEADS = 16


def attention_jobs(target, *, head_dims=HEAD_DIMS, dtypes=(torch.bfloat16, torch.float32)):
    """Every entry of the tables, with 16 heads, with RoPE and with shared heads of k and v."""
    for head_dim in head_dims:
        for dtype in dtypes:
            example = torch.empty(0, 1, head_dim, dtype=dtype, device="meta")
            ropes = (False, True) if forward.rotates_in_kernel(example) else (False,)
            for rope in ropes:
                yield from _forward_jobs(target, head_dim, dtype, rope)
                yield from _backward_jobs(target, head_dim, dtype, rope)


def _forward_jobs(target, head_dim, dtype, rope):
    for tiling in forward.select_tilings(target, head_dim, dtype):
        yield forward_job(head_dim, dtype, tiling, rope)


def _backward_jobs(target, head_dim, dtype, rope):
    tilings = backward.select_tilings(target, head_dim, dtype)
    for tiling in tilings.dq:
        yield dq_job(head_dim, dtype, tiling, rope)
    for tiling in tilings.dkdv:
        yield dkdv_job(head_dim, dtype, tiling, rope)
    for tiling in tilings.atomic:
        yield dkdv_job(head_dim, dtype, tiling, rope, atomic=True)
    if tilings.atomic:
        yield dq_job(head_dim, dtype, tilings.dq[0], rope, delta_only=True)


def forward_job(head_dim, dtype, tiling, rope=False, *, group=1):
    signature, constants = _common("qkvo", head_dim, dtype, tiling, rope, group)
    constants |= {"BM": tiling.rows, "BN": tiling.step, "AHEAD": tiling.ahead}
    if tiling.ahead:
        block = f"tensordesc<{NAMES[dtype]}[{tiling.step}, 1, {constants['BD']}]>"
        signature |= {"k_blocks": block, "v_blocks": block}
    else:
        constants |= {"k_blocks": None, "v_blocks": None}
    name = f"forward{' ahead' if tiling.ahead else ''}"
    return _job(name, forward.forward_kernel, signature, constants, head_dim, dtype, tiling, rope)


def dq_job(head_dim, dtype, tiling, rope=False, *, group=1, delta_only=False):
    names = ["q", "k", "v", "o", "g", "dq"]
    signature, constants = _common(names, head_dim, dtype, tiling, rope, group)
    constants |= {"BM": tiling.rows, "BN": tiling.step, "DELTA_ONLY": delta_only}
    signature["delta"] = "*fp32:16"
    name = "delta" if delta_only else "dq"
    return _job(name, backward.dq_kernel, signature, constants, head_dim, dtype, tiling, rope)


def dkdv_job(head_dim, dtype, tiling, rope=False, *, group=1, atomic=False):
    names = ["q", "k", "v", "g", "dq", "dk", "dv"]
    signature, constants = _common(names, head_dim, dtype, tiling, rope, group)
    constants |= {"BM": tiling.step, "BN": tiling.rows, "ATOMIC": atomic}
    signature |= {"delta": "*fp32:16", "dq": "*fp32:16"}
    if not atomic:
        del signature["dq"]
        constants |= {"dq": None, "stride_dqt": 0, "stride_dqh": 0}
        del signature["stride_dqt"], signature["stride_dqh"]
    if group > 1:
        signature |= {"dk": "*fp32:16", "dv": "*fp32:16"}
    name = "dk, dv, dq" if atomic else "dk, dv"
    return _job(name, backward.dkdv_kernel, signature, constants, head_dim, dtype, tiling, rope)


def _common(names, head_dim, dtype, tiling, rope, group):
    """Arguments that the kernels share; `names` are the tensors [T, H, D]."""
    pointer = f"*{NAMES[dtype]}:16"
    signature = {"out" if name == "o" else name: pointer for name in names}
    signature |= {"lse": "*fp32:16", "cu_seqlens": "*i32:16", "tiles": "*i32:16"}
    signature |= {"T": "i32", "scale": "fp32"}
    signature |= {f"stride_{name}{axis}": "i32:16" for name in names for axis in "th"}
    constants = {"H": _HEADS, "GROUP": group, "D": head_dim, "ROPE": rope}
    constants |= {"BD": forward.padded_head_dim(head_dim), "PARTS": max(1, 64 // tiling.rows)}
    if rope:
        signature |= {"coords": "*fp32:16", "inv_freq": "*fp32:16"}
    else:
        constants |= {"coords": None, "inv_freq": None}
    return signature, constants


def _job(name, kernel, signature, constants, head_dim, dtype, tiling, rope):
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    tile = f"{tiling.rows}x{tiling.step} {tiling.num_warps} warps {tiling.num_stages} stages"
    full = f"varlen_attention {name} D={head_dim} {NAMES[dtype]}{' rope' if rope else ''} {tile}"
    tensor_core = dtype != torch.float32 and name != "delta"
    return Job(full, kernel, signature, constants, options, tensor_core)

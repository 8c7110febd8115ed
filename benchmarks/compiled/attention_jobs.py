"""varlen_attention's kernels as they are shipped, to compile; companion of jobs.py."""

from functools import partial

import torch

from benchmarks.compiled.jobs import NAMES, Job, of_row
from hrvlm_kernels.attention_problem import folds_rope
from hrvlm_kernels.packed_tables import SHORT_SEQLEN
from hrvlm_kernels.triton_kernels import varlen_attention as forward
from hrvlm_kernels.triton_kernels import varlen_attention_backward as backward
from hrvlm_kernels.triton_kernels import varlen_attention_short as short
from hrvlm_kernels.triton_kernels.attention_tiles import column_blocks
from hrvlm_kernels.triton_kernels.tilings import Tiling, table_head_dim

HEAD_DIMS = (32, 64, 72, 80, 96, 128)
_HEADS = 16


def attention_jobs(target, *, head_dims=HEAD_DIMS, dtypes=(torch.bfloat16, torch.float32)):
    """Every entry of the tables, with 16 heads, with RoPE and with shared heads of k and v."""
    for head_dim in head_dims:
        for dtype in dtypes:
            ropes = (False, True) if folds_rope(dtype, head_dim) else (False,)
            for rope in ropes:
                yield from _forward_jobs(target, head_dim, dtype, rope)
                yield from _backward_jobs(target, head_dim, dtype, rope)
                if rope:
                    yield from _short_jobs(target, head_dim, dtype)


def distinct_jobs(target, head_dim):
    """Those of :func:`attention_jobs` that no other one stands for.

    A kernel with RoPE does all that it does without, and more. Float32 heads of 128 stand for
    narrower ones in one block of columns, and those of 72, which are masked, for two blocks.
    """
    dtypes = (torch.bfloat16, torch.float32) if head_dim in (72, 128) else (torch.bfloat16,)
    every = list(attention_jobs(target, head_dims=[head_dim], dtypes=dtypes))
    rotated = {job.name.replace(" rope", "") for job in every if " rope " in job.name}
    for job in every:
        if job.name not in rotated:
            yield job


def _forward_jobs(target, head_dim, dtype, rope):
    skip = SHORT_SEQLEN if rope and short.select_short_tilings(target, head_dim, dtype) else 0
    tilings = forward.select_tilings(target, head_dim, dtype)
    make = partial(forward_job, head_dim, dtype, rope=rope, skip=skip)
    yield from of_row(make, tilings, "FORWARD", *_row(target, head_dim, dtype))


def _short_jobs(target, head_dim, dtype):
    tilings = short.select_short_tilings(target, head_dim, dtype)
    make = partial(short_job, head_dim, dtype)
    yield from of_row(make, tilings, "SHORT", *_row(target, head_dim, dtype))


def _backward_jobs(target, head_dim, dtype, rope):
    tilings = backward.select_tilings(target, head_dim, dtype)
    row = _row(target, head_dim, dtype)
    dq = partial(dq_job, head_dim, dtype, rope=rope)
    dkdv = partial(dkdv_job, head_dim, dtype, rope=rope)
    yield from of_row(dq, tilings.dq, "DQ", *row)
    yield from of_row(dkdv, tilings.dkdv, "DKDV", *row)


def _row(target, head_dim, dtype):
    return target, table_head_dim(head_dim), dtype.itemsize


def forward_job(head_dim, dtype, tiling, rope=False, *, group=1, skip=0):
    """The forward; `skip`: segments up to that length are left to another kernel."""
    signature, constants = _common("qkvo", head_dim, dtype, tiling, rope, group)
    ahead = tiling.order == "ahead"
    constants |= {"BM": tiling.rows, "BN": tiling.step, "AHEAD": ahead}
    constants |= {"SKIP": skip, "VIA_OUT": forward.rotates_via_out(head_dim, tiling)}
    widths = {"blocks": constants["BD"], "tails": constants["TAIL"]}
    for name, width in ((f"{a}_{part}", width) for a in "kv" for part, width in widths.items()):
        if ahead and width:
            signature[name] = f"tensordesc<{NAMES[dtype]}[{tiling.step}, 1, {width}]>"
        else:
            constants[name] = None
    name = f"forward{' ahead' if ahead else ''}"
    return _job(
        name, forward.varlen_attention_forward, signature, constants, head_dim, dtype, tiling, rope
    )


def gluon_job(head_dim, dtype, step, *, buffers=2, group=1):
    """The candidate that no table asks for, in blocks of `step` keys."""
    from benchmarks.candidates import varlen_attention_gluon as gluon

    tiling = Tiling(128, step, 4, buffers)
    signature, constants = _common("qkvo", head_dim, dtype, tiling, False, group)
    constants |= {"BN": step, "NB": buffers, "GROUPS": gluon.GROUPS, "REGISTERS": gluon.REGISTERS}
    for name in ("ROPE", "table", "BD", "TAIL", "PARTS"):
        del constants[name]
    kernel, options = gluon.varlen_attention_gluon, {"num_warps": tiling.num_warps}
    name = (
        f"varlen_attention forward gluon D={head_dim} {NAMES[dtype]} 128x{step} {buffers} buffers"
    )
    return Job(name, kernel, signature, constants, options, True)


def short_job(head_dim, dtype, tiling, *, group=1):
    """The forward of short images with RoPE."""
    signature, constants = _common("qkvo", head_dim, dtype, tiling, True, group)
    constants |= {"BM": tiling.rows, "BN": tiling.step}
    signature["segments"] = "*i32:16"
    for name in ("cu_seqlens", "tiles"):
        del signature[name]
    for name in ("BD", "TAIL", "PARTS", "ROPE"):
        del constants[name]
    kernel = short.varlen_attention_short
    return _job("forward short", kernel, signature, constants, head_dim, dtype, tiling, True)


def dq_job(head_dim, dtype, tiling, rope=False, *, group=1):
    """Dq and delta."""
    names = ["q", "k", "v", "o", "g", "dq"]
    signature, constants = _common(names, head_dim, dtype, tiling, rope, group)
    constants |= {"BM": tiling.rows, "BN": tiling.step}
    signature["delta"] = "*fp32:16"
    kernel = backward.varlen_attention_dq
    return _job("dq", kernel, signature, constants, head_dim, dtype, tiling, rope)


def dkdv_job(head_dim, dtype, tiling, rope=False, *, group=1):
    """Dk and dv."""
    names = ["q", "k", "v", "g", "dk", "dv"]
    signature, constants = _common(names, head_dim, dtype, tiling, rope, group)
    constants |= {"BM": tiling.step, "BN": tiling.rows}
    signature["delta"] = "*fp32:16"
    if group > 1:
        signature |= {"dk": "*fp32:16", "dv": "*fp32:16"}
    kernel = backward.varlen_attention_dkdv
    return _job("dk, dv", kernel, signature, constants, head_dim, dtype, tiling, rope)


def _common(names, head_dim, dtype, tiling, rope, group):
    """Arguments that the kernels share; `names` are the tensors [T, H, D]."""
    pointer = f"*{NAMES[dtype]}:16"
    signature = {"out" if name == "o" else name: pointer for name in names}
    signature |= {"lse": "*fp32:16", "cu_seqlens": "*i32:16", "tiles": "*i32:16"}
    signature |= {"T": "i32", "scale": "fp32"}
    signature |= {f"stride_{name}{axis}": "i32:16" for name in names for axis in "th"}
    constants = {"H": _HEADS, "GROUP": group, "D": head_dim, "ROPE": rope}
    constants |= {"PARTS": max(1, 64 // tiling.rows), **column_blocks(head_dim)}
    if rope:
        signature["table"] = "*fp32:16"
    else:
        constants["table"] = None
    return signature, constants


def _job(name, kernel, signature, constants, head_dim, dtype, tiling, rope):
    options = {"num_warps": tiling.num_warps, "num_stages": tiling.num_stages}
    tile = f"{tiling.rows}x{tiling.step} {tiling.num_warps} warps {tiling.num_stages} stages"
    full = f"varlen_attention {name} D={head_dim} {NAMES[dtype]}{' rope' if rope else ''} {tile}"
    tensor_core = dtype != torch.float32
    return Job(full, kernel, signature, constants, options, tensor_core)

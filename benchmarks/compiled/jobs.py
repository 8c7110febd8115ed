"""The kernels as they are shipped: signature and constants of every configuration, to compile.

``jobs(target)`` lists what the launchers would build on a chip for the sizes of common encoders.
"""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
import triton

from hrvlm_kernels.triton_kernels import bias_gelu as gelu
from hrvlm_kernels.triton_kernels import layer_norm_pixel_shuffle as norm
from hrvlm_kernels.triton_kernels import linear_gelu, linear_rope_2d, linear_swiglu
from hrvlm_kernels.triton_kernels import linear_residual_layer_norm as connection
from hrvlm_kernels.triton_kernels import normalize_patchify as patchify
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear as shuffle
from hrvlm_kernels.triton_kernels import pixel_shuffle_linear_backward as shuffle_backward
from hrvlm_kernels.triton_kernels import residual_layer_norm as residual
from hrvlm_kernels.triton_kernels import rope_2d as rope
from hrvlm_kernels.triton_kernels import swiglu as gated
from hrvlm_kernels.triton_kernels.tilings import table_head_dim, table_width

NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True)
class Job:
    """One kernel with one configuration; `options` are num_warps and the like."""

    name: str
    kernel: object
    signature: dict[str, str]
    constants: dict[str, object]
    options: dict[str, int] = field(default_factory=dict)
    tensor_core: bool = False
    row: tuple[str | int, ...] = ()  # (table, *row) that its tile sizes stand in
    tiles: object = None


def of_row(make, configs, table, *row):
    """``make(config)`` for the tile sizes of a row; each says which they are."""
    for config in configs:
        yield replace(make(config), row=(table, *row), tiles=config)


def rope_jobs(target, *, head_dims=(32, 64, 128), dtypes=(torch.bfloat16, torch.float32)):
    """rope_2d on slices of a packed qkv with 16 heads; every entry of its table."""
    for head_dim in head_dims:
        for dtype in dtypes:
            row = target, table_head_dim(head_dim), dtype.itemsize
            configs = [rope.select_config(target, head_dim, dtype)]
            yield from of_row(partial(rope_job, head_dim, dtype), configs, "ROPE", *row)


def rope_job(head_dim, dtype, config, *, heads=16):
    """Q and k are slices of a packed qkv."""
    pointer = f"*{NAMES[dtype]}:16"
    signature = dict.fromkeys(("q", "k", "q_out", "k_out"), pointer)
    signature |= {"coords": "*fp32:16", "inv_freq": "*fp32:16", "T": "i32"}
    for tensor in ("q", "k", "qo", "ko"):
        signature |= {f"stride_{tensor}t": "i32:16", f"stride_{tensor}h": "i32:16"}
    constants = dict.fromkeys(("stride_qd", "stride_kd", "stride_qod", "stride_kod"), 1)
    constants |= {"stride_ct": 2, "stride_ca": 1, "stride_f": 1}
    constants |= {"HQ": heads, "HK": heads, "D": head_dim, "INVERSE": False}
    constants |= {"BT": config.block_t, "BH": config.block_h}
    constants |= {"BD": triton.next_power_of_2(head_dim // 2)}
    options = {"num_warps": config.num_warps}
    name = f"rope_2d D={head_dim} {NAMES[dtype]}"
    return Job(name, rope.rope_2d, signature, constants, options)


def pixel_shuffle_jobs(target, *, dtypes=(torch.bfloat16, torch.float32)):
    """Forward, dx and dweight with C = 1024, factor 4: every configuration of the target."""
    for dtype in dtypes:
        for part in ("forward", "dx", "dweight"):
            make = partial(pixel_shuffle_job, part, dtype)
            configs = shuffle.select_configs(target, dtype)
            yield from of_row(make, configs, "GEMM", target, dtype.itemsize)
    config = shuffle.parts_config(target, dtypes[0], shuffle.select_configs(target, dtypes[0])[0])
    for part in ("forward", "dweight"):
        make = partial(pixel_shuffle_job, part, dtypes[0], split=True)
        yield from of_row(make, [config], "GEMM_PARTS", target, dtypes[0].itemsize)


def pixel_shuffle_job(
    part, dtype, config, *, channels=1024, factor=4, precision="ieee", split=False
):
    """The forward, "dx" or "dweight"; `split` is a part of a sum."""
    pointer, index = f"*{NAMES[dtype]}:16", {"index": "*i32:16"}
    out = "*fp32:16" if split else pointer
    tiling = shuffle.tile_arguments(config)
    options = {name: tiling.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"C": channels, "S": factor, "PRECISION": precision, **tiling}
    sizes = {"M": "i32", "N": "i32:16"}
    if part == "forward":
        kernel = shuffle.pixel_shuffle_linear_forward
        signature = {"x": pointer, "weight": pointer, "bias": pointer, "out": out} | index | sizes
        strides = ("xt", "wn", "op", "om")
        constants |= {"stride_xc": 1, "stride_wk": 1, "stride_b": 1, "HAS_BIAS": not split}
        signature["steps"] = "i32"
        if split:
            del signature["bias"]
            constants["bias"] = None
    elif part == "dx":
        kernel = shuffle_backward.pixel_shuffle_linear_dx
        signature = {"dy": pointer, "weight": pointer, "dx": pointer} | index | sizes
        strides = ("ym", "wn", "xt")
        constants |= {"stride_yn": 1, "stride_wk": 1, "EVEN_N": True}
    else:
        kernel = shuffle_backward.pixel_shuffle_linear_dweight
        signature = {"dy": pointer, "x": pointer, "dw": out} | index | sizes | {"steps": "i32"}
        strides = ("ym", "xt", "dp", "dn")
        constants |= {"stride_yn": 1, "stride_xc": 1}
    signature |= {f"stride_{name}": "i32:16" for name in strides}
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    name = f"pixel_shuffle_linear {part}{' part' if split else ''} {tile} {NAMES[dtype]}"
    # Exact float32 products run on the ordinary units of NVIDIA's chips.
    tensor_core = dtype != torch.float32 or precision != "ieee"
    return Job(name, kernel, signature, constants, options, tensor_core)


def layer_norm_jobs(target, *, widths=(384, 1024, 4096), dtype=torch.bfloat16):
    """Forward and backward of layer_norm_pixel_shuffle, factor 4."""
    for width in widths:
        for backward in (False, True):
            make = partial(layer_norm_job, width, dtype, backward=backward)
            yield from _norm_row(make, target, width, backward)


def layer_norm_job(width, dtype, config, backward):
    """Forward or backward of layer_norm_pixel_shuffle, factor 4, weights in float32."""
    pointer = f"*{NAMES[dtype]}:16"
    signature = {
        "x": pointer,
        "index": "*i32:16",
        "weight": "*fp32:16",
        "rows": "i32",
        "eps": "fp32",
    }
    signature["stride_xt"] = "i32:16"
    constants = {"stride_xc": 1, "C": width, "BR": config.rows}
    constants["BC"] = triton.next_power_of_2(width)
    kernel = norm.layer_norm_pixel_shuffle_forward
    if backward:
        kernel = norm.layer_norm_pixel_shuffle_backward
        signature |= {"dy": pointer, "dx": pointer, "blocks": "i32", "stride_ym": "i32:16"}
        signature |= {"dw_parts": "*fp32:16", "db_parts": "*fp32:16"}
        constants |= {"stride_yk": 1, "PATCHES": 16}
    else:
        signature |= {"bias": "*fp32:16", "out": pointer}
        constants["HAS_BIAS"] = True
    name = f"layer_norm_pixel_shuffle {'backward' if backward else 'forward'} C={width}"
    return Job(name, kernel, signature, constants, {"num_warps": config.num_warps})


def _norm_row(make, target, width, backward):
    configs = [norm.select_config(target, width, backward=backward)]
    table = "NORM_BACKWARD" if backward else "NORM_FORWARD"
    return of_row(make, configs, table, target, table_width(width))


def residual_jobs(target, *, widths=(384, 1024, 4096), dtype=torch.bfloat16):
    """Forward and backward of residual_layer_norm."""
    for width in widths:
        for backward in (False, True):
            make = partial(residual_job, width, dtype, backward=backward)
            yield from _norm_row(make, target, width, backward)


def residual_job(width, dtype, config, backward, *, update=True, shift=False):
    """Forward or backward of residual_layer_norm, weights in float32.

    Without an update the forward is shifted_layer_norm's, and the backward that of
    linear_residual_layer_norm, which has a shift in its forward.
    """
    pointer = f"*{NAMES[dtype]}:16"
    names = ["g", "h", "out", "dx", "dupdate"] if backward else ["x"]
    names += ["update"] if update else []
    signature = dict.fromkeys(names, pointer) | {"T": "i32", "eps": "fp32"}
    signature |= {"scale": "*fp32:16", "weight": "*fp32:16"}
    constants = {"C": width, "BR": config.rows, "BC": triton.next_power_of_2(width)}
    strided = ("gh" if backward else "x") + ("u" if update else "")
    signature |= {f"stride_{name}t": "i32:16" for name in strided}
    constants |= {f"stride_{name}c": 1 for name in strided} | {"HAS_UPDATE": update}
    if not update:
        constants |= {"update": None, "stride_ut": 0, "stride_uc": 0}
    if backward:
        kernel = residual.residual_layer_norm_backward
        signature |= dict.fromkeys(("ds_parts", "dw_parts", "db_parts"), "*fp32:16")
        signature["blocks"] = "i32"
        name = "backward" if update else "backward in parts"
    else:
        kernel = residual.residual_layer_norm_forward
        signature |= {"bias": "*fp32:16", "normed": pointer}
        constants |= {"HAS_BIAS": True, "HAS_SHIFT": shift}
        for argument, there in (("out", update), ("scale", update), ("shift", shift)):
            kind = pointer if argument == "out" else "*fp32:16"
            signature.pop(argument, None)
            (signature if there else constants)[argument] = kind if there else None
        name = ("forward, shifted" if shift else "forward") if update else "of a shifted stream"
    return Job(
        f"residual_layer_norm {name} C={width}",
        kernel, signature, constants, {"num_warps": config.num_warps},
    )  # fmt: skip


def connection_jobs(target, *, widths=(1024, 4096), dtype=torch.bfloat16):
    """What linear_residual_layer_norm and shifted_layer_norm add to residual_layer_norm."""
    for width in widths:
        for update, backward in ((True, False), (False, False), (False, True)):
            make = partial(
                residual_job, width, dtype, backward=backward, update=update, shift=not backward
            )
            yield from _norm_row(make, target, width, backward)
    pointer, inner = f"*{NAMES[dtype]}:16", 4096
    signature = dict.fromkeys(
        ("product", "weight", "scale", "bias", "dweight", "vectors", "of_norm"), pointer
    )
    signature |= {"parts": "*fp32:16", "count": "i32", "C": "i32:16"}
    constants = {
        "K": inner, "HAS_BIAS": True, "BC": connection.ROWS, "BK": connection.COLUMNS,
        "BP": connection.PARTS,
    }  # fmt: skip
    yield Job(
        f"linear_residual_layer_norm gradients K={inner}",
        connection.linear_residual_layer_norm_gradients,
        signature,
        constants,
        {"num_warps": connection.WARPS},
    )  # fmt: skip


def gelu_jobs(target, *, dtypes=(torch.bfloat16, torch.float32)):
    """bias_gelu, forward, backward and the sum of its parts; nothing depends on F."""
    for dtype in dtypes:
        config = gated.select_config(target, dtype)
        options = {"num_warps": config.num_warps}
        pointer = f"*{NAMES[dtype]}:16"
        names = dict.fromkeys(("x", "bias", "out"), pointer) | {"F": "i32:16"}
        yield Job(
            f"bias_gelu forward {NAMES[dtype]}", gelu.bias_gelu_forward, names,
            {"BLOCK": config.elements}, options,
        )  # fmt: skip
        names = dict.fromkeys(("g", "x", "bias", "dx"), pointer) | {"parts": "*fp32:16"}
        names |= {"T": "i32", "F": "i32:16", "blocks": "i32"}
        rows, columns = gelu.tile_of(config)
        yield Job(
            f"bias_gelu backward {NAMES[dtype]}", gelu.bias_gelu_backward, names,
            {"BR": rows, "BF": columns}, options,
        )  # fmt: skip
        names = {"parts": "*fp32:16", "out": pointer, "count": "i32", "F": "i32:16"}
        yield Job(
            f"bias_gelu, adding parts {NAMES[dtype]}", gelu.bias_gelu_add_parts, names,
            {"BF": gelu.SUM_COLUMNS}, {"num_warps": 1},
        )  # fmt: skip


def linear_jobs(target, *, dtypes=(torch.bfloat16, torch.float32)):
    """Products with more in their epilogues, with every tile of their tables, else of GEMM."""
    for op in ("linear_gelu", "linear_swiglu", "linear_rope_2d"):
        for dtype in dtypes:
            table = op.upper()
            configs = linear_gelu.configs_of(table, target, dtype)
            yield from of_row(
                partial(linear_job, op, dtype), configs, table, target, dtype.itemsize
            )


def linear_job(op, dtype, config):
    """With biases, and contiguous weights; heads of 64."""
    pointer = f"*{NAMES[dtype]}:16"
    kernel, inputs = {
        "linear_gelu": (linear_gelu.linear_gelu_forward, ("weight", "bias")),
        "linear_swiglu": (
            linear_swiglu.linear_swiglu_forward, ("gate", "up", "gate_bias", "up_bias")
        ),
        "linear_rope_2d": (linear_rope_2d.linear_rope_2d_forward, ("weight", "bias", "table")),
    }[op]  # fmt: skip
    signature = dict.fromkeys(("x", *inputs, "out"), pointer) | {"T": "i32"}
    signature |= dict.fromkeys(("F", "C", "stride_xt", "stride_wf"), "i32:16")
    tiling = shuffle.tile_arguments(config)
    options = {name: tiling.pop(name) for name in ("num_warps", "num_stages")}
    constants = {"stride_xc": 1, "stride_wc": 1, "EVEN_C": True, "HAS_BIAS": True, **tiling}
    constants["PRECISION"] = "ieee"
    if op == "linear_rope_2d":
        signature["table"] = "*fp32:16"
        constants |= {"D": 64, "HEADS": linear_rope_2d.heads_of_tile(64, config.block_n)}
        constants["ALIGNED"] = True
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
    # Exact float32 products run on the ordinary units of NVIDIA's chips.
    tensor_core = dtype != torch.float32
    return Job(f"{op} {tile} {NAMES[dtype]}", kernel, signature, constants, options, tensor_core)


def swiglu_jobs(target, *, dtypes=(torch.bfloat16, torch.float32)):
    """Forward and backward of swiglu; nothing depends on F."""
    for dtype in dtypes:
        for backward in (False, True):
            make = partial(swiglu_job, dtype, backward=backward)
            configs = [gated.select_config(target, dtype)]
            yield from of_row(make, configs, "SWIGLU", target, dtype.itemsize)


def swiglu_job(dtype, config, backward):
    """Forward or backward; gate and up may be halves of one product."""
    names = ("g", "gate", "up", "dgate", "dup") if backward else ("gate", "up", "out")
    strided = "ygu" if backward else "gu"
    signature = dict.fromkeys(names, f"*{NAMES[dtype]}:16") | {"F": "i32:16"}
    signature |= {f"stride_{name}t": "i32:16" for name in strided}
    constants = {f"stride_{name}f": 1 for name in strided} | {"BLOCK": config.elements}
    kernel = gated.swiglu_backward if backward else gated.swiglu_forward
    name = f"swiglu {'backward' if backward else 'forward'} {NAMES[dtype]}"
    return Job(name, kernel, signature, constants, {"num_warps": config.num_warps})


def patchify_jobs(target, *, patch_sizes=(16, 14), dtypes=(torch.bfloat16, torch.float32)):
    """normalize_patchify of contiguous images."""
    for patch_size in patch_sizes:
        for dtype in dtypes:
            make = partial(patchify_job, dtype, patch_size=patch_size)
            configs = [patchify.select_config(target, dtype)]
            yield from of_row(make, configs, "PATCHIFY", target, dtype.itemsize)


def patchify_job(dtype, config, patch_size=16):
    """Images of bytes, one launch for each size."""
    aligned = ":16" if patch_size == 16 else ""  # 14 divides sides that 16 does not
    signature = {"image": "*u8:16", "out": f"*{NAMES[dtype]}:16", "hp": "i32", "wp": "i32"}
    signature |= {f"{name}_{c}": "fp32" for name in ("scale", "shift") for c in range(3)}
    signature |= {f"stride_{name}": f"i32{aligned}" for name in "bcy"}
    elements = triton.next_power_of_2(patch_size**2)
    constants = {"stride_x": 1, "P": patch_size, "BE": elements}
    constants["BN"] = config.elements // elements
    name = f"normalize_patchify p={patch_size} {NAMES[dtype]}"
    options = {"num_warps": config.num_warps}
    return Job(name, patchify.normalize_patchify, signature, constants, options)


def small_jobs(target):
    """Beside the large ones: adding parts of a sum, zeroing prefix rows, a table of cos and sin."""
    signature = {"parts": "*fp32:16", "bias": "*bf16:16", "out": "*bf16:16"}
    signature |= {"n_parts": "i32", "size": "i32", "N": "i32:16"}
    constants = {"stride_b": 1, "HAS_BIAS": True, "BLOCK": 1024}
    yield Job("add_parts", shuffle.pixel_shuffle_linear_add_parts, signature, constants)
    signature = {"dx": "*bf16:16", "cu_seqlens": "*i32:16", "C": "i32:16", "stride_xt": "i32:16"}
    constants = {"stride_xc": 1, "PREFIX": 5, "BLOCK": 1024}
    yield Job(
        "zero_prefix", shuffle_backward.pixel_shuffle_linear_zero_prefix, signature, constants
    )
    signature = dict.fromkeys(("coords", "inv_freq", "table"), "*fp32:16") | {"T": "i32"}
    constants = {"stride_ct": 2, "stride_ca": 1, "stride_f": 1, "D": 64, "BT": 32, "BD": 32}
    yield Job("rope_2d_table", rope.rope_2d_table, signature, constants)


def jobs(target):
    """Everything above."""
    for make in (
        rope_jobs,
        pixel_shuffle_jobs,
        layer_norm_jobs,
        residual_jobs,
        connection_jobs,
        gelu_jobs,
        linear_jobs,
        swiglu_jobs,
        patchify_jobs,
        small_jobs,
    ):
        yield from make(target)

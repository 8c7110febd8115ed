"""Why some faults in compiled kernels do nothing: nothing notices them, and nothing has to.

Each is listed, by its number among the places of its kind and by its line of source: a fault that
was noticed and no longer is, or one in a new place, has no reason here and fails its test. After a
change of a kernel the places are others; what ``COMPILED=all`` then says is unexplained gets an
entry once it is explained. The same goes for Triton: the list holds for the release it names, and
with others the reason of a kind is taken at every place.
"""

import re
from collections.abc import Mapping

import triton

from tests.compiled.faults import Fault

WHY = {
    # Vector clocks leave nothing to luck: with the barrier dropped, every two accesses of different
    # warps to the same bytes, one of them a write, are still ordered by the other barriers.
    "barrier dropped": (
        "the vector clocks find no pair of accesses without order: another barrier orders them, or "
        "they are one warp's"
    ),
    # What is in flight is known byte by byte. At the end of a pipelined loop the newest groups are
    # those of copies past the end, which are masked off.
    "wait dropped": (
        "nothing is in flight there: the groups it waits for are empty, or were waited for before"
    ),
    "wait a group short": (
        "the groups it waits for are empty, were waited for before, or are before they are read"
    ),
    "fence dropped": "another fence lies between the same writes and reads",
    # With q in registers, nothing that a product reads was written by an ordinary store.
    "fence before a load dropped": (
        "it lies between ordinary accesses and a TMA load into the same bytes, which the machine "
        "does not follow"
    ),
}
# Masks that let one element more in: (kernel, what the line of source contains, why).
EMPTY_TURN = "one more turn of a loop, in which everything is masked"
FIRST_ROW = "the first row of a program: there is no program without rows"
MASKS = (
    # Attention's are many, all by one function.
    (
        "attention",
        "return tl.load(p_rows, mask=(rows < n)",
        "a row past the end of the segment: read, but nothing that it gives is stored",
    ),
    ("pixel_shuffle_linear, prefix rows", "for c in range(0, C, BLOCK)", EMPTY_TURN),
    ("pixel_shuffle_linear dweight", "for step in range(begin,", EMPTY_TURN),
    ("linear_rope_2d", "for start in range(0, C, BK)", EMPTY_TURN),
    ("linear_rope_2d", "m_p = i_p < F // 2", "the first head of a tile: no tile is without heads"),
    ("linear_residual_layer_norm gradients", "for start in range(0, count, BP)", EMPTY_TURN),
    ("residual_layer_norm forward", "mask = (i_t < T)", FIRST_ROW),
    ("layer_norm_pixel_shuffle forward", "m_r, m_c = i_r < rows", FIRST_ROW),
)

RELEASE = "3.6."  # of Triton, that the list is for
LOOP, LOOP_AHEAD = "for s in range(0, last,", "for s in range(BN, last,"
AFTER_THE_LOOP = (("wait dropped", 1, LOOP), ("wait a group short", 1, LOOP))
Places = tuple[tuple[str, int, str], ...]  # kind, number, what the line of source contains
# By chip and kernel, in the words of faults.subjects().
SILENT: Mapping[tuple[str, str], Places] = {
    ("sm_80", "attention forward"): AFTER_THE_LOOP,
    ("sm_80", "attention forward, D=128, RoPE"): AFTER_THE_LOOP,
    ("sm_80", "attention dq"): AFTER_THE_LOOP,
    ("sm_80", "attention dk, dv"): AFTER_THE_LOOP,
    ("sm_80", "pixel_shuffle_linear forward"): (
        ("barrier dropped", 0, "b_x, b_w = tl.load(p_x), tl.load(p_w)"),
        ("wait a group short", 1, "for step in range(begin,"),
    ),
    ("sm_80", "pixel_shuffle_linear dx"): (("barrier dropped", 0, "b_w = tl.load(p_w,"),),
    ("sm_80", "pixel_shuffle_linear dweight"): (("barrier dropped", 0, "row = tl.load(index"),),
    ("sm_90", "attention forward, ahead"): (
        ("barrier dropped", 0, "b = blocks.load([row, head, 0])"),
        ("barrier dropped", 17, LOOP_AHEAD),
        ("fence dropped", 2, "s = tl.dot(a[0], b[0].T,"),
    ),
    ("sm_90", "attention forward, ahead, RoPE"): (
        ("barrier dropped", 20, LOOP_AHEAD),
        ("fence before a load dropped", 0, "b = blocks.load([row, head, 0])"),
    ),
    ("sm_90", "attention forward, plain"): (
        ("barrier dropped", 4, LOOP),
        ("wait dropped", 5, LOOP),
        ("wait a group short", 5, LOOP),
        ("fence dropped", 2, "qk = tl.dot(b_q[0], b_k.T,"),
    ),
    ("sm_90", "attention dq"): (
        ("wait dropped", 7, LOOP),
        ("wait a group short", 7, LOOP),
        ("fence dropped", 2, "first = tl.dot(s, b[0], acc"),
        ("fence dropped", 3, "s = tl.dot(a[0], b[0].T,"),
    ),
    ("sm_90", "attention dk, dv"): (
        ("wait a group short", 8, LOOP),
        ("fence dropped", 2, "first = tl.dot(s, b[0], acc"),
        ("fence dropped", 4, "s = tl.dot(a[0], b[0].T,"),
    ),
    ("sm_90", "pixel_shuffle_linear forward"): (
        ("barrier dropped", 0, "b_x, b_w = tl.load(p_x), tl.load(p_w)"),
        ("wait a group short", 3, "for step in range(begin,"),
    ),
    ("sm_90", "pixel_shuffle_linear dx"): (("barrier dropped", 0, "b_w = tl.load(p_w,"),),
    ("sm_90", "pixel_shuffle_linear dweight"): (
        ("barrier dropped", 0, "row = tl.load(index"),
        ("wait a group short", 3, "for step in range(begin,"),
    ),
    **{
        (chip, op): (
            ("barrier dropped", 0, "b_x, b_w = tl.load(p_x), tl.load(p_wc)"),
            ("wait a group short", number, "for start in range(0, C, BK)"),
        )
        for chip, number in (("sm_80", 1), ("sm_90", 3))
        for op in ("linear_gelu", "linear_swiglu")
    },
    ("sm_80", "linear_rope_2d"): (
        ("barrier dropped", 0, "b_x, b_w = tl.load(p_x), tl.load(p_wc)"),
        ("wait a group short", 1, "for start in range(0, C, BK)"),
    ),
    ("sm_90", "linear_rope_2d"): (
        ("barrier dropped", 0, "b_x, b_w = tl.load(p_x), tl.load(p_wc)"),
        ("barrier dropped", 7, "tl.store(p_out, left.to("),
        ("wait a group short", 3, "for start in range(0, C, BK)"),
    ),
    **{
        (chip, f"{norm} backward"): (("barrier dropped", 0, "mean = tl.sum(b_x, 1)"),)
        for chip in ("sm_80", "sm_90")
        for norm in ("residual_layer_norm", "layer_norm_pixel_shuffle")
    },
}


def reason_for(subject: str, fault: Fault) -> str:
    """Why the fault does nothing; "" if that is not known."""
    if fault.kind == "mask off by one":
        whys = (w for name, line, w in MASKS if subject.startswith(name) and line in fault.place)
        return next(whys, "")
    if not triton.__version__.startswith(RELEASE):
        return WHY.get(fault.kind, "")
    chip = re.search(r"^\.target (sm_\d+)", fault.ptx, re.M)
    assert chip, "PTX without a target"
    for kind, number, line in SILENT.get((chip[1], subject), ()):
        same = kind.replace(" before a load", "") == fault.kind and number == fault.number
        if same and line in fault.place:
            return WHY[kind]
    return ""

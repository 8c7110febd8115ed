"""varlen_attention's kernels compiled for chips that are not here: resources and instructions."""

import pytest
import torch

from benchmarks.compiled.attention_jobs import (
    distinct_jobs,
    dkdv_job,
    dq_job,
    forward_job,
    gluon_job,
)
from benchmarks.compiled.compiler import TARGETS, assert_clean, submit_compile
from hrvlm_kernels.attention_problem import folds_rope
from hrvlm_kernels.triton_kernels import varlen_attention as forward
from hrvlm_kernels.triton_kernels import varlen_attention_backward as backward
from hrvlm_kernels.triton_kernels.varlen_attention_short import select_short_tilings

BF16 = torch.bfloat16


def compile_all(jobs, target):
    """(job, compiled kernel) of each job, in order."""
    jobs = list(jobs)
    results = [
        submit_compile(job.kernel, job.signature, job.constants, target, **job.options)
        for job in jobs
    ]
    return [(job, result.result()) for job, result in zip(jobs, results, strict=True)]


def check_built(job, built):
    assert_clean(built, tensor_core=job.tensor_core)
    # Triton 3.6 has made kernels of 16 instructions for sm_100, without a word.
    assert built.instructions > 500, job.name
    if not job.tensor_core and built.target.startswith("sm_"):
        assert built.tensor_core_ops == 0, f"{job.name} on {built.target}: not float32 products"


def skipped(head_dim, rope):
    """Up to which length segments are left to the kernel for short images, as shipped."""
    tilings = select_short_tilings("sm_90", head_dim, BF16) if rope else ()
    return tilings[0].step if tilings else 0


@pytest.mark.parametrize("rope", (False, True))
def test_ahead_runs_the_softmax_beside_the_tensor_cores(rope):
    """A thread has 64 scores of a block: most of their exps stand behind the issue of p v.

    It takes the tensor cores as long as 32 of them take a thread.
    """
    tilings, skip = forward.select_tilings("sm_90", 64, BF16), skipped(64, rope)
    jobs = [forward_job(64, BF16, tiling, rope, skip=skip) for tiling in tilings]
    (_, ahead), (_, plain) = compile_all(jobs, "sm_90")
    assert ahead.exps_beside_wgmma >= 40
    assert ahead.spills == 0
    assert ahead.ops["UTMALDG"] >= 4
    assert plain.exps_beside_wgmma < 16
    assert plain.ops["LDGSTS"] >= 8  # asynchronous copies of 16 bytes
    assert ahead.loop_instructions <= 7.4 * 64
    assert plain.loop_instructions < 1.05 * 273


@pytest.mark.parametrize(("head_dim", "exps"), [(32, 28), (72, 48), (96, 48), (128, 48)])
def test_ahead_does_so_for_other_heads(head_dim, exps):
    """With RoPE, which may take the registers that it needs."""
    tiling = forward.select_tilings("sm_90", head_dim, BF16)[0]
    assert tiling.order == "ahead"
    ways = [(False, 0)]
    if folds_rope(BF16, head_dim):
        ways += [(True, skip) for skip in {0, skipped(head_dim, True)}]
    jobs = [forward_job(head_dim, BF16, tiling, rope, skip=skip) for rope, skip in ways]
    for _, built in compile_all(jobs, "sm_90"):
        assert built.exps_beside_wgmma >= exps


def test_the_gluon_candidate_has_warps_that_load_and_warps_that_compute():
    for job, built in compile_all([gluon_job(d, BF16, 64) for d in (64, 128)], "sm_90"):
        check_built(job, built)
        assert built.num_warps == 12  # four for each group that computes, four to load
        assert built.ops["USETMAXREG"] >= 3
        assert built.exps_beside_wgmma >= 24


@pytest.mark.parametrize("target", ("sm_80", "sm_90", "sm_100"))
def test_heads_in_two_blocks_of_columns(target):
    """72 masks columns and 96 has the most registers: nothing spills, not even around the loop."""
    jobs = []
    for head_dim in (72, 96):
        tilings = backward.select_tilings(target, head_dim, BF16)
        for make, row in (
            (forward_job, forward.select_tilings(target, head_dim, BF16)),
            (dq_job, tilings.dq),
            (dkdv_job, tilings.dkdv),
        ):
            jobs += [make(head_dim, BF16, tiling) for tiling in row]
    for job, built in compile_all(jobs, target):
        check_built(job, built)
        assert built.spills == 0
        # One HMMA takes 16 rows, 8 keys and 16 columns; in the loop and in the last block.
        if target == "sm_80" and " forward " in job.name:
            rows, keys = job.constants["BM"] // built.num_warps, job.constants["BN"]
            columns = 80 if job.constants["D"] == 72 else 96
            assert built.tensor_core_ops == 2 * 2 * (rows // 16) * (keys // 8) * (columns // 16)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", (32, 64, 72, 80, 96, 128))
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target, head_dim):
    for job, built in compile_all(distinct_jobs(target, head_dim), target):
        check_built(job, built)


@pytest.mark.parametrize("target", TARGETS)
def test_float16_and_shared_heads(target):
    fp16 = torch.float16
    jobs = [
        forward_job(64, fp16, forward.select_tilings(target, 64, fp16)[0], group=4),
        dkdv_job(64, fp16, backward.select_tilings(target, 64, fp16).dkdv[0], group=4),
    ]
    for job, built in compile_all(jobs, target):
        check_built(job, built)

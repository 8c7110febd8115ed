"""varlen_attention's kernels compiled for chips that are not here: resources and instructions."""

import re

import pytest
import torch

from hrvlm_kernels import varlen_attention_backward_triton as backward
from hrvlm_kernels import varlen_attention_triton as forward
from tests.kernels.compile_checks import TARGETS, assert_clean, submit_compile
from tests.kernels.shipped_attention import (
    HEAD_DIMS,
    attention_jobs,
    dkdv_job,
    dq_job,
    forward_job,
)

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
    assert built.instructions > (100 if "delta" in job.name else 500), job.name
    if not job.tensor_core and built.target.startswith("sm_"):
        assert built.tensor_core_ops == 0, f"{job.name} on {built.target}: not float32 products"


def exps_beside_wgmma(asm):
    """The most exps that stand between the issue of a wgmma and the next wait."""
    most = count = 0
    issued = False
    for line in asm.splitlines():
        if re.search(r"\bHGMMA", line):
            issued = True
        elif "WARPGROUP.DEPBAR" in line:
            issued, count = False, 0
        elif issued and "MUFU.EX2" in line:
            count += 1
            most = max(most, count)
    return most


@pytest.mark.parametrize("target", TARGETS)
def test_head_dim_64(target):
    tilings = backward.select_tilings(target, 64, BF16)
    jobs = [
        forward_job(64, BF16, forward.select_tilings(target, 64, BF16)[0], rope=True),
        dq_job(64, BF16, tilings.dq[0], rope=True),
        dkdv_job(64, BF16, tilings.dkdv[0], rope=True),
        dkdv_job(64, BF16, tilings.atomic[0], rope=True, atomic=True),
    ]
    for job, built in compile_all(jobs, target):
        check_built(job, built)


def test_ahead_runs_the_softmax_beside_the_tensor_cores():
    """A thread has 64 scores of a block: their exps stand behind the issue of the next q.k."""
    tilings = forward.select_tilings("sm_90", 64, BF16)
    jobs = [forward_job(64, BF16, tiling) for tiling in tilings]
    (_, ahead), (_, plain) = compile_all(jobs, "sm_90")
    assert exps_beside_wgmma(ahead.asm) >= 48
    assert ahead.ops["UTMALDG"] >= 4
    assert exps_beside_wgmma(plain.asm) < 16
    assert plain.ops["LDGSTS"] >= 8  # asynchronous copies of 16 bytes
    assert ahead.loop_instructions / (128 * 128) < 1.05 * 505 / (128 * 128)
    assert plain.loop_instructions / (128 * 64) < 1.05 * 273 / (128 * 64)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration(target, head_dim):
    for job, built in compile_all(attention_jobs(target, head_dims=[head_dim]), target):
        check_built(job, built)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_float16_and_shared_heads(target):
    fp16 = torch.float16
    tilings = backward.select_tilings(target, 64, fp16)
    jobs = [
        forward_job(64, fp16, forward.select_tilings(target, 64, fp16)[0], group=4),
        dq_job(64, fp16, tilings.dq[0], group=4),
        dkdv_job(64, fp16, tilings.dkdv[0], group=4),
        dkdv_job(64, fp16, tilings.atomic[0], group=4, atomic=True),
    ]
    for job, built in compile_all(jobs, target):
        check_built(job, built)

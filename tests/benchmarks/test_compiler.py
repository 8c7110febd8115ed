"""benchmarks.compiled.compiler: what is recorded of a kernel is what the compilers make of it."""

import pytest
import torch

from benchmarks.compiled.compiler import TARGETS, compile_kernel
from benchmarks.compiled.jobs import swiglu_jobs


@pytest.mark.parametrize("target", TARGETS)
def test_the_record_is_what_the_compilers_say(target):
    job = next(iter(swiglu_jobs(target, dtypes=(torch.bfloat16,))))

    def of(constants, **options):
        options |= job.options
        return compile_kernel(job.kernel, job.signature, constants, target, **options)

    known = of(job.constants)
    assert known == of(job.constants, fresh=True)
    assert known != of(job.constants | {"BLOCK": 4 * job.constants["BLOCK"]})

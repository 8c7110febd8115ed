import json

import pytest
import torch
from typer.testing import CliRunner

from hrvlm.cli import app
from hrvlm.verification import rules
from hrvlm.verification.verify import BACKENDS, verify
from hrvlm_kernels import PackedGrids, pixel_shuffle_linear, reference, rope_2d, varlen_attention
from hrvlm_kernels.backends import OPS
from hrvlm_kernels.cpu_attention import attention

DIRECTIONS = {
    "rope_2d": {"forward", "backward"},
    "pixel_shuffle_linear": {"forward", "backward", "gather"},
    "layer_norm_pixel_shuffle": {"forward", "backward"},
    "varlen_attention": {"forward", "backward", "isolation"},
    "residual_layer_norm": {"forward", "backward"},
    "swiglu": {"forward", "backward"},
    "normalize_patchify": {"forward"},
    "encoder": {"forward", "backward"},
}


def failures(report) -> set[str]:
    return {check.what for check in report.checks if not check.passed}


def test_everything_that_runs_here_passes():
    seen = []
    report = verify("cpu", backends=["eager", "sdpa"], on_check=seen.append)
    assert {check.op for check in report.checks} == {*OPS, "encoder"} == set(DIRECTIONS)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert tuple(seen) == report.checks
    for dtype in ("float32", "bfloat16"):
        for op, directions in DIRECTIONS.items():
            with_attention = op in ("varlen_attention", "encoder")
            for backend in ("eager", "sdpa") if with_attention else ("eager",):
                found = [
                    check
                    for check in report.checks
                    if (check.op, check.backend, check.dtype) == (op, backend, dtype)
                ]
                assert {check.what for check in found} == directions
                assert all(
                    (check.error > 0) == (check.what in ("forward", "backward")) for check in found
                )


def test_float16_leaves_out_the_encoder_and_says_so():
    report = verify("cpu", dtypes=["float16"], ops=["rope_2d", "encoder"])
    assert report.passed and {check.op for check in report.checks} == {"rope_2d"}
    assert any(skip.ops == ("encoder",) and "overflow" in skip.reason for skip in report.skipped)


def test_backends_that_cannot_run_are_explained_or_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    report = verify("cpu", dtypes=["float32"], ops=["rope_2d"])
    reasons = {skip.backend: skip.reason for skip in report.skipped}
    assert "tensors are on the CPU" in reasons["triton"]
    assert "needs a GPU" in reasons["flash_attn"]
    with pytest.raises(ValueError, match=r"backend 'triton' can't run in float32: .* on the CPU"):
        verify("cpu", dtypes=["float32"], backends=["triton"])
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match=r"triton' can't run in bfloat16: .*interpreter"):
        verify("cpu", dtypes=["bfloat16"], backends=["triton"])


@pytest.mark.parametrize("field", ["dtypes", "backends", "ops"])
def test_unknown_names_are_refused(field):
    with pytest.raises(ValueError, match=f"{field[:-1]} must be one of .*got 'float33'"):
        verify("cpu", **{field: ["float33"]})


def unrotated(q, k, coords, inv_freq, *, backend):
    """3 of 16 frequencies left at angle 0."""
    return rope_2d(q, k, coords, torch.cat((inv_freq[:-3], torch.zeros(3))), backend=backend)


def transposed(x, packed, factor, weight, bias=None, *, backend):
    """(dx, dy) for (dy, dx)."""
    shape = (factor, factor, x.shape[1])
    weight = weight.unflatten(1, shape).transpose(1, 2).flatten(1)
    return pixel_shuffle_linear(x, packed, factor, weight, bias, backend=backend)


def across_images(q, k, v, packed, scale=None, *, backend, **_):
    """One attention over the whole pack."""
    everything = PackedGrids.from_lengths([packed.total_tokens])
    return varlen_attention(q, k, v, everything, scale, backend=backend)


def constant_keys(q, k, v, packed, scale=None, *, backend, **_):
    """The right output, without a gradient to k."""
    return varlen_attention(q, k.detach() + 0 * k, v, packed, scale, backend=backend)


def one_bad_row(q, k, v, packed, scale=None, *, backend, **_):
    out = varlen_attention(q, k, v, packed, scale, backend=backend)
    return torch.cat((out[:40], out[40:41] * 1.001, out[41:]))


def not_finite(q, k, v, packed, scale=None, *, backend, **_):
    return varlen_attention(q, k, v, packed, scale, backend=backend) * float("nan")


def half_precision(q, k, v, packed, scale=None, *, backend, **_):
    return reference.varlen_attention(q.half(), k.half(), v.half(), packed, scale)[0].float()


def raising(q, k, v, packed, scale=None, *, backend, **_):
    raise RuntimeError("out of resource: shared memory\nand more lines")


@pytest.mark.parametrize(
    ("op", "broken", "expected"),
    [
        ("rope_2d", unrotated, {"forward", "backward"}),
        ("pixel_shuffle_linear", transposed, {"forward", "backward", "gather"}),
        ("varlen_attention", across_images, {"forward", "backward", "isolation"}),
        ("varlen_attention", constant_keys, {"backward"}),
        ("varlen_attention", one_bad_row, {"forward", "backward"}),
        ("varlen_attention", not_finite, {"forward", "backward", "isolation"}),
        ("varlen_attention", half_precision, {"forward", "backward"}),
        ("varlen_attention", raising, {"forward", "backward", "isolation"}),
    ],
)
def test_a_broken_op_is_found(op, broken, expected, monkeypatch):
    monkeypatch.setattr(f"hrvlm.verification.cases.{op}", broken)
    report = verify("cpu", dtypes=["float32"], backends=["eager"], ops=[op])
    assert not report.passed and failures(report) == expected
    if broken is raising:
        assert {c.message for c in report.checks} == {
            "RuntimeError: out of resource: shared memory"
        }
    json.dumps(report.to_json(), allow_nan=False)


def test_a_broken_rope_is_found_in_bfloat16(monkeypatch):
    monkeypatch.setattr("hrvlm.verification.cases.rope_2d", unrotated)
    report = verify("cpu", dtypes=["bfloat16"], backends=["eager"], ops=["rope_2d"])
    assert failures(report) == {"forward", "backward"}


def test_a_broken_layer_is_found_by_the_encoder_check(monkeypatch):
    def one_backend_wrong(q, k, v, packed, scale=None, *, rope=None, backend):
        out = varlen_attention(q, k, v, packed, scale, rope=rope, backend=backend)
        return out * 1.0001 if backend == "sdpa" else out

    def wrong_attention(*inputs):  # what the encoder calls on a CPU without gradients
        return attention(*inputs) * 1.0001

    monkeypatch.setattr("hrvlm.encoder.layers.varlen_attention", one_backend_wrong)
    monkeypatch.setattr("hrvlm.encoder.cpu_blocks.attention", wrong_attention)
    report = verify("cpu", dtypes=["float32"], backends=["eager", "sdpa"], ops=["encoder"])
    found = {(check.backend, check.what) for check in report.checks if not check.passed}
    assert found == {("sdpa", "forward"), ("sdpa", "backward")}


def test_command_exits_1_on_a_failure_and_0_without(monkeypatch):
    arguments = ["verify", "--device", "cpu", "--dtype", "float32", "--backend", "eager"]
    arguments += ["--op", "varlen_attention"]
    good = CliRunner().invoke(app, arguments)
    assert good.exit_code == 0 and "all checks passed" in good.stdout
    monkeypatch.setattr("hrvlm.verification.cases.varlen_attention", across_images)
    bad = CliRunner().invoke(app, arguments)
    assert bad.exit_code == 1 and "3 of 3 checks FAILED" in bad.stdout
    as_json = CliRunner().invoke(app, [*arguments, "--json"])
    assert as_json.exit_code == 1
    document = json.loads(as_json.stdout)
    assert document["passed"] is False and len(document["checks"]) == 3
    assert {check["where"] for check in document["checks"]} >= {"segment 6, equal"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without GPU")
def test_the_triton_kernels_pass_in_the_interpreter():
    pytest.importorskip("triton")
    report = verify("cpu", dtypes=["float32"], backends=["triton"])
    assert report.passed, report.checks


@pytest.mark.gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_everything_passes_on_the_gpu(backend):
    dtypes = ["float16", "bfloat16"] + ["float32"] * (backend != "flash_attn")
    report = verify("cuda", dtypes=dtypes, backends=[backend])
    assert report.passed, [check for check in report.checks if not check.passed]
    assert {check.backend for check in report.checks} == {backend}


def test_only_the_float32_attention_of_torch_on_a_gpu_has_limits_of_its_own():
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert rules.factor_of("sdpa", torch.float32, gpu) == 8
    others = [("sdpa", torch.float32, cpu), ("sdpa", torch.bfloat16, gpu)]
    others += [(name, torch.float32, gpu) for name in BACKENDS if name != "sdpa"]
    assert {rules.factor_of(*other) for other in others} == {2}
    # A product in TF32, of 10 bits, is still found.
    oracle = torch.randn(50, 8, dtype=torch.float64)
    baseline, tf32 = (oracle + eps * oracle.norm(dim=1, keepdim=True) for eps in (3e-7, 3e-4))
    found = rules.contraction(tf32.float(), oracle, baseline.float(), factor=8)
    assert not any(finding.passed for finding in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [slice(0, 70), slice(3, 20), slice(25, 26)])
def test_contraction_rule_limits_the_whole_each_segment_and_the_worst_row(dtype, rows, rng):
    """An error 1.5 times the baseline's passes, 50 times fails wherever it is, in one row too."""
    packed = PackedGrids.from_lengths([3, 0, 17, 50])
    oracle = torch.randn(70, 4, 8, generator=rng, dtype=torch.float64)
    error = 8 * torch.finfo(dtype).eps * torch.randn(70, 4, 8, generator=rng).double()
    baseline = (oracle + error).to(dtype)
    for factor, passes in ((1.5, True), (50.0, False)):
        out = baseline.double()
        out[rows] = oracle[rows] + factor * error[rows]
        found = rules.contraction(out.to(dtype), oracle, baseline, packed)
        names = ["whole", "segment 0", "segment 2", "segment 3", "worst row"]
        assert [finding.part for finding in found] == names
        assert all(finding.passed for finding in found) == passes
    failed = {finding.part for finding in found if not finding.passed}
    assert "worst row" in failed and ("segment 2" in failed) == (rows.start < 20)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rope_rule_passes_the_rounded_result_and_fails_two_steps_beside_it(dtype, rng):
    packed = PackedGrids.from_grids([(3, 5)], num_prefix_tokens=1)
    inv_freq = 100.0 ** (-torch.arange(4) / 4)
    a = torch.randn(16, 2, 16, generator=rng).to(dtype)
    exact, bound = rules.rope_reference(a, packed.coords, inv_freq)
    out = exact.to(dtype)
    assert rules.rope(out, a, packed.coords, inv_freq)[0].passed
    out[5, 1, 3] = (exact + 1.5 * bound + torch.finfo(dtype).eps * exact.abs())[5, 1, 3].to(dtype)
    (found,) = rules.rope(out, a, packed.coords, inv_freq)
    assert not found.passed and found.used > 1


def test_terms_that_cancel_allow_their_own_roundings_and_no_more():
    packed = PackedGrids.from_lengths([1, 2])
    oracle = torch.tensor([[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    baseline = oracle.float()
    out = baseline.clone()
    out[0, 0] = 1e-7
    assert not all(f.passed for f in rules.contraction(out, oracle, baseline, packed))
    terms = torch.tensor([1.0, 0.0, 0.0])
    assert all(f.passed for f in rules.contraction(out, oracle, baseline, packed, terms=terms))
    out[0, 0] = 1e-6
    assert not all(f.passed for f in rules.contraction(out, oracle, baseline, packed, terms=terms))


@pytest.mark.parametrize(
    ("out", "part"),
    [
        (torch.zeros(2, 3), "shape"),
        (torch.zeros(3, 2, dtype=torch.bfloat16), "torch.bfloat16"),
        (torch.tensor([[0.0, 0.0], [float("inf"), 0.0], [0.0, 0.0]]), "not finite"),
    ],
)
def test_outputs_that_cannot_be_judged_fail(out, part):
    baseline = torch.zeros(3, 2)
    (found,) = rules.contraction(out, baseline.double(), baseline)
    assert not found.passed and found.used == float("inf") and found.part.startswith(part)


def test_equality_counts_the_elements_that_differ():
    expected = torch.tensor([1.0, 2.0, 3.0])
    assert rules.equal(expected, expected.clone())[0].passed
    (found,) = rules.equal(torch.tensor([1.0, 2.5, float("nan")]), expected)
    assert not found.passed and found.error == 2

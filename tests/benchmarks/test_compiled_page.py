"""docs/compiled.md: what of the result files it shows, and that it is up to date."""

import pytest

from benchmarks.compiled import page, results
from ptx_machine import NOT_SEEN, Report
from ptx_machine.global_memory import AFTER_READ, IN_PLACE
from ptx_machine.proxies import CP_ASYNC_NOTE
from tests.compiled.judge import findings_of, notes_of

CASE = {
    "kind": "case", "op": "swiglu", "dtype": "bf16", "configuration": "F=8", "used": 0.25,
    "at": "out", "problem": "", "findings": {}, "notes": {}, "launches": {"swiglu_forward": 1},
    "instructions": 2_500_000,
}  # fmt: skip
FAULT = {
    "kind": "fault", "kernel": "swiglu forward", "fault": "store dropped", "number": 0,
    "place": "swiglu.py: tl.store(out", "noticed": "wrong numbers", "reason": "",
}  # fmt: skip
ROWS = [
    CASE | {"chip": 80},
    CASE | {"chip": 90, "op": "varlen_attention", "notes": {CP_ASYNC_NOTE: 3}},
    CASE | {"chip": 90, "findings": {"race": 2}},
    CASE | {"chip": 90, "dtype": "fp32", "problem": "wrong numbers: out"},
    FAULT | {"chip": 90},
    FAULT | {"chip": 90, "number": 1, "noticed": "", "reason": "nothing is in flight there"},
]


def test_rows_of_each_chip(tmp_path):
    results.write(tmp_path, ROWS)
    results.write_tests(tmp_path, "sm_80", {"passed": 700, "skipped": 30})
    page.main(["--results", str(tmp_path), "--docs", str(tmp_path)])
    text = (tmp_path / page.NAME).read_text()
    old, new = text.partition("## sm_80")[2].split("## sm_90", 1)
    assert "| swiglu | bf16 | F=8 | 0.25 | none | 2.5 |" in old
    assert "1 cases, none with a finding" in old and "Device: none." in old
    assert "3 cases, 2 with a finding or above a limit; 7.5 million instructions" in new
    assert "| swiglu | bf16 | F=8 | 0.25 | race 2 | 2.5 |" in new
    assert "| swiglu | fp32 | F=8 | failed | none | 2.5 |" in new
    assert f"| sm_90 | {CP_ASYNC_NOTE} | varlen_attention 1 |" in text
    assert "it was seen in `varlen_attention`." in " ".join(text.split())
    assert f"- *{CP_ASYNC_NOTE}*: {page.EXPLAINED[CP_ASYNC_NOTE]}." in text
    assert all(f"- {what}" in text for what in NOT_SEEN)
    assert "| sm_80 | 700 | 0 | 30 |" in new
    assert "2 faults, 1 noticed, 1 without effect" in new
    assert "| 2 | wrong numbers (1) | nothing is in flight there (1) |" in new


def test_only_what_rope_2d_overwrites_in_place_is_a_note():
    report = Report()
    for kernel, kind in (("rope_2d", AFTER_READ), ("rope_2d", IN_PLACE), ("swiglu", IN_PLACE)):
        report.add(kind, kernel, "st.global.b32", "writes what warp 1 read")
    assert findings_of(report) == {AFTER_READ: 1, IN_PLACE: 1}
    assert notes_of(report) == {page.COPIES: 1}


def test_no_note_where_nothing_was_noted(tmp_path):
    results.write(tmp_path, ROWS[:1])
    assert "fence.proxy.async` between" not in page.page(results.read(tmp_path, "case"), [])


def test_the_page_is_that_of_the_result_files():
    documents = [results.read(results.FOLDER, kind) for kind in ("case", "fault")]
    tests = results.read_tests(results.FOLDER)
    if not any(documents):
        pytest.skip("no result of make compiled is kept")
    assert (page.DOCS / page.NAME).read_text(encoding="utf-8") == page.page(*documents, tests)
    for of_kind in documents:
        assert [document["chip"] for document in of_kind] == ["sm_80", "sm_90"]
        for document in of_kind:
            assert document["device"] is None and not document["commit"].endswith("-dirty")

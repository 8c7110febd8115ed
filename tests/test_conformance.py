"""What is kept of `make conformance`: its outcomes, the list of what does not apply, the page."""

import json
import re
from fnmatch import fnmatchcase

import pytest

from tests.conformance import page
from tests.conformance.suite import HERE, ROOT

OUTCOMES = [json.loads(path.read_text()) for path in sorted(page.OUTCOMES.glob("*.json"))]
LISTED = json.loads(page.LIST.read_text())
PINS = (ROOT / "constraints.txt").read_text().splitlines()


def is_pinned(outcome):
    return f"transformers=={outcome['transformers']}" in PINS


def test_the_page_is_that_of_the_outcomes():
    assert page.PAGE.read_text() == page.text()


def test_the_pinned_release_and_a_newer_one_were_tried():
    assert sorted(map(is_pinned, OUTCOMES)) == [False, True]


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome["transformers"])
def test_all_classes_were_run_and_nothing_that_applies_fails(outcome):
    texts = [path.read_text() for path in HERE.glob("test_*.py")]
    written = {
        name for text in texts for name in re.findall(r"^class ([A-Z]\w+Test)\(", text, re.M)
    }
    assert set(outcome["classes"]) == written
    assert outcome["failed"] == []
    for name, counts in outcome["classes"].items():
        assert counts["passed"] > 0, name
        assert "failed" not in counts, name


@pytest.mark.parametrize("outcome", OUTCOMES, ids=lambda outcome: outcome["transformers"])
def test_each_entry_of_the_list_is_of_tests_that_were_met(outcome):
    patterns = {*LISTED["tests"]} | (set() if is_pinned(outcome) else {*LISTED["newest"]})
    met = outcome["does not apply"]
    assert {p for p in patterns if not any(fnmatchcase(name, p) for name in met)} == set()
    assert {name for name in met if not any(fnmatchcase(name, p) for p in patterns)} == set()


def test_each_reason_is_used_and_told_with_what_transformers_does():
    used = {*LISTED["tests"].values(), *LISTED["newest"].values()}
    assert used == set(LISTED["reasons"])
    for reason in LISTED["reasons"].values():
        assert set(reason) == {"why", "elsewhere"}
        assert all(len(text) > 15 for text in reason.values())

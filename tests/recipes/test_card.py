"""The figures in the reader's card are those of the result files, and hold."""

import json

from hrvlm.inference.chat import load_vlm
from hrvlm.reader.model import DOUBT_BELOW, reader_path
from recipes.reader import doubts, peers, score


def test_the_bound_tells_what_it_reads_from_what_it_can_not():
    """The whole figures are in its card."""
    processor, vlm = load_vlm(reader_path())
    rows = list(
        doubts.ask(processor, vlm, [a for a in doubts.pictures(small=True) if a.kind != "noise"])
    )
    right = [row for row in rows if row["kind"] == "drawn text, right"]
    unreadable = [row for row in rows if not row["kind"].startswith(("drawn", "a line of text up"))]
    assert len(right) >= 6 and sum(bool(row["doubts"]) for row in right) <= 1
    assert len(unreadable) == 10 and sum(bool(row["doubts"]) for row in unreadable) >= 9


def test_the_card_has_the_figures_of_the_results():
    report = json.loads(score.RESULTS.read_text(encoding="utf-8"))
    assert score.table(report) in score.CARD.read_text(encoding="utf-8")


def test_the_card_has_the_doubts_of_the_results():
    report = json.loads(doubts.RESULTS.read_text(encoding="utf-8"))
    assert doubts.table(report) in doubts.CARD.read_text(encoding="utf-8")
    assert report["bound"] == DOUBT_BELOW


def test_the_card_has_the_peers_of_the_results():
    report = json.loads(peers.RESULTS.read_text(encoding="utf-8"))
    assert peers.table(report) in peers.CARD.read_text(encoding="utf-8")
    kinds = [row["set"] for row in report["sets"]]
    assert len(kinds) == 7 and len(peers.SYSTEM_FONTS) >= 12
    assert all(row["samples"] == peers.SAMPLES for row in report["sets"])
    documents = report["sets"][-1]
    assert documents["set"] == "paragraphs of PDFs"
    assert documents["reader"]["refused"] + documents["reader"]["doubtful"] >= 0.9 * peers.SAMPLES

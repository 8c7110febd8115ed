import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrvlm.inference.text_metrics import (
    edit_distance,
    exact_match,
    nearest_reference,
    normalize_vqa,
    vqa_accuracy,
)

words = st.text(alphabet="abé🙂 ", max_size=9)


def table_distance(a, b):
    """Wagner and Fischer's table, row by row."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row = row, [i]
        for j, y in enumerate(b, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (x != y)))
    return row[-1]


@given(words, words)
def test_edit_distance_is_levenshteins(a, b):
    assert edit_distance(a, b) == table_distance(a, b)


def test_edit_distance_beyond_a_machine_word():
    a, b = "abcde" * 40, "abde" * 45
    assert edit_distance(a, b) == edit_distance(b, a) == table_distance(a, b)


def test_references():
    assert nearest_reference("Berlin", ["Paris", "berlin", "Bern"]) == "berlin"
    assert nearest_reference("a", ["", "b"]) == ""
    assert exact_match(" Total: 3\n", ["total: 3", "Total: 3"])
    assert not exact_match("total", ["Total"])


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The  Two\tcats.", "2 cats"),
        ("3,000", "3000"),
        ("1.5", "1.5"),
        ("U.S.", "us"),
        ("yes, sir", "yes sir"),
        ("x-ray", "x ray"),
        ("x - ray", "x ray"),
        ("dont know; wont", "don't know won't"),
        ("5 oclock", "5 o'clock"),
        ("None", "0"),
        ("its", "its"),
    ],
)
def test_answers_are_normalized_as_in_vqav2(text, normal):
    assert normalize_vqa(text) == normal


def test_vqa_accuracy_leaves_each_person_out_in_turn():
    def people(agreeing):
        return ["two"] * agreeing + [f"other {i}" for i in range(10 - agreeing)]

    # 1 of 10: the nine others who leave somebody else out see one agreeing, that one sees none.
    assert vqa_accuracy("2", people(1)) == pytest.approx(9 / 10 * 1 / 3)
    assert vqa_accuracy("Two.", people(2)) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert vqa_accuracy("two", people(3)) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert vqa_accuracy("two", people(4)) == 1
    assert vqa_accuracy("three", people(4)) == 0
    with pytest.raises(ValueError, match="at least 4 people's, got 1"):
        vqa_accuracy("two", ["two"])

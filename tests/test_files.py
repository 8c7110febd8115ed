"""Files are written whole or not at all."""

import pytest

from hrvlm.files import parse_yaml, replacing, write_text


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "before")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "half\udc80")
    with pytest.raises(KeyError), replacing(path) as part:
        part.write_text("half")
        raise KeyError
    assert path.read_text() == "before"
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("[" * 3000 + "]" * 3000, "nested too deeply"),
        ("- " * 3000 + "a", "nested too deeply"),
        ("a: {b: 1}\na: 2", "'a' stands twice"),
        ("a: !!int many", "no YAML"),
        ("a: !!bool maybe", "no YAML"),
        ("a: !!timestamp now", "no YAML"),
        ("a: 2024-99-99", "no YAML"),
        ("&a [*a]", "more than 100000 values"),
        ("a: &x {b: *x}", "more than 100000 values"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
            f"{after}: &{after} [{', '.join([f'*{name}'] * 8)}]\n"
            for name, after in zip("abcdefg", "bcdefgh", strict=True)
        ), "more than 100000 values"),
    ],
)  # fmt: skip
def test_yaml_that_is_none_says_so_with_its_name(text, cause):
    with pytest.raises(ValueError, match=f"^config.yaml: .*{cause}"):
        parse_yaml(text, "config.yaml")


def test_an_alias_stands_for_what_it_names():
    value = parse_yaml("a: &a {lr: 1e-4}\nb: *a\nc: {<<: *a, lr: 2}", "config.yaml")
    assert value == {"a": {"lr": 1e-4}, "b": {"lr": 1e-4}, "c": {"lr": 2}}

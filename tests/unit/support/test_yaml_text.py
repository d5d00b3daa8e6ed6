"""YAML: what is read, and what is refused without a traceback."""

from __future__ import annotations

from pathlib import Path

import pytest

from ssv.support.errors import UserError
from ssv.support.yaml_text import read_yaml


def read(tmp_path: Path, text: str) -> object:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    return read_yaml(path)


def test_what_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, "") is None
    assert read(tmp_path, "a: [1, yes, x, 1.5, null]\nb: {a: 1}\n") == {"a": [1, True, "x", 1.5, None], "b": {"a": 1}}
    assert read(tmp_path, "a: &x {k: 1}\nb: {<<: *x, k: 2}\n") == {"a": {"k": 1}, "b": {"k": 2}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\na: 2", "key a is given twice"),
        ("a: {b: 1, c: 2, b: 1}", "key b is given twice"),
        ("- - {k: 1, 'k': 2}", "key k is given twice"),
        ("a: &x {b: 1, b: 2}\nc: *x", "key b is given twice"),
        ("a: [1", "while parsing"),
        ("a: \x07", "special characters"),
        ("a: !!python/object/apply:os.system [x]", "could not determine a constructor"),
        ("a: 2024-99-99", "month must be"),
        ("a: !!int x", "invalid literal"),
        ("a: !!bool x", "'x'"),
        ("a: !!timestamp x", ""),
        ("? [a]\n: 1", "unhashable key"),
    ],
)
def test_what_is_refused(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file\.yaml is not YAML \(") as raised:
        read(tmp_path, text)
    assert says in str(raised.value)


def test_nested_too_deeply(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"file\.yaml is nested too deeply"):
        read(tmp_path, "[" * 3000)


def test_an_alias_may_refer_to_what_it_stands_in(tmp_path: Path) -> None:
    found = read(tmp_path, "a: &x [*x]")
    assert isinstance(found, dict)
    assert found["a"][0] is found["a"]

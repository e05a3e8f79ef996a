"""Text for terminals."""

from __future__ import annotations

import io
import sys

import pytest

from awconv.terminal import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a photo, é ü 猫 🐱 [red] :cat:.jpg", "a photo, é ü 猫 🐱 [red] :cat:.jpg"),
        ("\x1b[2J\x1b]0;title\x07.jpg", r"\x1b[2J\x1b]0;title\x07.jpg"),
        ("a\nb\rc\td\x7f\x9b", r"a\nb\rc\td\x7f\x9b"),
        ("caf\udce9.jpg", r"caf\xe9.jpg"),  # a byte that is not UTF-8, as Python keeps it
        ("photo\u202egpj.exe", r"photo\u202egpj.exe"),
        ("\ud800\u2028", r"\ud800\u2028"),
    ],
)
def test_names_are_shown_and_do_nothing(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_what_the_output_cannot_encode_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert printable("é猫") == r"\xe9\u732b"

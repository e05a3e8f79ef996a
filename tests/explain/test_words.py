"""What an explanation says of its figures."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from awconv.explain.words import _alone, _together, percent, sentences, significant
from awconv.explain.worth import Worth


def measured(**worths: tuple[int, int, float]) -> Any:
    """Layers of 500 images: of each the images lost and gained, and its p value."""
    layers = [
        SimpleNamespace(name=name, worth=Worth(500, 0, lost, gained, 0.0, 0.1), p_value=p_value)
        for name, (lost, gained, p_value) in worths.items()
    ]
    return SimpleNamespace(layers=layers)


def test_a_layer_that_does_harm_is_not_called_worth_anything() -> None:
    said = _alone(measured(a=(3, 2, 1.0), b=(2, 40, 1e-6)))
    assert "a's is worth most, +0.20 points, but no layer's alone is worth more than noise" in said
    assert "does harm, more than noise: that of b \N{MINUS SIGN}7.60 points" in said
    said = _alone(measured(a=(0, 30, 1e-6), b=(2, 40, 1e-6)))
    assert "No single layer's attention is worth anything" in said
    assert "that of a \N{MINUS SIGN}6.00 points, that of b \N{MINUS SIGN}7.60 points" in said
    assert _alone(measured(a=(30, 0, 1e-6), b=(40, 2, 1e-6))).endswith("each one's is more than noise.")


def test_gains_over_input_channels_are_told_apart_from_maps() -> None:
    def said(*layers: tuple[float, float | None]) -> str:
        found = [
            SimpleNamespace(
                name=f"layer{number}",
                worth=Worth(500, 4),
                input_variation=of_input,
                statistics=SimpleNamespace(variation=lambda of_map=of_map: of_map),
            )
            for number, (of_map, of_input) in enumerate(layers)
        ]
        return " ".join(sentences(SimpleNamespace(layers=found, without={"mean": Worth(500, 9)}), SimpleNamespace()))  # type: ignore[arg-type]

    both = said((0.2, 0.03), (0.1, 0.05))
    assert "Gains over input channels change the weights by 3 % to 5 % beside" in both
    assert "Gains" not in said((0.2, None))
    assert "does not depend on the image" in said((0.0, None), (0.0, 0.0))
    assert "does not depend on the image" not in said((0.0, 0.1))


@pytest.mark.parametrize(("loss", "word"), [(0.2, "0.200 ± 0.100 lower"), (-0.2, "0.200 ± 0.100 higher")])
def test_a_cross_entropy_that_shows_more_is_told_in_both_directions(loss: float, word: str) -> None:
    assert word in _together(Worth(500, 0, 10, 9, loss, 0.1))
    assert "cross-entropy" not in _together(Worth(500, 0, 10, 9, loss, 0.3))


def test_numbers_are_read_at_a_glance() -> None:
    assert [percent(value) for value in (0.0012, 0.099, 0.314, 0.996, 1.4)] == [
        "0.12 %",
        "9.9 %",
        "31 %",
        "100 %",
        "140 %",
    ]
    assert [significant(value) for value in (0.0312, -1.26, 12.6, 130)] == [
        "+0.031",
        "\N{MINUS SIGN}1.3",
        "+13",
        "+130",
    ]

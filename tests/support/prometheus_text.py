"""What a server shows to Prometheus, read as Prometheus does."""

from __future__ import annotations

from prometheus_client.parser import text_string_to_metric_families

Series = tuple[str, frozenset[tuple[str, str]]]


def samples(text: str) -> dict[Series, float]:
    """Values by a series' name and labels. No series may stand there twice."""
    found: dict[Series, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            # The parser ends a counter's name as OpenMetrics does, and not as it is written.
            name = family.name if family.type == "counter" else sample.name
            series = name, frozenset(sample.labels.items())
            assert series not in found, f"{series} stands there twice"
            found[series] = sample.value
    return found


def families(text: str) -> dict[str, str]:
    """What kind each family is of, by its name."""
    return {family.name: family.type for family in text_string_to_metric_families(text)}

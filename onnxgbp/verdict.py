"""What a health report says in words, each sentence with the numbers that it rests on."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["counted", "verdict"]

_SHOWN = 5  # layers and samples that a line of the verdict names; the report has them all
_STEP, _WAY = 100.0, 1e4  # a change of the gradient from layer to layer, and over all, that is called one
_MOSTLY = 0.5  # a share from which a layer is called saturated
_FEW = 100  # samples
_CONFIDENCE = 0.95

# Their slope is 0 or that of one line: a unit that is active everywhere is linear there.
_BENT = frozenset({"Relu", "Relu6", "QuantizedRelu", "Clip", "ThresholdedRelu", "Shrink", "HardSigmoid"})
# Flat on both sides: most places there mean that little of the gradient passes. A half of a ReLU's are meant to be.
_SQUASHING = frozenset({"Sigmoid", "Tanh", "Softsign", "HardSigmoid"})


def verdict(found: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Sentences, each with what it is about and the nodes that it names."""
    rows = [row for row in found["activations"] if row["measured"]]
    judged = [row for row in rows if row["gate"] is None]
    samples = counted(found["samples"], "sample")
    if not found["activations"]:
        yield _said("activations", [], "no activation lies on the path: only the gradient at the input was measured")
    yield from _dead(judged, found["samples"], samples, found["threshold"])
    yield from _linear(judged, samples)
    yield from _saturated(judged, found["threshold"])
    yield from _passes(found["depths"], found["method"] if len(found["rules"]) == 1 else ", ".join(found["rules"]))
    for row in rows:
        if row["not_finite"]:
            text = (
                f"{row['not_finite']:,} of {row['values']:,} values of '{row['node']}' are not finite, and not counted"
            )
            yield _said("not finite", [row["node"]], text)
    if found["samples"] < _FEW:
        few = f"no more than {samples}: shares, means and histograms describe these and say little of others"
        yield _said("samples", [], few)
    if left := found["left_out"]:
        listed = "; ".join(
            one["why"] if one["sample"] in one["why"] else f"{one['sample']}: {one['why']}" for one in left[:_SHOWN]
        )
        more = f"; and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        yield _said("left out", [], f"{counted(len(left), 'sample')} left out: {listed}{more}")
    for about, names, text in (
        ("gates", [row["node"] for row in rows if row["gate"]], "gates, measured and not judged"),
        ("not measured", found["not_reached"], "not measured, since no gradient reaches them"),
        (
            "not measured",
            [row["node"] for row in found["activations"] if not row["measured"]],
            "not measured inside If, Loop or Scan",
        ),
    ):
        if names:
            yield _said(about, names, f"{text}: {_named(names)}")


def _said(about: str, nodes: Sequence[str], text: str) -> dict[str, Any]:
    return {"about": about, "nodes": list(nodes), "text": text}


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


def _named(nodes: Sequence[str]) -> str:
    more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return ", ".join(f"'{node}'" for node in nodes[:_SHOWN]) + more


def _units(row: Mapping[str, Any], count: int) -> str:
    """37 of 512 channels of 'relu'."""
    return f"{count:,} of {counted(row['units'], row['unit'])} of '{row['node']}'"


def _dead(rows: Sequence[Mapping[str, Any]], count: int, samples: str, threshold: float) -> Iterator[dict[str, Any]]:
    if not rows:
        return
    dead = sorted((row for row in rows if row["dead"]["count"]), key=lambda row: -row["dead"]["share"])
    if not dead:
        units = sum(row["units"] for row in rows)
        yield _said("dead", [], f"no unit is dead: each of {units:,} was active somewhere in {samples}")
        return
    for row in dead[:_SHOWN]:
        number, constant = row["dead"]["count"], row["dead"]["constant"]
        were, they = ("was", "it") if number == 1 else ("were", "they")
        carry = f"carr{'ies' if number == 1 else 'y'}" if count >= _FEW else "carried"
        how = "never active" if row["kind"] in _BENT else f"never above {threshold:.2g} of the largest slope"
        so = f"{they} {carry} nothing" + " here" * (count < _FEW)
        if constant < number:
            so = f"no gradient passes, though the output of {number - constant:,} still changes"
        yield _said("dead", [row["node"]], f"{_units(row, number)} {were} {how} in {samples}: {so}")
    if rest := dead[_SHOWN:]:
        number = sum(row["dead"]["count"] for row in rest)
        names = [row["node"] for row in rest]
        yield _said("dead", names, f"{counted(number, 'dead unit')} more in {counted(len(rest), 'activation')} more")
    bound = 1 - (1 - _CONFIDENCE) ** (1 / count)
    yield _said(
        "dead",
        [],
        f"never in {samples} does not mean never: at {_CONFIDENCE:.0%} confidence, any one of them may be active in "
        f"up to {bound:.2g} of all samples like these, had they been drawn at random",
    )


def _linear(rows: Sequence[Mapping[str, Any]], samples: str) -> Iterator[dict[str, Any]]:
    always = [row for row in rows if row["kind"] in _BENT and row["always_active"]["count"]]
    if always:
        number, names = sum(row["always_active"]["count"] for row in always), [row["node"] for row in always]
        were = "was" if number == 1 else "were"
        text = f"{counted(number, 'unit')} of {_named(names)} {were} active at every place in {samples}: linear there"
        yield _said("always active", names, text)


def _saturated(rows: Sequence[Mapping[str, Any]], threshold: float) -> Iterator[dict[str, Any]]:
    known = [row for row in rows if row["kind"] in _SQUASHING and row["saturated"] is not None]
    known.sort(key=lambda row: -row["saturated"])
    flat = f"|f'| below {threshold:.2g} of its largest"
    mostly = [row for row in known if row["saturated"] >= _MOSTLY]
    for row in mostly[:_SHOWN]:
        text = f"'{row['node']}' ({row['kind']}) is saturated at {row['saturated']:.1%} of its places ({flat})"
        yield _said("saturated", [row["node"]], text)
    if rest := [row["node"] for row in mostly[_SHOWN:]]:
        yield _said(
            "saturated", rest, f"so are {len(rest)} more at {_MOSTLY:.0%} of their places or more: {_named(rest)}"
        )
    if known and not mostly:
        most = known[0]
        text = f"no activation is saturated at {_MOSTLY:.0%} of its places ({flat}); most is '{most['node']}'"
        yield _said("saturated", [most["node"]], f"{text}, at {most['saturated']:.1%}")


def _passes(levels: Sequence[Mapping[str, Any]], method: str) -> Iterator[dict[str, Any]]:
    """Whether the gradient vanishes or explodes on its way from the last activation to the first."""
    what = "the gradient's RMS" if method == "gradient" else f"the RMS of what {method} passes"
    broken = [level for level in levels if level["rms"] is None]
    if broken:
        yield _said("gradient", broken[-1]["nodes"], f"{what} is not finite at {_named(broken[-1]['nodes'])}")
    blank = [level for level in levels if level["rms"] == 0]
    if blank:
        yield _said("gradient", blank[-1]["nodes"], f"no gradient at all arrives at {_named(blank[-1]['nodes'])}")
    if broken or blank or not levels:
        return
    if len(levels) == 1:
        yield _said("gradient", levels[0]["nodes"], "one depth of activations: no way on which a gradient could vanish")
        return
    steps = [_Change.between(level, behind) for level, behind in itertools.pairwise(levels)]
    large = [step for step in steps if step.beyond(_STEP)]
    for step in large[::-1][:_SHOWN]:
        ends = f"from {_named(step.behind['nodes'])} back to {_named(step.level['nodes'])}"
        factors = f"{what} changes by a factor of {step.rms:.2g}, its norm by one of {step.norm:.2g}"
        yield _said("gradient", step.level["nodes"], f"it {step.word} {ends}: {factors}")
    way = _Change.between(levels[0], levels[-1])
    over = f"at the first activation the RMS is {way.rms:.2g} of that at the last"
    if way.beyond(_WAY):
        yield _said("gradient", levels[0]["nodes"], f"{what} {way.word} on the way: {over}")
    elif not large:
        most, norms = (
            max(max(ratio, 1 / ratio) for ratio in ratios) for ratios in zip(*map(_Change.ratios, steps), strict=True)
        )
        change = f"{what} changes by at most {most:.3g}x from layer to layer, its norm by {norms:.3g}x"
        yield _said("gradient", [], f"no layer vanishes or explodes: {change}; {over}")


@dataclasses.dataclass(frozen=True)
class _Change:
    """From the activations of one depth back to those of an earlier one."""

    level: Mapping[str, Any]
    behind: Mapping[str, Any]
    rms: float
    norm: float

    @classmethod
    def between(cls, level: Mapping[str, Any], behind: Mapping[str, Any]) -> _Change:
        return cls(level, behind, level["rms"] / behind["rms"], level["norm"] / behind["norm"])

    def ratios(self) -> tuple[float, float]:
        return self.rms, self.norm

    def beyond(self, limit: float) -> bool:
        """Of both: the root mean square alone falls where a pool spreads the gradient over more places."""
        return max(self.ratios()) <= 1 / limit or min(self.ratios()) >= limit

    @property
    def word(self) -> str:
        return "vanishes" if self.rms < 1 else "explodes"

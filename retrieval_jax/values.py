"""Whether a value is what a parameter's annotation asks for: its kind and its range.

Ranges are written with `typing.Annotated`, by the names below. `configuration.configure` checks every
value of gin files and of the command line against the annotation of its parameter, before a verb runs.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Annotated


@dataclasses.dataclass(frozen=True)
class Within:
    """The range of a number: at least `least` (or, if `open`, more than that), and at most `most`."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        return (value > self.least if self.open else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        low = f"above {self.least}" if self.open else f"of at least {self.least}"
        return low if self.most == math.inf else f"{low} and at most {self.most}"


Positive = Annotated[int, Within(1)]
Natural = Annotated[int, Within(0)]
PositiveFloat = Annotated[float, Within(0, open=True)]
NonNegativeFloat = Annotated[float, Within(0)]
Share = Annotated[float, Within(0, 1)]

KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text, in quotes of its own",
    bool: "True or False",
    type(None): "None",
}


def expected(value: object, annotation: object) -> str | None:
    """What the annotation asks for, in words; None where the value is that.

    Kinds that it does not know (classes, callables) are taken to fit. A whole number is a number, too; True
    and False are no numbers.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is None:
        annotation = type(None)
    if origin is Annotated:
        ranges = [one for one in arguments[1:] if isinstance(one, Within)]
        wanted = " ".join([KINDS.get(arguments[0], "a value"), *map(str, ranges)])
        fits = expected(value, arguments[0]) is None and all(one.holds(value) for one in ranges)
        return None if fits else wanted
    if origin in (typing.Union, types.UnionType):
        wanted = [expected(value, option) for option in arguments]
        return None if None in wanted else " or ".join(wanted)
    if annotation in KINDS:
        return None if _is(value, annotation) else KINDS[annotation]
    container = origin or annotation
    if isinstance(container, type) and issubclass(container, Mapping):
        return None if isinstance(value, Mapping) else "a mapping, as {'name': value}"
    if isinstance(container, type) and issubclass(container, Sequence):
        return None if isinstance(value, list | tuple) else "a list, as ('a', 'b')"
    return None


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

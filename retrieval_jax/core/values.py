"""Whether a value is what a parameter's annotation asks for: its kind, its range and the names in it.

Ranges and names are written with `typing.Annotated`, by the classes below. `configuration.configure` checks
every value of gin files and of the command line against the annotation of its parameter, before a verb runs.
"""

import dataclasses
import difflib
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated

LISTED = 12  # names that a message lists at most


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


@dataclasses.dataclass(frozen=True)
class Names:
    """The names that a text may be, such as the keys of a mapping: another one would have no effect.

    In a name, one capital letter stands for a number and a word of capitals for any text: "layers_N",
    "labelled_LABEL".

    Attributes:
      kind: what they name, as "a task".
      known: the names, or a function that gives them where they take time to find.
    """

    kind: str
    known: tuple[str, ...] | Callable[[], Iterable[str]]

    def names(self) -> list[str]:
        return list(self.known() if callable(self.known) else self.known)

    def holds(self, name: str) -> bool:
        def any_of(match: re.Match) -> str:
            return r"\d+" if len(match[0]) == 1 else ".+"

        return any(re.fullmatch(re.sub("[A-Z]+", any_of, one), name) for one in self.names())

    def __str__(self) -> str:
        names = self.names()
        more = ", …" if len(names) > LISTED else ""
        return f"the name of {self.kind} ({', '.join(names[:LISTED])}{more})"

    def near(self, name: str) -> str:
        """The names that may have been meant, where there are some near to it; else as many as are listed."""
        close = difflib.get_close_matches(name, self.names(), 3)
        return f"the name of {self.kind}, as {' or '.join(close)} is" if close else str(self)


class Misfit(typing.NamedTuple):
    """A value, or a part of one, that is not what is asked for; and what is, in words."""

    value: object
    wanted: str


ANY = object()
"""Stands for a value that is not known before it is used, and fits wherever it is."""

Positive = Annotated[int, Within(1)]
NonNegative = Annotated[int, Within(0)]
PositiveFloat = Annotated[float, Within(0, open=True)]
NonNegativeFloat = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1)]
Seed = Annotated[int, Within(0, (1 << 32) - 1)]  # what every generator of random numbers takes

KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text, in quotes of its own",
    bool: "True or False",
    type(None): "None",
}


def misfit(value: object, annotation: object) -> Misfit | None:
    """The part of a value that is not what an annotation asks for; None where the value is that.

    Kinds that it does not know (classes, callables) are taken to fit. A whole number is a number, too; True
    and False are no numbers.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if value is ANY:
        return None
    if annotation is None:
        annotation = type(None)
    if origin is Annotated:
        return (
            Misfit(value, _words(annotation)) if misfit(value, arguments[0]) else _outside(value, arguments)
        )
    if origin in (typing.Union, types.UnionType):
        return _none_of(value, [misfit(value, option) for option in arguments])
    if annotation in KINDS:
        return None if _is(value, annotation) else Misfit(value, KINDS[annotation])
    container = origin or annotation
    if isinstance(container, type) and issubclass(container, Mapping):
        if not isinstance(value, Mapping):
            return Misfit(value, "a mapping, as {'name': value}")
        parts = [(part, kind) for item in value.items() for part, kind in zip(item, arguments, strict=False)]
        return _first(parts)
    if isinstance(container, type) and issubclass(container, Sequence):
        if not isinstance(value, list | tuple):
            return Misfit(value, "a list, as ('a', 'b')")
        return _elements(value, container, arguments)
    return None


def _elements(value: Sequence, container: type, kinds: Sequence) -> Misfit | None:
    """The misfit of a list's elements: of one kind, or, of a tuple's, each of its own."""
    if container is not tuple or kinds[1:] == (Ellipsis,) or not kinds:
        return _first((part, kinds[0]) for part in value) if kinds else None
    if len(value) != len(kinds):
        return Misfit(value, f"a list of {len(kinds)}")
    return _first(zip(value, kinds, strict=True))


def _first(parts: Iterable[tuple[object, object]]) -> Misfit | None:
    """The first misfit of some (value, annotation)."""
    return next(filter(None, (misfit(part, kind) for part, kind in parts)), None)


def _none_of(value: object, found: Sequence[Misfit | None]) -> Misfit | None:
    """The misfit of a union's options: of the part of the value where one of them fits but for that."""
    if None in found:
        return None
    parts = [one for one in found if one.value is not value]
    return parts[0] if parts else Misfit(value, " or ".join(one.wanted for one in found))


def _outside(value: object, arguments: Sequence) -> Misfit | None:
    """The misfit of a value of the right kind that is not in its range, or not one of the names."""
    for bound in arguments[1:]:
        if isinstance(bound, Names) and not bound.holds(value):
            return Misfit(value, bound.near(value))
        if isinstance(bound, Within) and not bound.holds(value):
            return Misfit(value, _words(Annotated[tuple(arguments)]))
    return None


def _words(annotation: object) -> str:
    """What an annotation with a range or names asks for."""
    kind, *bounds = typing.get_args(annotation)
    names = [str(bound) for bound in bounds if isinstance(bound, Names)]
    ranges = [str(bound) for bound in bounds if isinstance(bound, Within)]
    return " ".join(names or [KINDS.get(kind, "a value"), *ranges])


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

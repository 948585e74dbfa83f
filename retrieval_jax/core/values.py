"""Checks whether a value fits a parameter's annotation: its type, its range and the names in it.

Ranges and names are written with `typing.Annotated` and the classes below. `configuration.configure` checks
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
    """The range of a number.

    Attributes:
      least: the smallest value.
      most: the largest value.
      open: whether `least` itself is excluded.
    """

    least: float = -math.inf
    most: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        """Returns whether a number is in the range."""
        return (value > self.least if self.open else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        low = f"above {self.least}" if self.open else f"of at least {self.least}"
        return low if self.most == math.inf else f"{low} and at most {self.most}"


@dataclasses.dataclass(frozen=True)
class Names:
    """The names that a text may be, such as the keys of a mapping: any other name would have no effect.

    In a name, one capital letter stands for a number and a word of capitals for any text, as in "layers_N"
    and "labelled_LABEL".

    Attributes:
      kind: what they name, as "a task".
      known: the names, or a function that returns them if it takes time to find them.
    """

    kind: str
    known: tuple[str, ...] | Callable[[], Iterable[str]]

    def names(self) -> list[str]:
        """Returns the names."""
        return list(self.known() if callable(self.known) else self.known)

    def holds(self, name: str) -> bool:
        """Returns whether a text is one of the names."""

        def any_of(match: re.Match) -> str:
            return r"\d+" if len(match[0]) == 1 else ".+"

        return any(re.fullmatch(re.sub("[A-Z]+", any_of, one), name) for one in self.names())

    def __str__(self) -> str:
        names = self.names()
        more = ", …" if len(names) > LISTED else ""
        return f"the name of {self.kind} ({', '.join(names[:LISTED])}{more})"

    def near(self, name: str) -> str:
        """Describes the names that may have been meant: those that are similar, or else a list of all."""
        close = difflib.get_close_matches(name, self.names(), 3)
        return f"the name of {self.kind}, as {' or '.join(close)} is" if close else str(self)


class Misfit(typing.NamedTuple):
    """A value (or a part of one) that does not fit, and a description of what would.

    Attributes:
      value: the value.
      wanted: what is asked for, in words.
    """

    value: object
    wanted: str


ANY = object()
"""Stands for a value that is not known before it is used, and fits wherever it is."""

Positive = Annotated[int, Within(1)]
NonNegative = Annotated[int, Within(0)]
PositiveFloat = Annotated[float, Within(0, open=True)]
NonNegativeFloat = Annotated[float, Within(0)]
Fraction = Annotated[float, Within(0, 1)]
Dtype = Annotated[str, Names("a dtype", ("float32", "bfloat16", "float16"))]
Seed = Annotated[int, Within(0, (1 << 32) - 1)]  # what every generator of random numbers takes

KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text, in quotes of its own",
    bool: "True or False",
    type(None): "None",
}


def misfit(value: object, annotation: object) -> Misfit | None:
    """Finds the part of a value that does not fit an annotation.

    Types that are not known here (classes, callables) fit always. An int is a float, too; a bool is no
    number.

    Args:
      value: the value; `ANY` fits always.
      annotation: a type, a union or container of types, or one of these with `Annotated` ranges and names.

    Returns:
      The part that does not fit; None if the value does.
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
    """Returns the misfit of the elements of a list, or of a tuple with a type for each element."""
    if container is not tuple or kinds[1:] == (Ellipsis,) or not kinds:
        return _first((part, kinds[0]) for part in value) if kinds else None
    if len(value) != len(kinds):
        return Misfit(value, f"a list of {len(kinds)}")
    return _first(zip(value, kinds, strict=True))


def _first(parts: Iterable[tuple[object, object]]) -> Misfit | None:
    """Returns the first misfit of (value, annotation) pairs."""
    return next(filter(None, (misfit(part, kind) for part, kind in parts)), None)


def _none_of(value: object, found: Sequence[Misfit | None]) -> Misfit | None:
    """Returns the misfit of a union: of a part of the value, if an option fits but for that part."""
    if None in found:
        return None
    parts = [one for one in found if one.value is not value]
    return parts[0] if parts else Misfit(value, " or ".join(one.wanted for one in found))


def _outside(value: object, arguments: Sequence) -> Misfit | None:
    """Returns the misfit of a value of the right type: outside its range, or not one of the names."""
    for bound in arguments[1:]:
        if isinstance(bound, Names) and not bound.holds(value):
            return Misfit(value, bound.near(value))
        if isinstance(bound, Within) and not bound.holds(value):
            return Misfit(value, _words(Annotated[tuple(arguments)]))
    return None


def _words(annotation: object) -> str:
    """Describes what an annotation with a range or names asks for."""
    kind, *bounds = typing.get_args(annotation)
    names = [str(bound) for bound in bounds if isinstance(bound, Names)]
    ranges = [str(bound) for bound in bounds if isinstance(bound, Within)]
    return " ".join(names or [KINDS.get(kind, "a value"), *ranges])


def _is(value: object, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

"""Values against annotations, compared with what Python's own types say of them."""

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval_jax.core.values import ANY, Misfit, Names, Within, misfit

NUMBERS = st.one_of(st.integers(-5, 5), st.floats(-5, 5), st.sampled_from([math.nan, math.inf, True, False]))


@given(NUMBERS, st.floats(-3, 3), st.floats(-3, 3), st.booleans(), st.sampled_from([int, float]))
def test_a_number_fits_where_its_type_and_range_say_so(value, least, most, is_open, kind):
    is_number = not isinstance(value, bool) and (kind is float or isinstance(value, int))
    in_range = (least < value if is_open else least <= value) and value <= most
    found = misfit(value, Annotated[kind, Within(least, most, open=is_open)])
    assert (found is None) == (is_number and math.isfinite(value) and in_range)
    assert found is None or found.value is value


@given(st.recursive(st.one_of(st.integers(), st.text(), st.none()), st.lists, max_leaves=8))
def test_the_part_that_does_not_fit_is_found_at_any_depth(value):
    def wrong(x: object, annotation: object) -> list:
        if isinstance(x, list) and typing.get_origin(annotation) is not None:
            return [leaf for part in x for leaf in wrong(part, typing.get_args(annotation)[0])]
        return [] if isinstance(x, int) and annotation is int else [x]

    annotation = Sequence[Sequence[int]]
    found = misfit(value, annotation)
    if not isinstance(value, list):
        assert found == Misfit(value, "a list, as ('a', 'b')")
        return
    leaves = wrong(value, annotation)
    assert (found is None) == (not leaves)
    assert found is None or found.value is leaves[0] or found.value == leaves[0]


@pytest.mark.parametrize(
    ("value", "annotation", "wanted"),
    [
        (None, int | None, None),
        ("x", int | None, "a whole number or None"),
        ({"a": 1}, Mapping[str, int], None),
        ({"a": "b"}, Mapping[str, int], "a whole number"),
        ({1: 1}, Mapping[str, int], "a text, in quotes of its own"),
        ([("a", 1)], Sequence[tuple[str, int]], None),
        ([("a",)], Sequence[tuple[str, int]], "a list of 2"),
        ([ANY, 3], Sequence[int], None),
        (ANY, int, None),
        (len, Callable, None),
        ("layers_3", Annotated[str, Names("a layer", ("layers_N", "x_LABEL"))], None),
        ("x_any thing", Annotated[str, Names("a layer", lambda: ["layers_N", "x_LABEL"])], None),
        ("layers_x", Annotated[str, Names("a layer", ("layers_N",))], "the name of a layer, as layers_N is"),
        ("zzz", Annotated[str, Names("a layer", ("ab", "cd"))], "the name of a layer (ab, cd)"),
        (1.5, Annotated[int, Within(1)], "a whole number of at least 1"),
        (0, Annotated[float, Within(0, open=True)], "a number above 0"),
        (2, Annotated[float, Within(0, 1)], "a number of at least 0 and at most 1"),
    ],
)
def test_what_is_asked_for_is_said_in_words(value, annotation, wanted):
    found = misfit(value, annotation)
    assert (found and found.wanted) == wanted

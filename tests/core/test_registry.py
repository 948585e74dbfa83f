"""Registering under a name: the same place replaces, another is refused."""

import pytest

from retrieval_jax.core.registry import check_complete, register


def cell() -> type:
    """What a notebook's cell defines, anew each time that it runs."""

    class Plug:
        name = "mine"

    return Plug


def test_a_cell_that_runs_again_replaces_and_anything_else_is_refused():
    registry, first, second = {}, cell(), cell()
    register(registry, "mine", first, "the plug")
    register(registry, "mine", second, "the plug")
    assert registry == {"mine": second}
    with pytest.raises(ValueError, match=r"Other: .*cell\.<locals>\.Plug is the plug 'mine': choose another"):
        register(registry, "mine", type("Other", (), {}), "the plug")
    assert registry == {"mine": second}
    register(registry, "a value", 3, "the plug")
    register(registry, "a value", 3, "the plug")
    with pytest.raises(ValueError, match="4: 3 is the plug 'a value'"):
        register(registry, "a value", 4, "the plug")


def test_what_a_base_class_leaves_open_is_required():
    class Base:
        name: str

        def build(self): ...

        @classmethod
        def read(cls): ...

    class Whole(Base):
        name = "whole"

        def build(self): ...

        @classmethod
        def read(cls): ...

    needed = ("name", "build", "read")
    check_complete(Whole, Base, needed, "a plug")
    check_complete(type("Sub", (Whole,), {}), Base, needed, "a plug")
    with pytest.raises(TypeError, match=r"^Half: a plug needs name, read$"):
        check_complete(type("Half", (Base,), {"build": len}), Base, needed, "a plug")

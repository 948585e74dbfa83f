"""The one rule of the registries of docid kinds, searchers, metrics and retrievers: who may replace whom."""

import inspect


def register(registry: dict[str, object], name: str, thing: object, noun: str) -> None:
    """Adds a class, a function or a value to a registry.

    It replaces one that is equal, or that was defined in the same place (module and qualified name), as when
    a notebook's cell runs again.

    Args:
      registry: name -> what is registered.
      name: the name by which users choose it.
      thing: the class, function or value.
      noun: what the registry holds, for the message, such as "the searcher".

    Raises:
      ValueError: another one has that name.
    """
    other = registry.get(name, thing)
    if _place(other) != _place(thing) and other != thing:
        raise ValueError(f"{_place(thing)}: {_place(other)} is {noun} {name!r}: choose another name")
    registry[name] = thing


def check_complete(cls: type, base: type, required: tuple[str, ...], noun: str) -> None:
    """Raises TypeError if a subclass of `base` lacks attributes or methods that `base` leaves open.

    Args:
      cls: the class.
      base: the class that declares what is required.
      required: names of attributes and methods.
      noun: what the class is, for the message, such as "a searcher".
    """
    of = inspect.getattr_static  # a class method is another object each time it is looked up
    missing = [name for name in required if of(cls, name, None) is of(base, name, None)]
    if missing:
        raise TypeError(f"{cls.__qualname__}: {noun} needs {', '.join(missing)}")


def _place(thing: object) -> str:
    """Returns where a class or function is defined; the text of anything else."""
    qualname = getattr(thing, "__qualname__", None)
    return f"{thing.__module__}.{qualname}" if qualname else str(thing)

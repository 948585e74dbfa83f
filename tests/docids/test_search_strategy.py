"""The interface: each strategy has all of it, with the same arguments."""

import inspect

import pytest

from retrieval_jax.docids.search_strategies import STRATEGIES
from retrieval_jax.docids.search_strategy import SearchStrategy

METHODS = {name: method for name, method in vars(SearchStrategy).items() if isinstance(method, classmethod)}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_has_the_whole_interface(name: str):
    strategy = STRATEGIES[name]
    assert strategy.name == name
    assert METHODS
    for method, declared in METHODS.items():
        own = getattr(strategy, method)
        arguments = [
            [(each.name, each.default) for each in inspect.signature(function).parameters.values()]
            for function in (own, declared.__get__(None, SearchStrategy))
        ]
        assert arguments[0] == arguments[1], method
        left_open = "raise NotImplementedError" in inspect.getsource(declared.__func__)
        assert not left_open or own.__func__ is not declared.__func__, method

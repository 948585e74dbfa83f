"""The tests mirror the package: a module PACKAGE/MODULE.py is tested by tests/PACKAGE/test_MODULE.py."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
UNTESTED = {  # modules that have no test file of their name yet
    "decoding/sampling",
    "examples/training_data",
    "models/encoder_decoder",
    "models/feature_converters",
    "models/generative",
    "models/layers",
    "training/aot",
    "training/metric_writer",
    "training/preemption",
    "training/profiler",
    "training/program",
    "training/run",
    "training/settings",
    "training/shapes",
    "training/throughput",
    "verbs/demo",
    "verbs/table",
    "verbs/train",
}


def test_every_module_has_a_test_file_of_its_name():
    package = ROOT / "retrieval_jax"
    modules = {
        path.relative_to(package).with_suffix("")
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    missing = {
        str(module)
        for module in modules
        if not (ROOT / "tests" / module.parent / f"test_{module.name}.py").is_file()
    }
    assert missing <= UNTESTED, f"no test file of their name: {sorted(missing - UNTESTED)}"

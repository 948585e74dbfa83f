"""Where a package is not installed, what needs it says so in one line, and the rest runs."""

from pathlib import Path

# What may be missing: each of them is imported when it is used.
WITHOUT = """
import importlib, pathlib, sys
from importlib.machinery import PathFinder
MISSING = {"scann", "tensorflow", "tensorflow_text", "tensorflow_datasets", "seqio"}
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
MODULES = """
package = pathlib.Path(sys.argv[1])
for path in sorted(package.rglob("*.py")):
    name = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
    if name == "retrieval_jax.interop.t5x":  # a program for T5X's users
        continue
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        print(name)
"""
MAIN = """
from retrieval_jax.main import main
sys.exit(main(sys.argv[1:]))
"""
PACKAGE = Path(__file__).parents[1] / "retrieval_jax"


def test_all_modules_can_be_imported_but_those_of_seqio(python):
    done = python(WITHOUT + MODULES, PACKAGE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "retrieval_jax.examples.seqio_tasks",
        "retrieval_jax.models.feature_converters",
    ]


def test_help_needs_none_and_a_verb_names_in_one_line_what_it_lacks(python, source: Path, tmp_path: Path):
    assert python(WITHOUT + MAIN, "--help").returncode == 0
    done = python(WITHOUT + MAIN, "import", source, f"--WORK_DIR={tmp_path / 'work'}")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == (
        "retrieval-jax: tensorflow_datasets: not installed, and this command needs it: "
        "install retrieval_jax's requirements again, or name the folder of a module of your own in PYTHONPATH"
    )

"""The README's Python runs as it stands; links, files, verbs and settings that any page names exist."""

import inspect
import re
from pathlib import Path

import gin
import pytest

from retrieval_jax.core import configuration
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.verbs.table import VERBS, configure_verbs

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in [*ROOT.glob("*.md"), *ROOT.glob("*/**/*.md")]
    if not re.match(r"work/|build/|\.", str(page.relative_to(ROOT)))
)
GIN = configuration.gin_folder()
# A page's text with the lines of its commands joined.
PAGE = {page: (ROOT / page).read_text().replace("\\\n", " ") for page in PAGES}

T5X = {"TRAIN_STEPS", "CHECKPOINT_PATH", "EVAL_OUTPUT_DIR", "INFER_OUTPUT_DIR", "INITIAL_CHECKPOINT_PATH"}
T5X |= {"RETRIEVER", "OPTIMIZER", "USE_CACHED_TASKS"}  # macros of T5X's gin files and of gin_configs/t5x/


@pytest.fixture(scope="module")
def settings() -> dict[str, set[str]]:
    """Names that gin knows -> their parameters."""
    configure_verbs([], [])
    known = gin.config._REGISTRY._selector_map.values()
    found = {one.name: set(inspect.signature(one.wrapped).parameters) for one in known}
    return found | {"FUNCTION": {"PARAMETER"}}  # as a page speaks of any


def anchors(page: Path) -> set[str]:
    """The names that a page's headings have in links, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str):
    for link, anchor in re.findall(r"\]\((?!\w+:)([^)#\s]*)(?:#([^)]*))?\)", PAGE[page]):
        file = (ROOT / page).parent / link if link else ROOT / page
        assert file.exists(), link
        assert not anchor or anchor in anchors(file), f"{link}#{anchor}"


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_verbs_gin_files_and_settings_exist(page: str, settings: dict[str, set[str]]):
    text = PAGE[page]
    for verb in re.findall(r"(?:^|`)retrieval-jax +([a-z][\w-]*)", text, re.MULTILINE):
        assert verb in VERBS
    for file in re.findall(r"--gin_file=([\w./-]+)", text):
        assert (GIN / file).is_file() or "/" not in file, file  # or it is the reader's own
    known = {"NAME", *configuration.macros(), *T5X}
    for file in GIN.rglob("*.gin"):
        known |= {*re.findall(r"^([A-Z_]+) =", file.read_text(), re.MULTILINE)}
    assert {*re.findall(r"--(?:gin\.)?([A-Z][A-Z_]+)=", text)} <= known
    for name, parameter in re.findall(r"--gin\.(?:\w+/)?(\w+)\.(\w+)=", text):
        if name != "DatasetConfig":  # T5X's
            assert parameter in {"NAME", *settings[name]}, f"{name}.{parameter}"
    # A sentence names them in backticks, where it may mean a file, too.
    for name, parameter in re.findall(r"`(?:\w+/)?(\w+)\.([a-z_]+)(?: ?=[^`]*)?`", text):
        file = parameter in ("gin", "py", "json", "jsonl", "tsv", "md", "html")
        assert file or name not in settings or parameter in settings[name], f"{name}.{parameter}"


def test_its_python_runs(
    work: Workspace, arguments, cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    assert cli("index", *arguments)[0] == 0
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "python_docs").symlink_to(work.folder)
    monkeypatch.chdir(tmp_path)
    search, train = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(search, {})
    lines = capsys.readouterr().out.splitlines()
    assert 3 < len(lines) <= 6
    assert all(float(line.split()[1]) > 0 for line in lines)

    small = [argument.removeprefix("--gin.") for argument in arguments]
    train = train.replace('["DOCIDS=atomic"]', '["DOCIDS=atomic", *small]')
    train = train.replace('["STEPS=200"', '[*small, "STEPS=2"')
    exec(train, {"small": small})
    assert capsys.readouterr().out.splitlines()[-1] == "work/python_docs/models/short 2"

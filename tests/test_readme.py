"""The README's Python runs as it stands, and the files that it names are there."""

import re
from pathlib import Path

import pytest

from retrieval_jax.core.workspace import Workspace

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


def test_its_links_lead_somewhere():
    for page in ("README.md", "CONTRIBUTING.md", *map(str, ROOT.glob("retrieval_jax/*/README.md"))):
        text = (ROOT / page).read_text()
        for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert ((ROOT / page).parent / link).exists(), f"{page}: {link}"


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

"""The frame of a page: facts, texts that UTF-8 cannot hold, a path that cannot be written."""

import re
from pathlib import Path

import pytest

from retrieval_jax.core.errors import UserError
from retrieval_jax.evaluation.page import write_page


def test_facts_and_odd_characters(tmp_path: Path):
    facts = {"passages": 109739, "name": "half a pair \ud800"}
    write_page(tmp_path / "a.html", "t", facts, [("Empty", ""), ("Full", "<p>x</p>")], {})
    html = (tmp_path / "a.html").read_text(encoding="utf-8")
    assert re.findall("<dd>(.*?)</dd>", html) == ["109,739", "half a pair ?"]
    assert re.findall("<h2>(.*?)</h2>", html) == ["Full"]


def test_an_unwritable_page_is_a_user_error(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        write_page(tmp_path / "file" / "report.html", "t", {}, [], {})

"""JSON objects of source files: what they hold is what `json` reads, or they are refused with their place."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.data.sources.json_objects import json_id, json_object, string
from retrieval_jax.data.sources.lines import ErrorLog, ParseError, parse_lines, parse_whole

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
VALUES = st.recursive(st.none() | st.integers() | TEXTS, lambda x: st.lists(x) | st.dictionaries(TEXTS, x))


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(TEXTS, VALUES), st.booleans(), st.sampled_from([None, 1]))
def test_an_object_is_read_as_json_reads_it(record, ascii_only, indent):
    assert json_object(json.dumps(record, ensure_ascii=ascii_only, indent=indent), ()) == record


@pytest.mark.parametrize(
    ("text", "told", "line"),
    [
        ('{"a": 1, "b": {"c": 1, "d": 2, "c": 1}}', "the key 'c' is there 2 times", 1),
        ('{"a": 1, "a": 1}', "the key 'a' is there 2 times", 1),
        ('{"a": "\\ud800"}', "surrogates not allowed", 1),
        ("[" * 200_000, "recursion", 1),
        ("[1]", "it is not an object", 1),
        ('{"a": 1,\n"b" 2}', "column 5", 2),
    ],
)
def test_a_bad_object_is_refused_with_its_line(tmp_path, text, told, line):
    with pytest.raises(ParseError, match=told) as raised:
        json_object(text, ("a", "b"), of="file")
    assert raised.value.line == line
    assert raised.value.hint == "write one JSON object a file, with a, b"
    path, errors = tmp_path / "a.json", ErrorLog()
    path.write_text(text)
    assert not list(parse_whole(path, lambda found: json_object(found, ()), errors))
    assert [error.line for error in errors.first["bad JSON"]] == [line]


def test_a_line_is_told_by_its_number_in_the_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": "b"}\n\n{"a"\n')
    errors = ErrorLog()
    found = list(
        parse_lines(tmp_path / "a.jsonl", lambda text: string(json_object(text, ()), "a", ()), errors)
    )
    assert found == [(1, "b")]
    assert [error.line for error in errors.first["bad JSON"]] == [3]


def test_ids_are_texts_or_whole_numbers():
    assert [json_id(7), json_id("07"), json_id(-(10**20))] == ["7", "07", f"-1{'0' * 20}"]
    for value in (None, True, 1.0, ["a"], {}):
        with pytest.raises(ParseError, match="an id is"):
            json_id(value)

"""JSON objects of source files, on a line each or a whole file: an object, its texts and its ids."""

import collections
import json
from collections.abc import Sequence

from retrieval_jax.data.sources.lines import ParseError


def json_object(text: str, fields: Sequence[str], of: str = "line") -> dict:
    """Parses a text that is a JSON object.

    Args:
      text: the line, or the whole file.
      fields: the keys that it should have, for messages.
      of: "line" or "file": what the object should fill, for messages.

    Raises:
      ParseError: it is no JSON object, has a key twice, or contains half of a surrogate pair.
    """
    try:
        record = json.loads(text, object_pairs_hook=_without_repeats)
        if not isinstance(record, dict):
            raise ValueError("it is not an object, {...}")
        if "\\" in text:
            json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except json.JSONDecodeError as error:
        raise bad_json(f"{error.msg}: column {error.colno}", fields, of, error.lineno) from error
    except (ValueError, RecursionError) as error:
        raise bad_json(str(error), fields, of) from error
    return record


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    record = dict(pairs)
    if len(record) < len(pairs):
        ((key, count),) = collections.Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key[:80]!r} is there {count} times")
    return record


def bad_json(reason: str, fields: Sequence[str], of: str = "line", line: int = 1) -> ParseError:
    """Returns the exception for a JSON object that lacks something.

    Args:
      reason: what is wrong.
      fields: the keys that it should have.
      of: "line" or "file": what the object should fill.
      line: where it is wrong in the text, from 1.
    """
    hint = f"write one JSON object a {of}, with {', '.join(fields)}"
    return ParseError("bad JSON", f"the JSON is wrong ({reason})", hint, line)


def json_id(value: object) -> str:
    """Returns an id, which JSON may have as a whole number.

    Raises:
      ParseError: it is neither a text nor a whole number.
    """
    if isinstance(value, str) or type(value) is int:
        return str(value)
    what = f"the JSON is wrong (an id is {str(value)[:80]!r})"
    raise ParseError("bad JSON", what, "write ids as texts or whole numbers")


def string(record: dict, field: str, fields: Sequence[str]) -> str:
    """Returns the text of a key of a JSON object. A title may be missing or null (as pandas writes it).

    Args:
      record: the object.
      field: the key.
      fields: all keys that it should have, for messages.

    Raises:
      ParseError: the value is missing or no text.
    """
    value = record.get(field)
    if value is None and field == "title":
        return ""
    if not isinstance(value, str):
        raise bad_json(f"{field!r} is {'not a string' if field in record else 'missing'}", fields)
    return value

import tempfile
from pathlib import Path

import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval_jax.core import arrow_ids

IDS = st.lists(st.text(st.characters(codec="utf-8"), max_size=3), max_size=30)


@settings(deadline=None)
@given(IDS)
def test_ids_come_back_from_a_file(ids):
    with tempfile.TemporaryDirectory() as folder:
        arrow_ids.write(Path(folder) / "ids.arrow", ids)
        found = arrow_ids.read(Path(folder) / "ids.arrow")
        assert found.to_pylist() == ids
        assert found.equals(arrow_ids.array(ids))
        assert arrow_ids.digest(found) == arrow_ids.digest(pa.array(ids, pa.string()))
        del found


@settings(deadline=None)
@given(IDS, IDS)
def test_rows_are_places(ids, wanted):
    ids = list(dict.fromkeys(ids))
    expected = [ids.index(key) if key in ids else -1 for key in wanted]
    assert arrow_ids.find_rows(arrow_ids.array(ids), wanted).tolist() == expected
    assert arrow_ids.RowFinder(arrow_ids.array(ids))(wanted) == expected


@settings(deadline=None)
@given(IDS)
def test_first_rows(ids):
    assert arrow_ids.first_rows(arrow_ids.array(ids)).tolist() == [ids.index(key) for key in ids]


def test_digests_tell_orders_apart():
    digests = {arrow_ids.digest(arrow_ids.array(ids)) for ids in (["a", "b"], ["b", "a"], ["ab"], ["a"], [])}
    assert len(digests) == 5

"""`pag`: its stages in order; a joint training begins as the average; the same command makes nothing anew."""

import dataclasses
import json
from pathlib import Path

import gin
import numpy as np
import pytest
from staged import command, made, stages

from retrieval_jax.checkpoints.model_folder import lazy_params
from retrieval_jax.core.errors import UserError
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.verbs.pag import PagConfig

STEPS = {"lexical": 2, "query": 0, "dense": 2, "seq2seq": 0, "rank": 2}


def test_the_stages_are_those_of_ripor_with_a_lexical_encoder_and_its_sets():
    def names(**values: object) -> list[str]:
        return [what for what, _ in PagConfig(source="x", **values).stages()]

    assert names(steps=STEPS, rounds=1) == [
        "the collection",
        "the lexical encoder",
        "sets of tokens",
        "the dense encoder",
        "its searcher, and the teacher",
        "docids of its vectors",
        "the average of both",
        "round 1: negatives",
        "round 1: the teacher's scores",
        "round 1: ranking",
        "search",
    ]
    more = names(rounds=2)
    assert more[3] == "the weights of queries"
    assert "cross-entropy" in more
    assert more[-4:] == [
        *(f"round 2: {what}" for what in ("negatives", "the teacher's scores", "ranking")),
        "search",
    ]


def test_each_joint_training_goes_on_from_the_model_before_it():
    config = PagConfig(source="x", work_dir="w", rounds=2)
    assert config.generative == ["pag_0", "pag_1", "pag_2"]
    for number in (1, 2):
        settings = config.settings("rank", number)
        assert f"INITIAL_CHECKPOINT = 'w/models/pag_{number - 1}'" in settings
        assert "InitialCheckpoint.docid_centroids = False" in settings
        assert "rank/InitialCheckpoint.lexical_idf = 0" in settings
        assert "SETS = 'pag'" in settings


def test_what_is_averaged_is_what_was_trained_last():
    config = PagConfig(source="x", work_dir="w")
    assert (config.sequential, config.lexical[-1]) == ("pag_seq2seq", "pag_query")
    of_dense = PagConfig(source="x", work_dir="w", steps=STEPS)
    assert (of_dense.sequential, of_dense.lexical[-1]) == ("pag_dense", "pag_lexical")
    given = dataclasses.replace(of_dense, dense_encoder="dual_encoder")
    assert given.sequential == "dual_encoder"
    assert "the dense encoder" not in [what for what, _ in given.stages()]


def test_lexical_encoders_may_be_left_out_unless_the_sets_are_theirs():
    none = PagConfig(source="x", work_dir="w", steps=STEPS | {"lexical": 0})
    none.check()
    assert [what for what, _ in none.stages()][:2] == ["the collection", "sets of tokens"]
    assert none.lexical == []
    dataclasses.replace(none, rounds=0).check()  # the average is searched
    with pytest.raises(UserError, match=r"^pag.set_weights: 'lexical', which has 0 steps"):
        dataclasses.replace(none, set_weights="lexical").check()


def test_the_sequential_weight_is_chosen_on_dev_queries_unless_dev_is_reported(collection: Collection):
    """Else it is the one of the joint training, of gin's scope of that; a weight that is given stays."""
    work = str(collection.folder.parent)
    gin.parse_config("rank/joint_ranking.sequential_weight = 0.5")
    config = PagConfig(source="x", work_dir=work)
    assert Workspace(Path(work)).collection == collection.folder
    assert config.weighed() == {"fit_split": "dev"}
    of_dev = dataclasses.replace(config, split="dev")
    assert of_dev.weighed() == {"fit_split": None, "sequential_weight": 0.5}
    gin.parse_config("make_index.sequential_weight = 2.0")
    assert of_dev.weighed() == {}


@pytest.mark.slow
def test_a_round_is_trained_and_plans(source: Path, tmp_path: Path, cli):
    work = Workspace(tmp_path / "work")
    tiny = {"joint_ranking.prefix_lengths": (1,), "make_sets.m": 16, "pag.steps": STEPS}
    tiny["make_index.beams"] = 12  # no fewer than the ten that nDCG@10 looks at
    given = command("pag", source, work.folder, tiny)
    status, told, err = cli(*given)
    assert status == 0, err
    assert [line.split(" ", 1)[0] for line in stages(err)] == [f"{n}/11" for n in range(1, 12)]
    searchers = {"bm25", "pag_dense", "pag_teacher", "pag_0", "pag_1", "pag_1_unplanned", "pag_1_lexical"}
    assert searchers == told["search"]["metrics"].keys()
    names = ("pag_dense", "pag_lexical", "pag_0")
    dense, lexical, average = (lazy_params(work.model(name))[2] for name in names)
    for name, array in average.items():
        if name in dense or name in lexical:
            parts = [some[name].read() for some in (dense, lexical) if name in some]
            np.testing.assert_allclose(array.read(), np.mean(parts, axis=0), rtol=1e-6)
    assert "lexical_head/gain" in average
    description = json.loads((work.model("pag_0") / "model.json").read_text())
    assert description["averaged_with"] == str(work.model("pag_lexical"))
    there = made(work)
    assert cli(*given)[0] == 0
    assert made(work) == there

    # Other wordings of the queries: what they cost the planned search, and how much of it stays.
    here = given[1:3]
    assert cli("vary", *here)[0] == 0
    assert cli("search", *here, "--SEARCHER=pag_1", "--SPLIT=test~all")[0] == 0
    status, told, err = cli("evaluate", *here)
    assert status == 0, err
    facts = json.loads(Path(told["robustness_file"]).read_text())
    effects = facts["methods"]["pag_1"]
    assert {"typo", "no_stop_words", "drop_words", "shuffle"} <= effects.keys()
    for effect in effects.values():
        assert 0 <= effect["overlap@10"] <= 1
        assert 0 <= effect["certain"] <= 1
        assert effect["difference"]["p_holm"] is not None
    assert "Other wordings" in Path(told["report"]).read_text()

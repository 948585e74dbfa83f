"""What was made by an earlier model or vocabulary is made anew, or refused; searchers: test_manifest.py."""

import shutil

from model_folders import random_params, write_model_folder

from retrieval_jax.data.synthetic import SyntheticQueries
from retrieval_jax.data.vocabulary import learn
from retrieval_jax.models.layers import T5Config
from retrieval_jax.models.query_generator import QueryGenerator


def test_queries_of_a_generator_that_is_another_at_the_same_step_are_made_anew(
    own, collection, tmp_path, cli
):
    assert cli("import", *own)[0] == 0
    model, folder = QueryGenerator(T5Config(1152, 16, 2, 8, 20, 1, 1)), tmp_path / "model"
    generate = ["generate-queries", *own, f"--gin.MODEL_DIR='{folder}'", "--gin.generate_queries.count=1"]

    def generated(seed: int) -> tuple[list[list[str]], int]:
        write_model_folder(folder, model, random_params(model, seed), collection)
        status, _, err = cli(*generate)
        assert status == 0, err
        made = tmp_path / "work/synthetic/doc2query"
        texts = SyntheticQueries(made).get(range(collection.passage_count))
        assert any(texts)
        return texts, (made / "manifest.json").stat().st_mtime_ns

    first = generated(0)
    assert generated(0) == first
    assert generated(1)[0] != first[0]


def test_another_vocabulary_under_the_same_name_is_noticed(own, collection, tmp_path, cli):
    path, work = tmp_path / "pieces.model", tmp_path / "work"
    own = [*own, f"--gin.VOCABULARY='{path}'", "--gin.DOCIDS='naive'"]
    shutil.copyfile(collection.vocabulary_path, path)
    for verb in ("import", "docids"):
        assert cli(verb, *own)[0] == 0
    first = (work / "docids/naive/tokens.npy").read_bytes()

    learn(["an altogether different text", "of few words", *collection.ids.to_pylist()], 300, path)
    assert cli("import", *own)[0] == 0
    assert (work / "collection/sentencepiece.model").read_bytes() == path.read_bytes()
    status, _, err = cli("train", "--gin_file=runs/naive.gin", *own)
    assert status == 2
    assert "docids/naive: written in another vocabulary" in err
    assert cli("docids", *own)[0] == 0
    assert (work / "docids/naive/tokens.npy").read_bytes() != first

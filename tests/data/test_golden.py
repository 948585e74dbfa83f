"""Every task's examples on a small collection, decoded into text that a person can read and judge.

`python tests/data/test_golden.py` writes tests/data/library/examples.txt anew; read what changed.
"""

import dataclasses
from pathlib import Path

import numpy as np
import seqio

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.docids.table import DocidTable
from retrieval_jax.examples.targets import DocidTargets, PassageTargets, QueryTargets
from retrieval_jax.examples.tasks import PADDING
from retrieval_jax.examples.training_data import DataConfig, TrainDataset
from retrieval_jax.verbs.docids import make_docids
from retrieval_jax.verbs.generating import generate_queries
from retrieval_jax.verbs.importing import import_collection

LIBRARY = Path(__file__).parent / "library"
GOLDEN = LIBRARY / "examples.txt"
TASKS = {
    DocidTargets: ("firstp", "daq", "d2q", "labelled", "labelled_human", "labelled_llm"),
    PassageTargets: ("firstp", "daq", "d2q", "labelled", "labelled_human", "labelled_llm"),
    QueryTargets: ("doc2query",),
}
DATA = DataConfig(
    input_length=16, passage_length=20, chunk_length=12, chunks=2, positives=2, negatives=1,
    synthetic="doc2query",
)  # fmt: skip


def decoded(folder: Path) -> str:
    """All examples of all tasks, a paragraph each."""
    work, source = Workspace(folder / "library"), str(LIBRARY)
    # The vocabulary is kept with the texts: releases of SentencePiece learn other pieces.
    vocabulary = str(LIBRARY / "sentencepiece.model")
    import_collection(source=source, work_dir=str(work.folder), vocabulary_path=vocabulary)
    collection = Collection(work.collection)
    predictions = folder / "predictions"
    for sample, words in (("000", "what is a good"), ("001", "how to do")):
        lines = "".join(f"{words} {p.title or 'bike chain'}\n" for p in collection.passages())
        storage.atomic_write(predictions / f"predicted_queries_sample{sample}.txt", lines.encode())
    generate_queries(source=source, work_dir=str(work.folder), predictions=str(predictions))
    paragraphs = []
    for kind in ("atomic", "naive", None):
        if kind:
            make_docids(source=source, work_dir=str(work.folder), kind=kind)
        table = DocidTable.open(work.docids(kind)) if kind else None
        for targets in (DocidTargets,) if kind else (PassageTargets, QueryTargets):
            opened = TrainDataset(DATA, work, collection, targets, table)
            for task in TASKS[targets]:
                paragraphs += [f"# {opened.prefix}.{task}", *examples(opened, task), ""]
    return "\n".join(paragraphs)


def examples(opened, task: str) -> list[str]:
    """Each example on a line, as text."""
    model, made = opened.vocabulary.model, opened.computed(task)
    lines = []
    for i in range(len(made)):
        features = made(i, np.random.default_rng(i))
        text = model.decode(list(features["inputs"]))
        if opened.table:
            docid = features["targets"]
            answer = model.decode(docid) if opened.table.kind == "naive" else " ".join(map(str, docid))
        elif opened.target_type is QueryTargets:
            answer = model.decode(list(features["targets"]))
        else:
            length = opened.config.passage_length
            answer = " | ".join(
                f"{grade}: {model.decode(features['targets'][k * length : (k + 1) * length])}"
                for k, grade in enumerate(features["grade"])
                if grade != PADDING
            )
        lines.append(f"{text}  ->  {answer}")
    return lines


def test_examples_read_as_they_always_did(tmp_path: Path):
    assert decoded(tmp_path) == GOLDEN.read_text()

    from retrieval_jax.examples.seqio_tasks import register_all  # TensorFlow

    names = register_all(tmp_path / "library", DATA)
    tasks = (*TASKS[DocidTargets], "sentence", "title")  # these are not in examples.txt
    assert {name for name in names if ".naive." in name} == {
        f"library.naive.{name}" for name in (*tasks, "1a", "2a", "2b", "3a", "3b", "6b", "7")
    }
    alone = register_all(tmp_path / "library", dataclasses.replace(DATA, negatives=0))
    of_naive = {name for name in names if ".naive." in name}
    in_groups = {name for name in {*names} - {*alone} if ".naive_groups." in name}
    assert in_groups == {name.replace(".naive.", ".naive_groups.") for name in of_naive}
    task = seqio.TaskRegistry.get("library.naive_groups.labelled")
    assert {"inputs", "targets", "grade"} <= {*task.output_features}
    lengths = {name: 99 for name in task.output_features}
    assert len([*task.get_dataset(lengths, "train", shuffle=False)]) > 0
    mixture = seqio.get_mixture_or_task("library.naive.3b")
    assert mixture.num_input_examples("train") == 6 + 12 + 8
    lengths = {"inputs": 16, "targets": 16}
    dataset = seqio.get_dataset(
        mixture.name, lengths, seqio.EncDecFeatureConverter(pack=False), shuffle=True, seed=0
    )
    batch = next(dataset.batch(26).as_numpy_iterator())
    vocabulary = mixture.output_features["inputs"].vocabulary
    found = {vocabulary.decode(docid.tolist()) for docid in batch["decoder_target_tokens"]}
    assert found == {"brew-1", "brew-2", "bike-1", "bike-2", "star-1", "bread-1"}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        GOLDEN.write_text(decoded(Path(folder)))

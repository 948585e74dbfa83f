"""The data of the study of several positives: tokens, a teacher's scores, labels and batches."""

import dataclasses
import functools
import gzip
import shutil
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from retrieval_jax.core import storage
from retrieval_jax.core.workspace import Workspace
from retrieval_jax.data.collection import Collection
from retrieval_jax.data.mined import MinedNegatives
from retrieval_jax.data.scores import TeacherScores
from retrieval_jax.data.vocabulary import EOS, Vocabulary
from retrieval_jax.main import run

OF_TEACHER = "llm", "mixture", "curriculum"
LABELS = (*OF_TEACHER, "own", "false_20", "false_40")
LLM_SHARE = 0.75  # of a curriculum's steps
RELEVANT = 0.8  # of the best candidate's score by the teacher: from there on it labels a passage as positive
MOST = 4  # positives that the teacher labels
NEGATIVES = 3
LENGTHS = 16, 48  # tokens of a query, of a passage
SPAN = 4, 12  # tokens, without the end
KEPT = 0.1  # of the passages that keep the span, as Lee et al. (2019) chose


def import_collection(source: Path, work: Workspace, passages: int | None, teacher_steps: int) -> None:
    """Imports a folder, mines BM25's negatives of its train queries, and lets a teacher score them.

    Args:
      source: the folder. Where it has queries.lemmas (wordnet), those with several positives are its queries.
      work: the work folder.
      passages: of a collection of lemmas; None: all.
      teacher_steps: of the dual encoder that the teacher fuses with BM25; 0: no teacher.
    """
    if list(source.glob("queries.lemmas*")):
        source = lemmas(source, work.folder / "source" / source.name, passages)
    here = [f"COLLECTION={str(source)!r}", f"WORK_DIR={str(work.folder)!r}"]
    run("import", [], [*here, "import_collection.vocab_size=8192"])
    run("index", [], here)
    run("mine", [], [*here, "mine.depth=40", "mine.negatives_per_query=20"])
    if teacher_steps:
        model = f"MODEL_DIR={str(work.model(f'teacher_{teacher_steps}'))!r}"
        unevaluated = ["train.eval_every=1000000", "train.save_every=1000000", "train.keep_best=None"]
        dense = [model, f"STEPS={teacher_steps}", "T5Config.num_encoder_layers=0", *unevaluated]
        run("train", ["runs/dual_encoder.gin"], [*here, *dense])
        run("index", [], [*here, model, "make_index.kind='exact'", "make_index.name='dense'"])
        fused = ["make_index.kind='fused'", "make_index.name='teacher'", "make_index.fusion='min_max'"]
        run("index", [], [*here, *fused, "make_index.parts=('bm25', 'dense')"])
        scored = ["SEARCHER='teacher'", "score_pairs.candidates=('bm25',)", "score_pairs.name='teacher'"]
        run("score", [], [*here, *scored])


def lemmas(source: Path, folder: Path, passages: int | None) -> Path:
    """The passages, with lemmas that have several positives as queries: a tenth test, 8,000 of the others.

    A part of the passages is the positives of some lemmas, and others; these lemmas are its queries.
    """
    folder = folder if passages is None else folder.with_name(f"{folder.name}_{passages}")
    files = [source / f"{name}.tsv.gz" for name in ("docs", "queries.lemmas", "qrels.lemmas")]

    def make(folder: Path) -> dict:
        with gzip.open(files[1], "rt") as file:
            texts = dict(line.rstrip("\n").split("\t") for line in file)
        qrels = defaultdict(list)
        with gzip.open(files[2], "rt") as file:
            for line in file:
                qrels[line.split("\t")[0]].append(line)
        several = sorted((q for q in qrels if len(qrels[q]) > 1), key=storage.hash_fraction)
        if passages is None:
            shutil.copyfile(files[0], folder / "docs.tsv.gz")
        else:
            several = _part(source, folder, several, qrels, passages)
        tenth = len(several) // 10
        splits = {"test": several[:tenth], "train": several[tenth : tenth + 8000]}
        for split, queries in splits.items():
            (folder / f"queries.{split}.tsv").write_text("".join(f"{q}\t{texts[q]}\n" for q in queries))
            (folder / f"qrels.{split}.tsv").write_text("".join(line for q in queries for line in qrels[q]))
        return {split: len(queries) for split, queries in splits.items()}

    recipe = {"passages": passages, "files": [storage.checksum(file) for file in files]}
    storage.build_once(folder, recipe, make)
    return folder


def _part(source: Path, folder: Path, queries: list[str], qrels: dict[str, list[str]], passages: int):
    """Writes `passages` passages: positives of as many of the queries as fill three quarters, and others."""
    kept, chosen = set(), []
    for query in queries:
        more = kept | {line.split("\t")[1] for line in qrels[query]}
        if len(more) > 0.75 * passages:
            break
        kept = more
        chosen.append(query)
    with gzip.open(source / "docs.tsv.gz", "rt") as file:
        docs = {line.split("\t")[0]: line for line in file}
    others = sorted((name for name in docs if name not in kept), key=storage.hash_fraction)
    kept |= {*others[: passages - len(kept)]}
    with gzip.open(folder / "docs.tsv.gz", "wt") as file:
        file.writelines(line for name, line in docs.items() if name in kept)
    return chosen


@dataclasses.dataclass
class Data:
    """A collection in memory, as tokens; `labels` and `mined` are rows of each train query's passages.

    `teacher` has the teacher's score of each of a train query's labels and mined passages, by row.
    """

    ids: list[str]
    passages_NxP: np.ndarray
    queries_QxS: np.ndarray
    labels: list[list[int]]
    mined: list[list[int]]
    tests_TxS: np.ndarray
    qrels: dict[str, dict[str, int]]
    teacher: list[dict[int, float]] | None = None

    @classmethod
    def read(cls, work: Workspace) -> "Data":
        """Reads what `import_collection` made."""
        collection = Collection(work.collection)
        vocabulary = Vocabulary(collection.vocabulary_path)
        train, test = collection.queries("train"), collection.queries("test")
        mined = MinedNegatives(work.negatives("bm25")).of_queries(collection)
        passages = [p.full_text for p in collection.passages()]
        teacher = None
        if storage.finished(work.scores("teacher")):
            scored = TeacherScores(work.scores("teacher")).by_row(collection)
            found = [scored[query.id] for query in train]
            teacher = [dict(zip(one.rows_P.tolist(), one.scores_P.tolist(), strict=True)) for one in found]
        return cls(
            collection.ids.to_pylist(),
            vocabulary.batch(passages, LENGTHS[1]),
            vocabulary.batch([q.text for q in train], LENGTHS[0]),
            [collection.find_rows(list(q.positives)).tolist() for q in train],
            [collection.find_rows(list(mined.get(q.id, ()))).tolist() for q in train],
            vocabulary.batch([q.text for q in test], LENGTHS[0]),
            {q.id: q.positives for q in test},
            teacher,
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """A digest of all of it, and of how batches are made of it."""
        arrays = (x.tobytes() for x in (self.passages_NxP, self.queries_QxS, self.tests_TxS))
        rules = LLM_SHARE, RELEVANT, MOST, NEGATIVES, SPAN, KEPT
        facts = self.ids, self.labels, self.mined, self.qrels, self.teacher, rules
        return storage.digest([*arrays, *map(repr, facts)])

    def with_noise(self, share: float, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """(labels of which a share is false, the mined that are left)."""
        rng, labels, rest = np.random.default_rng(seed), [], []
        for right, found in zip(self.labels, self.mined, strict=True):
            count = int(len(right) * share / (1 - share) + rng.random())
            wrong = rng.choice(found, min(count, len(found)), replace=False).tolist()
            labels.append(right + wrong)
            rest.append([row for row in found if row not in wrong])
        return labels, rest

    def by_teacher(self) -> tuple[list[list[int]], list[list[int]]]:
        """(the teacher's labels, the candidates that are left).

        Its positives are those of a query's candidates that it scores at least RELEVANT of the best one, at
        most MOST; the collection's positives are candidates as the mined passages are.
        """
        labels, rest = [], []
        for scores in self.teacher:
            best = sorted(scores, key=scores.get, reverse=True)
            chosen = [row for row in best[:MOST] if scores[row] >= RELEVANT * scores[best[0]]]
            labels.append(chosen)
            rest.append([row for row in best if row not in chosen])
        return labels, rest

    def labelled(self, kind: str, seed: int) -> tuple[list[list[int]], list[list[int]]]:
        """(labels, negatives) of one of LABELS; a curriculum's are those of its first part."""
        if kind in ("own", "false_20", "false_40"):
            return self.with_noise({"own": 0.0, "false_20": 0.2, "false_40": 0.4}[kind], seed)
        labels, rest = self.by_teacher()
        if kind == "mixture":
            own = np.random.default_rng(seed).random(len(labels)) < 0.5
            labels = [a if is_own else b for is_own, a, b in zip(own, self.labels, labels, strict=True)]
            rest = [a if is_own else b for is_own, a, b in zip(own, self.mined, rest, strict=True)]
        return labels, rest

    def quality(self, kind: str) -> dict[str, float]:
        """Compares labels with the collection's own: how many a query, how many are right, and are there."""
        labels, _ = self.labelled(kind, 0)
        right = sum(len({*some} & {*own}) for some, own in zip(labels, self.labels, strict=True))
        count, own = sum(map(len, labels)), sum(map(len, self.labels))
        return {"per_query": count / len(labels), "precision": right / count, "recall": right / own}


def batches(data: Data, positives: int, kind: str, *, batch: int, seed: int, steps: int) -> Iterator[dict]:
    """Yields a run's batches: groups of positives and mined negatives, with a teacher's scores if known."""
    changes = round(LLM_SHARE * steps) if kind == "curriculum" else steps
    first, then = data.labelled(kind, seed), data.labelled("own", seed)
    rng, known = np.random.default_rng(seed + 1), 2 * max(map(len, data.labels)) + 1  # as wide for all labels
    known, step = max(known, MOST), 0
    batch = min(batch, len(data.labels))
    while True:
        order = rng.permutation(len(data.labels))
        for chosen in order[: len(order) // batch * batch].reshape(-1, batch):
            labels, mined = first if step < changes else then
            yield _batch(data, chosen, labels, mined, (positives, known), rng)
            step += 1


def _batch(data: Data, chosen, labels, mined, sizes: tuple[int, int], rng) -> dict[str, np.ndarray]:
    positives, known = sizes
    shape = len(chosen), positives + NEGATIVES
    made = {"passage": np.full(shape, -1), "other_positives": np.full((len(chosen), known), -1)}
    made["grade"], score_BxG = np.full(shape, -1), np.full(shape, np.nan, np.float32)
    for row, query in enumerate(chosen):
        right = rng.permutation(labels[query])[:positives]
        wrong = rng.permutation(mined[query])[:NEGATIVES].astype(int)
        own = np.concatenate([right, wrong]).astype(int)
        made["passage"][row, : len(own)] = own
        made["grade"][row, : len(own)] = np.arange(len(own)) < len(right)
        made["other_positives"][row, : len(labels[query])] = labels[query]
        if data.teacher:
            score_BxG[row, : len(own)] = [data.teacher[query].get(int(p), np.nan) for p in own]
    there = made["passage"][..., None] >= 0
    made["left_encoder_input_tokens"] = data.queries_QxS[chosen]
    made["right_encoder_input_tokens"] = np.where(there, data.passages_NxP[made["passage"]], 0)
    made = {name: x.astype(np.int32) for name, x in made.items()}
    return made | ({"score": score_BxG} if data.teacher else {})


def spans(data: Data, batch: int, seed: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields batches of spans and the passages that they were cut from, without labels (Lee et al. 2019).

    A span, of the title too, is the query; nine in ten of the passages lose it.
    """
    rng, length, batch = np.random.default_rng(seed), LENGTHS[0], min(batch, len(data.ids))
    while True:
        rows = rng.permutation(len(data.ids))[:batch]
        queries, passages = np.zeros((batch, length)), np.zeros((batch, 1, LENGTHS[1]))
        for i, row in enumerate(rows):
            tokens = data.passages_NxP[row]
            tokens = tokens[(tokens != 0) & (tokens != EOS)]
            size = min(int(rng.integers(SPAN[0], SPAN[1] + 1)), len(tokens))
            start = int(rng.integers(len(tokens) - size + 1))
            rest = tokens if rng.random() < KEPT else np.delete(tokens, np.s_[start : start + size])
            queries[i, : size + 1] = [*tokens[start : start + size], EOS]
            passages[i, 0, : len(rest) + 1] = [*rest, EOS]
        made = {"left_encoder_input_tokens": queries, "right_encoder_input_tokens": passages}
        made |= {"passage": rows[:, None], "grade": np.ones((batch, 1))}
        made["other_positives"] = np.full((batch, 1), -1)
        yield {name: x.astype(np.int32) for name, x in made.items()}

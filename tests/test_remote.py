"""Every verb on gs://, from import to the report, as the same commands do it on a disk."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from gcs import Bucket
from reading import error_of

from retrieval_jax.checkpoints.checkpoints import Checkpoints
from retrieval_jax.core import paths

# Several commands one after the other in one process: stdin has their arguments.
VERBS = """
import json, sys
from retrieval_jax.main import main
for argv in json.load(sys.stdin):
    assert main([*argv, "--json"]) == 0, argv
"""
RUNS = ("metrics.json", "runs/qrels.test.trec")


class Machine:
    """A machine on which processes may leave copies of remote files, and temporary ones, and nothing else."""

    def __init__(self, folder: Path, bucket: Bucket, settings: Sequence[str]):
        self.folder, self.settings = folder, settings
        for name in ("home", "temporary", "cache"):
            (folder / name).mkdir(parents=True)
        self.environment = os.environ | bucket.environment
        self.environment |= {
            "HOME": str(folder / "home"),
            "TMPDIR": str(folder / "temporary"),
            "MPLCONFIGDIR": str(folder / "temporary"),
            "KERAS_HOME": str(folder / "temporary"),
            "RETRIEVAL_JAX_CACHE": str(folder / "cache"),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }

    def process(self) -> dict:
        return {"cwd": self.folder / "home", "env": self.environment}

    def command(self, work: str, verb: str, **settings: object) -> list[str]:
        """A verb's arguments; its settings are gin's, and `run` is a gin file."""
        files = [f"--gin_file={settings.pop('run')}"] if "run" in settings else []
        given = [f"--gin.{name.replace('__', '.')}={value!r}" for name, value in settings.items()]
        return [verb, *files, *self.settings, f"--gin.WORK_DIR={work!r}", *given]

    def run(self, work: str, *commands: tuple) -> None:
        argv = [self.command(work, verb, **settings) for verb, settings in commands]
        subprocess.run(
            [sys.executable, "-c", VERBS], input=json.dumps(argv).encode(), check=True, **self.process()
        )

    def left(self) -> list[str]:
        """What lies where nothing should. Beam makes folders for its own programs, whatever it is told."""
        there = (path.relative_to(self.folder / "home") for path in (self.folder / "home").rglob("*"))
        return [str(path) for path in there if path.parts[0] != ".apache_beam"]


@pytest.fixture
def machine(bucket: Bucket, arguments: list[str], tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine", bucket, [a for a in arguments if "WORK_DIR" not in a])


def lexical(predictions: Path) -> list[tuple]:
    """All that needs no training."""
    synthetic = {"generate_queries__predictions": str(predictions), "generate_queries__shard_size": 30}
    return [
        ("import", {}),
        ("docids", {"DOCIDS": "naive_digits"}),
        ("docids", {"DOCIDS": "naive_digits", "make_docids__kind": "atomic"}),
        ("generate-queries", synthetic),
        ("index", {"MODEL_DIR": None}),
        ("index", {"MODEL_DIR": None, "make_index__expansion": "doc2query"}),
        ("mine", {}),
        ("score", {"score_pairs__candidates": ("bm25",)}),
        ("search", {"SEARCHER": "bm25"}),
        ("search", {"SEARCHER": "bm25_doc2query"}),
        ("evaluate", {}),
        ("export", {"SEARCHER": "bm25"}),
    ]


def compare(bucket: Bucket, work: str, disk: Path, names: Sequence[str]) -> None:
    """These files are the same on a disk and in the bucket."""
    for name in names:
        there = bucket.read(f"{work}/{name}")
        assert there == (disk / name).read_bytes(), name
        assert there, name


def test_verbs_without_training(bucket: Bucket, machine: Machine, source: Path, tmp_path: Path):
    work = "without_training/small_docs"
    ids = [line.split("\t")[0] for line in (source / "docs.tsv").read_text().splitlines()]
    lines = [json.dumps({"id": one, "predicted_queries": [f"what is {one}"]}) for one in ids]
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "all.jsonl").write_text("\n".join(lines))
    commands = lexical(tmp_path / "predictions")
    machine.run(str(tmp_path / "disk"), *commands)
    machine.run(f"gs://bucket/{work}", *commands)
    names = [f"runs/{name}.test.trec" for name in ("bm25", "bm25_doc2query")]
    names += ["docids/naive_digits/tokens.npy", "negatives/bm25/qrels.train.tsv"]
    compare(bucket, work, tmp_path / "disk", [*RUNS, *names])
    there = sorted(bucket.objects(f"{work}/"))
    on_disk = [str(path.relative_to(tmp_path / "disk")) for path in paths.files(tmp_path / "disk")]
    assert there == [f"{work}/{name}" for name in on_disk]  # no more, no less: nothing unfinished
    assert machine.left() == []
    assert not [path for path in (machine.folder / "temporary").iterdir() if "retrieval_jax" in path.name]


@pytest.mark.slow
def test_train_index_search(bucket: Bucket, machine: Machine, tmp_path: Path):
    """A run that was killed as its first checkpoint was saved, then resumed; both families; the caches."""
    work = "training/small_docs"
    remote = f"gs://bucket/{work}"
    pytest.importorskip("google.cloud.storage", reason="Orbax asks it about buckets: the extra gcs")

    def naive(work: str) -> dict:
        return {"MODEL_DIR": f"{work}/models/naive", "DOCIDS": "naive"}

    def dual(work: str) -> dict:
        return {"MODEL_DIR": f"{work}/models/dual_encoder", "run": "runs/dual_encoder.gin"}

    def before(work: str) -> list[tuple]:
        return [("import", {}), ("docids", {"DOCIDS": "naive"}), ("cache", {"DOCIDS": "naive"})]

    def after(work: str) -> list[tuple]:
        model = {"MODEL_DIR": f"{work}/models/dual_encoder"}
        return [
            ("train", naive(work) | {"STEPS": 2}),
            ("train", naive(work) | {"STEPS": 4, "train__profile": (3, 1)}),
            ("train", dual(work) | {"STEPS": 2}),
            ("docids", {"DOCIDS": "rq_2x8", "EMBEDDINGS": f"{work}/models/dual_encoder"}),
            ("index", {"MODEL_DIR": f"{work}/models/naive"}),
            ("index", model | {"make_index__kind": "exact"}),
            ("index", model | {"make_index__kind": "scann"}),
            *[("search", {"SEARCHER": name, "K": 10}) for name in ("naive", "exact", "scann")],
            ("export", {"SEARCHER": "naive"}),
            ("export", {"SEARCHER": "scann"}),
            ("export", {**model, "export__format": "sentence_transformers"}),
            (
                "convert",
                {
                    "INITIAL_CHECKPOINT": f"{work}/exports/dual_encoder.sentence_transformers",
                    "MODEL_DIR": f"{work}/models/converted",
                },
            ),
            ("index", {"MODEL_DIR": f"{work}/models/converted", "make_index__name": "converted"}),
            ("search", {"SEARCHER": "converted", "K": 10}),
            ("evaluate", {}),
        ]

    disk = str(tmp_path / "disk")
    machine.run(disk, *before(disk), *after(disk))
    machine.run(remote, *before(remote))
    killed = machine.command(remote, "train", **naive(remote), STEPS=2)
    command = [sys.executable, "-m", "retrieval_jax.main", *killed]
    bucket.kill_at("checkpoints/2/commit_success.txt", command, **machine.process())
    machine.run(remote, *after(remote))

    searchers = ("naive", "exact", "scann", "converted")
    names = [f"runs/{name}.test.trec" for name in searchers]
    compare(bucket, work, tmp_path / "disk", [*RUNS, *names, "docids/rq_2x8/tokens.npy"])
    left = bucket.objects(f"{work}/")
    assert not [name for name in left if "unfinished" in name or "making" in name]
    curve = bucket.read(f"{work}/models/naive/learning_curve.jsonl")
    steps = [json.loads(line)["step"] for line in curve.splitlines()]
    assert steps == [2, 4]  # the points on dev
    assert any(name.endswith("xplane.pb") for name in left)
    assert any("events.out.tfevents" in name for name in left)
    assert machine.left() == []

    code = f"""
import seqio
from retrieval_jax.examples.seqio_tasks import register_all
from retrieval_jax.examples.training_data import DataConfig
from retrieval_jax.search.searcher import Searcher

register_all({remote!r}, DataConfig())
seqio.add_global_cache_dirs([{remote!r} + "/cache"])
task = seqio.get_mixture_or_task("small_docs.naive.firstp")
lengths = {{"inputs": 64, "targets": 64}}
assert sum(1 for _ in task.get_dataset(lengths, "train", use_cached=True, shuffle=False)) == 100
for name in ("naive", "scann"):
    assert len(Searcher.open({remote!r} + f"/exports/{{name}}").search(["print a table"], 5)[0]) == 5
"""
    subprocess.run([sys.executable, "-c", code], check=True, **machine.process())


def test_checkpoints_in_a_bucket_need_googles_client():
    if paths.has_client():
        pytest.skip("it is installed")
    assert "pip install 'retrieval_jax[gcs]'" in error_of(lambda: Checkpoints("gs://bucket/remote/m"))

"""Verbs of several trainings, `ripor` and `pag`, on a tiny collection: their command, and what they made."""

from pathlib import Path

from retrieval_jax.core.workspace import Workspace

TINY = {
    "import_collection.vocab_size": 1000,
    "DOCIDS": "rq_2x8",
    "T5Config.emb_dim": 16,
    "T5Config.mlp_dim": 16,
    "train.batch_size": 8,
    "rank/train.batch_size": 4,
    "DataConfig.passage_length": 24,
    "mine.prefix_lengths": (1, 2),
    "make_index.beams": 4,
    "learning_rate.peak": 1e-30,  # weights stay what they begin as
    "rank/learning_rate.peak": 1e-30,
}


def command(verb: str, source: Path, folder: Path, settings: dict[str, object]) -> list[str]:
    values = {"COLLECTION": str(source), "WORK_DIR": str(folder)} | TINY | settings
    return [verb, *(f"--gin.{name}={value!r}" for name, value in values.items())]


def stages(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.partition("/")[0].isdigit()]


def made(work: Workspace) -> dict[str, int]:
    """When each model, negatives, scores, docids and searchers were made."""
    files = (
        work.folder.glob("*/*/manifest.json"),
        work.folder.glob("models/*/checkpoints/*/_CHECKPOINT_METADATA"),
    )
    return {str(path): path.stat().st_mtime_ns for some in files for path in some}

"""The list of verbs, and what gin configures before one of them runs. Nothing heavy is imported here."""

import importlib

VERBS = {
    "demo": ("retrieval_jax.verbs.demo", "demo"),
    "ripor": ("retrieval_jax.verbs.ripor", "ripor"),
    "pag": ("retrieval_jax.verbs.pag", "pag"),
    "import": ("retrieval_jax.verbs.importing", "import_collection"),
    "docids": ("retrieval_jax.verbs.docids", "make_docids"),
    "sets": ("retrieval_jax.verbs.sets", "make_sets"),
    "cache": ("retrieval_jax.verbs.cache", "cache"),
    "preflight": ("retrieval_jax.verbs.preflight", "preflight"),
    "train": ("retrieval_jax.verbs.train", "train"),
    "convert": ("retrieval_jax.verbs.convert", "convert"),
    "generate-queries": ("retrieval_jax.verbs.generating", "generate_queries"),
    "mine": ("retrieval_jax.verbs.mine", "mine"),
    "score": ("retrieval_jax.verbs.score", "score_pairs"),
    "index": ("retrieval_jax.verbs.index", "make_index"),
    "vary": ("retrieval_jax.verbs.vary", "vary"),
    "search": ("retrieval_jax.verbs.search", "search"),
    "evaluate": ("retrieval_jax.verbs.evaluate", "evaluate"),
    "sweep": ("retrieval_jax.verbs.sweep", "sweep"),
    "export": ("retrieval_jax.verbs.export", "export"),
    "serve": ("retrieval_jax.verbs.serve", "serve"),
}
# Verb -> the command lines that its --help shows.
EXAMPLES = {
    "demo": (
        "retrieval-jax demo                      # on the collection that comes with the package",
        "retrieval-jax demo path/to/folder       # on a folder in BEIR or TSV layout",
    ),
    "ripor": (
        "retrieval-jax ripor path/to/folder      # from random weights",
        "retrieval-jax ripor --gin.ripor.rounds=1 --gin.rank/DataConfig.negatives=15",
    ),
    "pag": (
        "retrieval-jax pag path/to/folder        # from random weights",
        "retrieval-jax pag --gin.pag.rounds=2 --gin.rank/DataConfig.negatives=15",
    ),
    "import": ("retrieval-jax import path/to/folder --WORK_DIR=work/NAME",),
    "docids": (
        "retrieval-jax docids --DOCIDS=naive",
        "retrieval-jax docids --DOCIDS=semantic --EMBEDDINGS=vectors.npy",
    ),
    "sets": (
        "retrieval-jax sets                      # the tokens of highest BM25 weight",
        "retrieval-jax sets --gin.make_sets.weights=\"'work/NAME/models/lexical'\"",
    ),
    "cache": ("retrieval-jax cache --DOCIDS=naive --gin_file=tasks/paper.gin --SYNTHETIC=doc2query",),
    "preflight": ("retrieval-jax preflight --gin_file=runs/atomic.gin --gin_file=tpu/v5e_2x2.gin",),
    "train": (
        "retrieval-jax train --gin_file=runs/naive.gin --STEPS=2000",
        "retrieval-jax train --gin_file=runs/dual_encoder.gin",
    ),
    "convert": (
        "retrieval-jax convert --INITIAL_CHECKPOINT=path/to/gtr-t5 --MODEL_DIR=work/NAME/models/gtr",
    ),
    "generate-queries": ("retrieval-jax generate-queries --gin.generate_queries.count=10",),
    "mine": (
        "retrieval-jax mine --SEARCHER=bm25 --gin.mine.skip_top=2",
        "retrieval-jax mine --SEARCHER=exact --gin.mine.relative_margin=0.05",
    ),
    "score": (
        "retrieval-jax score --SEARCHER=fused --gin.score_pairs.candidates=\"('mined', 'bm25')\"",
        "retrieval-jax score --gin.score_pairs.file=\"'teacher_scores.json.gz'\"",
    ),
    "index": (
        "retrieval-jax index                     # BM25",
        "retrieval-jax index --MODEL_DIR=work/NAME/models/naive",
        "retrieval-jax index --gin.make_index.kind=\"'fused'\" --gin.make_index.parts=\"('bm25', 'exact')\"",
    ),
    "vary": (
        "retrieval-jax vary --SPLIT=test",
        'retrieval-jax vary --gin.vary.kinds="()" --gin.vary.file="\'paraphrase.tsv\'"',
    ),
    "search": (
        "retrieval-jax search --SEARCHER=planned --SPLIT=test",
        'retrieval-jax search --SEARCHER=planned --QUERY="how do I smooth a signal?"',
    ),
    "evaluate": ("retrieval-jax evaluate --SPLIT=test",),
    "sweep": (
        "retrieval-jax sweep path/to/one path/to/another ir_datasets:nano-beir/scifact",
        "retrieval-jax sweep path/to/one path/to/another \\\n"
        "    --gin.sweep.methods=\"('bm25', 'runs/dual_encoder.gin', 'work/gtr/models/gtr')\"",
    ),
    "export": ("retrieval-jax export --SEARCHER=planned",),
    "serve": (
        "retrieval-jax serve                     # all searchers, at http://127.0.0.1:8000/",
        "retrieval-jax serve --gin.serve.searchers=\"('bm25', 'planned')\" --gin.serve.port=8080",
    ),
}
# Verbs of several collections -> the setting that takes those that are given as arguments.
SEVERAL = {"sweep": "sweep.collections"}
# Where no --gin_file is given.
DEFAULT_FILES = {
    "demo": ["runs/demo.gin"],
    "ripor": ["runs/ripor.gin"],
    "pag": ["runs/pag.gin"],
    "preflight": ["runs/naive.gin"],
    "train": ["runs/naive.gin"],
}
# Modules whose gin names a configuration file may mention, whichever verb runs.
CONFIGURABLE = (
    "retrieval_jax.examples.training_data",
    "retrieval_jax.models.contrastive",
    "retrieval_jax.training.optimizers",
    "retrieval_jax.training.evaluators",
)


def configure_verbs(files: list[str], bindings: list[str]) -> None:
    """Imports all that gin may name, and configures it."""
    from retrieval_jax.core.progress import quiet_libraries

    quiet_libraries()
    from retrieval_jax.core import configuration

    modules = [module for module, _ in VERBS.values()]
    for module in (*modules, *CONFIGURABLE):
        importlib.import_module(module)
    configuration.configure(files, bindings)

"""The verb `cache`: which examples it writes, for which retriever."""

from retrieval_jax.core.workspace import Workspace


def test_docids_are_needed_where_they_are_written(arguments: list[str], cli):
    status, _, err = cli("cache", *arguments, "--DOCIDS=None")
    assert (status, err.count("\n")) == (2, 1)
    assert "cache: docids of no kind: --DOCIDS=naive, or --gin.cache.retriever=@DualEncoder" in err


def test_a_dual_encoders_examples_are_groups_of_passages(arguments: list[str], work: Workspace, cli):
    settings = ["--gin.DataConfig.mixture={'labelled': 1}", "--gin.DataConfig.passage_length=16"]
    retriever = ["--DOCIDS=None", "--gin.cache.retriever=@DualEncoder"]
    assert cli("cache", *arguments, *settings, *retriever)[0] == 0
    (folder,) = work.cache("").iterdir()
    assert folder.name == "small_docs.passages.labelled"
    assert (folder / "COMPLETED").exists()

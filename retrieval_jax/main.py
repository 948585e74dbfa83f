"""The one entry: `retrieval-jax VERB --gin_file=… --gin.NAME=VALUE`.

Nothing heavy is imported here, so that `--help` answers at once; each verb imports what it needs.
"""

import argparse
import errno
import importlib
import json
import os
import re
import sys

from retrieval_jax.core.errors import Diverged, Preempted, UserError
from retrieval_jax.verbs.documentation import documentation
from retrieval_jax.verbs.table import DEFAULT_FILES, EXAMPLES, SEVERAL, VERBS, configure_verbs

OPTIONS = """options of every verb:
  --gin_file=FILE     a gin file, from the working folder or from gin_configs/; may be repeated
                      (train and preflight without one read runs/naive.gin, demo, ripor and pag
                      runs/VERB.gin)
  --NAME=VALUE        sets a macro of base.gin: --COLLECTION=path, --DOCIDS=atomic, --K=10, --MODEL_DIR=None
  --gin.NAME=VALUE    the same, or a function's parameter; a text needs quotes of its own here, as in
                      --gin.make_index.kind="'exact'"
  --json              one JSON object that says what was made on stdout, everything else on stderr

WORK_DIR and MODEL_DIR may lie in Google Cloud Storage (training there needs the extra retrieval_jax[gcs]):
  --WORK_DIR=gs://BUCKET/NAME

train, generate-queries, mine, sets, score, index and search on several hosts: the same command on each, the
work folder shared by all
  --gin.multihost.enabled=True                 on a TPU pod, GKE or SLURM: no more is needed
  JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0 retrieval-jax train …    elsewhere

exit status: 0; 2 for bad input (one line says what); 3 if a training diverged (LossSpikeGuard.on_spike);
130 after Ctrl-C; 143 after SIGTERM in training, when the running step has ended and is saved: the same
command goes on
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a verb; returns the exit status, which `OPTIONS` explains."""
    verb, files, bindings, as_json = parse(sys.argv[1:] if argv is None else argv)
    if verb == "demo":
        sum_as_on_two_processors()
    try:
        made = run(verb, files, bindings)
    except UserError as error:
        # gin adds lines to what passes through its functions; ours is the first.
        print(f"retrieval-jax: {str(error).splitlines()[0]}", file=sys.stderr)
        return 3 if isinstance(error, Diverged) else 2
    except Preempted as stop:
        print(f"retrieval-jax: {str(stop).splitlines()[0]}", file=sys.stderr)
        return 143
    except Exception as error:
        if not (line := missing_package(error) or disk_error(error)):
            raise
        print(f"retrieval-jax: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("retrieval-jax: interrupted; the same command goes on from what is finished", file=sys.stderr)
        return 130
    if made is not None:
        print(json.dumps(made) if as_json else plain(made))
    return 0


def sum_as_on_two_processors() -> None:
    """Has XLA and OpenBLAS, which are not loaded yet, split long sums as on two processors.

    They split them by the number of processors, and sums in another order round otherwise: clusters of
    vectors, and the docids that are made of them, would differ from one machine to another. Who has more
    processors and needs no such table may set NPROC.
    """
    os.environ.setdefault("NPROC", "2")  # of XLA's threads
    os.environ.setdefault("OPENBLAS_NUM_THREADS", os.environ["NPROC"])


def missing_package(error: BaseException) -> str | None:
    """One line for a package that is not installed; None for any other error."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    name = re.match(r"No module named '(\w+)", str(error))
    if name is None or name[1] == "retrieval_jax":
        return None
    return (
        f"{name[1]}: not installed, and this command needs it: install retrieval_jax's requirements again, "
        "or name the folder of a module of your own in PYTHONPATH"
    )


def disk_error(error: BaseException) -> str | None:
    """One line for a full or read-only disk, whichever library met it; None for any other error."""
    kinds = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
    # What C++ libraries say, with no number. "Permission denied" alone may be of a device or a port.
    texts = [os.strerror(kind) for kind in kinds[:3]]
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in kinds:
            what, path = os.strerror(seen.errno), seen.filename
        else:
            path = None
            what = next((text for text in texts if text in str(seen)), None)
        if what:
            where = os.fsdecode(path) if isinstance(path, str | bytes) else "a file of this command"
            hint = "free some space" if what in texts[:2] else "check its permissions"
            return f"{where}: cannot be used ({what}): {hint}, or another WORK_DIR; then the same command"
        seen = seen.__cause__ or seen.__context__
    return None


def run(verb: str, files: list[str], bindings: list[str]) -> dict | None:
    """Configures and runs a verb; returns what it made (None if another process of a training reports it)."""
    configure_verbs(files or DEFAULT_FILES.get(verb, []), bindings)
    from retrieval_jax.core import configuration
    from retrieval_jax.core.progress import console, log
    from retrieval_jax.mesh import multihost

    multihost.initialize(verb)
    console.quiet = silent = verb == "train" and not multihost.is_process_0()
    if verb not in ("demo", "ripor", "pag") and not silent and (scoped := configuration.scoped()):
        names = ", ".join(name for _, name in scoped)
        log(f"{names}: without effect here: only `demo`, `ripor` and `pag` enter scopes")
    module, function = VERBS[verb]
    made = getattr(importlib.import_module(module), function)()
    return None if silent else made


def parse(argv: list[str]) -> tuple[str, list[str], list[str], bool]:
    """(verb, gin files, gin bindings, whether --json was given)."""
    parser = argparse.ArgumentParser(
        "retrieval-jax",
        description="Trains, searches and compares generative retrievers and dual encoders.",
        epilog=_epilog("demo", "train", "search"),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in VERBS:
        summary, detail = documentation(verb)
        sub = verbs.add_parser(
            verb,
            help=summary,
            description=detail,
            epilog=_epilog(verb),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        sub.add_argument("--gin_file", action="append", default=[], help=argparse.SUPPRESS)
        sub.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
        same = f"--gin.{SEVERAL[verb]}" if verb in SEVERAL else "--COLLECTION"
        nargs = "*" if verb in SEVERAL else "?"
        sub.add_argument("collection", nargs=nargs, metavar="COLLECTION", help=f"the same as {same}=…")
    is_binding = [bool(re.match(r"--(gin\.|[A-Z_]+(=|$))", argument)) for argument in argv]
    bindings = [re.sub(r"^--(gin\.)?", "", x) for x, binds in zip(argv, is_binding, strict=True) if binds]
    args = parser.parse_args([x for x, binds in zip(argv, is_binding, strict=True) if not binds])
    for binding in bindings:
        if "=" not in binding:
            parser.error(f"--{binding}: a setting is --NAME=VALUE or --gin.NAME=VALUE")
    if args.verb in SEVERAL:
        bindings += [f"{SEVERAL[args.verb]}={tuple(args.collection)!r}"] if args.collection else []
    elif args.collection is not None:
        bindings.append(f"COLLECTION={args.collection}")
    return args.verb, args.gin_file, bindings, args.json


def _epilog(*verbs: str) -> str:
    return "\n".join(["examples:", *(f"  {line}" for verb in verbs for line in EXAMPLES[verb]), "", OPTIONS])


def plain(made: dict) -> str:
    """What a verb made, for people: a line per fact and per row of a table, a paragraph per passage."""

    def value(x: object) -> str:
        if isinstance(x, dict):
            return ", ".join(f"{k} {value(v)}" for k, v in x.items())
        if isinstance(x, list):
            return "; ".join(map(value, x))
        return f"{x:.3f}" if isinstance(x, float) else str(x)

    lines = []
    for key, fact in made.items():
        if isinstance(fact, dict) and any(isinstance(row, dict) for row in fact.values()):
            lines += [f"{key}:", *(f"  {name}: {value(row)}" for name, row in fact.items())]
        elif isinstance(fact, list) and all(isinstance(item, dict) for item in fact):
            lines += ["\n" + "\n".join(f"{k}: {value(v)}" for k, v in item.items()) for item in fact]
        else:
            lines.append(f"{key}: {value(fact)}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

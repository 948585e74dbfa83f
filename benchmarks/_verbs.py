"""The command line, for benchmarks that train and search as users do."""

import argparse
import json
import subprocess
import sys


def run(verb: str, *arguments: str) -> dict:
    """Runs a verb as its users do; gives what it made."""
    command = [sys.executable, "-m", "retrieval_jax.main", verb, "--json", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def parse(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """(the parser's own options, the bindings of --gin.NAME=VALUE beside them)."""
    args, others = parser.parse_known_args()
    wrong = [argument for argument in others if not argument.startswith("--gin.")]
    if wrong:
        parser.error(f"{wrong[0]}: not an option")
    return args, [argument.removeprefix("--gin.") for argument in others]

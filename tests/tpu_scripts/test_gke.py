"""gke.sh against an xpk and a gcloud that record their calls."""

import pytest
from recorded import Cloud

PLACE = ["--cluster=my-cluster", "--project=my-project", "--zone=us-west4-a"]
FOLDER = "gs://my-bucket/jobs/naive-xl"
IMAGE = "us-docker.pkg.dev/my-project/r/retrieval-jax"
COSTS = "the cluster my-cluster may exist and cost money; to end that: tpu_scripts/gke.sh stop --env tpu.env"


@pytest.fixture
def gke(cloud: Cloud) -> Cloud:
    cloud.env |= {"CLUSTER": "my-cluster", "IMAGE": IMAGE, "SLICES": "2"}
    return cloud


@pytest.mark.parametrize(
    ("env", "capacity"),
    [
        ({}, "--on-demand"),
        ({"CAPACITY": "spot"}, "--spot"),
        ({"CAPACITY": "reserved", "RESERVATION": "mine"}, "--reservation=mine"),
    ],
)
def test_create_makes_a_cluster_that_has_the_bucket(gke: Cloud, env: dict, capacity: str):
    gke.env |= env
    assert gke.run("gke.sh", "create")[0] == 0
    cluster, storage = gke.calls()
    assert cluster[:4] + cluster[6:] == [
        *["xpk", "cluster", "create", PLACE[0], "--tpu-type=v5litepod-16", "--num-slices=2"],
        *[capacity, "--enable-gcsfuse-csi-driver"],
    ]
    assert storage[:4] == ["xpk", "storage", "attach", "retrieval-jax"]
    assert {*PLACE, "--type=gcsfuse", "--bucket=my-bucket", "--mount-point=/bucket"} < set(storage)


def test_create_that_fails_half_way_tells_what_costs_money(gke: Cloud):
    gke.answers("xpk storage attach", 1)
    status, _, err = gke.run("gke.sh", "create")
    assert status == 1
    assert COSTS in err


def test_setup_makes_the_image_of_the_commit(gke: Cloud):
    assert gke.run("gke.sh", "setup")[0] == 0
    assert gke.kinds() == ["ls", "wheel", "rsync", "builds"]
    _, _, (*_, code, url), build = gke.calls()
    assert url == f"{FOLDER}/code"
    assert build[:4] == ["gcloud", "builds", "submit", code]
    assert f"--tag={IMAGE}:{code.split('/')[-2]}" in build


def test_launch_gives_xpk_a_command_without_anything_to_quote(gke: Cloud):
    gke.answers("storage cat commit", "c0ffee")
    status, _, err = gke.run("gke.sh", "launch", "train", "--gin.COLLECTION='gs://b/my $folder'")
    assert status == 0, err
    assert gke.kinds() == ["ls", "cat commit", "cp", "xpk workload create"]
    assert gke.calls()[-1] == [
        *["xpk", "workload", "create", *PLACE, "--workload=naive-xl", "--tpu-type=v5litepod-16"],
        *["--num-slices=2", f"--docker-image={IMAGE}:c0ffee"],
        "--command=exec bash /bucket/jobs/naive-xl/code/host.sh run naive-xl",
        *["--max-restarts=1000", "--termination-grace-period-seconds=300"],
    ]
    assert gke.written("job.sh").endswith(" --gin.multihost.enabled=True\n")


def test_launch_clears_the_last_job_and_needs_an_image(gke: Cloud):
    gke.answers("storage ls", f"{FOLDER}/ended\n{FOLDER}/job.sh")
    assert gke.run("gke.sh", "launch", "train")[0] == 0
    assert gke.kinds()[-3:] == ["rm ended", "xpk workload delete", "xpk workload create"]
    gke.answers("storage cat commit", 1)
    status, _, err = gke.run("gke.sh", "launch", "train")
    assert status == 2
    assert "has no image: `gke.sh setup` first" in err


@pytest.mark.parametrize(("accelerator", "several"), [("v5litepod-4", False), ("v5litepod-8", True)])
def test_hosts_of_gke_have_four_chips_at_most(gke: Cloud, accelerator: str, several: bool):
    gke.env |= {"ACCELERATOR": accelerator, "SLICES": "1"}
    assert gke.run("gke.sh", "launch", "train")[0] == 0
    assert ("--gin.multihost.enabled=True" in gke.written("job.sh")) is several


def test_watch_until_it_ends_or_its_restarts_are_used_up(gke: Cloud):
    gke.answers("storage cat ended", 1, 1, "0")
    gke.answers("workload list", "Jobset Name  Status\nnaive-xl-2  Failed", 1)
    status, _, err = gke.run("gke.sh", "watch")
    assert status == 0, err
    assert gke.kinds().count("xpk workload list") == 2

    gke.rules = [
        ("storage cat ended", [(1, "")]),
        ("workload list", [(0, ""), (0, "Jobset Name  Status\nnaive-xl  Failed")]),
    ]
    status, _, err = gke.run("gke.sh", "watch")
    assert status == 1
    assert "failed before it began: `gke.sh logs`" in err
    assert COSTS in err


def test_cancel_and_stop(gke: Cloud):
    gke.answers("storage cat ended", 1)
    assert gke.run("gke.sh", "cancel")[0] == 0
    assert gke.calls()[-1] == ["xpk", "workload", "delete", *PLACE, "--workload=naive-xl", "--force"]
    assert gke.written("ended") == "143\n"

    gke.answers("workload delete", 1)
    gke.answers("cluster delete", 1, "")
    status, _, err = gke.run("gke.sh", "stop")
    assert status == 0
    assert gke.calls()[-1] == ["xpk", "cluster", "delete", *PLACE, "--force"]
    assert gke.kinds().count("xpk cluster delete") == 2
    assert "my-cluster: deleted" in err

    gke.rules = [("cluster delete", [(1, "")])]
    status, _, err = gke.run("gke.sh", "stop")
    assert status == 1
    assert "my-cluster: deleted" not in err
    assert COSTS in err


@pytest.mark.parametrize("missing", ["CLUSTER", "IMAGE"])
def test_what_the_env_file_must_have(gke: Cloud, missing: str):
    del gke.env[missing]
    status, _, err = gke.run("gke.sh", "create")
    assert status == 2
    assert err == f"gke.sh: tpu.env: {missing} is missing: see tpu_scripts/example.env\n"

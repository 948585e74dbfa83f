"""What a run leaves to look at, and that looking costs no second compilation."""

import json
from pathlib import Path

import jax
import pytest
from tiny_training import batches, curve, retriever, train


class Dev:
    """Metrics, and samples as RetrievalEvaluator has them."""

    samples = ()

    def __call__(self, params: dict) -> dict[str, float]:
        self.samples = [{"query": "how?", "right": [{"id": "a"}], "found": [{"id": "b", "score": -1.5}]}]
        return {"Hits@10": 0.5}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[int], list[int]]:
    """A run's folder, the steps at which a batch was asked for, and those at which something compiled."""
    folder, asked, compiled = tmp_path_factory.mktemp("seen") / "model", [], []

    def counted(position: int):
        for number, batch in enumerate(batches(position)):
            asked.append(number)
            batch["encoder_input_tokens"][:, 4:] = 0
            yield batch

    def listener(event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(len(asked))

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        train(
            retriever(),
            counted,
            Dev(),
            folder,
            steps=12,
            eval_every=4,
            save_every=3,
            log_every=2,
            profile=(5, 2),
        )
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)
    return folder, asked, compiled


def test_nothing_compiles_after_the_second_step(run):
    _, asked, compiled = run
    assert len(asked) == 12
    assert compiled  # the listener hears
    assert max(compiled) <= 2  # the second batch is asked for once the first step runs


def test_a_point_holds_all_metrics_of_the_step_and_the_rates(run):
    folder, _, _ = run
    points = [p for p in curve(folder) if "loss" in p]
    assert [p["step"] for p in points] == [2, 4, 6, 8, 10, 12]
    names = {"loss", "accuracy", "gradient_norm", "parameter_norm", "learning_rate"}
    rates = {"input_wait", "steps_per_second", "tokens_per_second"}
    assert names | rates <= set(points[-1])
    assert points[-1]["learning_rate"] == pytest.approx(1e-2)
    for point in points:  # a batch has 8 × (4 + 3) tokens that are not padding
        assert point["tokens_per_second"] == pytest.approx(56 * point["steps_per_second"])


def test_tensorboard_has_the_scalars_and_samples_and_the_trace(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _, _ = run
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["tensors"]
    assert {"loss", "gradient_norm", "tokens_per_second", "dev/Hits@10", "dev/samples"} <= set(tags)
    text = events.Tensors("dev/samples")[-1].tensor_proto.string_val[0].decode()
    assert "how?" in text
    assert list(folder.glob("plugins/profile/*/*.xplane.pb"))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [4, 8, 12]
    assert samples[0]["found"] == [{"id": "b", "score": -1.5}]


class Device:
    def __init__(self, device_kind: str):
        self.device_kind = device_kind

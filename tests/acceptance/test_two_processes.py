"""Two processes under torchrun (gloo, CPU) train like one with the same global batch."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from made_ek100 import write_ek100_copy
from safetensors.torch import load_file

from rlt_retrieval.data.synthetic import write_synthetic_shards
from rlt_retrieval.training.losses import NEED_RELEVANCY

ROOT = Path(__file__).resolve().parents[2]
BETA_1 = 0.9
SMALL = {
    "model.backbone_config.vision_cfg.width": 64,
    "model.backbone_config.vision_cfg.layers": 2,
    "model.backbone_config.text_cfg.width": 32,
    "model.backbone_config.text_cfg.layers": 1,
    "video.stochastic_depth": 0.2,
    "video.patch_dropout": 0.2,
    "data.num_workers": 0,
    "optim.batch_size": 16,
    "optim.token_budget": 400,  # several micro-batches a rank, not equally many
    "optim.warmup_steps": 2,
    "eval_every": 4,
}

pytestmark = pytest.mark.acceptance


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Training clips, the same with classes and sentences, and an odd number of test clips."""
    folder = tmp_path_factory.mktemp("data")
    write_synthetic_shards(folder, num_train=64, num_test=7, seed=0, num_streams=8)
    write_ek100_copy(folder / "train", folder / "classed")
    return folder


def train(num_processes: int, run: Path, data: Path, **changes: Any) -> Path:
    """The demo recipe, made small, as a user would launch it."""
    clips = "classed" if changes.get("optim.loss") in NEED_RELEVANCY else "train"
    values = {"run_dir": run, "data.train": data / clips, "data.eval": data / "test"}
    paths = {"run_dir": json.dumps(str(run))} | {
        key: json.dumps([str(path)]) for key, path in values.items() if key != "run_dir"
    }
    settings = paths | SMALL | changes
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    command = [
        sys.executable,
        *(launcher if num_processes == 2 else []),
        "-m",
        "rlt_retrieval",
        "train",
        "demo",
    ]
    options = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--device", "cpu", *options], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return run


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", ["clip", "siglip", "sms"])
def test_same_loss_curve(data: Path, tmp_path: Path, loss: str) -> None:
    """Evaluation too: seven clips over two ranks, each once."""
    changes = {"optim.loss": loss, "optim.steps": 12}
    one = read_metrics(train(1, tmp_path / "one", data, **changes))
    two = read_metrics(train(2, tmp_path / "two", data, **changes))
    assert [line["step"] for line in two] == [line["step"] for line in one] == list(range(1, 13))
    for name in ("loss", "keep_ratio", "learning_rate"):
        expected = [line[name] for line in one]
        assert [line[name] for line in two] == pytest.approx(expected, rel=0, abs=1e-4), name
    print(
        f"{loss}: largest difference {max(abs(a['loss'] - b['loss']) for a, b in zip(one, two, strict=True))}"
    )
    for ours, theirs in zip(two, one, strict=True):
        assert ("eval" in ours) == ("eval" in theirs)
        if "eval" in ours:
            assert ours["eval"]["num_videos"] == 7
            for key, value in theirs["eval"]["text_to_video"].items():
                assert ours["eval"]["text_to_video"][key] == pytest.approx(value, abs=1e-4), key


@pytest.mark.parametrize("loss", ["clip", "siglip", "sms"])
def test_same_gradients_on_the_first_step(data: Path, tmp_path: Path, loss: str) -> None:
    """As the optimiser saw them: after one step its first moment is (1 - beta_1) times the clipped gradient."""
    changes = {"optim.loss": loss, "optim.steps": 1}
    runs = [train(n, tmp_path / str(n), data, **changes) for n in (1, 2)]
    one, two = (load_file(run / "checkpoints" / "step-00000001" / "optimizer.safetensors") for run in runs)
    names = [name for name in one if name.startswith("exp_avg/")]
    assert two.keys() == one.keys()
    assert len(names) > 30
    for name in names:
        gradient = one[name] / (1 - BETA_1)
        torch.testing.assert_close(two[name] / (1 - BETA_1), gradient, rtol=0, atol=1e-6, msg=name)
    lines = [read_metrics(run)[0] for run in runs]
    assert lines[1]["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=1e-5), "clipping hides a scale"


def test_interrupted_run_may_go_on_with_another_number_of_processes(data: Path, tmp_path: Path) -> None:
    """Positions belong to the streams, not to the ranks: two processes go on where one stopped."""
    changes = {"optim.steps": 6, "checkpoint_every": 3}
    whole = read_metrics(train(1, tmp_path / "whole", data, **changes))
    run = train(2, tmp_path / "run", data, **changes)
    last = run / "checkpoints" / "step-00000006"
    for file in last.iterdir():
        file.unlink()
    last.rmdir()
    again = read_metrics(train(1, run, data, **changes))
    assert [line["step"] for line in again] == list(range(1, 7))
    assert [line["loss"] for line in again] == pytest.approx(
        [line["loss"] for line in whole], rel=0, abs=1e-4
    )

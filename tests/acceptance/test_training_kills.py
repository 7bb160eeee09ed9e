"""`rlt-retrieval train` killed (-9) at seeded moments ends like a run that was never touched."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlt_retrieval.data.synthetic import write_synthetic_shards
from rlt_retrieval.model import VideoTextModel

ROOT = Path(__file__).resolve().parents[2]
NUM_STEPS, NUM_KILLS = 90, 7
SETTINGS = {
    "model.backbone_config.vision_cfg.width": 64,
    "model.backbone_config.vision_cfg.layers": 2,
    "model.backbone_config.text_cfg.width": 32,
    "model.backbone_config.text_cfg.layers": 1,
    "video.stochastic_depth": 0.2,
    "video.patch_dropout": 0.2,
    "data.num_workers": 1,
    "optim.batch_size": 16,
    "optim.token_budget": 1000,
    "optim.steps": NUM_STEPS,
    "checkpoint_every": 3,
    "eval_every": 20,
}

pytestmark = pytest.mark.acceptance


class Run:
    """One run folder, and the command that makes and continues it."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        settings = SETTINGS | {
            "run_dir": json.dumps(str(folder)),
            "data.train": json.dumps([str(data / "train")]),
            "data.eval": json.dumps([str(data / "test")]),
        }
        options = [text for key, value in settings.items() for text in ("--set", f"{key}={value}")]
        self.command = [sys.executable, "-m", "rlt_retrieval", "train", "demo", "--device", "cpu", *options]

    def start(self) -> subprocess.Popen[str]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        log = (self.folder.parent / "stderr.txt").open("a")
        with log:
            return subprocess.Popen(
                self.command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=log, text=True
            )

    def lines(self) -> list[dict[str, Any]]:
        """Whole lines of the log; the file is read while it is written."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def checkpoint_step(self) -> int:
        steps = [
            int(path.name.removeprefix("step-")) for path in (self.folder / "checkpoints").glob("step-*")
        ]
        return max(steps, default=0)


def kill_at(run: Run, moment: random.Random) -> bool:
    """Start the run and kill it some time after a few new steps, or while it starts; False: it had ended."""
    before = run.lines()
    process = run.start()
    if moment.random() < 0.2:
        time.sleep(moment.uniform(0, 8))
    else:
        num_new = moment.randint(1, 8)
        while process.poll() is None and sum(line not in before for line in run.lines()) < num_new:
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.3))
    os.kill(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL


def test_killed_at_seeded_moments(tmp_path: Path) -> None:
    write_synthetic_shards(tmp_path / "data", num_train=64, num_test=7, seed=0, num_streams=8)
    whole, killed = (Run(tmp_path / name / "run", tmp_path / "data") for name in ("whole", "killed"))
    for run in (whole, killed):
        run.folder.parent.mkdir()
    assert whole.start().wait() == 0

    kills = 0
    for seed in range(NUM_KILLS):
        lines_before, checkpoint = killed.lines(), killed.checkpoint_step()
        kills += kill_at(killed, random.Random(seed))
        lines = killed.lines()
        print(f"from step {checkpoint}: killed at step {len(lines)}, checkpoint {killed.checkpoint_step()}")
        assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)), "each step exactly once"
        # what the checkpoint holds was not done again, what came after it was (its time differs)
        assert lines[:checkpoint] == lines_before[:checkpoint]
        if killed.checkpoint_step() > checkpoint:
            redone = zip(lines[checkpoint:], lines_before[checkpoint:], strict=False)
            assert all(line["seconds"] != before["seconds"] for line, before in redone)
    assert kills >= 5, "the run ended too early to be killed: make it longer"
    assert killed.start().wait() == 0, (killed.folder.parent / "stderr.txt").read_text()

    expected, found = whole.lines(), killed.lines()
    assert [line["step"] for line in found] == list(range(1, NUM_STEPS + 1))
    losses = [line["loss"] for line in expected]
    assert [line["loss"] for line in found] == pytest.approx(losses, rel=0, abs=1e-5)
    assert found[-1]["eval"]["text_to_video"] == pytest.approx(
        expected[-1]["eval"]["text_to_video"], abs=1e-5
    )
    weights, others = (VideoTextModel.load(run.folder, device="cpu").state_dict() for run in (killed, whole))
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=1e-5, msg=name)
    leftovers = {path.name for path in killed.folder.rglob("*") if ".part" in path.name}
    assert not leftovers, "what the kills left half-written is cleared by the run that ends"
    assert "Traceback" not in (killed.folder.parent / "stderr.txt").read_text()

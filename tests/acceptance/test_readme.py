"""The README's shell blocks run as they stand.

Lines that would download weights run with a file made on the spot; long training is cut to two steps. `make` lines are
run by the other acceptance tests and by continuous integration itself.
"""

import csv
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
from safetensors.torch import save_file

from rlt_retrieval.data.video import encode_mp4

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.acceptance

TWO_STEPS = "optim.steps=2 optim.warmup_steps=1 optim.batch_size=8 data.num_streams=4 data.num_workers=1"


def shell_lines() -> list[str]:
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def runnable(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    if words[:3] == ["rlt-retrieval", "index", "build"] and "--model" not in words:
        if "--backbone" in words:
            del words[words.index("--backbone") :]
        words += ["--backbone", "ViT-B-32", "--pretrained", "weights.safetensors"]
    if words[:2] == ["rlt-retrieval", "train"]:
        changes = ["model.backbone=ViT-B-32", "model.pretrained=weights.safetensors", *TWO_STEPS.split()]
        words += [word for change in changes for word in ("--set", change)]
    return words


@pytest.fixture
def newcomers_folder(tmp_path: Path) -> Path:
    model = open_clip.create_model("ViT-B-32")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    (tmp_path / "my_videos").mkdir()
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        rows = [["video", "caption"]]
        for number in range(12):
            video = tmp_path / "my_videos" / f"{name}{number}.mp4"
            video.write_bytes(encode_mp4(rng.integers(0, 256, (10, 64, 64, 3), dtype=np.uint8), fps=5))
            rows.append([f"my_videos/{video.name}", f"noise number {number} of {name}"])
        with (tmp_path / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    return tmp_path


def test_every_shell_block_runs(newcomers_folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    lines = [line for line in shell_lines() if not line.startswith("make ")]
    assert len(lines) >= 9
    for line in lines:
        done = subprocess.run(
            runnable(line), cwd=newcomers_folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stderr


def test_python_block_names_exist() -> None:
    import rlt_retrieval as rlt

    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"rlt\.([A-Z]\w+)", text):
        assert getattr(rlt, name)

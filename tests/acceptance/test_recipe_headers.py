"""The launch command in the header of a recipe works: the demo's, as it stands, on the fast demo's shards.

Those for real data run on small synthetic clips that lie where the recipe looks, with a tiny backbone.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_ek100 import write_ek100_copy

from rlt_retrieval.data.synthetic import SyntheticSpec, write_synthetic_shards

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.acceptance


def test_the_demo_recipe_runs_by_its_header(tmp_path: Path) -> None:
    header = (ROOT / "configs" / "demo.toml").read_text().split("\n\n")[0]
    commands = [line[1:].split() for line in header.splitlines() if line.startswith("#   rlt-retrieval")]
    assert len(commands) == 2
    for words in commands:
        extra = ["--set", "optim.steps=2", "--set", "optim.warmup_steps=1"] if words[1] == "train" else []
        command = [sys.executable, "-m", "rlt_retrieval", *words[1:], *extra, "--json"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)


SPEC = SyntheticSpec(side=32, num_frames=4, shape_size=(8.0, 10.0), speed=(2.0, 4.0), distractor_size=6.0)
TINY = {
    "model.pretrained": "none",
    "model.backbone_config.embed_dim": 16,
    "model.backbone_config.vision_cfg": "{image_size=32, patch_size=8, width=32, head_width=16, layers=2}",
    "model.backbone_config.text_cfg": "{context_length=24, vocab_size=49408, width=16, heads=2, layers=1}",
    "video.num_frames": 4,
    "data.num_workers": 1,
    "optim.steps": 2,
    "optim.warmup_steps": 1,
    "optim.batch_size": 8,
}


@pytest.fixture(scope="module")
def shards_in_place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the shards that the recipes name."""
    folder = tmp_path_factory.mktemp("work")
    write_synthetic_shards(folder / "made", num_train=32, num_test=5, seed=0, num_streams=8, spec=SPEC)
    for source, name in (("train", "msrvtt_train"), ("test", "msrvtt_test"), ("test", "ek100_test")):
        shutil.copytree(folder / "made" / source, folder / "shards" / name)
    write_ek100_copy(folder / "made" / "train", folder / "shards" / "ek100_train")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("ek100_mir_vitb16", "ek100_mir_vitb16_1gpu", "ek100_mir_vitl14", "ek100_mir_vitl14_1gpu"),
        "msrvtt_vitb32",
    ],
)
def test_recipes_for_real_data_run_by_their_headers(name: str, shards_in_place: Path) -> None:
    header = (ROOT / "configs" / f"{name}.toml").read_text().split("\n\n")[0]
    (words,) = [
        line[1:].split() for line in header.splitlines() if line.startswith("#   rlt-retrieval train")
    ]
    sizes = [text for key, value in TINY.items() for text in ("--set", f"{key}={value}")]
    command = [sys.executable, "-m", "rlt_retrieval", *words[1:], *sizes, "--device", "cpu", "--json"]
    done = subprocess.run(command, cwd=shards_in_place, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 2
    assert (shards_in_place / "runs" / name / "model" / "config.json").is_file()

"""The launch command in the header of a recipe works: the demo's, as it stands, on the fast demo's shards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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

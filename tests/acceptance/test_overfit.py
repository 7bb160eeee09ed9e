"""A small model learns the real clips by heart: the path from real file to gradient is right.

It shows nothing more: the clips it is scored on are those it was trained on.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NUM_CLIPS = 56

pytestmark = pytest.mark.acceptance


def command(*arguments: str) -> dict[str, Any]:
    """Run `rlt-retrieval … --json` as a user would; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "rlt_retrieval", *arguments, "--json"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    return json.loads(done.stdout)


def test_learns_the_real_clips_by_heart(shared_data: Path, tmp_path: Path) -> None:
    """Near-duplicates (one keyboard filmed three ways) are not excused: 0.9 leaves room for a few of them."""
    shards, run = str(tmp_path / "shards"), str(tmp_path / "run")
    made = command(
        "shards", "make", str(shared_data / "videos" / "manifest.csv"), shards, "--short-side", "96"
    )
    assert made == {"clips": NUM_CLIPS, "captioned": NUM_CLIPS, "shards": 1, "skipped": 0}

    paths = [f"data.train={json.dumps([shards])}", f"data.eval={json.dumps([shards])}"]
    settings = [f"run_dir={json.dumps(run)}", *paths]
    trained = command("train", "overfit_real", *(part for text in settings for part in ("--set", text)))
    assert trained["skipped"] == 0
    metrics = (Path(run) / "metrics.jsonl").read_text().splitlines()
    print(f"training: {sum(json.loads(line)['seconds'] for line in metrics):.0f} s")

    scores = command("eval", shards, "--model", run)
    print(json.dumps(scores["text_to_video"]))
    assert scores["num_videos"] == NUM_CLIPS
    assert 0.2 < scores["keep_ratio"] < 0.8, "RLT was on"
    assert scores["text_to_video"]["recall@1"] >= 0.9
    assert scores["text_to_video"] == pytest.approx(trained["eval"]["text_to_video"], abs=1e-3)

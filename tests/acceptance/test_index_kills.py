"""`index build` killed (-9) at 20 seeded moments: nothing committed is lost, and the repeat ends as if never killed."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from index_rows import Rows, assert_begins_like, assert_same_rows, rows_of

from rlt_retrieval.indexing.store import ClipStore
from rlt_retrieval.model import VideoTextModel

pytestmark = pytest.mark.acceptance

NUM_KILLS, NUM_EARLY_KILLS = 20, 4  # early: until the first commit
NUM_AT_A_TIME = 2
# 256 patches a frame, 16 frames: four clips of noise fill a batch, so that a build commits about ten times.
BACKBONE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "patch_size": 4, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}
VIDEO_SECONDS = (1, 7, 2, 9, 1, 12, 3, 5)


@pytest.fixture(scope="module")
def build_arguments(
    tiny_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> list[str | Path]:
    """Arguments of `index build` after the index: short and long videos, a torn one, one that is none."""
    root = tmp_path_factory.mktemp("kills")
    VideoTextModel.create(BACKBONE, None, device="cpu", num_frames=16).save(root / "model")
    for number, seconds in enumerate(VIDEO_SECONDS):
        tiny_video(root / "videos" / f"{number}.mp4", seconds, fps=16, size=64, seed=number)
    whole = (root / "videos" / "3.mp4").read_bytes()
    (root / "videos" / "torn.mp4").write_bytes(whole[: len(whole) // 2])
    (root / "videos" / "none.mp4").write_text("not a video")
    options: list[str | Path] = ["--model", root / "model", "--device", "cpu"]
    return [root / "videos", *options, "--window-seconds", "1", "--workers", "1"]


def start(index_path: Path, arguments: list[str | Path]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rlt_retrieval", "index", "build", index_path, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> None:
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 3, messages
    assert "Traceback" not in messages


def num_clips(index_path: Path) -> int:
    """Committed so far; -1 while there is no index."""
    if not index_path.exists():
        return -1
    with ClipStore.open(index_path) as store:
        return store.counts().clips


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)


def killed_and_repeated(
    index_path: Path, arguments: list[str | Path], moment: tuple[int, float], whole: Rows
) -> int:
    """Kill a build `moment[1]` seconds after `moment[0]` clips are committed (-1: after its start), and repeat it.

    Returns the number of clips that were committed when it died.
    """
    process = start(index_path, arguments)
    while num_clips(index_path) < moment[0] and process.poll() is None:
        time.sleep(0.005)
    time.sleep(moment[1])
    before = rows_of(index_path) if index_path.exists() else {}
    kill(process)

    after = rows_of(index_path) if index_path.exists() else {}
    assert_begins_like(after, whole)
    for video, row in before.items():
        assert len(after[video][3]) >= len(row[3]), f"{video}: committed clips are lost"
    finish(start(index_path, arguments))
    assert_same_rows(rows_of(index_path), whole)
    assert [path.name for path in index_path.parent.iterdir()] == [index_path.name]
    return sum(len(row[3]) for row in after.values())


def test_a_build_killed_at_any_moment_ends_as_an_uninterrupted_one(
    tmp_path: Path, build_arguments: list[str | Path]
) -> None:
    process, started = start(tmp_path / "whole.index", build_arguments), time.monotonic()
    while num_clips(tmp_path / "whole.index") < 1 and process.poll() is None:
        time.sleep(0.01)
    start_seconds = time.monotonic() - started
    finish(process)
    whole = rows_of(tmp_path / "whole.index")
    total = num_clips(tmp_path / "whole.index")
    assert total > sum(VIDEO_SECONDS)

    rng = np.random.default_rng(0)
    early = [(-1, float(seconds)) for seconds in rng.uniform(0, start_seconds, NUM_EARLY_KILLS)]
    late = [
        (int(clips), rng.uniform(0, 0.1)) for clips in rng.integers(0, total, NUM_KILLS - NUM_EARLY_KILLS)
    ]
    moments = early + late

    def one(number: int) -> int:
        folder = tmp_path / f"kill-{number:02}"
        folder.mkdir()
        return killed_and_repeated(folder / "my.index", build_arguments, moments[number], whole)

    with ThreadPoolExecutor(NUM_AT_A_TIME) as pool:
        committed = list(pool.map(one, range(NUM_KILLS)))
    print(f"clips committed at the kills, of {total}: {sorted(committed)}")
    assert sum(0 < clips < total for clips in committed) > NUM_KILLS // 4

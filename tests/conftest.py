"""Shared fixtures: where the optional real data lies, a seed for everything, tiny models, videos and shards."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import settings
from small_videos import tiny_mp4

if TYPE_CHECKING:
    from rlt_retrieval.model import VideoTextModel

# How long an example takes is the machine's business.
settings.register_profile("no wall time", deadline=None)
settings.load_profile("no wall time")

SHARED_DATA = Path(__file__).resolve().parents[1].parent / "shared" / "data"


@pytest.fixture
def shared_data() -> Path:
    """Folder of real clips, broken files and foreign shards; absent on a user's machine."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"real test data not found at {SHARED_DATA}: this check did not run")
    return SHARED_DATA


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


TINY_BACKBONE = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def make_tiny_model() -> Callable[..., "VideoTextModel"]:
    """`make_tiny_model(seed=0, **video_settings)`: random weights, 16 patches a frame, 4 frames a clip."""
    from rlt_retrieval.model import VideoTextModel

    def make(seed: int = 0, **video_settings: Any) -> VideoTextModel:
        settings = {"num_frames": 4, **video_settings}
        return VideoTextModel.create(TINY_BACKBONE, None, device="cpu", seed=seed, **settings)

    return make


@pytest.fixture(scope="session")
def tiny_model(make_tiny_model: Callable[..., "VideoTextModel"]) -> "VideoTextModel":
    """One for all tests: not to be changed."""
    return make_tiny_model()


@pytest.fixture(scope="session")
def tiny_model_path(tiny_model: "VideoTextModel", tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model`, saved."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model.save(path)
    return path


@pytest.fixture(scope="session")
def tiny_video() -> Callable[..., Path]:
    """`tiny_video(path, seconds=1.0, fps=8, size=32, seed=0)` writes an mp4 and gives its path back."""

    def write(path: Path, seconds: float = 1.0, **options: int) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tiny_mp4(seconds, **options))
        return path

    return write


@pytest.fixture(scope="session")
def tiny_shards() -> Callable[..., list[Path]]:
    """`tiny_shards(folder, captions, samples_per_shard=4)`: one clip a caption ("" leaves it out), key clip-00, …"""
    from rlt_retrieval.data.shards import ShardSample, write_shards

    def write(folder: Path, captions: Sequence[str], samples_per_shard: int = 4) -> list[Path]:
        samples = (
            ShardSample(
                f"clip-{number:02}", tiny_mp4(seed=number), (text,) if text else (), f"v{number}", 0.0, 1.0
            )
            for number, text in enumerate(captions)
        )
        return write_shards(samples, folder, samples_per_shard=samples_per_shard)

    return write

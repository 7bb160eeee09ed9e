"""A model so small, and videos so few, that a whole training run takes a second or two."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_ek100 import made_classes, write_ek100_copy

from rlt_retrieval.config import Recipe
from rlt_retrieval.data.loading import TrainBatch, TrainClip
from rlt_retrieval.data.synthetic import SyntheticSpec, write_synthetic_shards
from rlt_retrieval.model import VideoTextModel

BACKBONE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
SPEC = SyntheticSpec(side=32, num_frames=4, shape_size=(8.0, 10.0), speed=(2.0, 4.0), distractor_size=6.0)
NUM_STREAMS, NUM_TRAIN, NUM_TEST = 4, 32, 5  # an odd number: ranks get uneven shares


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with `train/` (4 shards of 8 clips) and `test/` (5 clips)."""
    folder = tmp_path_factory.mktemp("tiny")
    write_synthetic_shards(
        folder, num_train=NUM_TRAIN, num_test=NUM_TEST, seed=0, num_streams=NUM_STREAMS, spec=SPEC
    )
    return folder


@pytest.fixture(scope="session")
def tiny_ek100(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the training clips of `tiny_data`, classes and a data set of sentences."""
    return write_ek100_copy(tiny_data / "train", tmp_path_factory.mktemp("tiny_ek100"))


@pytest.fixture
def make_recipe(make_recipe_in: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """`make_recipe_in` this test's own folder."""
    return functools.partial(make_recipe_in, tmp_path)


@pytest.fixture(scope="session")
def make_recipe_in(tiny_data: Path) -> Callable[..., Recipe]:
    """A recipe for these clips; tables given as keywords are laid over the defaults."""

    def make(folder: Path, name: str = "run", *, seed: int = 0, **tables: Any) -> Recipe:
        values: dict[str, Any] = {
            "run_dir": str(folder / name),
            "seed": seed,
            "eval_every": 0,
            "checkpoint_every": 2,
            "model": {"pretrained": "none", "backbone_config": BACKBONE},
            "video": {"layout": "joint", "num_frames": 4, "stochastic_depth": 0.2, "patch_dropout": 0.2},
            "data": {
                "train": [str(tiny_data / "train")],
                "num_streams": NUM_STREAMS,
                "shuffle_buffer": 8,
                "crop_scale": [0.6, 1.0],
                "num_workers": 0,
            },
            "optim": {
                "steps": 6,
                "batch_size": 8,
                "token_budget": 120,
                "learning_rate": 3e-3,
                "warmup_steps": 2,
                "precision": "fp32",
            },
        }
        for table, changes in tables.items():
            values[table] = {**values[table], **changes} if isinstance(changes, dict) else changes
        return Recipe.model_validate(values)

    return make


@pytest.fixture
def make_model() -> Callable[..., VideoTextModel]:
    """A tiny model in training mode, every parameter random: zeros and ones would hide mistakes."""

    def make(dtype: torch.dtype = torch.float32, **video_settings: Any) -> VideoTextModel:
        settings = {"layout": "joint", "num_frames": 4, **video_settings}
        model = VideoTextModel.create(BACKBONE, None, device="cpu", **settings)
        model.add_logit_bias()
        randomise(model)
        return model.to(dtype).train()

    return make


def randomise(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


@pytest.fixture
def random_batch(make_model: Callable[..., VideoTextModel]) -> TrainBatch:
    """Eight clips of very different token counts: ever larger parts of the picture move; each has its own sentence."""
    generator = torch.Generator().manual_seed(3)
    tokenizer = make_model().tokenizer
    clips = []
    for number in range(8):
        frames_TCHW = torch.randint(0, 256, (1, 3, 32, 32), generator=generator).repeat(4, 1, 1, 1)
        moving = frames_TCHW[..., : 4 * number]
        moving.copy_(torch.randint(0, 256, moving.shape, generator=generator))
        tokens = tokenizer(frames_TCHW.to(torch.uint8))
        classes = made_classes(number), made_classes(number + 15 * (number % 2))
        clips.append(TrainClip(f"clip-{number}", f"a picture with number {number}", tokens, *classes))
    assert len({len(clip.tokens) for clip in clips}) > 3
    return TrainBatch(clips, {})

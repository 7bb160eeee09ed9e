"""A clip's way from its CSV row to its score keeps its id.

Every stand-in video shows, at each moment, the number of the row whose clip that moment belongs to. A fake model reads
the number out of the patches and answers with an oracle embedding of that row's classes. So the score is 1 only if the
cut, the shards, the loader, the batching, dataset.json and the relevancies all speak of the same row.
"""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ek100_files import write_ek100_csvs
from ek100_oracle import oracle_embeddings

from rlt_retrieval.annotations import Classes, Ek100Clip, Ek100Sentence
from rlt_retrieval.data.making import make_shards
from rlt_retrieval.data.sources.ek100 import read_ek100
from rlt_retrieval.data.video import FrameTransform, encode_mp4
from rlt_retrieval.embed import LoaderOptions, ShardScores, evaluate_shards
from rlt_retrieval.encoders.packing import PackedTokens
from rlt_retrieval.encoders.tokenizer import RunLengthTokenizer

SIDE, PATCH, FPS = 64, 16, 10
NUM_BITS = 6
VIDEOS = ("P01_11", "P01_12", "P22_107")
CLIPS_PER_VIDEO, CLIP_SECONDS = 6, 0.8
NUM_CLIPS = len(VIDEOS) * CLIPS_PER_VIDEO


def made_rows() -> list[Ek100Clip]:
    """Rows of different videos mixed, as no order of files would give them; every third shares classes with another."""
    rows = []
    for number in range(NUM_CLIPS):
        video, place = VIDEOS[number % len(VIDEOS)], number // len(VIDEOS)
        kind = number * 7 % 12  # 18 rows, 12 kinds
        classes = Classes.of(kind % 4, {kind // 2, 20 + kind % 3})
        start = place * CLIP_SECONDS
        rows.append(
            Ek100Clip(f"{video}_{place}", video, start, start + CLIP_SECONDS, f"text of {number}", classes)
        )
    return rows


def code_frame(number: int) -> np.ndarray:
    """uint8 [SIDE, SIDE, 3]: one patch a bit, black or white, row by row."""
    patches = np.zeros((SIDE // PATCH) ** 2, np.uint8)
    patches[:NUM_BITS] = [255 * (number >> bit & 1) for bit in range(NUM_BITS)]
    grid = patches.reshape(SIDE // PATCH, SIDE // PATCH)
    return grid.repeat(PATCH, 0).repeat(PATCH, 1)[..., None].repeat(3, -1)


def write_videos(folder: Path, rows: list[Ek100Clip]) -> None:
    for video in VIDEOS:
        frames_per_clip = round(CLIP_SECONDS * FPS)
        numbers = [n for n, row in enumerate(rows) if row.video_id == video]
        frames = np.stack([code_frame(n) for n in numbers for _ in range(frames_per_clip)])
        path = folder / video[:3] / f"{video}.MP4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_mp4(frames, fps=FPS))


class OracleModel:
    """Stands for VideoTextModel: reads the row's number from the pixels, and the sentence's from its text."""

    transform = FrameTransform(SIDE, SIDE)
    tokenizer = RunLengthTokenizer(PATCH, 1, 0.1, "anchor")
    config = SimpleNamespace(video=SimpleNamespace(num_frames=3))
    video = SimpleNamespace(num_rows=len, num_cells=math.prod)
    device = torch.device("cpu")

    def __init__(self, rows: list[Ek100Clip]) -> None:
        self.z_rows_ND = torch.from_numpy(oracle_embeddings([row.classes for row in rows]))
        self.row_of_text = {row.narration: n for n, row in enumerate(rows)}
        self.dimension = self.z_rows_ND.shape[1]

    def encode_tokens(self, packed: PackedTokens) -> torch.Tensor:
        """The first frame of a clip keeps all its patches, in row-major order; six of them hold the bits."""
        numbers = []
        for start in packed.cu_seqlens[:-1].tolist():
            bits = packed.patches[start : start + NUM_BITS].float().mean(dim=(1, 2, 3, 4)) > 127
            numbers.append(sum(int(bit) << place for place, bit in enumerate(bits)))
        return self.z_rows_ND[numbers]

    def encode_text(self, texts: list[str]) -> torch.Tensor:
        return self.z_rows_ND[[self.row_of_text[text] for text in texts]]


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ek100Clip]]:
    """Shards of the stand-ins, made as a user makes them, and the rows they come from."""
    root = tmp_path_factory.mktemp("way")
    rows = made_rows()
    sentences = [Ek100Sentence(row.narration_id, row.narration, row.classes) for row in rows[::-1]]
    write_ek100_csvs(root / "annotations", rows, sentences)
    write_videos(root / "videos", rows)
    source = read_ek100(root / "annotations", root / "videos", "test")
    make_shards(
        source.clips,
        root / "shards",
        samples_per_shard=5,
        num_workers=0,
        timeout_seconds=60,
        dataset=source.describe(),
    )
    return root / "shards", rows


def scored(shards: Path, model: Any, token_budget: int = 100) -> ShardScores:
    return evaluate_shards(model, [shards], LoaderOptions(num_workers=0, token_budget=token_budget))


def test_a_planted_oracle_scores_one_in_both_directions(way: tuple[Path, list[Ek100Clip]]) -> None:
    shards, rows = way
    scores = scored(shards, OracleModel(rows))
    assert scores.embeddings.keys == [row.narration_id for row in rows]
    values = scores.to_dict()
    assert (values["protocol"], values["partial"], values["num_videos"]) == ("ek100", True, NUM_CLIPS)
    for direction in ("text_to_video", "video_to_text", "mean"):
        assert values[direction]["mAP"] == pytest.approx(1, abs=1e-6)
        assert values[direction]["nDCG"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("direction", ["text_to_video", "video_to_text"])
def test_shuffled_ids_score_less(way: tuple[Path, list[Ek100Clip]], direction: str) -> None:
    """The test above can fail: the same model, but every clip is taken for the next row."""
    shards, rows = way
    model = OracleModel(rows)
    model.row_of_text = {row.narration: (n + 1) % NUM_CLIPS for n, row in enumerate(rows)}
    assert scored(shards, model).to_dict()[direction]["mAP"] < 0.6

"""The encoder's operations: hand-worked, and against what torch counts while the tower runs.

The small tower: grid 4 x 4, patches of 8 pixels, width 32, MLP twice as wide, so 3 * 32² weights before attention,
32² after it and 4 * 32² in the MLP of each block, and 32 * 192 in the patch embedding.
"""

import itertools
from typing import Any

import pytest
import torch
from small_models import repeating_frames, small_model
from small_towers import small_timm_model
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from rlt_retrieval.bench.costs import EncoderCost, encoder_cost, mean_cost
from rlt_retrieval.config import RATIO_REDUCERS
from rlt_retrieval.encoders.packing import pack
from rlt_retrieval.model import VideoTextModel

W = 32 * 32
EMBEDDING = 2 * 32 * 192  # a token
CPU_ATTENTION = {  # torch counts the kernels of GPUs, and a CPU's by the function that chooses it
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (
        lambda q, k, v, *_, out_shape, **__: sdpa_flop_count(q, k, v)
    )
}


def choice(reducer: str) -> dict[str, Any]:
    """Settings that choose a reducer."""
    return {"reducer": reducer, **({"keep_ratio": 0.5} if reducer in RATIO_REDUCERS else {})}


def cost_of(model: VideoTextModel, frames: torch.Tensor) -> EncoderCost:
    return encoder_cost(model.video, model.tokenizer(frames))


def torch_count(model: VideoTextModel, frames: torch.Tensor) -> tuple[dict[str, int], list[int]]:
    """Operations by kind, and the rows that the MLP of each block read."""
    rows: list[int] = []
    hooks = [
        block.get_submodule("mlp").register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
        for block in model.video.tower.blocks
    ]
    tokens = pack(
        [model.requires_grad_(False).tokenizer(frames)]
    )  # the counter stumbles over views of parameters
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        model.encode_tokens(tokens)
    for hook in hooks:
        hook.remove()
    return {str(kind): count for kind, count in counter.get_flop_counts()["Global"].items()}, rows


def test_two_whole_frames_by_hand() -> None:
    """In the last block only CLS rows go on: one in layout "joint" (33 rows), two in "frame" (2 x 17 rows)."""
    frames = repeating_frames(2, 1.0)
    joint = cost_of(small_model(layout="joint", num_frames=2, reducer="none"), frames)
    first = 2 * 33 * 3 * W + 2 * 33 * W + 4 * 32 * 33 * 33 + 2 * 33 * 4 * W
    last = 2 * 33 * 3 * W + 2 * 1 * W + 4 * 32 * 1 * 33 + 2 * 1 * 4 * W
    assert joint == EncoderCost(32 * EMBEDDING + first + last, (33, 1))
    frame = cost_of(small_model(layout="frame", num_frames=2, reducer="none"), frames)
    first = 2 * 34 * 3 * W + 2 * 34 * W + 4 * 32 * 2 * 17 * 17 + 2 * 34 * 4 * W
    last = 2 * 34 * 3 * W + 2 * 2 * W + 4 * 32 * 2 * 17 + 2 * 2 * 4 * W
    assert frame == EncoderCost(32 * EMBEDDING + first + last, (34, 2))


def test_one_changed_patch_by_hand() -> None:
    """Layout "frame": the second frame has its CLS and one token as queries, but a whole frame of keys."""
    frames = repeating_frames(1, 0.0).repeat(2, 1, 1, 1)
    frames[1, :, :8, :8] = 255 - frames[1, :, :8, :8]
    cost = cost_of(small_model(layout="frame", num_frames=2, reducer="rlt"), frames)
    first = 2 * 19 * 4 * W + 4 * 32 * (17 * 17 + 2 * 17) + 2 * 19 * 4 * W
    last = 2 * 19 * 3 * W + 2 * 2 * W + 4 * 32 * 2 * 17 + 2 * 2 * 4 * W
    assert cost == EncoderCost(17 * EMBEDDING + first + last, (19, 2))


CHOOSING = ("none", "rlt", "random", "frames", "resolution", "gated", "motion", "rlt+random")


@pytest.mark.parametrize(
    ("layout", "reducer"), [*itertools.product(["joint", "frame"], CHOOSING), ("frame", "centerclip")]
)
def test_it_is_what_torch_counts_less_the_projection(layout: str, reducer: str) -> None:
    """The projection: 32 x 32 weights for each sequence's one vector."""
    model = small_model({"layers": 4}, layout=layout, **choice(reducer))
    frames = repeating_frames(6, 0.3)
    cost = cost_of(model, frames)
    counted, rows = torch_count(model, frames)
    num_sequences = cost.rows[-1]
    assert cost.rows == tuple(rows)
    assert cost.flops == sum(counted.values()) - 2 * num_sequences * W


@pytest.mark.parametrize("layout", ["joint", "frame"])
@pytest.mark.parametrize("reducer", ["tome", "vid_tldr", "rlt+tome"])
def test_merging_counts_the_rows_and_not_the_matching(layout: str, reducer: str) -> None:
    """Torch also counts similarities (bmm), and 24 instead of 16 dimensions a head where a bias rides along.

    What the stand-ins may get wrong, how many different keys "rlt+tome" leaves, is inside that half.
    """
    model = small_model({"layers": 4}, layout=layout, **choice(reducer))
    frames = repeating_frames(6, 0.3)
    cost = cost_of(model, frames)
    counted, rows = torch_count(model, frames)
    attention = sum(count for kind, count in counted.items() if "attention" in kind)
    linear = counted["aten.mm"] + counted["aten.addmm"] - 2 * cost.rows[-1] * W
    assert cost.rows == tuple(rows)
    assert 0.9 * attention / 1.5 < cost.flops - linear < 1.1 * attention


@pytest.mark.parametrize("tower", ["SigLIP", "PE-Core", "EVA02-B", "CLS"])
@pytest.mark.parametrize("reducer", ["none", "rlt", "tome"])
def test_other_towers_have_the_same_parts(tower: str, reducer: str) -> None:
    """What is left out, the pooling heads, is a good part of towers of two layers, and never negative."""
    model = small_timm_model(tower, layout="frame", **choice(reducer))
    frames = repeating_frames(6, 0.3)
    cost = cost_of(model, frames)
    counted, rows = torch_count(model, frames)
    assert cost.rows == tuple(rows)
    assert 0.6 * sum(counted.values()) < cost.flops < sum(counted.values())


def test_mean_cost_is_of_all_clips_where_they_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = [repeating_frames(6, change, seed=n) for n, change in enumerate((0.1, 0.9))]
    model = small_model(layout="frame")
    each = [cost_of(model, clip) for clip in clips]
    mean = mean_cost(model, clips)
    assert mean.flops == (each[0].flops + each[1].flops) / 2
    assert mean.rows == tuple((a + b) / 2 for a, b in zip(each[0].rows, each[1].rows, strict=True))
    assert mean.tokens == sum(len(model.tokenizer(clip)) for clip in clips) / 2

    seen: list[Any] = []
    whole = model.with_settings(reducer="tome", keep_ratio=0.5)
    monkeypatch.setattr("rlt_retrieval.bench.costs.encoder_cost", lambda *a: seen.append(a) or each[0])
    mean_cost(whole, clips)
    assert len(seen) == 1

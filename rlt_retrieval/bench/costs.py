"""What the encoder computes for a clip, counted without running the tower.

Shapes: R rows of a layout, S attention sequences, N kept patches, D width, P patch side.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlt_retrieval.encoders.layouts import LayoutPlan
from rlt_retrieval.encoders.packing import VideoTokens, pack
from rlt_retrieval.encoders.video import VideoEncoder
from rlt_retrieval.model import VideoTextModel

STAND_IN_WIDTH = 8

# Reducers whose token counts depend on what a clip shows; all others compute the same for clips of one size.
ADAPTIVE = ("rlt", "random", "gated", "motion", "rlt+random", "rlt+tome")


@dataclass(frozen=True)
class EncoderCost:
    """flops: a multiply-add counts as two. rows: how many rows (tokens and CLS) each block's MLP reads."""

    flops: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class MeanCost:
    """Means over clips; `tokens`: patches that go into the encoder, without CLS."""

    flops: float
    rows: tuple[float, ...]
    tokens: float


def encoder_cost(video: VideoEncoder, tokens: VideoTokens) -> EncoderCost:
    """Operations of the image tower on one clip.

    Patch embedding: 2 N D 3 P² tubelet. Each block: 2 a row for each weight of the matrices of `block.attn`, 4 D for
    each query with each of its keys, and 2 a row for each weight of the matrices of `block.mlp`, whose rows are what
    the reducer has left by then. The last block of a tower that pools CLS computes queries, keys and values of all
    rows, and all that follows for the CLS rows alone. Left out: the pooling head and the projection (of one vector a
    sequence), norms, activations, biases, and what a reducer itself computes to choose rows: measured time has it.

    A reducer inside the network is shown random stand-ins of the hidden states. How many rows it leaves does not
    depend on them; how many different keys "rlt+tome" leaves in layout "frame" does, by a few percent of attention.

    Args:
        tokens: of one clip, on the host.
    """
    tower, reducer = video.tower, video.network_reducer
    plan = video.plan(pack([tokens]))
    generator = torch.Generator().manual_seed(0)
    x_RE = _stand_in(plan, generator)
    tubelet_size = tokens.patches.shape[1]
    flops = 2 * len(tokens) * tower.patch_weight.numel() * tubelet_size
    rows = []
    for index, block in enumerate(tower.blocks):
        is_last = index == len(tower.blocks) - 1 and tower.pools_cls
        reads_all, plan = plan, plan.first_rows_only() if is_last else plan
        in_weights, out_weights = _attention_weights(block.get_submodule("attn"))
        flops += 2 * in_weights * len(reads_all.rows) + 2 * out_weights * len(plan.rows)
        flops += 4 * tower.width * attended_pairs(plan)
        if reducer is not None and not is_last:
            q_R1E, k_R1E = (_stand_in(plan, generator)[:, None] for _ in range(2))
            x_RE, plan = reducer.after_attention(index, x_RE, plan, q_R1E, k_R1E)
        flops += 2 * sum(_matrix_sizes(block.get_submodule("mlp")).values()) * len(plan.rows)
        rows.append(len(plan.rows))
        if reducer is not None and not is_last:
            x_RE, plan = reducer.after_block(index, x_RE, plan)
    return EncoderCost(flops, tuple(rows))


def mean_cost(model: VideoTextModel, clips: Sequence[Tensor]) -> MeanCost:
    """What the encoder computes for clips, uint8 [T, 3, H, W] of one size, on the mean.

    Only an adaptive reducer needs more than one of them.
    """
    if model.config.video.reducer not in ADAPTIVE:
        clips = clips[:1]
    tokens = [model.tokenizer(frames_TCHW) for frames_TCHW in clips]
    costs = [encoder_cost(model.video, clip) for clip in tokens]
    return MeanCost(
        flops=_mean([cost.flops for cost in costs]),
        rows=tuple(_mean(rows) for rows in zip(*(cost.rows for cost in costs), strict=True)),
        tokens=_mean([len(clip) for clip in tokens]),
    )


def attended_pairs(plan: LayoutPlan) -> int:
    """Sum over sequences of queries times keys."""
    return int((plan.cu_q.diff().long() * plan.cu_k.diff().long()).sum())


def _matrix_sizes(module: nn.Module) -> dict[str, int]:
    """Numbers in each parameter of two or more dimensions, by its name: each is one multiply-add a row."""
    return {name: weight.numel() for name, weight in module.named_parameters() if weight.ndim >= 2}


def _attention_weights(attention: nn.Module) -> tuple[int, int]:
    """Weights before attention (queries, keys, values) and after it (open_clip: out_proj, timm: proj)."""
    sizes = _matrix_sizes(attention)
    after = sum(size for name, size in sizes.items() if name.startswith(("out_proj.", "proj.")))
    return sum(sizes.values()) - after, after


def _stand_in(plan: LayoutPlan, generator: torch.Generator) -> Tensor:
    return torch.randn(len(plan.rows), STAND_IN_WIDTH, generator=generator)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

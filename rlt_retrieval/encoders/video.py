"""The video encoder: an image tower walked over packed run-length tokens.

Shapes: B clips, S attention sequences (clips or frames), N kept patches, R rows = patches and CLS tokens laid out
in sequences, D width, T' tubelets a clip, L blocks.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlt_retrieval.config import VideoSettings
from rlt_retrieval.encoders.attention import Backend, attend_varlen, with_key_bias
from rlt_retrieval.encoders.packing import PackedTokens, VideoTokens
from rlt_retrieval.encoders.tokenizer import KEEP_ALL, RunLengthTokenizer
from rlt_retrieval.encoders.towers import adapt_tower

logger = logging.getLogger(__name__)


def make_tokenizer(settings: VideoSettings, patch_size: int) -> RunLengthTokenizer:
    """The tokenizer that the settings ask for."""
    threshold = settings.threshold if settings.reducer == "rlt" else KEEP_ALL
    return RunLengthTokenizer(patch_size, settings.tubelet_size, threshold, settings.reference)


@dataclass(frozen=True)
class LayoutPlan:
    """Which token goes where: the host-side index arithmetic of a layout.

    rows: int64 [R], 0 for the CLS token, 1 + n for patch n; cu_seqlens: int32 [S + 1]; weights: float32 [R], the
    tubelets a row stands for (CLS: 1, or T' with cls_bias "log_T"); key_bias: float32 [R] or None;
    clip_of_sequence: int64 [S]; sequence_weights: float32 [S], frames a sequence stands for; branch_scales:
    float32 [L, 2, S] of stochastic depth, or None.
    """

    rows: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    weights: Tensor
    clip_of_sequence: Tensor
    sequence_weights: Tensor
    key_bias: Tensor | None = None
    branch_scales: Tensor | None = None

    def to(self, device: torch.device) -> LayoutPlan:
        """The same plan on another device."""
        moved: dict[str, Any] = {
            name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class VideoEncoder(nn.Module):
    """Packed tokens → one unit-norm embedding a clip.

    The tower's weights stay where they are (in the open_clip model); this module owns only what is added beside
    them: temporal and run-length embeddings (zero at the start, layout "joint"; video weights bring their temporal
    table) and, for tubelets of two frames, what the patch weights of each frame differ by from an even split (zero
    at the start).
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, visual: nn.Module, settings: VideoSettings, *, backend: Backend = "auto") -> None:
        """
        Args:
            visual: an image tower that `adapt_tower` knows, with `image_mean` and `image_std`.
        Raises:
            ModelError: a tower of another kind.
        """
        super().__init__()
        self.tower = adapt_tower(visual)
        self.settings = settings
        self.backend: Backend = backend
        self.gradient_checkpointing = False
        width, patch = self.tower.width, self.tower.patch_size
        if settings.layout == "joint":
            self.temporal_embedding = nn.Parameter(torch.zeros(settings.num_tubelets, width))
            self.run_length_embedding = nn.Parameter(torch.zeros(settings.num_tubelets, width))
        if settings.tubelet_size > 1:
            self.tubelet_weight = nn.Parameter(torch.zeros(width, settings.tubelet_size, 3, patch, patch))
        mean, std = (torch.tensor(cast(Any, value)) for value in (visual.image_mean, visual.image_std))
        self.register_buffer("pixel_mean", 255 * mean.reshape(3, 1, 1).float(), persistent=False)
        self.register_buffer("pixel_std", 255 * std.reshape(3, 1, 1).float(), persistent=False)

    def forward(self, packed: PackedTokens) -> Tensor:
        """Encode clips.

        Args:
            packed: tokens, on the host (then nothing waits for the device) or on the model's device.
        Returns:
            float32 [B, D], unit norm (float64 for a float64 model).
        Raises:
            ValueError: a token grid that is not the tower's, or random settings in training without seeds.
        """
        plan = self.plan(packed)
        device = self.tower.patch_weight.device
        packed, plan = packed.to(device), plan.to(device)
        x_RD = self._embed(packed, plan)
        attend = self._attention(plan)
        for index, block in enumerate(self.tower.blocks):
            run_block = functools.partial(self._run_block, block, index, plan, attend)
            if self.gradient_checkpointing and self.training:
                x_RD = checkpoint(run_block, x_RD, use_reentrant=False)
            else:
                x_RD = run_block(x_RD)
        pooled = self.tower.pool(x_RD, plan.cu_seqlens, plan.max_seqlen, plan.weights, self._cross_attend)
        z_SD = F.normalize(_at_least_float32(self.tower.project(pooled)), dim=-1)
        weighted_SD = z_SD * plan.sequence_weights.to(z_SD.dtype)[:, None]
        z_BD = z_SD.new_zeros(len(packed), z_SD.shape[1]).index_add(0, plan.clip_of_sequence, weighted_SD)
        return F.normalize(z_BD, dim=-1)

    def set_temporal_table(self, table_TD: Tensor) -> None:
        """Start from the temporal table of video weights, [T, D], interpolated to this model's tubelets.

        For tubelets of two frames that gives the mean of their two rows. Layout "frame" has no such table, and says so.
        """
        if self.settings.layout == "frame":
            logger.warning(
                "the temporal table of %d frames is not used: layout 'frame' has none; these weights were trained for "
                "layout 'joint'",
                len(table_TD),
            )
            return
        with torch.no_grad():
            self.temporal_embedding.copy_(_interpolated(table_TD[None], self.settings.num_tubelets)[0])

    def num_rows(self, tokens: VideoTokens) -> int:
        """Patch rows that encoding a clip computes: what a token budget counts.

        In layout "frame" a frame that keeps any token goes through the tower whole.
        """
        if self.settings.layout == "joint":
            return len(tokens)
        _, height, width = tokens.grid
        return len(tokens.positions[:, 0].unique()) * height * width

    def plan(self, packed: PackedTokens) -> LayoutPlan:
        """Index plan of the layout for these clips, on the device of the tokens."""
        for grid in packed.grids:
            if grid[1:] != self.tower.grid_size:
                raise ValueError(
                    f"tokens have a grid of {grid[1]}x{grid[2]} patches; this model expects "
                    f"{self.tower.grid_size[0]}x{self.tower.grid_size[1]}: tokenize with model.tokenizer"
                )
        settings, random = self.settings, self.training
        if packed.patches.shape[1] != settings.tubelet_size:
            raise ValueError(
                f"tokens are tubelets of {packed.patches.shape[1]} frames; this model expects "
                f"{settings.tubelet_size}: tokenize with model.tokenizer"
            )
        if random and (settings.stochastic_depth or settings.patch_dropout) and not packed.clip_seeds:
            raise ValueError("stochastic_depth and patch_dropout need pack(…, clip_seeds=…) in training")
        if settings.layout == "frame":
            plan = frame_plan(packed)
        else:
            plan = joint_plan(packed, settings, drop=random and settings.patch_dropout > 0)
        if random and settings.stochastic_depth:
            scales_LPB = _branch_scales(packed, len(self.tower.blocks), settings.stochastic_depth)
            plan = replace(plan, branch_scales=scales_LPB[:, :, plan.clip_of_sequence.cpu()])
        return plan

    def _embed(self, packed: PackedTokens, plan: LayoutPlan) -> Tensor:
        """Patch embedding, positions and CLS, laid out in rows: [R, D]."""
        weight = self.tower.patch_weight
        pixels = (packed.patches.to(weight.dtype) - self.pixel_mean) / self.pixel_std
        if self.settings.tubelet_size > 1:
            weight = weight[:, None] / self.settings.tubelet_size + self.tubelet_weight
        patches_ND = F.linear(pixels.flatten(1), weight.flatten(1))
        _, y_N, x_N = packed.positions.unbind(1)
        patches_ND = patches_ND + self.tower.patch_positions(y_N, x_N)
        if self.settings.layout == "joint":
            patches_ND = patches_ND + self._time_embeddings(packed)
        with_cls = torch.cat([self.tower.cls_token().to(patches_ND.dtype)[None], patches_ND])
        return self.tower.before_blocks(with_cls.index_select(0, plan.rows))

    def _time_embeddings(self, packed: PackedTokens) -> Tensor:
        """Temporal plus run-length embedding of each patch, [N, D]."""
        lengths = sorted({grid[0] for grid in packed.grids})
        tables = torch.cat([self._tables(num_tubelets) for num_tubelets in lengths])
        starts = {
            num_tubelets: 2 * sum(lengths[:index]) for index, num_tubelets in enumerate(lengths)
        }  # a temporal and a run-length table each
        clip_starts_B = torch.tensor([starts[grid[0]] for grid in packed.grids])
        clip_lengths_B = torch.tensor([grid[0] for grid in packed.grids])
        device = packed.positions.device
        clip_N = torch.repeat_interleave(packed.cu_seqlens.diff().long(), output_size=packed.num_tokens)
        start_N = clip_starts_B.to(device)[clip_N]
        length_N = clip_lengths_B.to(device)[clip_N]
        time_N, run_N = packed.positions[:, 0].long(), packed.run_lengths.long()
        return tables.index_select(0, start_N + time_N) + tables.index_select(
            0, start_N + length_N + run_N - 1
        )

    def _tables(self, num_tubelets: int) -> Tensor:
        """Temporal and run-length tables for clips of `num_tubelets`, one above the other: [2 T', D]."""
        tables_2TD = torch.stack([self.temporal_embedding, self.run_length_embedding])
        return _interpolated(tables_2TD, num_tubelets).flatten(0, 1)

    def _run_block(
        self,
        block: nn.Module,
        index: int,
        plan: LayoutPlan,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        x_RD: Tensor,
    ) -> Tensor:
        for branch, residual in enumerate(self.tower.residuals(block, attend)):
            change_RD = residual(x_RD)
            if plan.branch_scales is not None:
                scales_S = plan.branch_scales[index, branch].to(change_RD.dtype)
                sequence_lengths = plan.cu_seqlens.diff().long()
                change_RD = change_RD * scales_S.repeat_interleave(sequence_lengths)[:, None]
            x_RD = x_RD + change_RD
        return x_RD

    def _attention(self, plan: LayoutPlan) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        cu, longest = plan.cu_seqlens, plan.max_seqlen

        def attend(q_RNH: Tensor, k_RNH: Tensor, v_RNH: Tensor) -> Tensor:
            return self._attend_biased(q_RNH, k_RNH, v_RNH, cu, cu, longest, longest, plan.key_bias)

        return attend

    def _cross_attend(
        self,
        q_TNH: Tensor,
        k_TNH: Tensor,
        v_TNH: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        weights_T: Tensor,
    ) -> Tensor:
        """Attention of a pooling head: a token that stands for r tubelets counts r times."""
        return self._attend_biased(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, weights_T.log())

    def _attend_biased(
        self,
        q_TNH: Tensor,
        k_TNH: Tensor,
        v_TNH: Tensor,
        cu_q: Tensor,
        cu_k: Tensor,
        max_q: int,
        max_k: int,
        key_bias_T: Tensor | None,
    ) -> Tensor:
        if key_bias_T is None:
            return attend_varlen(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, backend=self.backend)
        head_size = q_TNH.shape[-1]
        q_TNH, k_TNH, v_TNH, scale = with_key_bias(q_TNH, k_TNH, v_TNH, key_bias_T)
        out = attend_varlen(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, scale, backend=self.backend)
        return out[..., :head_size]


def joint_plan(packed: PackedTokens, settings: VideoSettings, *, drop: bool) -> LayoutPlan:
    """One sequence a clip: its CLS, then all its kept patches (less those that patch dropout takes away)."""
    offsets = packed.cu_seqlens.tolist()
    device = packed.positions.device
    parts = []
    for clip, (start, end) in enumerate(itertools.pairwise(offsets)):
        rows = torch.arange(start + 1, end + 1, device=device)
        if drop:
            rows = _dropped(rows, settings.patch_dropout, packed.clip_seeds[clip])
        parts.append(torch.cat([rows.new_zeros(1), rows]))
    rows, cu_seqlens, max_seqlen = _lay_out(parts)
    cls_counts = [grid[0] if settings.cls_bias == "log_T" else 1 for grid in packed.grids]
    weights = packed.run_lengths.float()[(rows - 1).clamp(min=0)]
    weights[cu_seqlens[:-1].long()] = torch.tensor(cls_counts, dtype=torch.float32, device=device)
    key_bias = weights.log() if settings.length_bias else None
    clips = torch.arange(len(packed), device=device)
    return LayoutPlan(rows, cu_seqlens, max_seqlen, weights, clips, torch.ones_like(clips).float(), key_bias)


def frame_plan(packed: PackedTokens) -> LayoutPlan:
    """One sequence a computed frame: its CLS, then for every place of the grid the token whose run covers it.

    The slow and obvious form: each frame that keeps a token goes whole through the tower, on patches copied
    forward; a frame that keeps none has the previous one's embedding and adds to its weight.
    """
    offsets = packed.cu_seqlens.tolist()
    parts: list[Tensor] = []
    clips: list[int] = []
    durations: list[Tensor] = []
    for clip, (grid, (start, end)) in enumerate(zip(packed.grids, itertools.pairwise(offsets), strict=True)):
        num_frames, height, width = grid
        t, y, x = packed.positions[start:end].long().unbind(1)
        covering = packed.positions.new_zeros(num_frames, height * width, dtype=torch.int64)
        covering[t, y * width + x] = torch.arange(start + 1, end + 1, device=covering.device)
        covering = covering.cummax(0).values  # tokens are ordered by t, so the latest one has the largest row
        computed = t.unique()
        boundaries = torch.cat([computed, computed.new_tensor([num_frames])])
        parts += [torch.cat([row.new_zeros(1), row]) for row in covering[computed]]
        clips += [clip] * len(computed)
        durations.append(boundaries.diff())
    rows, cu_seqlens, max_seqlen = _lay_out(parts)
    weights = torch.ones_like(rows, dtype=torch.float32)
    return LayoutPlan(
        rows,
        cu_seqlens,
        max_seqlen,
        weights,
        torch.tensor(clips, device=rows.device),
        torch.cat(durations).float(),
    )


def _lay_out(parts: list[Tensor]) -> tuple[Tensor, Tensor, int]:
    lengths = torch.tensor([len(part) for part in parts])
    cu_seqlens = torch.zeros(len(parts) + 1, dtype=torch.int32)
    cu_seqlens[1:] = lengths.cumsum(0)
    return torch.cat(parts), cu_seqlens.to(parts[0].device), int(lengths.max())


def _dropped(rows: Tensor, rate: float, seed: int) -> Tensor:
    """A uniform draw of the rows, in order; at least one stays."""
    generator = torch.Generator().manual_seed(seed)
    num_kept = max(1, round(len(rows) * (1 - rate)))
    kept = torch.randperm(len(rows), generator=generator)[:num_kept].sort().values
    return rows[kept.to(rows.device)]


def _branch_scales(packed: PackedTokens, num_blocks: int, rate: float) -> Tensor:
    """Stochastic depth (arXiv 1603.09382), rate growing linearly with depth: float32 [L, 2, B] on the host."""
    rates_L = torch.linspace(0, rate, num_blocks)[:, None]
    draws = [
        torch.rand(num_blocks, 2, generator=torch.Generator().manual_seed(seed + 1))
        for seed in packed.clip_seeds
    ]
    return torch.stack([(draw >= rates_L) / (1 - rates_L) for draw in draws], dim=-1)


def _interpolated(tables_KTD: Tensor, num_tubelets: int) -> Tensor:
    """K tables [K, T, D] over time, linearly interpolated to `num_tubelets` rows where that differs, and said."""
    if tables_KTD.shape[1] == num_tubelets:
        return tables_KTD
    _announce_interpolation(tables_KTD.shape[1], num_tubelets)
    return F.interpolate(tables_KTD.transpose(1, 2), size=num_tubelets, mode="linear").transpose(1, 2)


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


@functools.cache
def _announce_interpolation(table: int, num_tubelets: int) -> None:
    logger.warning(
        "time embeddings of %d steps are interpolated to clips of %d; use num_frames as trained for exact ones",
        table,
        num_tubelets,
    )

"""The video encoder: an image tower walked over packed run-length tokens.

Shapes: B clips, S attention sequences (clips or frames), N kept patches, R rows = patches and CLS tokens laid out
in sequences, D width, T' tubelets a clip, L blocks, E rotary features.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rlt_retrieval.config import VideoSettings
from rlt_retrieval.encoders.attention import Backend, attend_biased, attend_rows
from rlt_retrieval.encoders.layouts import LayoutPlan, frame_plan, joint_plan
from rlt_retrieval.encoders.packing import Grid, PackedTokens, VideoTokens, to_device
from rlt_retrieval.encoders.reducers import make_network_reducer, reduced_grid
from rlt_retrieval.encoders.towers import adapt_tower

logger = logging.getLogger(__name__)


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
        self.network_reducer = make_network_reducer(settings, len(self.tower.blocks))
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
        z_SD, plan = self._encode_sequences(packed)
        weighted_SD = z_SD * plan.sequence_weights.to(z_SD.dtype)[:, None]
        z_BD = z_SD.new_zeros(len(packed), z_SD.shape[1]).index_add(0, plan.clip_of_sequence, weighted_SD)
        return F.normalize(z_BD, dim=-1)

    def encode_frames(self, packed: PackedTokens) -> list[Tensor]:
        """The embeddings of the frames of each clip, layout "frame" only.

        Returns:
            float32 [T', D] a clip, unit norm; a frame that was not computed has the one before it.
        Raises:
            ValueError: as in `forward`, or another layout.
        """
        if self.settings.layout != "frame":
            raise ValueError("layout 'joint' has no embedding a frame; create the model with layout='frame'")
        z_SD, plan = self._encode_sequences(packed)
        num_frames = sum(grid[0] for grid in packed.grids)
        z_FD = z_SD.repeat_interleave(plan.sequence_weights.long(), 0, output_size=num_frames)
        return list(z_FD.split([grid[0] for grid in packed.grids]))

    def _encode_sequences(self, packed: PackedTokens) -> tuple[Tensor, LayoutPlan]:
        """Unit-norm embeddings of the layout's sequences [S, D], and the plan that came out of the last block."""
        plan, scales_LPB = self.plan(packed), self._branch_scales(packed)
        device = self.tower.patch_weight.device
        packed, plan = packed.to(device), plan.to(device)
        x_RD = self._embed(packed, plan)
        rotary_ME = self._rotary_of_tokens(packed)
        for index, block in enumerate(self.tower.blocks):
            scales_PB = None if scales_LPB is None else to_device(scales_LPB[index], device)
            run_block = functools.partial(self._run_block, block, index, plan, rotary_ME, scales_PB)
            if self.gradient_checkpointing and self.training:
                x_RD, plan = checkpoint(run_block, x_RD, use_reentrant=False)
            else:
                x_RD, plan = run_block(x_RD)
        z_SD = self.tower.project(self._pool(x_RD, plan))
        return F.normalize(_at_least_float32(z_SD), dim=-1), plan

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

    @property
    def grid_size(self) -> tuple[int, int]:
        """(H', W') of the tokens that this encoder reads."""
        if self.settings.reducer == "resolution":
            return reduced_grid(self.tower.grid_size, self.settings.required_keep_ratio)
        return self.tower.grid_size

    def num_rows(self, tokens: VideoTokens) -> int:
        """Rows that encoding a clip computes: what a token budget counts. In layout "frame" each frame has a CLS."""
        if self.settings.layout == "joint":
            return len(tokens)
        return len(tokens) + len(tokens.positions[:, 0].unique())

    def num_cells(self, grid: Grid) -> int:
        """Tokens of a whole clip of T' tubelets at the tower's own size: what a share of tokens is a share of."""
        return grid[0] * math.prod(self.tower.grid_size)

    def plan(self, packed: PackedTokens) -> LayoutPlan:
        """Index plan of the layout for these clips, on the device of the tokens."""
        self._check(packed)
        if self.settings.layout == "frame":
            return frame_plan(packed, has_cls=self.tower.has_cls)
        drop = self.training and self.settings.patch_dropout > 0
        return joint_plan(packed, self.settings, has_cls=self.tower.has_cls, drop=drop)

    def _check(self, packed: PackedTokens) -> None:
        settings, expected = self.settings, self.grid_size
        for grid in packed.grids:
            if grid[1:] != expected:
                raise ValueError(
                    f"tokens have a grid of {grid[1]}x{grid[2]} patches; this model expects "
                    f"{expected[0]}x{expected[1]}: tokenize with model.tokenizer"
                )
        if packed.patches.shape[1] != settings.tubelet_size:
            raise ValueError(
                f"tokens are tubelets of {packed.patches.shape[1]} frames; this model expects "
                f"{settings.tubelet_size}: tokenize with model.tokenizer"
            )
        whole = sum(math.prod(grid) for grid in packed.grids)
        if settings.reducer in ("vid_tldr", "centerclip") and packed.num_tokens != whole:
            raise ValueError(
                f"{packed.num_tokens} of {whole} tokens are there; reducer {settings.reducer!r} reads whole clips: "
                "tokenize with model.tokenizer"
            )
        is_random = self.training and (settings.stochastic_depth or settings.patch_dropout)
        if is_random and not packed.clip_seeds:
            raise ValueError("stochastic_depth and patch_dropout need pack(…, clip_seeds=…) in training")

    def _branch_scales(self, packed: PackedTokens) -> Tensor | None:
        """float32 [L, 2, B] on the host; None where no branch is ever left out."""
        if not (self.training and self.settings.stochastic_depth):
            return None
        return _draw_branch_scales(packed, len(self.tower.blocks), self.settings.stochastic_depth)

    def _embed(self, packed: PackedTokens, plan: LayoutPlan) -> Tensor:
        """Patch embedding, positions and CLS, laid out in rows: [R, D]."""
        weight = self.tower.patch_weight
        pixels = (packed.patches.to(weight.dtype) - self.pixel_mean) / self.pixel_std
        if self.settings.tubelet_size > 1:
            weight = weight[:, None] / self.settings.tubelet_size + self.tubelet_weight
        tokens_ND = F.linear(pixels.flatten(1), weight.flatten(1), self.tower.patch_bias)
        positions_CD = self.tower.position_table(self.grid_size)
        if positions_CD is not None:
            tokens_ND = tokens_ND + positions_CD.index_select(0, self._cells(packed))
        if self.settings.layout == "joint":
            tokens_ND = tokens_ND + self._time_embeddings(packed)
        if not self.tower.has_cls:
            return self.tower.before_blocks(tokens_ND.index_select(0, plan.rows - 1))
        cls_1D = self.tower.cls_token().to(tokens_ND.dtype)[None]
        return self.tower.before_blocks(torch.cat([cls_1D, tokens_ND]).index_select(0, plan.rows))

    def _cells(self, packed: PackedTokens) -> Tensor:
        """int64 [N], place of each token in its frame's grid, row by row."""
        _, y_N, x_N = packed.positions.long().unbind(1)
        return y_N * self.grid_size[1] + x_N

    def _rotary_of_tokens(self, packed: PackedTokens) -> Tensor | None:
        """Rotary positions of the CLS token and then of each token, [1 + N, E]; None in towers without."""
        table = self.tower.rotary_table(self.grid_size)
        if table is None:
            return None
        return torch.cat([table[:1], table[1:].index_select(0, self._cells(packed))])

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
        clip_N = packed.clip_of_token
        start_N = to_device(clip_starts_B, device)[clip_N]
        length_N = to_device(clip_lengths_B, device)[clip_N]
        time_N = packed.positions[:, 0].long()
        run_N = torch.minimum(packed.run_lengths.long(), length_N)  # a moved token may stand for more cells
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
        rotary_ME: Tensor | None,
        scales_PB: Tensor | None,
        x_RD: Tensor,
    ) -> tuple[Tensor, LayoutPlan]:
        """One block, and what the reducer makes of its rows: the rows that go on, and their plan.

        Where only CLS rows are read after the last block, only they are computed in it (all rows are still its keys).
        """
        seen: list[Tensor] = []
        is_last = index == len(self.tower.blocks) - 1 and self.tower.pools_cls
        wanted = plan.first_rows_only() if is_last else plan

        def attend(q_RNH: Tensor, k_RNH: Tensor, v_RNH: Tensor) -> Tensor:
            if self.network_reducer:  # else nothing holds them while the MLP needs its memory
                seen[:] = q_RNH, k_RNH
            q_RNH = q_RNH.index_select(0, plan.first_rows) if is_last else q_RNH
            return attend_rows(q_RNH, k_RNH, v_RNH, wanted, backend=self.backend)

        rotary_RE = None if rotary_ME is None else rotary_ME.index_select(0, plan.rows)
        attention, mlp = self.tower.residuals(block, attend, rotary_RE)
        wanted_RD = x_RD.index_select(0, plan.first_rows) if is_last else x_RD
        x_RD = wanted_RD + _scaled(attention(x_RD), wanted, None if scales_PB is None else scales_PB[0])
        if self.network_reducer and not is_last:
            x_RD, wanted = self.network_reducer.after_attention(index, x_RD, plan, *seen)
        x_RD = x_RD + _scaled(mlp(x_RD), wanted, None if scales_PB is None else scales_PB[1])
        if self.network_reducer and not is_last:
            x_RD, wanted = self.network_reducer.after_block(index, x_RD, wanted)
        return x_RD, wanted

    def _pool(self, x_RD: Tensor, plan: LayoutPlan) -> Tensor:
        """One unprojected vector a sequence, [S, D']: a head that pools patches reads the keys of a frame."""
        if plan.key_rows is None or self.tower.pools_cls:
            return self.tower.pool(x_RD, plan.cu_q, plan.max_q, plan.weights, self._cross_attend)
        weights_K = torch.ones(len(plan.key_rows), device=x_RD.device)
        if plan.key_bias is not None:
            weights_K = plan.key_bias.exp()
        return self.tower.pool(x_RD[plan.key_rows], plan.cu_k, plan.max_k, weights_K, self._cross_attend)

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
        """Attention of a pooling head: a token that stands for r cells counts r times."""
        bias_T = weights_T.log()
        return attend_biased(q_TNH, k_TNH, v_TNH, cu_q, cu_k, max_q, max_k, bias_T, backend=self.backend)


def _scaled(change_RD: Tensor, plan: LayoutPlan, scales_B: Tensor | None) -> Tensor:
    """The change of a residual branch, left out or scaled up a clip at a time (stochastic depth)."""
    if scales_B is None:
        return change_RD
    scales_R = scales_B[plan.clip_of_sequence][plan.sequence_of_row]
    return change_RD * scales_R.to(change_RD.dtype)[:, None]


def _draw_branch_scales(packed: PackedTokens, num_blocks: int, rate: float) -> Tensor:
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

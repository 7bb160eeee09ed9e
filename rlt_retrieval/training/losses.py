"""Contrastive losses over the clips of all ranks, and gradient caching over micro-batches.

InfoNCE and the sigmoid loss are open_clip's. The three ranking losses of EPIC-KITCHENS-100 retrieval compare an
anchor's own positive with every other item of the batch, from a clip to the texts and from a text to the clips, on
plain cosine similarities.

Shapes: B clips of this rank, G clips of all ranks (row i of a table is clip i, column j the text drawn for clip j), D
embedding; a leading 2 is the two directions: clips as anchors, texts as anchors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from open_clip.loss import ClipLoss, SigLipLoss, gather_features
from torch import Tensor, nn
from torch.nn.functional import relu

from rlt_retrieval.config import LossName

Loss = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # z_video_BD, z_text_BD, relevancy_GG → scalar
Features = tuple[Tensor, Tensor]
PairLoss = Callable[
    [Tensor, Tensor | None], Tensor
]  # similarity_GG, relevancy_GG → loss of every pair, [2, G, G]

NEED_RELEVANCY: frozenset[LossName] = frozenset({"adaptive_mi_mm", "sms"})
PUBLISHED_MARGINS: dict[LossName, float] = {"mi_mm": 0.2, "adaptive_mi_mm": 0.4, "sms": 0.6}
SAME_RELEVANCY = 1.1 / 240  # SMS: a smaller difference counts as none (its code keeps relevancies as 240ths)


def build_loss(
    name: LossName,
    clip: nn.Module,
    *,
    rank: int,
    world_size: int,
    margin: float | None = None,
    tolerance: float = 0.1,
) -> Loss:
    """A loss that sees the clips and texts of all ranks.

    The mean of its values over ranks is the loss of the global batch, and the mean of its gradients over ranks the
    gradient of that. Embeddings have unit norm.

    "clip": InfoNCE (CLIP, arXiv 2103.00020, figure 3). "siglip": the sigmoid loss (SigLIP, arXiv 2303.15343, section
    3). "mi_mm", "adaptive_mi_mm", "sms": `max_margin`, `adaptive_max_margin`, `symmetric_multi_similarity`, mean over
    all pairs of different rows in both directions.

    Args:
        clip: the open_clip model whose `logit_scale` (and `logit_bias`) "clip" and "siglip" read and train.
        margin: of the ranking losses; None: the published one.
        tolerance: of "sms".
    """
    if name == "clip":
        contrast = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        return lambda z_video_BD, z_text_BD, _: contrast(z_video_BD, z_text_BD, clip.logit_scale.exp())  # type: ignore[operator]
    if name == "siglip":
        sigmoid = SigLipLoss(rank=rank, world_size=world_size)
        return lambda z_video_BD, z_text_BD, _: sigmoid(
            z_video_BD,
            z_text_BD,
            clip.logit_scale.exp(),  # type: ignore[operator]
            clip.logit_bias,
        )
    margin = PUBLISHED_MARGINS[name] if margin is None else margin
    return _over_all_ranks(_pair_loss(name, margin, tolerance), rank, world_size)


def _pair_loss(name: LossName, margin: float, tolerance: float) -> PairLoss:
    if name == "mi_mm":
        return lambda similarity_GG, _: max_margin(similarity_GG, margin)
    if name == "adaptive_mi_mm":
        return lambda similarity_GG, relevancy_GG: adaptive_max_margin(
            similarity_GG, _given(relevancy_GG), margin
        )
    return lambda similarity_GG, relevancy_GG: symmetric_multi_similarity(
        similarity_GG, _given(relevancy_GG), margin, tolerance
    )


def _given(relevancy_GG: Tensor | None) -> Tensor:
    assert relevancy_GG is not None, "a loss of NEED_RELEVANCY"
    return relevancy_GG


def _over_all_ranks(pair_loss: PairLoss, rank: int, world_size: int) -> Loss:
    """Every rank has the loss of the global batch, and through the gather the gradient of all ranks' losses."""

    def loss(z_video_BD: Tensor, z_text_BD: Tensor, relevancy_GG: Tensor | None) -> Tensor:
        z_video_GD, z_text_GD = z_video_BD, z_text_BD
        if world_size > 1:
            z_video_GD, z_text_GD = gather_features(
                z_video_BD, z_text_BD, gather_with_grad=True, rank=rank, world_size=world_size
            )
        loss_2GG = pair_loss(z_video_GD @ z_text_GD.T, relevancy_GG)
        is_pair_GG = ~torch.eye(len(z_video_GD), dtype=torch.bool, device=loss_2GG.device)
        return loss_2GG[:, is_pair_GG].mean()

    return loss


# --- ranking losses, pair by pair ---------------------------------------------------------------------------


def max_margin(similarity_GG: Tensor, margin: float) -> Tensor:
    """MI-MM: max(0, m - S), S = s(anchor, its positive) - s(anchor, compared); [2, G, G].

    Source: the max-margin ranking loss that LaViLa (arXiv 2212.04501) and AVION (arXiv 2309.16669) fine-tune with on
    EPIC-KITCHENS-100, m 0.2.
    """
    return relu(margin - lead_of_positive(similarity_GG))


def adaptive_max_margin(similarity_GG: Tensor, relevancy_GG: Tensor, margin: float) -> Tensor:
    """Adaptive MI-MM: max(0, c·m - S), S as in `max_margin`, c the relevancy of the anchor's own positive; [2, G, G].

    Source: EgoVLP's challenge report (arXiv 2207.01334); m 0.4 as in the code of SMS (github.com/xqwang14/SMS-Loss).
    """
    margin_G1 = margin * relevancy_GG.diagonal().to(similarity_GG)[:, None]
    return relu(margin_G1 - lead_of_positive(similarity_GG))


def symmetric_multi_similarity(
    similarity_GG: Tensor, relevancy_GG: Tensor, margin: float, tolerance: float
) -> Tensor:
    """SMS: S should follow R, the lead of the positive in relevancy; [2, G, G].

    S as in `max_margin`, R = c(anchor, its positive) - c(anchor, compared), γ the margin 0.6, τ the tolerance 0.1:

        max(0, γR - S)   where R > 0, the positive is the more relevant one
        max(0, S - γR)   where R < 0, the compared item is
        max(0, |S| - τ)  where R = 0, i.e. |R| < 1.1/240: neither should lead

    Source: arXiv 2406.12256. In its code the last case reads |γR - S|; the two differ by less than 0.003.

    Args:
        relevancy_GG: float64, on any device; signs of R are taken in float64.
    """
    lead_2GG, lead_in_relevancy_2GG = lead_of_positive(similarity_GG), lead_of_positive(relevancy_GG)
    is_above_2GG, is_below_2GG = (
        mask_2GG.to(lead_2GG.device)
        for mask_2GG in (lead_in_relevancy_2GG >= SAME_RELEVANCY, lead_in_relevancy_2GG <= -SAME_RELEVANCY)
    )
    wanted_2GG = margin * lead_in_relevancy_2GG.to(lead_2GG)
    return torch.where(
        is_above_2GG,
        relu(wanted_2GG - lead_2GG),
        torch.where(is_below_2GG, relu(lead_2GG - wanted_2GG), relu(lead_2GG.abs() - tolerance)),
    )


def lead_of_positive(table_GG: Tensor) -> Tensor:
    """By how much an anchor's own positive leads every item, [2, G, G].

    [0, i, j] = t[i, i] - t[i, j], clip i as anchor; [1, j, i] = t[j, j] - t[i, j], text j as anchor.
    """
    both_2GG = torch.stack([table_GG, table_GG.T])
    return table_GG.diagonal()[None, :, None] - both_2GG


# --- gradients ----------------------------------------------------------------------------------------------


def backward(
    loss: Loss, micro_batches: Sequence[Callable[[], Features]], relevancy_GG: Tensor | None = None
) -> Tensor:
    """Add the gradient of `loss` over all micro-batches to the parameters; returns the loss, detached.

    One micro-batch is the plain way. Several are joined by gradient caching (arXiv 2101.06983, section 3): features
    without a graph, the loss and its gradient on the features, then each micro-batch again with that gradient.
    Memory is that of one micro-batch, the gradient that of the whole batch.

    Args:
        micro_batches: functions that give (z_video_bD, z_text_bD) in the graph of the model, the same at each call.
        relevancy_GG: of the global batch, for a loss of `NEED_RELEVANCY`.
    """
    if len(micro_batches) == 1:
        value = loss(*micro_batches[0](), relevancy_GG)
        value.backward()
        return value.detach()
    with torch.no_grad():
        parts = [features() for features in micro_batches]
    z_video_BD, z_text_BD = (torch.cat(part).requires_grad_() for part in zip(*parts, strict=True))
    value = loss(z_video_BD, z_text_BD, relevancy_GG)
    value.backward()
    sizes = [len(z_video_bD) for z_video_bD, _ in parts]
    assert z_video_BD.grad is not None
    assert z_text_BD.grad is not None
    gradients = zip(z_video_BD.grad.split(sizes), z_text_BD.grad.split(sizes), strict=True)
    for features, gradient in zip(micro_batches, gradients, strict=True):
        torch.autograd.backward(features(), gradient)
    return value.detach()

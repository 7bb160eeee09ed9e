"""Contrastive losses: open_clip's, gathered over ranks, and gradient caching over micro-batches.

Shapes: B clips of this rank, D embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]  # z_video_BD, z_text_BD → scalar
Features = tuple[Tensor, Tensor]


def build_loss(name: Literal["clip", "siglip"], clip: nn.Module, *, rank: int, world_size: int) -> Loss:
    """InfoNCE (CLIP, arXiv 2103.00020, figure 3) or the sigmoid loss (SigLIP, arXiv 2303.15343, section 3).

    Both are open_clip's and see the clips and texts of all ranks. The mean of their values over ranks is the loss of
    the global batch, and the mean of their gradients over ranks its gradient.

    Args:
        clip: the open_clip model whose `logit_scale` (and `logit_bias`) the loss reads and trains.
    """
    if name == "clip":
        contrast = ClipLoss(gather_with_grad=True, rank=rank, world_size=world_size)
        return lambda z_video_BD, z_text_BD: contrast(z_video_BD, z_text_BD, clip.logit_scale.exp())  # type: ignore[operator]
    sigmoid = SigLipLoss(rank=rank, world_size=world_size)
    return lambda z_video_BD, z_text_BD: sigmoid(
        z_video_BD,
        z_text_BD,
        clip.logit_scale.exp(),  # type: ignore[operator]
        clip.logit_bias,
    )


def backward(loss: Loss, micro_batches: Sequence[Callable[[], Features]]) -> Tensor:
    """Add the gradient of `loss` over all micro-batches to the parameters; returns the loss, detached.

    One micro-batch is the plain way. Several are joined by gradient caching (arXiv 2101.06983, section 3): features
    without a graph, the loss and its gradient on the features, then each micro-batch again with that gradient.
    Memory is that of one micro-batch, the gradient that of the whole batch.

    Args:
        micro_batches: functions that give (z_video_bD, z_text_bD) in the graph of the model, the same at each call.
    """
    if len(micro_batches) == 1:
        value = loss(*micro_batches[0]())
        value.backward()
        return value.detach()
    with torch.no_grad():
        parts = [features() for features in micro_batches]
    z_video_BD, z_text_BD = (torch.cat(part).requires_grad_() for part in zip(*parts, strict=True))
    value = loss(z_video_BD, z_text_BD)
    value.backward()
    sizes = [len(z_video_bD) for z_video_bD, _ in parts]
    assert z_video_BD.grad is not None
    assert z_text_BD.grad is not None
    gradients = zip(z_video_BD.grad.split(sizes), z_text_BD.grad.split(sizes), strict=True)
    for features, gradient in zip(micro_batches, gradients, strict=True):
        torch.autograd.backward(features(), gradient)
    return value.detach()

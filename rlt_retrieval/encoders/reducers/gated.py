"""GRT-like gating: a patch is dropped where it is built like the patch of its scene's key frame.

Shapes: T frames, H x W pixels, grid T x H' x W', P patch side, C = 3 channels, k values of a patch (3 P²).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlt_retrieval.encoders.packing import VideoTokens
from rlt_retrieval.encoders.tokenizer import check_patch_size, check_threshold, cut_tubelets, tokens_from_mask

NEW_SCENE_SHARE = 0.5  # of a frame's patches

_C1 = (0.01 * 255) ** 2  # the stabilising constants of SSIM for values of 0..255
_C2 = (0.03 * 255) ** 2


@dataclass(frozen=True)
class GatedTokenizer:
    """Keep the patches whose structure differs from the key frame's; the others stand for the key frame's token.

    After the first stage of gated residual tokenization (GRT, arXiv 2509.14199): patches that are structurally
    similar to the scene's key frame are not tokenized again. The paper's text could not be read, only its abstract
    and its authors' published code; so this is GRT-like, and these rules are ours:

    - A patch is kept when 1 - SSIM > `threshold`, SSIM taken once over all values of the two patches, three channels
      together, as that code does: (2 m_a m_b + C1)(2 s_ab + C2) / ((m_a² + m_b² + C1)(s_a² + s_b² + C2)) with means m
      and (co)variances s (Wang et al., "Image quality assessment", 2004, equation 13), C1 = (0.01 · 255)²,
      C2 = (0.03 · 255)² (that code: the patches' own range of values).
    - It is compared with the patch of the scene's key frame (that code: of the frame before), so a patch that changes
      and changes back stands for the key frame's token again: `VideoTokens.covering` says so.
    - Frame 0 is a key frame. A frame more than half of whose patches pass the gate starts a new scene: it is kept
      whole and is the next key frame.

    Attributes:
        patch_size: P, pixels.
        threshold: dissimilarity 1 - SSIM, 0 (the same) to 2 (inverted): another unit than RLT's; negative keeps all.
    Raises:
        ValueError: an impossible size or a threshold that is no number.
    """

    patch_size: int = 16
    threshold: float = 0.1

    def __post_init__(self) -> None:
        check_patch_size(self.patch_size)
        check_threshold(self.threshold)

    def __call__(self, frames_TCHW: Tensor) -> VideoTokens:
        """Tokenize one clip: uint8 [T, 3, H, W] on any device. Raises ValueError for frames of another kind."""
        frames_tuCHW = cut_tubelets(frames_TCHW, self.patch_size)
        mask_thw, key_frame_t = self._gate(_patch_values(frames_tuCHW[:, 0], self.patch_size))
        tokens_thw = (mask_thw.flatten().cumsum(0) - 1).reshape(mask_thw.shape)
        covering_thw = torch.where(mask_thw, tokens_thw, tokens_thw[key_frame_t])
        return tokens_from_mask(frames_tuCHW, mask_thw, self.patch_size, covering_thw)

    def _gate(self, values_thwk: Tensor) -> tuple[Tensor, list[int]]:
        """Kept cells [T, H', W'], and the key frame of each frame's scene."""
        mask_thw = torch.ones(values_thwk.shape[:3], dtype=torch.bool, device=values_thwk.device)
        key_frame_t = [0]
        for t in range(1, len(values_thwk)):
            key = key_frame_t[-1]
            changed_hw = 1 - structural_similarity(values_thwk[t], values_thwk[key]) > self.threshold
            is_new_scene = int(changed_hw.sum()) > NEW_SCENE_SHARE * changed_hw.numel()
            key_frame_t.append(t if is_new_scene else key)
            if not is_new_scene:
                mask_thw[t] = changed_hw
        return mask_thw, key_frame_t


def structural_similarity(a_nk: Tensor, b_nk: Tensor) -> Tensor:
    """SSIM of whole patches (formula: `GatedTokenizer`), float64 without the last dimension, between -1 and 1.

    a, b: integer values 0..255 with any leading dimensions. Sums are integers, so equal patches give exactly 1 and
    every device the same result.
    """
    count = a_nk.shape[-1]
    a_nk, b_nk = a_nk.to(torch.int32), b_nk.to(torch.int32)
    sum_a, sum_b = a_nk.sum(-1), b_nk.sum(-1)
    # Everything times count², which cancels: products of sums are integers, far below float64's 2**53.
    mean_products = (sum_a * sum_b).double()
    mean_squares = (sum_a * sum_a + sum_b * sum_b).double()
    covariances = (count * (a_nk * b_nk).sum(-1)).double() - mean_products
    variances = (count * (a_nk * a_nk + b_nk * b_nk).sum(-1)).double() - mean_squares
    c1, c2 = _C1 * count**2, _C2 * count**2
    return (2 * mean_products + c1) * (2 * covariances + c2) / ((mean_squares + c1) * (variances + c2))


def _patch_values(frames_TCHW: Tensor, patch_size: int) -> Tensor:
    """uint8 [T, H', W', 3 P²]."""
    t, c, height, width = frames_TCHW.shape
    blocks = frames_TCHW.reshape(t, c, height // patch_size, patch_size, width // patch_size, patch_size)
    return blocks.permute(0, 2, 4, 1, 3, 5).flatten(3)

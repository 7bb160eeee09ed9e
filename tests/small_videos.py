"""A small mp4, made on the spot."""

import numpy as np

from rlt_retrieval.data.video import encode_mp4


def tiny_mp4(seconds: float = 1.0, *, fps: int = 8, size: int = 32, seed: int = 0) -> bytes:
    """Blocks of random colours, drawn anew for every frame, so that most patches are kept."""
    shape = (round(seconds * fps), size // 8, size // 8, 3)
    blocks = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return encode_mp4(blocks.repeat(8, axis=1).repeat(8, axis=2), fps=fps)

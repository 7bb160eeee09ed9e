"""Small open_clip models with every constant parameter made random, and clips whose patches repeat exactly.

Shapes: T frames, H x W pixels, P patch side.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlt_retrieval.config import VideoSettings
from rlt_retrieval.encoders.towers.loading import ClipModel, create_clip
from rlt_retrieval.model import ModelConfig, VideoTextModel

SMALL_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
SMALL_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "width": 32,
    "head_width": 16,
    "layers": 2,
    "mlp_ratio": 2.0,
    "attn_pooler_heads": 4,
    "attn_pooler_queries": 5,
}


def small_config(**vision: Any) -> dict[str, Any]:
    """An open_clip configuration: grid 4 x 4, two layers of width 32, embedding of 32."""
    return {"embed_dim": 32, "vision_cfg": {**SMALL_VISION, **vision}, "text_cfg": dict(SMALL_TEXT)}


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Noise on every parameter that starts constant (zeros, ones, layer scales), so that none can be forgotten."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.2 * noise.to(parameter.dtype))


def small_model(vision: dict[str, Any] | None = None, seed: int = 0, **settings: Any) -> VideoTextModel:
    """A small randomised model in eval mode; `settings` are fields of VideoSettings (default: joint, 6 frames)."""
    made: ClipModel = create_clip(small_config(**(vision or {})), None, seed=seed)
    values = {"layout": "joint", "threshold": 0.0, "reference": "previous", "num_frames": 6, **settings}
    config = ModelConfig("custom", made.model_cfg, made.preprocess_cfg, VideoSettings(**values))
    model = VideoTextModel(made.module, config).eval()
    randomise(model, seed + 1)
    return model


def repeating_frames(
    num_frames: int, change: float, seed: int = 0, side: int = 32, patch: int = 8, group: int = 1
) -> Tensor:
    """uint8 [T, 3, H, W]: each patch changes with probability `change` from one group of frames to the next."""
    rng = np.random.default_rng(seed)
    groups = -(-num_frames // group)
    frames = rng.integers(0, 256, (groups, 3, side, side), dtype=np.uint8)
    places = rng.random((groups, side // patch, side // patch)) < change
    changed = places.repeat(patch, 1).repeat(patch, 2)[:, None]
    for t in range(1, groups):
        frames[t] = np.where(changed[t], frames[t], frames[t - 1])
    return torch.from_numpy(frames.repeat(group, 0)[:num_frames])


def pixels(model: VideoTextModel, frames_TCHW: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Frames as open_clip's preprocessing gives them to the tower (constants are float32, as in the model)."""
    mean, std = (
        (255 * torch.tensor(model.config.preprocess_cfg[name])).to(dtype).reshape(3, 1, 1)
        for name in ("mean", "std")
    )
    return (frames_TCHW.to(dtype) - mean) / std


def gradients(loss: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Gradient of each parameter that takes part, by name."""
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def assert_gradients_agree(seen: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest gradient of each parameter; the same parameters must take part."""
    assert seen.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (seen[name] - gradient).abs().max()
        assert error <= tolerance * gradient.abs().max().clamp(min=1e-3), f"{name}: {error}"

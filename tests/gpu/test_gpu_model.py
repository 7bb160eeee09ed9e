"""The model on a GPU against the model on the CPU, and a training step in bfloat16."""

import copy
from typing import Any

import pytest
import torch
from small_models import gradients, repeating_frames, small_model

from rlt_retrieval import PackedTokens, VideoTextModel, pack

pytestmark = pytest.mark.needs_cuda

MODELS: dict[str, dict[str, Any]] = {
    "joint": {"layout": "joint"},
    "length bias": {"layout": "joint", "length_bias": True},
    "frame": {"layout": "frame"},
}


def model_and_tokens(kind: str) -> tuple[VideoTextModel, PackedTokens]:
    model = small_model(**MODELS[kind])
    clips = [repeating_frames(6, change, seed) for seed, change in enumerate((0.0, 0.3, 1.0))]
    return model, pack([model.tokenizer(clip) for clip in clips])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("is_there", [False, True])
def test_embeddings_are_those_of_the_cpu(kind: str, is_there: bool) -> None:
    """In float32, and in the bfloat16 of inference; tokens on the host or on the device already."""
    model, packed = model_and_tokens(kind)
    with torch.no_grad():
        expected = model.encode_tokens(packed)
        packed = packed.to("cuda") if is_there else packed
        model = model.cuda()
        torch.testing.assert_close(model.video(packed).cpu(), expected, atol=1e-4, rtol=0)
        cosine_B = (model.encode_tokens(packed).cpu() * expected).sum(1)
    assert (cosine_B > 0.995).all(), cosine_B


@pytest.mark.parametrize("kind", MODELS)
def test_gradients_are_those_of_the_cpu(kind: str) -> None:
    """In float32 and under bfloat16 autocast, where the kernels run."""
    model, packed = model_and_tokens(kind)
    there = copy.deepcopy(model).cuda()
    z_BD = model.video(packed)
    direction = torch.randn(z_BD.shape, generator=torch.Generator().manual_seed(0))
    expected = gradients((z_BD * direction).sum(), model)
    for enabled, tolerance in ((False, 1e-3), (True, 0.1)):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            z_BD = there.video(packed)
        seen = gradients((z_BD * direction.cuda()).sum(), there)
        assert seen.keys() == expected.keys()
        for name, gradient in expected.items():
            error = (seen[name].cpu() - gradient).norm()
            assert error <= tolerance * gradient.norm().clamp(min=1e-2), (
                f"{name}: {error} of {gradient.norm()}"
            )


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_steps_in_bfloat16_lower_the_loss(kind: str, checkpointing: bool) -> None:
    model, packed = model_and_tokens(kind)
    model = model.cuda().train()
    model.video.gradient_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    target_BD = torch.nn.functional.normalize(torch.eye(3, 32), dim=1).cuda()
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            z_BD = model.encode_tokens(packed)
        loss = -(z_BD * target_BD).sum(1).mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert z_BD.dtype == torch.float32
    assert losses[-1] < losses[0] - 0.01, losses

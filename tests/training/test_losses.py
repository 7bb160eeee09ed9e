"""Losses on hand-worked tables; gradient caching = the plain gradient.

Shapes: B clips, D embedding.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from rlt_retrieval.config import Recipe
from rlt_retrieval.data.loading import TrainBatch, clip_seed
from rlt_retrieval.encoders.packing import pack
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.training.distributed import Ranks
from rlt_retrieval.training.loop import build_optimizer, train_step
from rlt_retrieval.training.losses import backward, build_loss

ONE_RANK = Ranks(0, 1, torch.device("cpu"))
Gradients = dict[str, torch.Tensor]


class Temperature(nn.Module):
    """What a loss needs of an open_clip model: scale 2 and bias -1."""

    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(2.0, dtype=torch.float64).log())
        self.logit_bias = nn.Parameter(torch.tensor(-1.0, dtype=torch.float64))


def hand_worked_features() -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities 0.6 0.8 / 0.8 -0.6: times 2, the logits are 1.2 1.6 / 1.6 -1.2."""
    z_video_BD = torch.eye(2, dtype=torch.float64)
    z_text_BD = torch.tensor([[0.6, 0.8], [0.8, -0.6]], dtype=torch.float64)
    return z_video_BD, z_text_BD


def test_clip_loss_by_hand() -> None:
    """Row 1: ln(1 + e^0.4) = 0.913015, row 2: ln(1 + e^2.8) = 2.859033; the columns are the same."""
    loss = build_loss("clip", Temperature(), rank=0, world_size=1)
    assert loss(*hand_worked_features()).item() == pytest.approx((0.913015 + 2.859033) / 2, abs=1e-6)


def test_siglip_loss_by_hand() -> None:
    """Logits with the bias 0.2 0.6 / 0.6 -2.2; the diagonal is positive, the rest negative; per clip, so / 2.

    ln(1 + e^-0.2) = 0.598139, ln(1 + e^0.6) = 1.037488 twice, ln(1 + e^2.2) = 2.305083. Without the bias: 2.43.
    """
    loss = build_loss("siglip", Temperature(), rank=0, world_size=1)
    expected = (0.598139 + 2 * 1.037488 + 2.305083) / 2
    assert loss(*hand_worked_features()).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_loss_trains_the_temperature(name: str) -> None:
    temperature = Temperature()
    build_loss(name, temperature, rank=0, world_size=1)(*hand_worked_features()).backward()  # type: ignore[arg-type]
    assert temperature.logit_scale.grad != 0
    assert (temperature.logit_bias.grad is not None) == (name == "siglip")


def test_caching_asks_each_micro_batch_for_its_features_at_most_twice() -> None:
    """Once without a graph, once with: more would cost time, and one pass with a graph would cost the memory."""
    weight = torch.ones(2, requires_grad=True)
    calls: list[tuple[int, bool]] = []

    def micro_batch(number: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def features() -> tuple[torch.Tensor, torch.Tensor]:
            calls.append((number, torch.is_grad_enabled()))
            return weight[None] * (number + 1), weight[None] * 2

        return features

    backward(lambda z_video_BD, z_text_BD: (z_video_BD * z_text_BD).sum(), [micro_batch(n) for n in range(3)])
    assert calls == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]
    assert weight.grad.tolist() == [4.0 * (1 + 2 + 3)] * 2  # d(2 (n + 1) w²)/dw at w = 1


def plain_gradients(
    model: VideoTextModel, batch: TrainBatch, recipe: Recipe, step: int
) -> tuple[float, Gradients]:
    """The obvious way: all clips in one forward and one backward pass."""
    loss = build_loss(recipe.optim.loss, model.clip, rank=0, world_size=1)
    seeds = [clip_seed(recipe.seed, step, clip.key) for clip in batch.clips]
    z_video_BD = model.encode_tokens(pack([clip.tokens for clip in batch.clips], seeds))
    value = loss(z_video_BD, model.encode_text([clip.caption for clip in batch.clips]))
    model.zero_grad()
    value.backward()
    return value.item(), gradients(model)


def gradients(model: VideoTextModel) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["clip", "siglip"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)], ids=["float64", "float32"]
)
def test_gradient_caching_is_the_plain_gradient(
    make_model: Callable[..., VideoTextModel],
    make_recipe: Callable[..., Recipe],
    random_batch: TrainBatch,
    dtype: torch.dtype,
    tolerance: float,
    name: str,
) -> None:
    """Catches micro-batches that draw other dropped patches and paths in their second pass, or that are dropped."""
    start = make_model(dtype, stochastic_depth=0.4, patch_dropout=0.4)
    num_tokens = sum(len(clip.tokens) for clip in random_batch.clips)
    expected: tuple[float, Gradients] | None = None
    for token_budget in (num_tokens, num_tokens // 2, num_tokens // 5, 1):
        limits = {"loss": name, "token_budget": token_budget, "max_grad_norm": 1e9}
        recipe = make_recipe(optim=limits)
        expected = expected or plain_gradients(copy.deepcopy(start), random_batch, recipe, step=3)
        model = copy.deepcopy(start)
        loss = build_loss(recipe.optim.loss, model.clip, rank=0, world_size=1)
        line = train_step(model, loss, build_optimizer(model, recipe), random_batch, 3, recipe, ONE_RANK)
        assert line["loss"] == pytest.approx(expected[0], abs=tolerance)
        found = gradients(model)
        assert found.keys() == expected[1].keys()
        for parameter, gradient in expected[1].items():
            torch.testing.assert_close(found[parameter], gradient, rtol=0, atol=tolerance, msg=parameter)


def test_random_decisions_depend_on_step_and_clip(
    make_model: Callable[..., VideoTextModel], make_recipe: Callable[..., Recipe], random_batch: TrainBatch
) -> None:
    """Else patch dropout would take the same patches away in every epoch."""
    recipe = make_recipe()
    model = make_model(stochastic_depth=0.4, patch_dropout=0.4)
    values = [plain_gradients(model, random_batch, recipe, step)[0] for step in (1, 2, 1)]
    assert values[0] == values[2] != values[1]
    assert clip_seed(0, 1, "a") != clip_seed(0, 1, "b") != clip_seed(1, 1, "b")

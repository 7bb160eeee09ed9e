"""Losses on hand-worked tables; gradient caching = the plain gradient.

Shapes: B clips, D embedding. Tables: clip i in row i, the text drawn for clip j in column j.
"""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rlt_retrieval.config import LossName, OptimRecipe, Recipe
from rlt_retrieval.data.loading import TrainBatch, clip_seed
from rlt_retrieval.encoders.packing import pack
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.training.distributed import Ranks
from rlt_retrieval.training.loop import build_optimizer, train_step
from rlt_retrieval.training.losses import backward, build_loss
from rlt_retrieval.training.relevancies import batch_relevancy

LOSSES: tuple[LossName, ...] = ("clip", "siglip", "mi_mm", "adaptive_mi_mm", "sms")
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
    assert loss(*hand_worked_features(), None).item() == pytest.approx((0.913015 + 2.859033) / 2, abs=1e-6)


def test_siglip_loss_by_hand() -> None:
    """Logits with the bias 0.2 0.6 / 0.6 -2.2; the diagonal is positive, the rest negative; per clip, so / 2.

    ln(1 + e^-0.2) = 0.598139, ln(1 + e^0.6) = 1.037488 twice, ln(1 + e^2.2) = 2.305083. Without the bias: 2.43.
    """
    loss = build_loss("siglip", Temperature(), rank=0, world_size=1)
    expected = (0.598139 + 2 * 1.037488 + 2.305083) / 2
    assert loss(*hand_worked_features(), None).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_loss_trains_the_temperature(name: str) -> None:
    temperature = Temperature()
    build_loss(name, temperature, rank=0, world_size=1)(*hand_worked_features(), None).backward()  # type: ignore[arg-type]
    assert temperature.logit_scale.grad != 0
    assert (temperature.logit_bias.grad is not None) == (name == "siglip")


# --- ranking losses ------------------------------------------------------------------------------------------

# Lead of the own text over the others, clip by clip: 0.6 0.1 / 0.1 0.5 / 0.3 -0.35;
# of the own clip, text by text: 0.4 0.8 / 0.3 -0.15 / -0.4 0.3.
SIMILARITY = [[0.9, 0.3, 0.8], [0.5, 0.6, 0.1], [0.1, 0.75, 0.4]]
# Not symmetric. Lead in relevancy, clip by clip: 0.5 -0.25 / 0.25 -0.002 / 0 -0.5;
# text by text: 0.5 0.25 / 0.25 -0.5 / -0.5 -0.002.
RELEVANCY = [[0.75, 0.25, 1.0], [0.25, 0.5, 0.502], [0.5, 1.0, 0.5]]


def loss_and_gradient(
    name: LossName, similarity: list[list[float]], relevancy: list[list[float]] | None, **options: float
) -> tuple[float, Tensor]:
    """Of a table of similarities; with clips that are unit vectors, the texts' embeddings are its columns."""
    z_video_BD = torch.eye(len(similarity), dtype=torch.float64)
    z_text_BD = torch.tensor(similarity, dtype=torch.float64).T.clone().requires_grad_()
    relevancy_GG = None if relevancy is None else torch.tensor(relevancy, dtype=torch.float64)
    value = build_loss(name, nn.Module(), rank=0, world_size=1, **options)(
        z_video_BD, z_text_BD, relevancy_GG
    )
    value.backward()
    assert z_text_BD.grad is not None
    return value.item(), z_text_BD.grad.T


def test_max_margin_by_hand() -> None:
    """Short of 0.2: clips by 0.1, 0.1, 0.55, texts by 0.35, 0.6; 1.7 over 12 pairs."""
    value, gradient = loss_and_gradient("mi_mm", SIMILARITY, None)
    assert value == pytest.approx(1.7 / 12, abs=1e-12)
    expected = [[-1.0, 0.0, 2.0], [1.0, -2.0, 0.0], [0.0, 2.0, -2.0]]
    torch.testing.assert_close(12 * gradient, torch.tensor(expected, dtype=torch.float64))


def test_adaptive_max_margin_by_hand() -> None:
    """Own relevancies 0.2, 0.5, 1 times 0.4: margins 0.08, 0.2, 0.4, whatever lies beside the diagonal.

    Clips are short by 0, 0 / 0.1, 0 / 0.1, 0.75, texts by 0, 0 / 0, 0.35 / 0.8, 0.1.
    """
    relevancy = [[0.2, 0.3, 0.9], [0.7, 0.5, 0.0], [0.1, 0.6, 1.0]]
    value, gradient = loss_and_gradient("adaptive_mi_mm", SIMILARITY, relevancy)
    assert value == pytest.approx(2.2 / 12, abs=1e-12)
    expected = [[0.0, 0.0, 1.0], [1.0, -2.0, 1.0], [1.0, 2.0, -4.0]]
    torch.testing.assert_close(12 * gradient, torch.tensor(expected, dtype=torch.float64))


def test_symmetric_multi_similarity_by_hand() -> None:
    """Clips: 0, 0.1 + 0.15 / 0.15 - 0.1, 0.5 - 0.1 / 0.3 - 0.1, 0; texts: 0, 0 / 0, -0.15 + 0.3 / 0, 0.3 - 0.1."""
    value, gradient = loss_and_gradient("sms", SIMILARITY, RELEVANCY)
    assert value == pytest.approx((0.25 + 0.05 + 0.4 + 0.2 + 0.15 + 0.2) / 12, abs=1e-12)
    expected = [[1.0, 0.0, -1.0], [1.0, 1.0, -2.0], [-1.0, -1.0, 2.0]]
    torch.testing.assert_close(12 * gradient, torch.tensor(expected, dtype=torch.float64))


def test_equally_relevant_items_pull_either_way() -> None:
    """Leads -0.35, 0.05 / -0.15, -0.15 where none is due: 0.25, 0, 0.05, 0.05 beyond the tolerance."""
    value, gradient = loss_and_gradient("sms", [[0.1, 0.45], [0.25, 0.3]], [[0.5, 0.5], [0.5, 0.5]])
    assert value == pytest.approx(0.35 / 4, abs=1e-12)
    expected = torch.tensor([[-2.0, 2.0], [1.0, -1.0]], dtype=torch.float64)
    torch.testing.assert_close(4 * gradient, expected)


@pytest.mark.parametrize(
    ("difference", "expected"),
    [(0.0045, 0.4), (0.0047, 0.0), (-0.0045, 0.4), (-0.0047, 0.5 + 0.6 * 0.0047)],
)
def test_a_240th_is_no_difference_in_relevancy(difference: float, expected: float) -> None:
    """1.1/240 is 0.00458. Leads of 0.5 where the difference is due: 0.4 too much, enough, or all of it wrong.

    Clip 0 and text 1 lead each other by that; the other two lead by 0 where 0 is due.
    """
    similarity = [[0.5, 0.0], [0.5, 0.5]]
    relevancy = [[0.5, 0.5 - difference], [0.5, 0.5]]
    value, _ = loss_and_gradient("sms", similarity, relevancy)
    assert 4 * value == pytest.approx(2 * expected, abs=1e-12)


def test_margin_and_tolerance_can_be_set() -> None:
    """Margin 0: what is short of a lead of 0, 0.35 + 0.15 + 0.4; tolerance 0.3 leaves 0.5 - 0.3 of the equal pairs."""
    assert loss_and_gradient("mi_mm", SIMILARITY, None, margin=0.0)[0] == pytest.approx(0.9 / 12)
    wide = loss_and_gradient("sms", SIMILARITY, RELEVANCY, margin=1.0, tolerance=0.31)[0]
    # γ 1: 0, 0.35 / 0.15, 0.19 / 0, 0.15; 0.1, 0 / 0, 0.35 / 0.1, 0
    assert wide == pytest.approx((0.35 + 0.15 + 0.19 + 0.15 + 0.1 + 0.35 + 0.1) / 12)


def slow_sms(similarity: Tensor, relevancy: Tensor) -> float:
    """Pair by pair, as the paper says it."""
    num, total = len(similarity), 0.0
    for a in range(num):
        for b in set(range(num)) - {a}:
            for s, c in ((similarity, relevancy), (similarity.T, relevancy.T)):
                lead, due = float(s[a, a] - s[a, b]), float(c[a, a] - c[a, b])
                if abs(due) < 1.1 / 240:
                    total += max(0.0, abs(lead) - 0.1)
                else:
                    total += max(0.0, math.copysign(1, due) * (0.6 * due - lead))
    return total / (2 * num * (num - 1))


@given(st.integers(2, 7), st.integers(0, 2**31))
def test_symmetric_multi_similarity_equals_its_slow_form(num: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z_video_BD, z_text_BD = (
        nn.functional.normalize(torch.randn(num, 3, dtype=torch.float64, generator=generator))
        for _ in range(2)
    )
    steps = torch.randint(0, 7, (num, num), generator=generator)
    relevancy_GG = steps.double() / 6 + 1e-12 * torch.rand(num, num, generator=generator)  # rounding
    value = build_loss("sms", nn.Module(), rank=0, world_size=1)(z_video_BD, z_text_BD, relevancy_GG)
    assert value.item() == pytest.approx(slow_sms(z_video_BD @ z_text_BD.T, relevancy_GG), abs=1e-12)


@given(st.sampled_from(LOSSES), st.permutations(range(5)))
def test_the_order_of_clips_does_not_matter(name: LossName, order: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    z_video_BD, z_text_BD, relevancy_GG = torch.rand(3, 5, 5, dtype=torch.float64, generator=generator)
    loss = build_loss(name, Temperature(), rank=0, world_size=1)
    expected = loss(z_video_BD, z_text_BD, relevancy_GG).item()
    shuffled = loss(z_video_BD[order], z_text_BD[order], relevancy_GG[order][:, order])
    assert shuffled.item() == pytest.approx(expected, abs=1e-12)


def test_relevancies_of_a_batch(random_batch: TrainBatch) -> None:
    """Rows are clips, columns the sentences drawn: clip 1 shares one of two nouns with sentence 0, clip 0 nothing."""
    zero, one = random_batch.clips[:2]
    assert (zero.classes, zero.sentence_classes) == ((0, (0,)), (0, (0,)))
    assert (one.classes, one.sentence_classes) == ((1, (0, 1)), (1, (1, 3)))
    relevancy_GG = batch_relevancy(random_batch.clips, ONE_RANK)
    assert relevancy_GG.dtype == torch.float64
    assert relevancy_GG.shape == (8, 8)
    assert relevancy_GG[:2, :2].tolist() == [[1.0, 0.0], [0.25, pytest.approx(0.5 + 0.5 / 3)]]


@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_a_margin_that_nothing_reads_is_refused(name: str) -> None:
    values = {"loss": name, "margin": 0.3, "steps": 1, "batch_size": 2, "learning_rate": 1.0}
    with pytest.raises(
        ValueError, match=f"loss '{name}' has no margin; only mi_mm, adaptive_mi_mm, sms have"
    ):
        OptimRecipe.model_validate(values)


# --- gradient caching ----------------------------------------------------------------------------------------


def test_caching_asks_each_micro_batch_for_its_features_at_most_twice() -> None:
    """Once without a graph, once with: more would cost time, and one pass with a graph would cost the memory."""
    weight = torch.ones(2, requires_grad=True)
    calls: list[tuple[int, bool]] = []

    def micro_batch(number: int) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        def features() -> tuple[torch.Tensor, torch.Tensor]:
            calls.append((number, torch.is_grad_enabled()))
            return weight[None] * (number + 1), weight[None] * 2

        return features

    backward(
        lambda z_video_BD, z_text_BD, _: (z_video_BD * z_text_BD).sum(), [micro_batch(n) for n in range(3)]
    )
    assert calls == [(0, False), (1, False), (2, False), (0, True), (1, True), (2, True)]
    assert weight.grad.tolist() == [4.0 * (1 + 2 + 3)] * 2  # d(2 (n + 1) w²)/dw at w = 1


def plain_gradients(
    model: VideoTextModel, batch: TrainBatch, recipe: Recipe, step: int
) -> tuple[float, Gradients]:
    """The obvious way: all clips in one forward and one backward pass."""
    loss = build_loss(recipe.optim.loss, model.clip, rank=0, world_size=1)
    seeds = [clip_seed(recipe.seed, step, clip.key) for clip in batch.clips]
    z_video_BD = model.encode_tokens(pack([clip.tokens for clip in batch.clips], seeds))
    z_text_BD = model.encode_text([clip.caption for clip in batch.clips])
    value = loss(z_video_BD, z_text_BD, batch_relevancy(batch.clips, ONE_RANK))
    model.zero_grad()
    value.backward()
    return value.item(), gradients(model)


def gradients(model: VideoTextModel) -> Gradients:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", LOSSES)
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

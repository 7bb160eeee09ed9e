"""Adapters of timm's towers against the towers' own forward, on small randomised instances of every family.

Shapes: B pictures, C = 3 channels, H x W pixels, T rows, D width, Z embedding, grid of H' x W' patches.
"""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import assert_gradients_agree, gradients, pixels, repeating_frames
from small_towers import TIMM_TOWERS, shrunken, small_timm_model, timm_config, walk
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval.encoders.attention import attend_varlen
from rlt_retrieval.encoders.towers import adapt_tower
from rlt_retrieval.encoders.towers.loading import create_clip
from rlt_retrieval.model import VideoTextModel


def small_visual(name: str) -> nn.Module:
    return small_timm_model(name).clip.visual


def pictures(visual: nn.Module, count: int = 3) -> Tensor:
    height, width = visual.image_size
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", TIMM_TOWERS)
def test_the_walk_equals_the_towers_own_forward(name: str) -> None:
    """Every constant is randomised, so a forgotten norm, bias, scale, position or head shows."""
    visual = small_visual(name)
    with torch.no_grad():
        expected = visual(pictures(visual))
        seen = walk(adapt_tower(visual), pictures(visual))
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-2  # not a constant output


@pytest.mark.parametrize(
    "name", ["SigLIP", "CLS", "CLS without position", "PE-Core", "PE-Core bigG", "EVA02-B"]
)
def test_another_grid_gets_the_positions_that_timm_gives_it(name: str) -> None:
    """timm resizes the tower itself; the walk takes the tables of the small one."""
    visual = small_visual(name)
    tower = adapt_tower(visual)
    resized = copy.deepcopy(visual)
    resized.set_input_size((48, 24))
    with torch.no_grad():
        expected = resized(pictures(resized))
        seen = walk(tower, pictures(resized))
    torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
    assert tower.grid_size == (4, 4)


@pytest.mark.parametrize("name", ["PE-Core", "EVA02-B"])
def test_the_first_rotary_row_turns_nothing(name: str) -> None:
    table = adapt_tower(small_visual(name)).rotary_table((4, 4))
    x_1NH = torch.randn(1, 2, table.shape[1] // 2)
    turned = apply_rot_embed_cat(x_1NH.expand(len(table), -1, -1), table[:, None])
    assert len(table) == 17
    assert torch.equal(turned[0], x_1NH[0])
    assert not torch.allclose(turned[-1], x_1NH[0])


@pytest.mark.parametrize("name", TIMM_TOWERS)
def test_pools_cls_is_true_where_no_other_row_matters(name: str) -> None:
    tower = adapt_tower(small_visual(name))
    cu = torch.tensor([0, 17], dtype=torch.int32)
    x_TD = torch.randn(17, tower.width, generator=torch.Generator().manual_seed(2))
    others = torch.cat([x_TD[:1], torch.randn(16, tower.width)])

    def cross_attend(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, *rest: object) -> Tensor:
        return attend_varlen(q, k, v, cu_q, cu_k, 1, 17, backend="sdpa")

    first, second = (tower.pool(x, cu, 17, torch.ones(17), cross_attend) for x in (x_TD, others))
    assert torch.equal(first, second) == tower.pools_cls


# --- in the video encoder -----------------------------------------------------------------------------------------


def image_embeddings(model: VideoTextModel, frames_TCHW: Tensor) -> Tensor:
    """[T, Z] of open_clip's image tower, unit norm."""
    return F.normalize(model.clip.encode_image(pixels(model, frames_TCHW)), dim=-1)


@pytest.mark.parametrize("layout", ["frame", "joint"])
@pytest.mark.parametrize("name", TIMM_TOWERS)
def test_one_frame_videos_equal_the_image_tower(name: str, layout: str) -> None:
    model = small_timm_model(name, layout=layout)
    for parameter in (
        getattr(model.video, table, None) for table in ("temporal_embedding", "run_length_embedding")
    ):
        if parameter is not None:
            nn.init.zeros_(parameter)
    height, width = model.clip.visual.image_size
    frames = torch.randint(0, 256, (3, 1, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        expected = image_embeddings(model, frames[:, 0])
        torch.testing.assert_close(model.encode_video(frames), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["SigLIP", "PE-Core", "EVA02-B", "average of a tower without CLS"])
def test_keep_all_in_layout_frame_equals_the_image_tower_frame_by_frame(name: str) -> None:
    model = small_timm_model(name, layout="frame", reducer="none")
    frames = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = F.normalize(image_embeddings(model, frames).mean(0), dim=-1)
        torch.testing.assert_close(model.encode_video([frames])[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["SigLIP", "PE-Core", "EVA02-B"])
def test_a_pruned_static_video_is_its_frame(name: str) -> None:
    model = small_timm_model(name, layout="frame")
    frames = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8).expand(6, -1, -1, -1)
    with torch.no_grad():
        expected = image_embeddings(model, frames[:1])[0]
        torch.testing.assert_close(model.encode_video([frames])[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["SigLIP", "PE-Core", "EVA02-E"])
def test_repeats_count_as_often_as_they_last(name: str) -> None:
    """Exact repeats with the length bias equal all tokens: queries, keys and the pooling head weight them alike."""
    frames = repeating_frames(6, 0.3, seed=4)
    settings = {"layout": "joint", "length_bias": True}
    pruned = small_timm_model(name, **settings)
    whole = small_timm_model(name, **{**settings, "reducer": "none"})
    for model in (pruned, whole):
        nn.init.zeros_(model.video.temporal_embedding)
        nn.init.zeros_(model.video.run_length_embedding)
    assert len(pruned.tokenizer(frames)) < 60
    with torch.no_grad():
        torch.testing.assert_close(
            pruned.encode_video([frames]), whole.encode_video([frames]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("name", ["SigLIP", "PE-Core", "EVA02-B"])
def test_gradients_reach_every_parameter_that_the_tower_itself_trains(name: str) -> None:
    model = small_timm_model(name, layout="frame").double()
    frames = torch.randint(0, 256, (1, 1, 3, 32, 32), dtype=torch.uint8)
    direction = torch.randn(32, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours = gradients((model.encode_video(frames)[0] * direction).sum(), model.clip.visual)
    picture = pixels(model, frames[0], torch.float64)
    theirs = F.normalize(model.clip.visual(picture), dim=-1)[0]
    assert_gradients_agree(ours, gradients((theirs * direction).sum(), model.clip.visual), 1e-7)


# --- saving, loading, sigmoid loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SigLIP", "PE-Core", "EVA02-B"])
def test_a_saved_model_comes_back_with_its_bias_and_preprocessing(name: str, tmp_path: Path) -> None:
    bias = {"init_logit_bias": -10} if name == "SigLIP" else {}
    model = small_timm_model(name, timm_config(name, **bias))
    model.save(tmp_path / "model")
    with shrunken(name):
        again = VideoTextModel.load(tmp_path / "model", device="cpu")
    assert again.state_dict().keys() == model.state_dict().keys()
    assert ("clip.logit_bias" in again.state_dict()) == (name == "SigLIP")
    frames = torch.randint(0, 256, (1, 2, 3, 32, 32), dtype=torch.uint8)
    assert torch.equal(again.encode_video(frames), model.encode_video(frames))


def test_the_sigmoid_loss_leaves_a_bias_that_the_backbone_brings() -> None:
    model = small_timm_model("SigLIP", timm_config("SigLIP", init_logit_bias=-7))
    model.add_logit_bias()
    assert model.clip.logit_bias.item() != -10
    assert not model.config.added_logit_bias


@pytest.mark.parametrize("name", ["SigLIP", "PE-Core", "EVA02-E"])
def test_local_weights_of_every_family(name: str, tmp_path: Path) -> None:
    with shrunken(name):
        state = create_clip(timm_config(name), None, seed=3).module.state_dict()
        save_file(state, tmp_path / "weights.safetensors")
        loaded = create_clip(timm_config(name), tmp_path / "weights.safetensors").module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], state[key]) for key in state)


# --- the true architectures ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "PE-Core-T-16-384",
        pytest.param("EVA02-B-16", marks=pytest.mark.acceptance),
        pytest.param("ViT-B-16-SigLIP", marks=pytest.mark.acceptance),
        pytest.param("ViT-B-32-SigLIP2-256", marks=pytest.mark.acceptance),
    ],
)
def test_a_model_by_its_name_equals_encode_image(name: str) -> None:
    """With random weights, from `create` to the embedding."""
    model = VideoTextModel.create(name, None, device="cpu", num_frames=2)
    height, width = model.config.preprocess_cfg["size"]
    frames = torch.randint(0, 256, (1, 1, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_video(frames), image_embeddings(model, frames[0]), atol=1e-5, rtol=0
        )

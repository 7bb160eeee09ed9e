"""VideoEncoder against forwards built independently from open_clip's own modules.

Shapes: B clips, T frames, T' tubelets, H' x W' patches, D width, Z embedding.
"""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import (
    assert_gradients_agree,
    gradients,
    pixels,
    randomise,
    repeating_frames,
    small_config,
    small_model,
)
from torch import Tensor
from torch.nn import functional as F

from rlt_retrieval.encoders.packing import PackedTokens, pack
from rlt_retrieval.encoders.tokenizer import KEEP_ALL
from rlt_retrieval.encoders.towers import adapt_tower
from rlt_retrieval.encoders.towers.loading import build_clip
from rlt_retrieval.errors import ModelError
from rlt_retrieval.model import VideoTextModel

CUSTOM_BLOCKS = {
    "qk_norm": True,
    "scale_heads": True,
    "scale_attn_inner": True,
    "scale_attn": True,
    "scale_fc": True,
}
TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "avg pooling": {"pool_type": "avg"},
    "norm after avg pooling": {"pool_type": "avg", "final_ln_after_pool": True},
    "norm after pooling": {"final_ln_after_pool": True},
    "no norm before": {"no_ln_pre": True},
    "layer scale": {"ls_init_value": 0.1},
    "attention pooling": {"attentional_pool": True},
    "attention pooling, avg": {"attentional_pool": True, "pool_type": "avg"},
    "parallel attention pooling": {"attentional_pool": "parallel"},
    "cascade attention pooling": {"attentional_pool": "cascade"},
    "custom blocks": CUSTOM_BLOCKS,
    "scaled cosine": {"scaled_cosine_attn": True, "ls_init_value": 0.1},
    "patch dropout": {"patch_dropout": 0.5},
    "sin cos": {"pos_embed_type": "sin_cos_2d"},
    "token outputs": {"output_tokens": True},
    "wide image": {"image_size": [24, 40]},
    "tanh gelu, eps": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
}
SEEDS = [11, 12, 13]


@pytest.fixture(autouse=True)
def _four_dimensional_bmm(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip's scaled-cosine attention calls torch.bmm on four dimensions, which torch refuses."""
    monkeypatch.setattr(torch, "bmm", torch.matmul)


def image_embeddings(model: VideoTextModel, frames_TCHW: Tensor) -> Tensor:
    """[T, Z] of open_clip's image tower, unit norm."""
    out = model.clip.visual(pixels(model, frames_TCHW, model.clip.visual.proj.dtype))
    out = out[0] if isinstance(out, tuple) else out
    return F.normalize(out.flatten(1), dim=-1)


def dense_joint(model: VideoTextModel, frames_TCHW: Tensor) -> Tensor:
    """[Z]: all T' H' W' tokens and one CLS through open_clip's own transformer, pooling and projection."""
    visual, video = model.clip.visual, model.video
    dtype, u = visual.proj.dtype, model.config.video.tubelet_size
    if u == 1:
        patches = visual.conv1(pixels(model, frames_TCHW, dtype))
    else:
        weights = visual.conv1.weight[:, None] / u + video.tubelet_weight
        frames = pixels(model, frames_TCHW, dtype)
        stride = visual.conv1.stride
        patches = sum(F.conv2d(frames[i::u], weights[:, i], stride=stride) for i in range(u))
    patches_TND = patches.flatten(2).mT + visual.positional_embedding[1:]
    patches_TND = patches_TND + video.temporal_embedding[: len(patches), None] + video.run_length_embedding[0]
    cls_1D = (visual.class_embedding + visual.positional_embedding[0])[None]
    x_1ND = visual.ln_pre(torch.cat([cls_1D, patches_TND.flatten(0, 1)])[None])
    pooled, _ = visual._pool(visual.transformer(x_1ND))
    return F.normalize((pooled @ visual.proj).flatten(), dim=-1)


def tokenized(model: VideoTextModel, clips: list[Tensor], seeds: list[int] | tuple[()] = ()) -> PackedTokens:
    return pack([model.tokenizer(clip) for clip in clips], seeds)


def moving_clips(lengths: tuple[int, ...] = (6, 6, 6), group: int = 1) -> list[Tensor]:
    """Clips that keep about 100 %, 40 % and a single frame of their tokens."""
    changes = (1.0, 0.3, 0.0)
    return [
        repeating_frames(n, change, seed=n + i, group=group)
        for i, (n, change) in enumerate(zip(lengths, changes, strict=True))
    ]


def without_time(model: VideoTextModel) -> VideoTextModel:
    """With the temporal and run-length embeddings of a freshly created model: zero."""
    for name, parameter in model.video.named_parameters():
        if name in ("temporal_embedding", "run_length_embedding"):
            torch.nn.init.zeros_(parameter)
    return model


def a_direction(z: Tensor) -> Tensor:
    return torch.randn(z.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(z.dtype)


# --- one-frame videos and towers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["frame", "joint"])
@pytest.mark.parametrize(
    ("tower", "quick_gelu"), [*((tower, False) for tower in TOWERS), ("plain", True), ("custom blocks", True)]
)
def test_one_frame_videos_equal_the_image_tower(tower: str, quick_gelu: bool, layout: str) -> None:
    """Each tower option by itself; catches one that the walk forgets (all constants are randomised)."""
    model = without_time(small_model(TOWERS[tower], layout=layout))
    if quick_gelu:
        config = {**small_config(**TOWERS[tower]), "quick_gelu": True}
        clip = build_clip(config).eval()
        clip.load_state_dict(model.clip.state_dict())
        model = VideoTextModel(clip, model.config).eval()
    height, width = model.clip.visual.image_size
    frames = torch.randint(0, 256, (3, 1, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_video(frames), image_embeddings(model, frames[:, 0]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("tower", TOWERS)
def test_frame_layout_that_keeps_all_equals_open_clip_frame_by_frame(tower: str) -> None:
    model = small_model(TOWERS[tower], layout="frame", reducer="none")
    height, width = model.clip.visual.image_size
    frames = torch.randint(0, 256, (5, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        expected = F.normalize(image_embeddings(model, frames).mean(0), dim=-1)
        torch.testing.assert_close(model.encode_video([frames])[0], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tower", TOWERS)
def test_joint_layout_that_keeps_all_equals_open_clips_own_blocks(tower: str) -> None:
    model = small_model(TOWERS[tower], reducer="none")
    height, width = model.clip.visual.image_size
    frames = torch.randint(0, 256, (6, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        z_Z = model.encode_video([frames])[0]
        torch.testing.assert_close(z_Z, dense_joint(model, frames), atol=1e-4, rtol=0)
        assert (z_Z - model.encode_video([frames[:1]])[0]).abs().max() > 1e-3, "time must matter here"


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"pool_type": "none"}, "pool_type 'none' and gives one vector a token"),
        ({"pool_type": "none", "attentional_pool": True}, "pool_type 'none'"),
        ({"patch_size": [8, 16]}, r"cuts \(32, 32\) pixels into patches of \[8, 16\], not into squares"),
        ({"image_size": 30}, r"cuts \(30, 30\) pixels .* that fill the image"),
    ],
)
def test_towers_without_one_vector_or_a_square_grid_are_refused(vision: dict[str, Any], message: str) -> None:
    clip = build_clip(small_config(**vision))
    with pytest.raises(ModelError, match=message):
        adapt_tower(clip.visual)


# --- joint layout: gradients and packing --------------------------------------------------------------------------


@pytest.mark.parametrize("tubelet", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tower", ["plain", "attention pooling", "custom blocks"])
def test_dense_joint_gradients(tower: str, dtype: torch.dtype, tolerance: float, tubelet: int) -> None:
    """Every parameter of the tower and what is added beside it, tubelets of two included."""
    model = small_model(TOWERS[tower], reducer="none", tubelet_size=tubelet).to(dtype)
    clips = [repeating_frames(6, 1.0, seed=seed) for seed in range(2)]
    expected = torch.stack([dense_joint(model, clip) for clip in clips])
    z_BZ = model.encode_tokens(tokenized(model, clips))
    assert z_BZ.dtype == dtype
    torch.testing.assert_close(z_BZ, expected, atol=1e-4 if dtype == torch.float32 else 1e-12, rtol=0)
    direction = a_direction(z_BZ)
    seen = gradients((z_BZ * direction).sum(), model)
    assert "video.temporal_embedding" in seen
    assert ("video.tubelet_weight" in seen) is (tubelet == 2)
    assert_gradients_agree(seen, gradients((expected * direction).sum(), model), tolerance)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"length_bias": True},
        {"length_bias": True, "cls_bias": "log_T"},
        {"tubelet_size": 2},
        {"layout": "frame"},
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("tower", ["plain", "avg pooling", "attention pooling"])
def test_packed_clips_equal_one_at_a_time(
    tower: str, dtype: torch.dtype, tolerance: float, options: dict[str, Any]
) -> None:
    """Clips of different motion and length; catches anything that leaks over a clip's border."""
    model = small_model(TOWERS[tower], **options).to(dtype)
    clips = moving_clips((6, 4, 8))
    together = model.encode_tokens(tokenized(model, clips))
    alone = torch.cat([model.encode_tokens(tokenized(model, [clip])) for clip in clips])
    torch.testing.assert_close(together, alone, atol=1e-5 if dtype == torch.float32 else 1e-12, rtol=0)
    direction = a_direction(together)
    seen = gradients((together * direction).sum(), model)
    assert_gradients_agree(seen, gradients((alone * direction).sum(), model), tolerance)


def test_gradients_need_not_be_asked_for() -> None:
    """encode_tokens leaves autograd to its caller: off inside no_grad, on outside."""
    model = small_model()
    packed = tokenized(model, moving_clips())
    assert model.encode_tokens(packed).requires_grad
    with torch.no_grad():
        assert not model.encode_tokens(packed).requires_grad


def test_time_and_run_length_embeddings_belong_to_their_tokens() -> None:
    """Each kept token gets temporal[t] + run_length[r - 1]; catches a shift by one or a swap of the tables."""
    model = small_model()
    packed = tokenized(model, moving_clips())
    expected = (
        model.video.temporal_embedding[packed.positions[:, 0].long()]
        + model.video.run_length_embedding[packed.run_lengths.long() - 1]
    )
    torch.testing.assert_close(model.video._time_embeddings(packed), expected)


def test_other_lengths_interpolate_the_tables_and_say_so_once(caplog: pytest.LogCaptureFixture) -> None:
    """T' = 3 and 12 from tables of 6, in one batch with T' = 6."""
    model = small_model()
    clips = [repeating_frames(n, 0.5, seed=n) for n in (3, 6, 12)]
    packed = tokenized(model, clips)
    for _ in range(2):
        seen = model.video._time_embeddings(packed).split(packed.cu_seqlens.diff().tolist())
    for clip, embeddings in zip(clips, seen, strict=True):
        tokens = model.tokenizer(clip)
        tables = [
            F.interpolate(table.T[None], size=len(clip), mode="linear")[0].T
            for table in (model.video.temporal_embedding, model.video.run_length_embedding)
        ]
        expected = tables[0][tokens.positions[:, 0].long()] + tables[1][tokens.run_lengths.long() - 1]
        torch.testing.assert_close(embeddings, expected)
    messages = [r.getMessage() for r in caplog.records if "interpolated" in r.getMessage()]
    assert len(messages) == 2
    assert len(set(messages)) == 2


def test_a_new_tubelet_model_reads_a_still_pair_as_its_image() -> None:
    """The patch weights are split evenly over the two frames at the start."""
    clip = build_clip(small_config()).eval()
    randomise(clip)
    config = small_model(tubelet_size=2).config
    model = VideoTextModel(clip, config).eval()
    assert not model.video.tubelet_weight.any()
    frames = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        z_Z = model.encode_video([frames.repeat(2, 1, 1, 1)])[0]
        torch.testing.assert_close(z_Z, image_embeddings(model, frames)[0], atol=1e-5, rtol=0)


# --- length bias --------------------------------------------------------------------------------------------------

POOLS = [
    "plain",
    "avg pooling",
    "norm after avg pooling",
    "attention pooling",
    "cascade attention pooling",
    "scaled cosine",
]


@pytest.mark.parametrize("tower", POOLS)
@given(
    seed=st.integers(0, 2**31), num_tubelets=st.integers(1, 5), change=st.sampled_from([0.0, 0.1, 0.4, 0.9])
)
@settings(max_examples=8, deadline=None)
def test_length_bias_on_exact_repeats_equals_dense_attention(
    tower: str, seed: int, num_tubelets: int, change: float
) -> None:
    """A repeated frame (change 0) and arbitrary runs; pooling weights each token by its run length."""
    model = without_time(small_model(TOWERS[tower], length_bias=True))
    frames = repeating_frames(num_tubelets, change, seed)
    with torch.no_grad():
        z_Z = model.encode_video([frames])[0]
        torch.testing.assert_close(z_Z, dense_joint(model, frames), atol=1e-5, rtol=0)


def test_length_bias_with_tubelets_of_two_equals_dense_attention() -> None:
    model = without_time(small_model(length_bias=True, tubelet_size=2))
    frames = repeating_frames(6, 0.4, group=2)
    tokens = model.tokenizer(frames)
    assert len(tokens) < 3 * 16
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode_video([frames])[0], dense_joint(model, frames), atol=1e-5, rtol=0
        )


def test_without_length_bias_repeats_do_weigh_less() -> None:
    """The two tests above would pass on a model that ignores run lengths if this did not differ."""
    model = without_time(small_model())
    frames = repeating_frames(6, 0.4)
    with torch.no_grad():
        assert (model.encode_video([frames])[0] - dense_joint(model, frames)).abs().max() > 1e-3


@pytest.mark.parametrize("tower", POOLS)
def test_cls_bias_log_t_makes_a_static_clip_its_image(tower: str) -> None:
    """The CLS token counts T' times too, in the blocks and where a pooling head reads it."""
    model = without_time(small_model(TOWERS[tower], length_bias=True, cls_bias="log_T"))
    frame = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        z_Z = model.encode_video([frame.repeat(6, 1, 1, 1)])[0]
        torch.testing.assert_close(z_Z, image_embeddings(model, frame)[0], atol=1e-5, rtol=0)


# --- random decisions in training ---------------------------------------------------------------------------------

RANDOM = [
    {"stochastic_depth": 0.6},
    {"patch_dropout": 0.5},
    {"stochastic_depth": 0.5, "patch_dropout": 0.3, "length_bias": True},
    {"stochastic_depth": 0.6, "layout": "frame"},
]


@pytest.mark.parametrize("options", RANDOM)
def test_random_decisions_follow_the_clip_into_any_batch(options: dict[str, Any]) -> None:
    """Drawn from the clip's seed alone: same in any order, any micro-batch, whatever the global generator does."""
    model = small_model(**options).train()
    clips = moving_clips()
    with torch.no_grad():
        together = model.encode_tokens(tokenized(model, clips, SEEDS))
        torch.manual_seed(99)
        reordered = model.encode_tokens(tokenized(model, clips[::-1], SEEDS[::-1])).flip(0)
        alone = [
            model.encode_tokens(tokenized(model, [clip], [seed]))
            for clip, seed in zip(clips, SEEDS, strict=True)
        ]
        others = model.encode_tokens(tokenized(model, clips, [seed + 100 for seed in SEEDS]))
    torch.testing.assert_close(together, reordered, atol=1e-5, rtol=0)
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    assert (together - others).abs().amax(1).max() > 1e-3, "another seed decides otherwise"


@pytest.mark.parametrize("options", RANDOM)
def test_random_decisions_are_off_in_eval_and_need_seeds_in_training(options: dict[str, Any]) -> None:
    model, plain = (
        small_model(**options),
        small_model(**{**options, "stochastic_depth": 0.0, "patch_dropout": 0.0}),
    )
    packed = tokenized(model, moving_clips())
    with torch.no_grad():
        assert torch.equal(model.encode_tokens(packed), plain.encode_tokens(packed))
    with pytest.raises(ValueError, match=r"need pack\(…, clip_seeds=…\) in training"):
        model.train().encode_tokens(packed)


def test_patch_dropout_takes_away_the_asked_share_of_kept_patches() -> None:
    """Never CLS, never everything, the same tokens' run lengths stay with them."""
    model = small_model(patch_dropout=0.5).train()
    packed = tokenized(model, moving_clips(), SEEDS)
    plan = model.video.plan(packed)
    kept = packed.cu_seqlens.diff()
    assert plan.cu_q.diff().tolist() == [1 + round(n * 0.5) for n in kept.tolist()]
    assert (plan.rows[plan.cu_q[:-1].long()] == 0).all()
    patches = plan.rows[plan.rows > 0] - 1
    assert len(patches.unique()) == len(patches)
    assert torch.equal(plan.weights[plan.rows > 0], packed.run_lengths[patches].float())
    tiny = small_model(patch_dropout=0.99).train()
    assert (tiny.video.plan(packed).cu_q.diff() == 2).all()


def test_stochastic_depth_drops_whole_branches_at_a_rate_that_grows_with_depth() -> None:
    """Scales are 0 or 1 / (1 - rate), the first block is never dropped, the mean is one."""
    model = small_model({"layers": 3}, stochastic_depth=0.5).train()
    clip = repeating_frames(1, 0.0)
    scales_LPB = model.video._branch_scales(tokenized(model, [clip] * 2000, list(range(0, 4000, 2))))
    assert scales_LPB is not None
    for scales, rate in zip(scales_LPB, (0.0, 0.25, 0.5), strict=True):
        torch.testing.assert_close(scales[scales > 0].unique(), torch.tensor([1 / (1 - rate)]))
        assert (scales == 0).float().mean() == pytest.approx(rate, abs=0.03)


def test_stochastic_depth_equals_leaving_the_branches_out() -> None:
    """Against the walk written out for one clip."""
    model = small_model(stochastic_depth=0.6).train()
    packed = tokenized(model, [repeating_frames(6, 0.3)], [3])
    plan = model.video.plan(packed)
    scales_LPB = model.video._branch_scales(packed)
    assert scales_LPB is not None
    assert (scales_LPB == 0).any()
    x_1RD = model.video._embed(packed, plan)[None]
    for block, scales in zip(model.clip.visual.transformer.resblocks, scales_LPB[..., 0], strict=True):
        x_1RD = x_1RD + scales[0] * block.attention(block.ln_1(x_1RD))
        x_1RD = x_1RD + scales[1] * block.mlp(block.ln_2(x_1RD))
    pooled, _ = model.clip.visual._pool(x_1RD)
    expected = F.normalize(pooled @ model.clip.visual.proj, dim=-1)
    torch.testing.assert_close(model.encode_tokens(packed), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("layout", ["joint", "frame"])
def test_gradient_checkpointing_gives_the_same_gradients(layout: str) -> None:
    model = small_model(layout=layout, stochastic_depth=0.5).double().train()
    packed = tokenized(model, moving_clips(), SEEDS)

    def run(checkpointing: bool) -> dict[str, Tensor]:
        model.video.gradient_checkpointing = checkpointing
        z_BZ = model.encode_tokens(packed)
        return gradients((z_BZ * a_direction(z_BZ)).sum(), model)

    assert_gradients_agree(run(True), run(False), 1e-12)


# --- errors -------------------------------------------------------------------------------------------------------


def test_tokens_of_another_grid_or_tubelet_are_refused() -> None:
    model = small_model()
    tokens = model.tokenizer(repeating_frames(2, 1.0, side=40))
    with pytest.raises(ValueError, match="grid of 5x5 patches; this model expects 4x4"):
        model.encode_tokens(pack([tokens]))
    pairs = small_model(tubelet_size=2).tokenizer(repeating_frames(2, 1.0))
    with pytest.raises(
        ValueError, match=r"tubelets of 2 frames; this model expects 1: tokenize with model.tokenizer"
    ):
        model.encode_tokens(pack([pairs]))


def test_threshold_of_keep_all_is_what_reducer_none_uses() -> None:
    model = small_model(reducer="none", threshold=0.3)
    assert model.tokenizer.threshold == KEEP_ALL
    assert len(model.tokenizer(repeating_frames(6, 0.0))) == 6 * 16


@pytest.mark.parametrize("layout", ["joint", "frame"])
def test_a_token_budget_counts_the_rows_that_are_computed(layout: str) -> None:
    """In layout "frame" each computed frame has a CLS row of its own."""
    model = small_model(layout=layout, num_frames=4)
    frames = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for t in (1, 3):
        frames[t:, :, :2, :2] = 60 * t
    tokens = model.tokenizer(frames)
    assert len(tokens) == 16 + 2
    plan = model.video.plan(pack([tokens]))
    assert model.video.num_rows(tokens) == len(plan.rows) - (layout == "joint")

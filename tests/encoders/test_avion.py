"""AVION checkpoints: made here from random numbers, read by `create`, compared with a forward written from scratch.

Shapes: T frames, N patches a frame, P patch side, D width, Q texts, C context, V vocabulary, Z embedding.
"""

import argparse
import pickle
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from rlt_retrieval.encoders import video as video_module
from rlt_retrieval.encoders.towers.avion import avion_config, to_open_clip
from rlt_retrieval.encoders.towers.loading import build_clip
from rlt_retrieval.errors import ModelError
from rlt_retrieval.model import VideoTextModel

State = dict[str, Tensor]

MEAN = (108.3272985, 116.7460125, 104.0937362)
STD = (68.5005327, 66.6321579, 70.3231631)
TEXTS = ["opens the fridge", "", "a cat " * 30]
VISION_HEADS, TEXT_HEADS = 2, 4
# Embedding size and context length are the file's matter, 24 and 20 there.
TABLE: dict[str, Any] = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": TEXT_HEADS, "layers": 2},
}
SMALL = {"vision": (32, 2, 8, 16), "text": (16, 2, 20), "embed": 24}
B_16 = {"vision": (768, 12, 16, 196), "text": (512, 12, 77), "embed": 256}
L_14 = {"vision": (1024, 24, 14, 256), "text": (768, 12, 77), "embed": 256}
L_14_336 = {"vision": (1024, 24, 14, 576), "text": (768, 12, 77), "embed": 256}


# --- a checkpoint of that layout ----------------------------------------------------------------------------------


def block_shapes(prefix: str, width: int, *, flash: bool) -> dict[str, tuple[int, ...]]:
    qkv = ("attn.Wqkv.weight", "attn.Wqkv.bias") if flash else ("attn.in_proj_weight", "attn.in_proj_bias")
    up, down = ("mlp.fc1", "mlp.fc2") if flash else ("mlp.c_fc", "mlp.c_proj")
    matrices = {"attn.out_proj": (width, width), up: (4 * width, width), down: (width, 4 * width)}
    shapes: dict[str, tuple[int, ...]] = {qkv[0]: (3 * width, width), qkv[1]: (3 * width,)}
    shapes |= {f"{name}.{kind}": (width,) for name in ("ln_1", "ln_2") for kind in ("weight", "bias")}
    for name, shape in matrices.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return {prefix + name: shape for name, shape in shapes.items()}


def shapes_of(
    sizes: dict[str, Any] = SMALL,
    *,
    num_frames: int = 4,
    flash: bool = True,
    flat: bool = True,
    flash_text: bool = False,
    top_level: bool = False,
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a published file, less the prefix `module.`; the defaults are what is published."""
    (width, layers, patch, patches), (text_width, text_layers, context) = sizes["vision"], sizes["text"]
    shapes: dict[str, tuple[int, ...]] = {
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (1 + patches, width),
        "visual.conv1.weight": (width, 3 * patch * patch) if flat else (width, 3, patch, patch),
        ("" if top_level else "visual.") + "image_projection": (width, sizes["embed"]),
        "textual.token_embedding.weight": (49408, text_width),
        "textual.positional_embedding": (context, text_width),
        ("" if top_level else "textual.") + "text_projection": (text_width, sizes["embed"]),
        "logit_scale": (),
    }
    if num_frames > 1:
        shapes["visual.temporal_embedding"] = (num_frames, width)
    for name, size in (
        ("visual.ln_pre", width),
        ("visual.ln_post", width),
        ("textual.ln_final", text_width),
    ):
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    for layer in range(layers):
        shapes |= block_shapes(f"visual.transformer.resblocks.{layer}.", width, flash=flash)
    for layer in range(text_layers):
        shapes |= block_shapes(f"textual.transformer.resblocks.{layer}.", text_width, flash=flash_text)
    return shapes


def random_state(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> State:
    """Noise on everything, so small on the residual stream that the eps of every norm counts."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if any(part in name for part in ("ln_pre", "embedding", "out_proj", "fc2", "c_proj")):
            state[name] = 0.005 * noise
        elif "conv1" in name:
            state[name] = 0.0005 * noise
        elif ".ln_" in name:
            state[name] = noise
        else:
            state[name] = noise / (shape[-1] ** 0.5 if shape else 1.0)
    return state


def save(state: State, path: Path, **more: Any) -> Path:
    args = argparse.Namespace(model="CLIP_VITB16", clip_length=4, betas=(0.9, 0.999))
    optimizer = {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 3e-5}]}
    prefixed = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"epoch": 3, "state_dict": prefixed, "optimizer": optimizer, "args": args, **more}, path)
    return path


# --- the same, computed from the checkpoint's tensors alone ------------------------------------------------------


def pick(state: State, *names: str) -> Tensor:
    return next(state[name] for name in names if name in state).double()


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], pick(state, f"{name}.weight"), pick(state, f"{name}.bias"), eps=eps)


def run_block(state: State, at: str, x_SD: Tensor, heads: int, eps: float, mask_SS: Tensor) -> Tensor:
    """One pre-norm block: softmax attention by hand, then the MLP with exact GELU."""
    qkv_weight = pick(state, f"{at}.attn.Wqkv.weight", f"{at}.attn.in_proj_weight")
    qkv_bias = pick(state, f"{at}.attn.Wqkv.bias", f"{at}.attn.in_proj_bias")
    qkv = F.linear(norm(state, f"{at}.ln_1", x_SD, eps), qkv_weight, qkv_bias)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
    logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask_SS
    out_SD = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
    x_SD = x_SD + F.linear(
        out_SD, pick(state, f"{at}.attn.out_proj.weight"), pick(state, f"{at}.attn.out_proj.bias")
    )
    up, down = (
        [pick(state, f"{at}.mlp.{a}.{kind}", f"{at}.mlp.{b}.{kind}") for kind in ("weight", "bias")]
        for a, b in (("fc1", "c_fc"), ("fc2", "c_proj"))
    )
    hidden = F.gelu(F.linear(norm(state, f"{at}.ln_2", x_SD, eps), *up))
    return x_SD + F.linear(hidden, *down)


def num_blocks(state: State, tower: str) -> int:
    return len({name.split(".")[3] for name in state if name.startswith(f"{tower}.transformer.")})


def expected_video(
    state: State, frames_TCHW: Tensor, table_TD: Tensor | None, heads: int = VISION_HEADS
) -> Tensor:
    """[Z], unit norm: all patches of all frames and one CLS in one sequence."""
    kernel = pick(state, "visual.conv1.weight").flatten(1)
    side = round((kernel.shape[1] / 3) ** 0.5)
    pixels = (frames_TCHW.double() - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(STD).double()[
        :, None, None
    ]
    patches_TND = F.linear(F.unfold(pixels, side, stride=side).transpose(1, 2), kernel)
    positions = pick(state, "visual.positional_embedding")
    patches_TND = patches_TND + positions[1:]
    if table_TD is not None:
        patches_TND = patches_TND + table_TD.double()[:, None]
    x_SD = torch.cat(
        [(pick(state, "visual.class_embedding") + positions[0])[None], patches_TND.flatten(0, 1)]
    )
    x_SD = norm(state, "visual.ln_pre", x_SD, 1e-6)
    for layer in range(num_blocks(state, "visual")):
        x_SD = run_block(state, f"visual.transformer.resblocks.{layer}", x_SD, heads, 1e-6, torch.zeros(1, 1))
    z_Z = norm(state, "visual.ln_post", x_SD[0], 1e-6) @ pick(
        state, "visual.image_projection", "image_projection"
    )
    return F.normalize(z_Z, dim=0).float()


def expected_texts(state: State, heads: int = TEXT_HEADS) -> Tensor:
    """[Q, Z], unit norm, read at the end token, which has the largest id."""
    positions_CD = pick(state, "textual.positional_embedding")
    context = len(positions_CD)
    causal_CC = torch.full((context, context), float("-inf")).triu(1)
    z_QZ = []
    for ids_C in open_clip.tokenize(TEXTS, context):
        x_CD = pick(state, "textual.token_embedding.weight")[ids_C] + positions_CD
        for layer in range(num_blocks(state, "textual")):
            x_CD = run_block(state, f"textual.transformer.resblocks.{layer}", x_CD, heads, 1e-5, causal_CC)
        last_D = norm(state, "textual.ln_final", x_CD, 1e-5)[ids_C.argmax()]
        z_QZ.append(last_D @ pick(state, "textual.text_projection", "text_projection"))
    return F.normalize(torch.stack(z_QZ), dim=1).float()


def random_frames(num_frames: int, side: int = 32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_frames, 3, side, side), dtype=torch.uint8, generator=generator)


def create(path: Path, backbone: Any = TABLE, **settings: Any) -> VideoTextModel:
    values = {"layout": "joint", "reducer": "none", "num_frames": 4, **settings}
    return VideoTextModel.create(backbone, pretrained=path, device="cpu", **values)


def assert_same_embeddings(
    model: VideoTextModel, state: State, table_TD: Tensor | None, frames: Tensor
) -> None:
    with torch.no_grad():
        z_video, z_text = model.encode_video([frames])[0], model.encode_text(TEXTS)
    torch.testing.assert_close(z_video, expected_video(state, frames, table_TD), atol=1e-5, rtol=0)
    torch.testing.assert_close(z_text, expected_texts(state), atol=1e-5, rtol=0)


@pytest.fixture
def state() -> State:
    return random_state(shapes_of())


@pytest.fixture
def file(state: State, tmp_path: Path) -> Path:
    return save(state, tmp_path / "avion_vitb.pt")


# --- equal embeddings ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"flash": False},
        {"flat": False},
        {"flash": False, "flat": False, "top_level": True},
        {"flash_text": True},
    ],
    ids=lambda form: ",".join(form) or "published",
)
def test_embeddings_equal_an_independent_forward(form: dict[str, bool], tmp_path: Path) -> None:
    """Catches swapped q/k/v, rows of the temporal table on the CLS, a patch embedding read in another order."""
    state = random_state(shapes_of(**form))
    model = create(save(state, tmp_path / "avion.pt"))
    assert_same_embeddings(model, state, state["visual.temporal_embedding"], random_frames(4))
    assert model.dimension == 24
    assert model.clip.logit_scale == state["logit_scale"]


def test_the_comparison_sees_the_eps_of_every_norm(state: State, file: Path) -> None:
    """The other tower's eps moves the embeddings by far more than the comparison's 1e-5."""
    frames, model = random_frames(4), create(file)
    norms = [module for module in model.clip.modules() if isinstance(module, nn.LayerNorm)]
    assert sorted(module.eps for module in norms) == [1e-6] * 6 + [1e-5] * 5
    for module in norms:
        right, module.eps = module.eps, 1.1e-5 - module.eps
        with torch.no_grad():
            video, text = model.encode_video([frames])[0], model.encode_text(TEXTS)
        moved = max(
            (video - expected_video(state, frames, state["visual.temporal_embedding"])).abs().max(),
            (text - expected_texts(state)).abs().max(),
        )
        assert moved > 1e-4, module
        module.eps = right
    assert_same_embeddings(model, state, state["visual.temporal_embedding"], frames)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_files_become_float32(dtype: torch.dtype, state: State, tmp_path: Path) -> None:
    half = {name: tensor.to(dtype) for name, tensor in state.items()}
    model = create(save(half, tmp_path / "avion.pt"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same_embeddings(model, half, half["visual.temporal_embedding"], random_frames(4))


def test_safetensors_without_the_prefix_are_recognised_too(state: State, tmp_path: Path) -> None:
    save_file(state, tmp_path / "avion.safetensors")
    model = create(tmp_path / "avion.safetensors")
    assert_same_embeddings(model, state, state["visual.temporal_embedding"], random_frames(4))


# --- time ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("trained", "num_frames"), [(4, 16), (4, 4), (16, 16), (16, 4), (4, 6), (2, 1)])
def test_temporal_tables_are_interpolated_never_truncated(
    trained: int, num_frames: int, tmp_path: Path, said: Callable[[str], list[str]]
) -> None:
    video_module._announce_interpolation.cache_clear()
    state = random_state(shapes_of(num_frames=trained))
    model = create(save(state, tmp_path / "avion.pt"), num_frames=num_frames)
    table_TD = F.interpolate(state["visual.temporal_embedding"].T[None], size=num_frames, mode="linear")[0].T
    torch.testing.assert_close(model.video.temporal_embedding.data, table_TD, atol=1e-9, rtol=1e-6)
    assert_same_embeddings(model, state, table_TD, random_frames(num_frames))
    lines = said("time embeddings of")
    assert len(lines) == (trained != num_frames)
    assert not model.video.run_length_embedding.any()


def test_a_file_of_one_frame_has_no_table(tmp_path: Path) -> None:
    state = random_state(shapes_of(num_frames=1))
    model = create(save(state, tmp_path / "avion.pt"), num_frames=2)
    assert not model.video.temporal_embedding.any()
    assert_same_embeddings(model, state, None, random_frames(2))


def test_a_tubelet_of_two_frames_gets_the_mean_of_their_rows(tmp_path: Path) -> None:
    """On frames shown twice, tubelets of two equal frames taken once with the averaged rows of the table."""
    state = random_state(shapes_of(num_frames=8))
    model = create(save(state, tmp_path / "avion.pt"), num_frames=8, tubelet_size=2)
    table_TD = state["visual.temporal_embedding"].unflatten(0, (4, 2)).mean(1)
    frames = random_frames(4)
    with torch.no_grad():
        z_Z = model.encode_video([frames.repeat_interleave(2, 0)])[0]
    torch.testing.assert_close(z_Z, expected_video(state, frames, table_TD), atol=1e-5, rtol=0)


def test_layout_frame_says_once_that_the_table_is_not_used(
    state: State, file: Path, said: Callable[[str], list[str]]
) -> None:
    model = create(file, layout="frame")
    assert len(said("the temporal table of 4 frames is not used: layout 'frame' has none")) == 1
    frames = random_frames(2)
    with torch.no_grad():
        z_Z = model.encode_video([frames])[0]
    each = torch.stack([expected_video(state, frame[None], None) for frame in frames])
    torch.testing.assert_close(z_Z, F.normalize(each.mean(0), dim=0), atol=1e-5, rtol=0)


# --- what goes with the model -------------------------------------------------------------------------------------


def test_mean_std_and_norms_survive_saving(state: State, file: Path, tmp_path: Path) -> None:
    """`load` has only the folder; a load that rebuilt the named backbone would lose eps, sizes and the red mean."""
    model = create(file)
    model.save(tmp_path / "model")
    file.unlink()
    loaded = VideoTextModel.load(tmp_path / "model", device="cpu")
    for each in (model, loaded):
        assert [255 * value for value in each.config.preprocess_cfg["mean"]] == pytest.approx(MEAN, abs=1e-9)
        assert [255 * value for value in each.config.preprocess_cfg["std"]] == pytest.approx(STD, abs=1e-9)
        assert each.video.pixel_mean.flatten().tolist() == pytest.approx(MEAN)
        assert each.video.pixel_std.flatten().tolist() == pytest.approx(STD)
        assert_same_embeddings(each, state, state["visual.temporal_embedding"], random_frames(4))
    assert loaded.sha256() == model.sha256()


def test_origin_gives_the_model_again(file: Path) -> None:
    model = create(file, num_frames=16)
    assert model.origin is not None
    assert VideoTextModel.from_origin(model.origin, device="cpu").sha256() == model.sha256()


@pytest.mark.parametrize("asked", [None, True, False])
def test_the_activation_is_exact_gelu_whatever_is_asked(
    asked: bool | None, state: State, file: Path, said: Callable[[str], list[str]]
) -> None:
    """Their scripts pass use_quick_gelu=True, and their models ignore it."""
    quick = {**TABLE, "quick_gelu": True, "vision_cfg": {**TABLE["vision_cfg"], "pool_type": "avg"}}
    model = create(file, quick, quick_gelu=asked)
    assert not any(isinstance(module, QuickGELU) for module in model.modules())
    assert_same_embeddings(model, state, state["visual.temporal_embedding"], random_frames(4))
    assert said("using") == [
        "the configured backbone + avion_vitb.pt: an AVION dual encoder; using GELU, norms, mean and std as it was "
        "trained with"
    ]


# --- published sizes ----------------------------------------------------------------------------------------------


def on_meta(sizes: dict[str, Any]) -> State:
    return {name: torch.empty(shape, device="meta") for name, shape in shapes_of(sizes).items()}


PUBLISHED = {"ViT-B-16": B_16, "ViT-L-14": L_14, "ViT-L-14-336": L_14_336}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("made_for", PUBLISHED)
def test_each_name_takes_the_published_file_of_its_size_only(name: str, made_for: str) -> None:
    state = on_meta(PUBLISHED[made_for])
    with torch.device("meta"):
        module = build_clip(avion_config(open_clip.get_model_config(name), state))
    expected = module.state_dict()
    if name == made_for:
        weights = to_open_clip(state, expected)
        assert {key: w.shape for key, w in weights.items()} == {key: p.shape for key, p in expected.items()}
        return
    with pytest.raises(ValueError, match=r"expected \[.*\]; choose the backbone it was trained with"):
        to_open_clip(state, expected)


@pytest.mark.acceptance
def test_a_vit_b_16_of_real_size(tmp_path: Path) -> None:
    state = {name: tensor.bfloat16() for name, tensor in random_state(shapes_of(B_16)).items()}
    model = create(save(state, tmp_path / "avion_vitb.pt"), "ViT-B-16")
    frames = random_frames(4, side=224)
    with torch.no_grad():
        z_video, z_text = model.encode_video([frames])[0], model.encode_text(TEXTS)
    expected = expected_video(state, frames, state["visual.temporal_embedding"], heads=12)
    torch.testing.assert_close(z_video, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(z_text, expected_texts(state, heads=8), atol=1e-5, rtol=0)


# --- what is refused ----------------------------------------------------------------------------------------------

BLOCK = "visual.transformer.resblocks"


def spoilt(state: State, how: str) -> State:
    state = dict(state)
    if how == "missing":
        del state[f"{BLOCK}.1.attn.Wqkv.bias"]
    elif how == "no projection":
        del state["visual.image_projection"]
    elif how == "no positions":
        del state["textual.positional_embedding"]
    elif how == "vector projection":
        state["visual.image_projection"] = torch.zeros(24)
    elif how == "odd":
        state["visual.ln_mid.weight"] = torch.zeros(32)
    elif how == "twice":
        state["image_projection"] = state["visual.image_projection"]
    elif how == "not a tensor":
        state["logit_scale"] = 4.6  # type: ignore[assignment]
    else:
        state["visual.temporal_embedding"] = torch.zeros(4, 48)
    return state


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (
            "missing",
            f"it has no {BLOCK}.1.attn.Wqkv.bias or {BLOCK}.1.attn.in_proj_bias; choose the backbone",
        ),
        ("no projection", "it has no visual.image_projection or image_projection; choose"),
        ("no positions", "it has no textual.positional_embedding; choose"),
        ("vector projection", "visual.image_projection has shape [24], expected a matrix; choose"),
        ("odd", "visual.ln_mid.weight has no place in this model; choose"),
        ("twice", "image_projection has no place in this model; choose"),
        ("not a tensor", "it has no logit_scale; choose"),
        ("table", "visual.temporal_embedding has shape [4, 48], expected [frames, 32]; choose"),
    ],
)
def test_odd_files_are_refused_by_the_first_mismatch(
    how: str, message: str, state: State, tmp_path: Path
) -> None:
    path = save(spoilt(state, how), tmp_path / "avion.pt")
    with pytest.raises(ModelError) as caught:
        create(path)
    assert f"the weights {path} do not load into the configured backbone: {message}" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layers": 3}, f"it has no {BLOCK}.2.ln_1.weight; choose"),
        ({"layers": 1}, f"{BLOCK}.1.attn.Wqkv.weight has no place in this model; choose"),
        (
            {"patch_size": 16, "image_size": 64},
            "visual.conv1.weight has shape [32, 192], expected [32, 3, 16, 16]",
        ),
        ({"image_size": 40}, "visual.positional_embedding has shape [17, 32], expected [26, 32]; choose"),
        ({"width": 48}, "visual.class_embedding has shape [32], expected [48]"),
    ],
)
def test_another_backbone_is_refused_by_the_first_mismatch(
    vision: dict[str, int], message: str, file: Path
) -> None:
    """open_clip alone would resize the position embedding in silence."""
    with pytest.raises(ModelError) as caught:
        create(file, {**TABLE, "vision_cfg": {**TABLE["vision_cfg"], **vision}})
    reason = str(caught.value).split(" do not load into the configured backbone: ")[1]
    assert message in reason
    assert "\n" not in reason


def test_a_table_without_towers_is_named(file: Path) -> None:
    with pytest.raises(ModelError, match="cannot be built: it has no table text_cfg"):
        create(file, {key: value for key, value in TABLE.items() if key != "text_cfg"})


def test_a_torn_file_is_one_line(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ModelError) as caught:
        create(file)
    assert str(caught.value).startswith(f"the weights {file} do not load into the configured backbone: ")
    assert "\n" not in str(caught.value)
    assert "python -c" not in str(caught.value)


def test_a_file_that_torch_did_not_write_gets_no_advice_to_unpickle_it(tmp_path: Path) -> None:
    (tmp_path / "avion.pt").write_text("<html>404</html>")
    with pytest.raises(ModelError, match=r"torch\.save did not write this file; download it again$"):
        create(tmp_path / "avion.pt")


class Intruder:
    """Unpickling this touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def save_with_intruder(state: State, path: Path, form: str) -> Path:
    content = {"state_dict": state, "best": Intruder(path.parent / "was here")}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    return path


@pytest.mark.parametrize("form", ["zip", "old", "pickle"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_other_objects_are_refused_with_a_command_that_keeps_the_tensors(
    form: str, state: State, tmp_path: Path
) -> None:
    """Nothing of the file runs before the user pastes that command; what it writes then loads."""
    folder = tmp_path / "my weights"
    folder.mkdir()
    path = save_with_intruder(state, folder / "it's mine.pt", form)
    with pytest.raises(ModelError) as caught:
        create(path)
    message = str(caught.value)
    assert not (folder / "was here").exists()
    assert message.startswith(f"the weights {path} do not load into the configured backbone: ")
    assert "if you trust the file" in message
    assert "\n" not in message
    command = shlex.split(message[message.index("python -c") :])
    subprocess.run([sys.executable, *command[1:]], check=True)
    assert (folder / "was here").exists()
    model = create(folder / "it's mine.tensors.pt")
    assert_same_embeddings(model, state, state["visual.temporal_embedding"], random_frames(4))

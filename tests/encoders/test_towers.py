"""Building and loading open_clip models: which activation, which files, which errors. No test touches the network."""

import argparse
import pickle
import re
import socket
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub import constants as hub
from open_clip.model import resize_pos_embed
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from small_models import SMALL_TEXT, randomise, small_config
from small_towers import walk
from torch import nn

from rlt_retrieval.encoders.towers import adapt_tower, loading
from rlt_retrieval.encoders.towers import hub as hub_files
from rlt_retrieval.encoders.towers.building import build_clip
from rlt_retrieval.encoders.towers.loading import create_clip
from rlt_retrieval.errors import ModelError


def is_vision_transformer(name: str) -> bool:
    config = open_clip.get_model_config(name)["vision_cfg"]
    return "timm_model_name" not in config and isinstance(config["layers"], int)


SUPPORTED_TAGS = [(name, tag) for name, tag in open_clip.list_pretrained() if is_vision_transformer(name)]


def activations(module: nn.Module) -> set[type[nn.Module]]:
    """Kinds of activation of both towers."""
    return {type(block.mlp.gelu) for block in module.modules() if hasattr(block, "mlp")}


def weight_file(path: Path, config: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Weights of a small model as safetensors."""
    save_file(create_clip(config or small_config(), None, seed=seed).module.state_dict(), path)
    return path


@pytest.fixture
def tiny_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B-16 and a few others are tiny here, with the switches of their true configurations."""
    for name in ("ViT-B-16", "ViT-B-16-quickgelu", "ViT-B-32", "ViT-H-14-378"):
        quick = {"quick_gelu": True} if name.endswith("-quickgelu") else {}
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**small_config(), **quick})


@pytest.fixture
def download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Every download gives this file."""
    path = weight_file(tmp_path / "downloaded.safetensors", seed=7)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda cfg, cache_dir=None: str(path))
    monkeypatch.setattr(hub_files, "reachable", lambda url: True)
    return path


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub cannot be reached and nothing may wait for it; returns the hub's empty cache."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("Network is unreachable")

    def no_waiting(seconds: float) -> None:
        raise AssertionError(f"waits {seconds} s for a network that is not there")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(time, "sleep", no_waiting)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


# --- activation ---------------------------------------------------------------------------------------------------


def test_the_list_of_tags_is_not_empty() -> None:
    assert len(SUPPORTED_TAGS) > 80
    assert ("ViT-B-16", "openai") in SUPPORTED_TAGS


@pytest.mark.parametrize(("name", "tag"), SUPPORTED_TAGS, ids=lambda value: value)
def test_the_tags_own_activation_wins(name: str, tag: str, said: Callable[[str], list[str]]) -> None:
    """open_clip builds ViT-B-16 + openai with GELU and only warns; said once where the two differ."""
    needed = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", False))
    found = loading._find(name)
    assert loading._quick_gelu(found, tag, None) is needed
    lines = said("as its weights need")
    assert len(lines) == (needed != found.model_cfg.get("quick_gelu", False))
    assert loading._quick_gelu(found, tag, not needed) is needed
    assert f"{name} + {tag}: using {'QuickGELU' if needed else 'GELU'}, as its weights need" in said("as its")


@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("ViT-B-16", "openai", QuickGELU),
        ("ViT-B-16", "dfn2b", QuickGELU),
        ("ViT-B-16", "metaclip_fullcc", QuickGELU),
        ("ViT-B-16-quickgelu", "openai", QuickGELU),
        ("ViT-B-16", "laion2b_s34b_b88k", nn.GELU),
    ],
)
@pytest.mark.usefixtures("tiny_names", "download")
def test_both_towers_get_the_activation(name: str, tag: str, expected: type[nn.Module]) -> None:
    made = create_clip(name, tag)
    assert activations(made.module) == {expected}
    assert made.model_cfg["quick_gelu"] is (expected is QuickGELU)
    rebuilt = build_clip(made.model_cfg, made.preprocess_cfg)
    assert activations(rebuilt) == {expected}


@pytest.mark.usefixtures("tiny_names", "download")
def test_preprocessing_is_the_tags_own() -> None:
    made = create_clip("ViT-H-14-378", "dfn5b")
    assert made.preprocess_cfg["resize_mode"] == "squash"
    assert made.preprocess_cfg["size"] == [32, 32]


@pytest.mark.parametrize(
    ("name", "asked", "expected", "reason"),
    [
        ("ViT-B-16", None, nn.GELU, "GELU, by its configuration"),
        ("ViT-B-16-quickgelu", None, QuickGELU, "QuickGELU, by its configuration"),
        ("ViT-B-16", True, QuickGELU, "QuickGELU, by request"),
        ("ViT-B-16-quickgelu", False, nn.GELU, "GELU, by request"),
    ],
)
@pytest.mark.usefixtures("tiny_names")
def test_a_local_file_takes_name_or_option_and_says_so(
    name: str,
    asked: bool | None,
    expected: type[nn.Module],
    reason: str,
    tmp_path: Path,
    said: Callable[[str], list[str]],
) -> None:
    path = weight_file(tmp_path / "mine.safetensors", seed=3)
    made = create_clip(name, path, quick_gelu=asked)
    assert activations(made.module) == {expected}
    assert len(said(f"{name} + mine.safetensors: using {reason}")) == 1
    assert torch.equal(made.module.visual.proj, create_clip(small_config(), None, seed=3).module.visual.proj)


# --- what may be loaded -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["ViT-B-16", small_config()], ids=["name", "table"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".bin"])
@pytest.mark.usefixtures("tiny_names")
def test_local_weights_of_every_kind(backbone: str | dict[str, Any], suffix: str, tmp_path: Path) -> None:
    """Published .pt files hold their command line as an argparse.Namespace; that one is let through."""
    state = create_clip(small_config(), None, seed=3).module.state_dict()
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(
            {"state_dict": {f"module.{k}": v for k, v in state.items()}, "args": argparse.Namespace(lr=1)},
            path,
        )
    loaded = create_clip(backbone, path).module.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


class Intruder:
    """Unpickling this touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("backbone", ["ViT-B-16", small_config()], ids=["name", "table"])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.usefixtures("tiny_names")
def test_a_pickle_with_other_objects_is_refused_and_not_run(
    backbone: str | dict[str, Any], legacy: bool, tmp_path: Path
) -> None:
    state = create_clip(small_config(), None).module.state_dict()
    path = tmp_path / "weights.pt"
    content = {"state_dict": state, "extra": Intruder(tmp_path / "was here")}
    if legacy:
        path.write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, path)
    with pytest.raises(
        ModelError, match=r"weights .*weights\.pt do not load into .* keep its tensors .*: python -c "
    ) as caught:
        create_clip(backbone, path)
    assert "Unsupported global: GLOBAL " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "was here").exists()


def unfitting(folder: Path, kind: str) -> Path:
    path = folder / ("weights.pt" if kind == "torchscript" else "weights.safetensors")
    if kind == "other width":
        weight_file(path, small_config(width=48))
    elif kind == "text":
        path.write_text("<html>404</html>")
    elif kind == "empty":
        save_file({}, path)
    elif kind == "torn":
        path.write_bytes(weight_file(path).read_bytes()[:5000])
    else:
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), path)
    return path


@pytest.mark.parametrize("backbone", ["ViT-B-16", small_config()], ids=["name", "table"])
@pytest.mark.parametrize("kind", ["other width", "text", "empty", "torn", "torchscript"])
@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore:.*TorchScript")
@pytest.mark.usefixtures("tiny_names")
def test_files_that_do_not_fit_are_one_line(
    backbone: str | dict[str, Any], kind: str, tmp_path: Path
) -> None:
    path = unfitting(tmp_path, kind)
    name = backbone if isinstance(backbone, str) else "the configured backbone"
    with pytest.raises(ModelError) as caught:
        create_clip(backbone, path)
    assert str(caught.value).startswith(f"the weights {path} do not load into {name}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("backbone", "pretrained", "message"),
    [
        ("ViT-B-61", None, "backbone 'ViT-B-61' is not an open_clip model; try ViT-B-32"),
        (
            "ViT-B-32",
            "opanai",
            "pretrained 'opanai' is neither a known tag nor a file; tags of ViT-B-32: openai, ",
        ),
        ("ViT-B-32", "no/such.safetensors", "'no/such.safetensors' is neither a known tag nor a file"),
        (small_config(), "openai", "pretrained 'openai' is neither a known tag nor a file; a file"),
        ("ViT-B-32", Path(__file__), r"test_towers\.py' is not a weight file"),
        (small_config(depth=3), None, "configuration cannot be built: .*depth"),
        ({"embed_dim": 8}, None, "configuration cannot be built: .*vision_cfg"),
        (small_config(pos_embed_type="rope"), None, "configuration cannot be built"),
    ],
)
def test_what_cannot_be_created_says_the_way_out(
    backbone: str | dict[str, Any], pretrained: str | Path | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        create_clip(backbone, pretrained)
    assert "\n" not in str(caught.value)


# --- the walk over open_clip's own towers -------------------------------------------------------------------------


def small_visual(**vision: Any) -> nn.Module:
    visual = build_clip(small_config(**vision)).eval().visual
    randomise(visual)
    return visual


@pytest.mark.parametrize(
    ("patch", "size"), [(14, 224), (14, 448), (16, 240), (16, 320), (32, 256), (32, 448)]
)
@pytest.mark.parametrize("pooling", [{}, {"pool_type": "avg"}, {"attentional_pool": "parallel"}], ids=str)
def test_patches_and_pictures_of_every_size(patch: int, size: int, pooling: dict[str, Any]) -> None:
    visual = small_visual(patch_size=patch, image_size=size, **pooling)
    pictures_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = visual(pictures_BCHW).flatten(1)
        torch.testing.assert_close(walk(adapt_tower(visual), pictures_BCHW), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [16, 48, 64])
def test_another_grid_gets_the_positions_that_open_clip_gives_it(size: int) -> None:
    """open_clip resamples the table when it loads weights into a tower of another size."""
    small, other = (build_clip(small_config(image_size=side)).eval() for side in (32, size))
    randomise(small)
    state = small.state_dict()
    resize_pos_embed(state, other)
    other.load_state_dict(state)
    pictures_BCHW = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        seen = walk(adapt_tower(small.visual), pictures_BCHW)
        torch.testing.assert_close(seen, other.visual(pictures_BCHW), atol=1e-5, rtol=1e-5)


# --- towers of another kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pretrained", "kind"),
    [
        ("RN50", "openai", "ModifiedResNet (open_clip.modified_resnet) has convolutions"),
        ("RN50", None, "ModifiedResNet (open_clip.modified_resnet) has convolutions"),
        ("convnext_base", None, "convnext_base (timm.models.convnext) has convolutions"),
        ("ViTamin-B", "datacomp1b", "vitamin_base_224 (timm.models.vitamin) has a convolutional stem"),
        (
            "MobileCLIP-B",
            None,
            "vit_base_mci_224 (timm.models.vision_transformer_hybrid) has a convolutional stem",
        ),
        ("swin_base_patch4_window7_224", None, "(timm.models.swin_transformer) has windowed attention"),
        ("vit_relpos_medium_patch16_cls_224", None, "has relative positions inside attention"),
        (
            "ViT-SO400M-14-SigLIP-384",
            "webli",
            "cuts (384, 384) pixels into patches of (14, 14), not into squares",
        ),
    ],
)
def test_other_towers_are_refused_before_anything_is_downloaded(
    name: str, pretrained: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "build_clip", lambda *a, **k: pytest.fail("it was built"))
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda *a, **k: pytest.fail("downloaded"))
    with pytest.raises(ModelError, match=re.escape(kind)) as caught:
        create_clip(name, pretrained)
    assert str(caught.value).endswith("(`rlt-retrieval models` lists them)")


def timm_table(timm_name: str, image_size: int = 224, pool: str = "token") -> dict[str, Any]:
    vision = {"timm_model_name": timm_name, "timm_pool": pool, "timm_proj": None, "image_size": image_size}
    return {"embed_dim": 8, "custom_text": True, "vision_cfg": vision, "text_cfg": dict(SMALL_TEXT)}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (
            timm_table("naflexvit_base_patch16_siglip", pool="map"),
            "has a grid of its own for every picture (NaFlex)",
        ),
        (timm_table("vit_base_patch16_reg4_gap_256", 256, "avg"), "has 4 tokens before its patches"),
        (
            timm_table("vit_base_patch16_siglip_224", 256, "map"),
            "configured for images of (256, 256) pixels and built",
        ),
        (
            timm_table("vit_base_patch16_clip_224", pool="max"),
            "pools by 'max', not by one of token, avg, map",
        ),
        (
            timm_table("vit_base_patch16_rope_mixed_224", pool="avg"),
            "rotates by RotaryEmbeddingMixed, not by one",
        ),
        (timm_table("vit_base_patch16_18x2_224"), "has blocks of the kind ParallelThingsBlock, not of Block"),
        (timm_table("no_such_model"), "cannot be built: Unknown model (no_such_model)"),
        (small_config(pool_type="none"), "has pool_type 'none' and gives one vector a token"),
        (small_config(image_size=30), "patches of (8, 8), not into squares that fill the image"),
    ],
)
def test_options_that_no_adapter_walks_are_named(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(ModelError, match=re.escape(reason)) as caught:
        create_clip(config, None)
    assert "\n" not in str(caught.value)


def test_adapt_tower_names_what_it_got() -> None:
    with pytest.raises(
        ModelError, match=r"tower Linear \(torch\.nn\.modules\.linear\) is of a kind that no adapter"
    ):
        adapt_tower(nn.Linear(2, 2))


# --- no network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32"])
def test_without_network_the_local_file_is_named_at_once(name: str, no_network: Path) -> None:
    """The hub's client, left alone, retries for most of a minute."""
    with pytest.raises(ModelError) as caught:
        create_clip(name, "openai")
    message = str(caught.value)
    repository = f"vit_base_patch{name[-2:]}_clip_224.openai"
    assert message.startswith(f"the weights {name} + openai could not be downloaded (")
    assert message.endswith(
        f"on a machine with network open https://huggingface.co/timm/{repository}, get open_clip_model.safetensors "
        'there and pass it: --pretrained path/to/open_clip_model.safetensors (pretrained="…" in Python); or copy '
        f"that machine's models--timm--{repository} to {no_network}"
    )
    assert "\n" not in message
    assert hub.HF_HUB_OFFLINE is False


@pytest.mark.usefixtures("tiny_names")
def test_without_network_the_hubs_cache_is_used(no_network: Path) -> None:
    folder = no_network / "models--timm--vit_base_patch16_clip_224.openai"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    weight_file(folder / "snapshots" / ("0" * 40) / "open_clip_model.safetensors", seed=7)
    made = create_clip("ViT-B-16", "openai")
    assert torch.equal(made.module.visual.proj, create_clip(small_config(), None, seed=7).module.visual.proj)


@pytest.mark.usefixtures("tiny_names")
def test_a_download_that_breaks_names_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaks(cfg: dict[str, Any], cache_dir: str | None = None) -> str:
        raise RuntimeError("certificate has\nexpired")

    monkeypatch.setattr(open_clip.factory, "download_pretrained", breaks)
    monkeypatch.setattr(hub_files, "reachable", lambda url: True)
    with pytest.raises(
        ModelError, match=r"could not be downloaded \(.*certificate has expired\); on a machine with"
    ):
        create_clip("ViT-B-16", "openai")


def test_a_proxy_is_left_to_the_hubs_client(monkeypatch: pytest.MonkeyPatch, no_network: Path) -> None:
    assert not hub_files.reachable("https://huggingface.co")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert hub_files.reachable("https://huggingface.co")


# --- random weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", ["ViT-B-16", small_config()], ids=["name", "table"])
@pytest.mark.usefixtures("tiny_names")
def test_random_weights_follow_the_seed_alone_and_are_said(
    backbone: str | dict[str, Any], said: Callable[[str], list[str]]
) -> None:
    before = torch.random.get_rng_state()
    first, again, other = (create_clip(backbone, None, seed=seed).module.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["visual.proj"], other["visual.proj"])
    assert len(said("has random weights (pretrained none): train it")) == 3


def test_the_callers_configuration_is_not_changed() -> None:
    config = small_config()
    create_clip(config, None)
    assert config == small_config()


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, "CLIP"),
        ({"custom_text": True}, "CustomTextCLIP"),
        ({"custom_text": True, "multimodal_cfg": {**SMALL_TEXT, "attn_pooler_heads": 2}}, "CoCa"),
    ],
)
def test_the_class_is_the_one_open_clip_takes(
    extra: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {**small_config(), **extra}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    assert type(open_clip.create_model("tiny")).__name__ == expected
    built = create_clip(config, None)
    assert type(built.module).__name__ == expected
    assert type(build_clip(built.model_cfg)).__name__ == expected

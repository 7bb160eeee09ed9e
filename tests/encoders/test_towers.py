"""Building and loading open_clip models: which activation, which files, which errors. No test touches the network."""

import argparse
import pickle
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
from open_clip.transformer import QuickGELU
from safetensors.torch import save_file
from small_models import SMALL_TEXT, small_config
from torch import nn

from rlt_retrieval.encoders.towers import adapt_tower, loading
from rlt_retrieval.encoders.towers.loading import build_clip, create_clip
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
    monkeypatch.setattr(loading, "_reachable", lambda url: True)
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
    config = open_clip.get_model_config(name)
    assert loading._quick_gelu(name, config, tag, None) is needed
    lines = said("as its weights need")
    assert len(lines) == (needed != config.get("quick_gelu", False))
    assert loading._quick_gelu(name, config, tag, not needed) is needed
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
        ("hf-hub:timm/x", None, "backbone 'hf-hub:timm/x': give an open_clip model name and its weights"),
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


# --- towers of another kind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pretrained", "kind"),
    [
        ("RN50", "openai", "ModifiedResNet"),
        ("RN50", None, "ModifiedResNet"),
        ("ViT-B-16-SigLIP", "webli", "timm vit_base_patch16_siglip_224"),
        ("EVA02-B-16", None, "timm eva02_base_patch16_clip_224"),
        ("convnext_base", None, "timm convnext_base"),
    ],
)
def test_other_towers_are_named_before_anything_is_downloaded(
    name: str, pretrained: str | None, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: pytest.fail("it was built"))
    with pytest.raises(
        ModelError, match=f"the image tower is a {kind}; supported is open_clip.transformer.Vision"
    ):
        create_clip(name, pretrained)


def test_adapt_tower_names_what_it_got() -> None:
    with pytest.raises(ModelError, match=r"is a torch\.nn\.modules\.linear\.Linear; supported is"):
        adapt_tower(nn.Linear(2, 2))
    wrapped = nn.Module()
    wrapped.trunk = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"Module around torch\.nn\.modules\.linear\.Linear; supported"):
        adapt_tower(wrapped)


# --- no network ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-B-32"])
def test_without_network_the_local_file_is_named_at_once(name: str, no_network: Path) -> None:
    """The hub's client, left alone, retries for most of a minute."""
    with pytest.raises(ModelError) as caught:
        create_clip(name, "openai")
    message = str(caught.value)
    assert message.startswith(f"the weights {name} + openai could not be downloaded (")
    assert message.endswith(
        "get the file on a machine with network and pass it instead: --pretrained path/to/weights.safetensors "
        '(pretrained="…" in Python)'
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
    monkeypatch.setattr(loading, "_reachable", lambda url: True)
    with pytest.raises(
        ModelError, match=r"could not be downloaded \(.*certificate has expired\); get the file"
    ):
        create_clip("ViT-B-16", "openai")


def test_a_proxy_is_left_to_the_hubs_client(monkeypatch: pytest.MonkeyPatch, no_network: Path) -> None:
    assert not loading._reachable("https://huggingface.co")
    monkeypatch.setattr(urllib.request, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert loading._reachable("https://huggingface.co")


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

"""What each backbone brings: its preprocessing, folders with weights, its tokenizer. No test touches the network.

Shapes: Q texts, C context, Z embedding.
"""

import json
import socket
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from huggingface_hub import constants as hub
from safetensors.torch import save_file
from small_models import small_config
from small_towers import shrunken, timm_config
from torch import Tensor
from torch.nn import functional as F

from rlt_retrieval.encoders import text as text_module
from rlt_retrieval.encoders.text import build_text_tokenizer, encode_text
from rlt_retrieval.encoders.towers import building, loading
from rlt_retrieval.encoders.towers import hub as hub_files
from rlt_retrieval.encoders.towers.building import build_clip
from rlt_retrieval.encoders.towers.loading import create_clip
from rlt_retrieval.errors import MissingDependencyError, ModelError
from rlt_retrieval.model import VideoTextModel

HALF = [0.5, 0.5, 0.5]
SQUASH = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
CLIP_MEAN = list(open_clip.OPENAI_DATASET_MEAN)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The hub cannot be reached; returns its empty cache."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def filled_folder(folder: Path, config: dict[str, Any], preprocess: dict[str, Any], seed: int = 3) -> Path:
    """A folder as open_clip publishes models."""
    folder.mkdir(parents=True)
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(
        create_clip(config, None, seed=seed).module.state_dict(), folder / "open_clip_model.safetensors"
    )
    return folder


def cached(cache: Path, repository: str, *arguments: Any) -> Path:
    """The same, as the hub's cache holds it."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    return filled_folder(folder / "snapshots" / ("0" * 40), *arguments)


def projection(model: VideoTextModel | Any) -> Tensor:
    return (model.clip if isinstance(model, VideoTextModel) else model.module).visual.proj


# --- preprocessing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["tag", "file", "random"])
@pytest.mark.parametrize(
    ("name", "tag", "expected"),
    [
        ("ViT-B-16-SigLIP2", "webli", SQUASH),
        ("PE-Core-B-16", "meta", {**SQUASH, "interpolation": "bilinear"}),
        ("EVA02-B-16", "merged2b_s8b_b131k", {"mean": CLIP_MEAN, "resize_mode": "shortest"}),
        ("ViT-L-14-CLIPA", "datacomp1b", {"mean": [0.485, 0.456, 0.406], "resize_mode": "squash"}),
        ("ViT-H-14-378", "dfn5b", {"mean": CLIP_MEAN, "resize_mode": "squash"}),
        ("ViT-B-16", "openai", {"mean": CLIP_MEAN, "interpolation": "bicubic", "resize_mode": "shortest"}),
    ],
)
def test_frames_reach_a_backbone_as_it_was_trained(
    name: str, tag: str, expected: dict[str, Any], how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a tag, of a local file and of random weights alike: open_clip itself gives the last two CLIP's values."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, small_config())
    file = tmp_path / "mine.safetensors"
    save_file(create_clip(small_config(), None).module.state_dict(), file)
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda cfg: str(file))
    monkeypatch.setattr(hub_files, "reachable", lambda url: True)
    pretrained = {"tag": tag, "file": file, "random": None}[how]
    model = VideoTextModel.create(name, pretrained, device="cpu")
    seen = model.config.preprocess_cfg
    assert {key: list(seen[key]) if key in ("mean", "std") else seen[key] for key in expected} == expected
    assert model.transform.resize_mode == expected["resize_mode"]
    torch.testing.assert_close(model.video.pixel_mean.flatten() / 255, torch.tensor(expected["mean"]))


def test_a_local_file_of_a_name_whose_tags_differ_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[[str], list[str]]
) -> None:
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14", small_config())
    file = tmp_path / "mine.safetensors"
    save_file(create_clip(small_config(), None).module.state_dict(), file)
    assert create_clip("ViT-H-14", file).preprocess_cfg["resize_mode"] == "shortest"
    assert (
        len(said("ViT-H-14 + mine.safetensors: the tags of ViT-H-14 differ in resize_mode; using CLIP's own"))
        == 1
    )


# --- folders and repositories that bring their configuration ------------------------------------------------------


def test_a_folder_brings_configuration_weights_and_preprocessing(tmp_path: Path) -> None:
    folder = filled_folder(tmp_path / "mine", {**small_config(), "quick_gelu": True}, SQUASH)
    model = VideoTextModel.create(f"local-dir:{folder}", device="cpu")
    assert torch.equal(projection(model), projection(create_clip(small_config(), None, seed=3)))
    assert {key: model.config.preprocess_cfg[key] for key in SQUASH} == SQUASH
    assert model.config.model_cfg["quick_gelu"] is True
    assert torch.equal(projection(VideoTextModel.from_origin(model.origin, device="cpu")), projection(model))


def test_a_folder_is_the_same_backbone_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An index compares hashes: a relative path must not make another model of it."""
    filled_folder(tmp_path / "mine", small_config(), SQUASH)
    monkeypatch.chdir(tmp_path)
    model = VideoTextModel.create("local-dir:mine", device="cpu")
    monkeypatch.chdir("/")
    assert model.origin is not None
    assert VideoTextModel.from_origin(model.origin, device="cpu").sha256() == model.sha256()


def test_a_folder_with_other_weights_or_with_none(tmp_path: Path) -> None:
    folder = filled_folder(tmp_path / "mine", small_config(), {})
    other = filled_folder(tmp_path / "other", small_config(), {}, seed=4) / "open_clip_model.safetensors"
    assert torch.equal(
        projection(create_clip(f"local-dir:{folder}", other)),
        projection(create_clip(small_config(), None, seed=4)),
    )
    assert torch.equal(
        projection(create_clip(f"local-dir:{folder}", None, seed=5)),
        projection(create_clip(small_config(), None, seed=5)),
    )


def test_a_repository_in_the_hubs_cache_needs_no_network(no_network: Path) -> None:
    cached(no_network, "org/name", small_config(), SQUASH)
    made = create_clip("hf-hub:org/name", "openai")
    assert torch.equal(projection(made), projection(create_clip(small_config(), None, seed=3)))
    assert made.preprocess_cfg["mean"] == HALF


def spoilt_folder(folder: Path, how: str) -> Path:
    filled_folder(folder, small_config(), {})
    if how == "no configuration":
        (folder / "open_clip_config.json").unlink()
    elif how == "torn configuration":
        (folder / "open_clip_config.json").write_text('{"model_cfg": ')
    elif how == "another configuration":
        (folder / "open_clip_config.json").write_text("[1, 2]")
    elif how == "no towers":
        (folder / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 8}}')
    elif how == "no weights":
        (folder / "open_clip_model.safetensors").unlink()
    elif how == "two weights":
        (folder / "open_clip_model.safetensors").rename(folder / "a.safetensors")
        (folder / "b.pt").write_bytes(b"")
    return folder


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no configuration", r"open_clip_config\.json is not an open_clip_config\.json \(.*No such file"),
        ("torn configuration", r"is not an open_clip_config\.json \(Expecting value"),
        ("another configuration", r"expected a JSON file with model_cfg and preprocess_cfg"),
        ("no towers", "it has no table vision_cfg"),
        ("no weights", r"expected one weight file beside open_clip_config\.json, found none; name it"),
        ("two weights", r"found a\.safetensors, b\.pt; name it open_clip_model\.safetensors"),
        ("a file that is not there", r"'no/such\.safetensors' is neither a known tag nor a file; a file"),
    ],
)
def test_folders_that_are_not_whole_are_one_line(how: str, message: str, tmp_path: Path) -> None:
    folder = spoilt_folder(tmp_path / "mine", how)
    with pytest.raises(ModelError, match=message) as caught:
        create_clip(f"local-dir:{folder}", "no/such.safetensors" if "not there" in how else "openai")
    assert "\n" not in str(caught.value)


def test_a_repository_that_cannot_be_had_says_what_to_bring(no_network: Path) -> None:
    with pytest.raises(ModelError) as caught:
        create_clip("hf-hub:org/name", "openai")
    message = str(caught.value)
    assert message.startswith("open_clip_config.json of hf-hub:org/name could not be downloaded (")
    assert "give the folder as backbone: local-dir:path/to/name" in message
    assert message.endswith(f"copy that machine's models--org--name to {no_network}")
    assert "\n" not in message


def test_a_repository_without_its_weights_names_the_file(no_network: Path) -> None:
    folder = cached(no_network, "org/name", small_config(), {})
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"get open_clip_model\.safetensors there and pass it: --pretrained"):
        create_clip("hf-hub:org/name", "openai")


def test_no_tower_downloads_its_own_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration may ask for that; the weights of the whole model follow anyway."""
    config = timm_config("SigLIP")
    config["vision_cfg"]["timm_model_pretrained"] = True
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: pytest.fail("it went to the network"))
    with shrunken("SigLIP"):
        create_clip(config, None)


# --- texts --------------------------------------------------------------------------------------------------------


class FakeTokenizer:
    """Stands for open_clip's HFTokenizer: letters to ids, padded with 1 to the context length."""

    def __init__(self, name: str, context_length: int, **options: Any) -> None:
        self.name, self.context_length, self.options = name, context_length, options

    def __call__(self, texts: list[str]) -> Tensor:
        rows = [[ord(letter) % 100 + 2 for letter in text][: self.context_length] for text in texts]
        return torch.tensor([row + [1] * (self.context_length - len(row)) for row in rows])


@pytest.fixture
def with_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "has_transformers", lambda: True)
    monkeypatch.setattr(text_module, "HFTokenizer", FakeTokenizer)
    monkeypatch.setattr(hub_files, "reachable", lambda url: True)


SIGLIP_TEXT = {
    **open_clip.get_model_config("ViT-B-16-SigLIP2")["text_cfg"],
    "vocab_size": 128,
    "width": 16,
    "heads": 2,
    "layers": 1,
}


@pytest.mark.usefixtures("with_transformers")
def test_a_siglip_text_tower_reads_its_own_context_length() -> None:
    """64 ids, whatever the text; the embedding is that of open_clip's own tower on the same ids."""
    clip = build_clip({**small_config(), "custom_text": True, "text_cfg": SIGLIP_TEXT}).eval()
    tokenize = build_text_tokenizer(SIGLIP_TEXT)
    texts = ["a dog jumps", "", "opens the fridge " * 20]
    ids_QC = tokenize(texts)
    assert ids_QC.shape == (3, 64)
    with torch.no_grad():
        z_QZ = encode_text(clip, tokenize, texts, torch.device("cpu"))
        torch.testing.assert_close(z_QZ, F.normalize(clip.text(ids_QC), dim=-1))
    torch.testing.assert_close(z_QZ.norm(dim=-1), torch.ones(3))


@pytest.mark.usefixtures("with_transformers")
def test_a_tokenizer_gets_the_options_of_its_tower(tmp_path: Path) -> None:
    """SigLIP cleans texts in its own way; a folder's own tokenizer files stand in for the name on the hub."""
    built = build_text_tokenizer(SIGLIP_TEXT).__closure__[0].cell_contents  # type: ignore[attr-defined]
    assert (built.name, built.options) == (
        "timm/ViT-B-16-SigLIP2",
        {"tokenizer_mode": None, "clean": "canonicalize"},
    )
    config = {**small_config(), "custom_text": True, "text_cfg": SIGLIP_TEXT}
    folder = filled_folder(tmp_path / "mine", config, SQUASH)
    name = "timm/ViT-B-16-SigLIP2"
    assert create_clip(f"local-dir:{folder}", "openai").model_cfg["text_cfg"]["hf_tokenizer_name"] == name
    (folder / "tokenizer_config.json").write_text("{}")
    made = create_clip(f"local-dir:{folder}", "openai")
    assert made.model_cfg["text_cfg"]["hf_tokenizer_name"] == str(folder)


def test_a_foreign_configuration_cannot_ask_for_code_to_be_run() -> None:
    with pytest.raises(ModelError, match="sets tokenizer_kwargs trust_remote_code; allowed are clean"):
        build_text_tokenizer({**SIGLIP_TEXT, "tokenizer_kwargs": {"trust_remote_code": True}})


@pytest.mark.parametrize("what", ["transformers", "sentencepiece", "sentencepiece, said otherwise"])
def test_a_missing_package_is_one_line_with_the_extra(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        if what == "sentencepiece":
            raise ImportError("T5Tokenizer requires the SentencePiece library")
        raise ValueError(
            "Couldn't instantiate the backend tokenizer.\nYou need to have sentencepiece installed"
        )

    monkeypatch.setattr(text_module, "has_transformers", lambda: what != "transformers")
    monkeypatch.setattr(text_module, "HFTokenizer", fails)
    monkeypatch.setattr(hub_files, "reachable", lambda url: True)
    with pytest.raises(MissingDependencyError) as caught:
        build_text_tokenizer(SIGLIP_TEXT)
    assert str(caught.value) == (
        "the tokenizer timm/ViT-B-16-SigLIP2 of the text tower needs the packages transformers and sentencepiece: "
        "pip install 'rlt-retrieval[siglip]'"
    )


@pytest.mark.usefixtures("with_transformers")
def test_a_tokenizer_that_cannot_be_had_says_what_to_bring(
    monkeypatch: pytest.MonkeyPatch, no_network: Path
) -> None:
    def offline(*arguments: Any, **options: Any) -> None:
        raise OSError("We couldn't connect to the hub\nand found no cached files")

    monkeypatch.setattr(text_module, "HFTokenizer", offline)
    with pytest.raises(ModelError) as caught:
        build_text_tokenizer(SIGLIP_TEXT)
    message = str(caught.value)
    assert message.startswith(
        "the tokenizer timm/ViT-B-16-SigLIP2 of the text tower could not be had (We couldn't"
    )
    assert (
        f"copy models--timm--ViT-B-16-SigLIP2 from the hub's cache of a machine with network to {no_network}"
        in message
    )
    assert "\n" not in message


def test_a_text_tower_of_transformers_without_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(building, "has_transformers", lambda: False)
    monkeypatch.setattr(loading, "tag_weights", lambda *a: pytest.fail("it downloaded"))
    with pytest.raises(
        MissingDependencyError, match=r"the text tower roberta-base needs .*rlt-retrieval\[siglip\]"
    ):
        create_clip("roberta-ViT-B-32", "laion2b_s12b_b32k")


def test_pictures_need_no_tokenizer() -> None:
    """A SigLIP model embeds videos on a machine without transformers."""
    model = VideoTextModel.create(
        {**small_config(), "custom_text": True, "text_cfg": SIGLIP_TEXT}, None, device="cpu", num_frames=2
    )
    frames = torch.zeros(1, 2, 3, 32, 32, dtype=torch.uint8)
    assert model.encode_video(frames).shape == (1, 32)

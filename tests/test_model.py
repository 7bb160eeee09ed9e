"""VideoTextModel: equal to open_clip on one frame, the same after save and load, exported unchanged.

Shapes: B clips, T frames, Q texts, Z embedding.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from safetensors.torch import load_file, save_file
from small_models import SMALL_TEXT, pixels, randomise, repeating_frames, small_config, small_model
from torch import Tensor

from rlt_retrieval import model as model_module
from rlt_retrieval.config import VideoSettings
from rlt_retrieval.encoders.towers import hub
from rlt_retrieval.errors import ModelError
from rlt_retrieval.model import ModelConfig, VideoTextModel, autocast, resolve_device

TEXTS = ["a red square moves left", "two dogs", ""]


def randomised_file(name: str, path: Path) -> Path:
    """Weights of a real-size model as one would download them, constants randomised."""
    torch.manual_seed(0)
    clip = open_clip.create_model(name)
    randomise(clip)
    save_file(clip.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vit_b_32_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return randomised_file("ViT-B-32", tmp_path_factory.mktemp("weights") / "b32.safetensors")


def as_layout(model: VideoTextModel, layout: str) -> VideoTextModel:
    """The same towers in another layout, time embeddings fresh."""
    config = ModelConfig(
        model.config.backbone,
        model.config.model_cfg,
        model.config.preprocess_cfg,
        VideoSettings(layout=layout),
    )
    return VideoTextModel(model.clip, config).eval()


def assert_equals_open_clip(model: VideoTextModel, name: str, file: Path) -> None:
    """One-frame videos and texts, both layouts, against open_clip's own model of that name and file."""
    reference = open_clip.create_model(name, pretrained=str(file)).eval()
    height, width = reference.visual.image_size
    frames = torch.randint(0, 256, (2, 1, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        expected = reference.encode_image(pixels(model, frames[:, 0]), normalize=True)
        for layout in ("frame", "joint"):
            z_BZ = as_layout(model, layout).encode_video(frames)
            torch.testing.assert_close(z_BZ, expected, atol=1e-5, rtol=0)
        ids = open_clip.get_tokenizer(name)(TEXTS)
        expected = reference.encode_text(ids, normalize=True)
        torch.testing.assert_close(model.encode_text(TEXTS), expected, atol=1e-5, rtol=0)


# --- against open_clip at real size -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_one_frame_equals_encode_image(name: str, vit_b_32_file: Path) -> None:
    model = VideoTextModel.create(name, pretrained=vit_b_32_file, device="cpu")
    assert_equals_open_clip(model, name, vit_b_32_file)


@pytest.mark.acceptance
@pytest.mark.parametrize("name", ["ViT-B-16", "ViT-L-14"])
def test_one_frame_equals_encode_image_of_large_towers(name: str, tmp_path: Path) -> None:
    file = randomised_file(name, tmp_path / "weights.safetensors")
    model = VideoTextModel.create(name, pretrained=str(file), device="cpu")
    assert_equals_open_clip(model, name, file)


def test_vit_b_16_openai_computes_with_quick_gelu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """At real size, with the download replaced by a file; open_clip alone would build it with GELU and warn."""
    file = randomised_file("ViT-B-16", tmp_path / "openai.safetensors")
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda cfg, cache_dir=None: str(file))
    monkeypatch.setattr(hub, "reachable", lambda url: True)
    caplog.clear()
    model = VideoTextModel.create("ViT-B-16", pretrained="openai", device="cpu")
    assert {type(m) for m in model.modules() if "GELU" in type(m).__name__} == {QuickGELU}
    said = [record.getMessage() for record in caplog.records]
    assert said == ["ViT-B-16 + openai: using QuickGELU, as its weights need"]
    assert model.origin is not None
    assert model.origin["pretrained"] == "openai"
    assert_equals_open_clip(model, "ViT-B-16-quickgelu", file)


def test_coca_models_work_too() -> None:
    """Custom text tower, attention pooling and a text decoder that nobody calls."""
    multimodal = {**SMALL_TEXT, "attn_pooler_heads": 2}
    config = {
        **small_config(attentional_pool=True, output_tokens=True),
        "custom_text": True,
        "multimodal_cfg": multimodal,
    }
    config["text_cfg"] |= {"embed_cls": True, "output_tokens": True}
    model = VideoTextModel.create(config, None, device="cpu", layout="joint")
    randomise(model.clip)
    frames = torch.randint(0, 256, (2, 1, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        expected = model.clip.encode_image(pixels(model, frames[:, 0]), normalize=True)
        torch.testing.assert_close(model.encode_video(frames), expected, atol=1e-5, rtol=0)
        assert model.encode_text(TEXTS).shape == (3, 32)


# --- create and encode --------------------------------------------------------------------------------------------


def test_create_gives_eval_mode_and_unit_float32_vectors() -> None:
    model = VideoTextModel.create(small_config(), None, device="cpu", num_frames=4)
    assert not model.training
    assert not model.clip.visual.training
    clips = torch.stack([repeating_frames(4, 0.5, seed) for seed in range(3)])
    with torch.no_grad():
        z_BZ, z_QZ = model.encode_video(clips), model.encode_text(TEXTS)
    for z in (z_BZ, z_QZ):
        assert z.shape == (3, 32)
        assert z.dtype == torch.float32
        torch.testing.assert_close(z.norm(dim=1), torch.ones(3))


def test_lists_and_batches_of_clips_give_the_same() -> None:
    model = small_model()
    clips = torch.stack([repeating_frames(6, 0.5, seed) for seed in range(3)])
    with torch.no_grad():
        torch.testing.assert_close(model.encode_video(clips), model.encode_video(list(clips)))


def test_frames_of_another_size_go_through_the_shared_resizing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And frames of the model's size are used as they are."""
    model = small_model()
    large = repeating_frames(3, 0.5, side=80)
    seen = []
    resize = model_module.resize_frames

    def spy(frames: Tensor, transform: Any) -> Tensor:
        seen.append(transform)
        return resize(frames, transform)

    with torch.no_grad():
        expected = model.encode_video([resize(large, model.transform)])
        monkeypatch.setattr(model_module, "resize_frames", spy)
        assert torch.equal(model.encode_video([large]), expected)
    assert [(t.height, t.width, t.resize_mode, t.interpolation) for t in seen] == [
        (32, 32, "shortest", "bicubic")
    ]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 4, 3, 32, 32), "expected uint8"),
        (torch.zeros(4, 3, 32, 32, dtype=torch.uint8), r"expected uint8 \[T, 3, H, W\]"),
        ([], "got no clip"),
    ],
)
def test_frames_of_another_kind_are_refused(frames: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_model().encode_video(frames)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"treshold": 0.1}, "video settings: unknown key 'treshold'; did you mean 'threshold'?"),
        ({"layout": "frames"}, "video settings: layout: "),
        ({"tubelet_size": 2}, "layout 'frame' takes tubelet_size 1"),
        ({"patch_dropout": 0.5}, "layout 'frame' takes .* no patch_dropout"),
        ({"length_bias": True}, "layout 'frame' takes .* no length_bias; use 'joint'"),
        ({"layout": "joint", "cls_bias": "log_T"}, "cls_bias needs length_bias = true"),
        (
            {"layout": "joint", "tubelet_size": 2, "num_frames": 5},
            "num_frames 5 is no multiple of tubelet_size 2",
        ),
        ({"threshold": float("nan")}, "threshold: .*finite"),
    ],
)
def test_impossible_settings_are_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        VideoTextModel.create(small_config(), None, **settings)
    assert "\n" not in str(caught.value)


# --- save, load, export -------------------------------------------------------------------------------------------


def embeddings(model: VideoTextModel) -> tuple[Tensor, Tensor]:
    clips = [repeating_frames(6, change, seed=1) for change in (0.0, 0.4, 1.0)]
    with torch.no_grad():
        return model.encode_video(clips), model.encode_text(TEXTS)


@pytest.mark.parametrize(
    "settings",
    [{}, {"layout": "frame"}, {"length_bias": True, "tubelet_size": 2}],
    ids=["joint", "frame", "tubelets"],
)
def test_a_saved_model_gives_identical_embeddings(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`load` needs nothing but the folder: neither open_clip's registry nor the file the weights came from."""
    model = small_model({"ls_init_value": 0.1}, **settings)
    model.save(tmp_path / "run" / "model")
    monkeypatch.setattr(open_clip, "create_model", lambda *a, **k: pytest.fail("asked open_clip for a model"))
    for path in (tmp_path / "run" / "model", tmp_path / "run"):
        loaded = VideoTextModel.load(path, device="cpu")
        assert not loaded.training
        assert loaded.config == ModelConfig.from_json(model.config.to_json())
        assert loaded.sha256() == model.sha256()
        for seen, expected in zip(embeddings(loaded), embeddings(model), strict=True):
            assert torch.equal(seen, expected)
    assert sorted(p.name for p in (tmp_path / "run" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["model"]


def test_activation_and_preprocessing_survive_saving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A tag's QuickGELU, mean and resize mode are not in the model's name; catches a load that asks the registry."""
    file = tmp_path / "weights.safetensors"
    save_file(small_model().clip.state_dict(), file)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-H-14-378", small_config())
    monkeypatch.setattr(open_clip.factory, "download_pretrained", lambda cfg, cache_dir=None: str(file))
    monkeypatch.setattr(hub, "reachable", lambda url: True)
    model = VideoTextModel.create("ViT-H-14-378", "dfn5b", device="cpu")
    model.save(tmp_path / "model")
    loaded = VideoTextModel.load(tmp_path / "model", device="cpu")
    assert loaded.transform == model.transform
    assert loaded.transform.resize_mode == "squash"
    assert {type(m) for m in loaded.modules() if "GELU" in type(m).__name__} == {QuickGELU}
    for seen, expected in zip(embeddings(loaded), embeddings(model), strict=True):
        assert torch.equal(seen, expected)


def test_saving_again_replaces_and_a_failed_save_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = small_model(seed=1), small_model(seed=2)
    first.save(tmp_path / "model")
    second.save(tmp_path / "model")
    assert VideoTextModel.load(tmp_path / "model", device="cpu").sha256() == second.sha256()

    def disk_full(state: dict[str, Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(model_module, "save_file", disk_full)
    with pytest.raises(
        ModelError, match=r"cannot write the model to .*model: .*No space left.*; choose another folder"
    ):
        first.save(tmp_path / "model")
    with pytest.raises(ModelError, match=r"cannot write .*towers\.safetensors: .*No space left"):
        first.export(tmp_path / "towers.safetensors")
    assert VideoTextModel.load(tmp_path / "model", device="cpu").sha256() == second.sha256()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match=r"cannot write the model to .*file/model"):
        small_model().save(tmp_path / "file" / "model")
    with pytest.raises(ModelError, match=r"expected a file name that ends in \.safetensors"):
        small_model().export(tmp_path / "towers.pt")
    with pytest.raises(ModelError, match=r"cannot write .*missing"):
        small_model().export(tmp_path / "missing" / "towers.safetensors")


def spoil(folder: Path, kind: str) -> None:
    config, weights = folder / "config.json", folder / "model.safetensors"
    values = json.loads(config.read_text())
    if kind == "torn weights":
        weights.write_bytes(weights.read_bytes()[:4000])
    elif kind == "torn config":
        config.write_text(config.read_text()[:100])
    elif kind == "other format":
        config.write_text(json.dumps({**values, "format": 99}))
    elif kind == "unknown field":
        config.write_text(json.dumps({**values, "colour": "red"}))
    elif kind == "unknown setting":
        config.write_text(json.dumps({**values, "video": {**values["video"], "treshold": 0.1}}))
    else:
        state = load_file(weights)
        state.pop("video.temporal_embedding")
        save_file(state, weights)


@pytest.mark.parametrize(
    "kind",
    ["torn weights", "torn config", "other format", "unknown field", "unknown setting", "missing tensor"],
)
def test_a_spoilt_folder_is_one_line(kind: str, tmp_path: Path) -> None:
    small_model().save(tmp_path / "model")
    spoil(tmp_path / "model", kind)
    with pytest.raises(
        ModelError, match=r"model does not hold a whole model \(.+\); train or save it again"
    ) as caught:
        VideoTextModel.load(tmp_path, device="cpu")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"is not a saved model: expected a folder with config\.json and model\.safe"
    ):
        VideoTextModel.load(tmp_path, device="cpu")


@pytest.mark.parametrize("layout", ["joint", "frame"])
def test_an_export_loads_into_open_clip_unchanged(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names and shapes of open_clip; what was added for video is left out."""
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", small_config())
    model = small_model(layout=layout)
    model.add_logit_bias()  # as training with the sigmoid loss does
    model.export(tmp_path / "towers.safetensors")
    exported, fresh = load_file(tmp_path / "towers.safetensors"), open_clip.create_model("tiny").state_dict()
    assert {k: v.shape for k, v in exported.items()} == {k: v.shape for k, v in fresh.items()}
    reloaded = open_clip.create_model("tiny", pretrained=str(tmp_path / "towers.safetensors")).eval()
    frames = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for a, b in (
            (reloaded.encode_image(pixels(model, frames)), model.clip.encode_image(pixels(model, frames))),
            (
                reloaded.encode_text(open_clip.tokenize(TEXTS, 16)),
                model.clip.encode_text(open_clip.tokenize(TEXTS, 16)),
            ),
        ):
            assert torch.equal(a, b)
    assert [path.name for path in tmp_path.iterdir()] == ["towers.safetensors"]


# --- origin, hash, reducer, device --------------------------------------------------------------------------------


def test_origin_gives_the_model_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder and through JSON, as an index keeps it."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    save_file(small_model().clip.state_dict(), "weights.safetensors")
    created = [
        VideoTextModel.create(small_config(), None, seed=3, device="cpu", threshold=0.2),
        VideoTextModel.create(
            small_config(), "weights.safetensors", quick_gelu=True, device="cpu", layout="joint"
        ),
        VideoTextModel.create(small_config(), Path("weights.safetensors"), device="cpu"),
    ]
    created[1].save("model")
    created.append(VideoTextModel.load("model", device="cpu"))
    created += [twin.with_settings(reducer="tome", keep_ratio=0.5) for twin in (created[0], created[3])]
    created.append(created[-1].with_settings(reducer="rlt", refresh_every=2))
    monkeypatch.chdir(tmp_path / "elsewhere")
    for model in created:
        again = VideoTextModel.from_origin(json.loads(json.dumps(model.origin)), device="cpu")
        assert again.sha256() == model.sha256()
        assert again.origin == model.origin
    assert created[1].sha256() == created[3].sha256()


def test_the_hash_follows_weights_and_settings() -> None:
    model, same, other_weights = small_model(seed=1), small_model(seed=1), small_model(seed=2)
    other_settings = small_model(seed=1, threshold=0.5)
    assert model.sha256() == same.sha256()
    assert len({m.sha256() for m in (model, other_weights, other_settings)}) == 3
    with torch.no_grad():
        model.video.run_length_embedding[2, 5] += 1e-6
    assert model.sha256() != same.sha256()
    assert len(model.sha256()) == len(hashlib.sha256().hexdigest())


def test_with_settings_shares_the_weights() -> None:
    model = small_model()
    dense = model.with_settings(reducer="none")
    clip = repeating_frames(6, 0.0)
    assert (len(model.tokenizer(clip)), len(dense.tokenizer(clip))) == (16, 96)
    shared = dict(dense.named_parameters())
    assert all(shared[name].data_ptr() == p.data_ptr() for name, p in model.named_parameters())
    assert not dense.training
    assert torch.equal(embeddings(dense.with_settings(reducer="rlt"))[0], embeddings(model)[0])


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    for name in ("cuda:99", "toaster"):
        with pytest.raises(
            ModelError, match=f"device '{name}' cannot be used here .*; use 'auto' or 'cpu'"
        ) as caught:
            resolve_device(name)
        assert "\n" not in str(caught.value)


def test_half_precision_only_where_it_belongs() -> None:
    """bf16 on request; "auto" leaves the CPU in float32."""
    x = torch.randn(4, 4)
    dtypes = {}
    for precision in ("auto", "fp32", "bf16"):
        with autocast(torch.device("cpu"), precision):  # type: ignore[arg-type]
            dtypes[precision] = (x @ x).dtype
    assert dtypes == {"auto": torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}

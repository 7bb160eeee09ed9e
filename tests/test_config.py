"""Recipes: complete TOML files; every mistake is one line that names the key and the way out."""

from pathlib import Path
from typing import Any

import pytest

from rlt_retrieval.config import (
    VideoSettings,
    default_num_workers,
    find_recipe,
    load_recipe,
    num_cores,
    parse_override,
)
from rlt_retrieval.errors import ConfigError

RECIPE = """
run_dir = "runs/test"
[video]
layout = "joint"
[data]
train = ["train-*.tar"]
num_streams = 4
[optim]
steps = 10
batch_size = 8
learning_rate = 1e-3
"""
SHIPPED = sorted((Path(__file__).parents[1] / "configs").glob("*.toml"))


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE)
    return path


def test_a_recipe_by_path(recipe: Path) -> None:
    loaded = load_recipe(recipe)
    assert loaded.optim.steps == 10
    assert loaded.data.train == ("train-*.tar",)
    assert loaded.model.backbone == "ViT-B-16"
    assert load_recipe(str(recipe)) == loaded


def test_recipes_are_shipped() -> None:
    assert "demo" in [path.stem for path in SHIPPED]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid_and_found_by_name(path: Path) -> None:
    """Its header is the command that runs it."""
    assert find_recipe(path.stem).samefile(path)
    load_recipe(path.stem)
    header = [line for line in path.read_text().split("\n\n")[0].splitlines() if line.startswith("#")]
    assert any(f"rlt-retrieval train {path.stem}" in line for line in header)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"recipe 'dmeo' is neither a file nor one of: .*demo"):
        load_recipe("dmeo")
    with pytest.raises(ConfigError, match="recipe 'no/demo' is neither a file"):
        find_recipe("no/demo")


def test_overrides(recipe: Path) -> None:
    loaded = load_recipe(
        recipe,
        [
            "optim.steps=100",
            "video.threshold=0.25",
            "model.pretrained=none",
            'data.train=["a.tar", "b.tar"]',
            "optim.gradient_checkpointing=true",
            "model.backbone_config.embed_dim=8",
            "run_dir = elsewhere",
        ],
    )
    assert (loaded.optim.steps, loaded.video.threshold, loaded.model.pretrained) == (100, 0.25, "none")
    assert loaded.data.train == ("a.tar", "b.tar")
    assert loaded.optim.gradient_checkpointing
    assert loaded.model.backbone_config == {"embed_dim": 8}
    assert loaded.run_dir == "elsewhere"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a.b=1", ("a.b", 1)),
        ("a=1.5", ("a", 1.5)),
        ("a=1e-3", ("a", 1e-3)),
        ("a=true", ("a", True)),
        ("a='x y'", ("a", "x y")),
        ("a=[1, 2]", ("a", [1, 2])),
        ("a=bare word", ("a", "bare word")),
        ("a=ViT-B-16", ("a", "ViT-B-16")),
        ("a=x=y", ("a", "x=y")),
        ("a=", ("a", "")),
        (" a = word ", ("a", "word")),
    ],
)
def test_parse_override(override: str, expected: tuple[str, Any]) -> None:
    assert parse_override(override) == expected


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.stepz=3"], "unknown key 'optim.stepz'; did you mean 'steps'?"),
        (["vidoe.threshold=1"], "unknown key 'vidoe'; did you mean 'video'?"),
        (["optim.zzz=3"], "unknown key 'optim.zzz'; known keys: loss, margin, tolerance"),
        (["optim.steps=many"], r"optim.steps: Input should be a valid integer \(got 'many'\)"),
        (["optim.steps='10'"], "optim.steps: Input should be a valid integer"),
        (["optim.steps=0"], "optim.steps: Input should be greater than or equal to 1"),
        (["video.layout=frames"], "video.layout: Input should be 'joint' or 'frame'"),
        (["video.threshold=nan"], "video.threshold: Input should be a finite number"),
        (
            ["video.tubelet_size=2", "video.num_frames=5"],
            "video: num_frames 5 is no multiple of tubelet_size 2",
        ),
        (["video=3"], "video: Input should be a valid dictionary"),
        (["data.train=[]"], "data.train: "),
        (["optim.batch_size=6"], "optim.batch_size 6 is no multiple of data.num_streams 4"),
        (["optim.steps"], "--set 'optim.steps': expected key=value, e.g. optim.steps=100"),
        (["=3"], "--set '=3': expected key=value"),
        (["run_dir.x=3"], "--set 'run_dir.x=3': 'run_dir' is a value, not a table"),
    ],
)
def test_mistakes_are_one_line(recipe: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe(recipe, overrides)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith((f"recipe {recipe}: ", "--set"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"run_dir = ", "is not TOML: "),
        (b"\xff\xfe", "is not TOML: "),
        (
            RECIPE.replace("steps = 10", "").encode(),
            "key 'optim.steps' is missing; add it or pass --set optim.steps=",
        ),
        (b"", "key 'run_dir' is missing"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"recipe .*bad.toml.*{message}") as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_settings_cannot_be_changed_afterwards(recipe: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(recipe).optim.steps = 3


def test_num_tubelets() -> None:
    assert VideoSettings(layout="joint", tubelet_size=2, num_frames=8).num_tubelets == 4


def test_workers_are_a_quarter_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_cores() >= 1
    for cores, workers in ((1, 1), (2, 1), (8, 2), (64, 16)):
        monkeypatch.setattr("rlt_retrieval.config.num_cores", lambda cores=cores: cores)
        assert default_num_workers() == workers

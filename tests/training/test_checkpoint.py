"""Checkpoints are whole or absent, give back every bit, and are read without unpickling."""

import json
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rlt_retrieval.config import Recipe
from rlt_retrieval.data.loading import TrainBatch
from rlt_retrieval.data.streams import StreamPosition
from rlt_retrieval.errors import CheckpointError
from rlt_retrieval.model import VideoTextModel
from rlt_retrieval.training import checkpoint
from rlt_retrieval.training.checkpoint import TrainState, load_checkpoint, save_checkpoint
from rlt_retrieval.training.distributed import Ranks
from rlt_retrieval.training.loop import build_optimizer, train_step
from rlt_retrieval.training.losses import build_loss

POSITIONS = {0: StreamPosition(3, 17), 5: StreamPosition(0, 0)}
Trained = tuple[VideoTextModel, torch.optim.Optimizer]


@pytest.fixture
def make_trained(
    make_model: Callable[..., VideoTextModel], make_recipe: Callable[..., Recipe], random_batch: TrainBatch
) -> Callable[[int], Trained]:
    """A model and its optimiser after some steps."""
    recipe = make_recipe(optim={"loss": "siglip"})

    def make(steps: int) -> Trained:
        model = make_model()
        optimizer = build_optimizer(model, recipe)
        loss = build_loss("siglip", model.clip, rank=0, world_size=1)
        for step in range(1, steps + 1):
            train_step(model, loss, optimizer, random_batch, step, recipe, Ranks(0, 1, torch.device("cpu")))
        return model, optimizer

    return make


def moments(model: VideoTextModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def full_disk(max_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `max_bytes`: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_gives_back_every_bit(make_trained: Callable[[int], Trained], tmp_path: Path) -> None:
    model, optimizer = make_trained(3)
    torch.manual_seed(11)
    torch.rand(3)
    save_checkpoint(tmp_path, TrainState(3, POSITIONS), model, optimizer)
    drawn = torch.rand(4)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    other, other_optimizer = make_trained(1)
    assert load_checkpoint(tmp_path, other, other_optimizer) == TrainState(3, POSITIONS)
    assert_equal(dict(other.state_dict()), weights)
    assert_equal(moments(other, other_optimizer), moments(model, optimizer))
    assert torch.equal(torch.rand(4), drawn), "the random state goes on where it was"


@pytest.mark.filterwarnings("ignore:.*meta parameter")
def test_the_step_lies_beside_its_parameter(make_trained: Callable[[int], Trained], tmp_path: Path) -> None:
    """It was once restored to the host whatever the device, where fused AdamW refuses it on a GPU."""
    save_checkpoint(tmp_path, TrainState(1, {}), *make_trained(1))
    model, optimizer = make_trained(0)
    model.to("meta")
    load_checkpoint(tmp_path, model, optimizer)
    assert {tensor.device.type for tensor in moments(model, optimizer).values()} == {"meta"}


def test_training_goes_on_as_if_nothing_had_been(
    make_trained: Callable[[int], Trained],
    make_recipe: Callable[..., Recipe],
    random_batch: TrainBatch,
    tmp_path: Path,
) -> None:
    """Catches an optimiser that restores its moments but not their step."""
    save_checkpoint(tmp_path, TrainState(2, {}), *make_trained(2))
    model, optimizer = make_trained(0)
    load_checkpoint(tmp_path, model, optimizer)
    loss = build_loss("siglip", model.clip, rank=0, world_size=1)
    recipe = make_recipe(optim={"loss": "siglip"})
    train_step(model, loss, optimizer, random_batch, 3, recipe, Ranks(0, 1, torch.device("cpu")))
    assert_equal(dict(model.state_dict()), dict(make_trained(3)[0].state_dict()))


def test_keeps_the_last_two_and_clears_what_a_kill_left(
    make_trained: Callable[[int], Trained], tmp_path: Path
) -> None:
    (tmp_path / ".part").mkdir()
    (tmp_path / ".part" / "model.safetensors").write_bytes(b"torn")
    for step in (2, 4, 6, 100):
        save_checkpoint(tmp_path, TrainState(step, {}), *make_trained(0))
    assert names(tmp_path) == ["step-00000006", "step-00000100"]
    state = load_checkpoint(tmp_path, *make_trained(0))
    assert state is not None
    assert state.step == 100


def test_nothing_is_pickled(make_trained: Callable[[int], Trained], tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TrainState(1, POSITIONS), *make_trained(1))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json"}
    package = Path(checkpoint.__file__).parent
    for source in package.glob("*.py"):
        assert not any(word in source.read_text() for word in ("torch.load(", "torch.save(", "import pickle"))


@pytest.mark.parametrize("at", ["save_file", "_flush", "os.replace"])
def test_stopped_in_the_middle_leaves_nothing_under_a_final_name(
    make_trained: Callable[[int], Trained], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    model, optimizer = make_trained(0)
    save_checkpoint(tmp_path, TrainState(1, {}), model, optimizer)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(f"rlt_retrieval.training.checkpoint.{at}", stop)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, TrainState(2, {}), model, optimizer)
    assert names(tmp_path) == ["step-00000001"]


@pytest.mark.parametrize("max_bytes", [0, 1000, 4_000_000])
def test_full_disk_is_one_line_and_leaves_the_last_checkpoint(
    make_trained: Callable[[int], Trained], tmp_path: Path, max_bytes: int
) -> None:
    """At 4 MB the weights fit and the optimiser's moments do not."""
    model, optimizer = make_trained(1)
    save_checkpoint(tmp_path, TrainState(1, {}), model, optimizer)
    with full_disk(max_bytes), pytest.raises(CheckpointError, match="free space or change run_dir") as error:
        save_checkpoint(tmp_path, TrainState(2, {}), model, optimizer)
    assert "\n" not in str(error.value)
    assert names(tmp_path) == ["step-00000001"]
    assert load_checkpoint(tmp_path, model, optimizer) == TrainState(1, {})


def test_folder_that_cannot_be_made(make_trained: Callable[[int], Trained], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="change run_dir"):
        save_checkpoint(tmp_path / "file" / "checkpoints", TrainState(1, {}), *make_trained(0))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", truncate),
        ("optimizer.safetensors", truncate),
        ("random.safetensors", truncate),
        ("state.json", truncate),
        ("state.json", lambda path: path.write_text("[]")),
        ("state.json", lambda path: path.write_text(json.dumps({"step": 2}))),
        ("model.safetensors", Path.unlink),
        ("random.safetensors", Path.unlink),
    ],
)
def test_damaged_checkpoint_names_the_way_out(
    make_trained: Callable[[int], Trained], tmp_path: Path, name: str, damage: Callable[[Path], object]
) -> None:
    model, optimizer = make_trained(0)
    for step in (1, 2):
        save_checkpoint(tmp_path, TrainState(step, {}), model, optimizer)
    damage(tmp_path / "step-00000002" / name)
    way_out = r"checkpoint .*step-00000002 cannot be restored: .*; delete it to go on from the one before$"
    with pytest.raises(CheckpointError, match=way_out) as error:
        load_checkpoint(tmp_path, model, optimizer)
    assert "\n" not in str(error.value)


def test_checkpoint_of_another_model(
    make_trained: Callable[[int], Trained], make_model: Callable[..., VideoTextModel], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, TrainState(1, {}), *make_trained(0))
    other = make_model(num_frames=8)
    with pytest.raises(CheckpointError, match=r"cannot be restored: .*delete it to begin again"):
        load_checkpoint(tmp_path, other, torch.optim.AdamW(other.parameters()))


def test_no_checkpoint_yet(make_trained: Callable[[int], Trained], tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "none", *make_trained(0)) is None

"""The command line as a user meets it: exit codes, what goes to which stream, and one line for every mistake.

Most tests call `main` in this process; those about signals, imports and closed pipes start the real command.
"""

import ast
import contextlib
import errno
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from cli_runs import Ran, runner
from signals import default_ctrl_c

from rlt_retrieval.cli import cli
from rlt_retrieval.encoders.packing import PackedTokens
from rlt_retrieval.indexing.store import ClipStore
from rlt_retrieval.model import VideoTextModel

TinyVideo = Callable[..., Path]
TinyShards = Callable[..., list[Path]]
CAPTIONS = ["a red square", "a blue circle", "a green star", "a red square", "a grey cube", "a line"]
RECIPE = """
run_dir = "{root}/run"
checkpoint_every = 1
[model]
pretrained = "none"
[model.backbone_config]
embed_dim = 32
vision_cfg = {{ image_size = 32, patch_size = 8, width = 32, head_width = 16, layers = 1 }}
text_cfg = {{ context_length = 24, vocab_size = 49408, width = 32, heads = 2, layers = 1 }}
[video]
layout = "joint"
num_frames = 4
[data]
train = ["{root}/shards"]
eval = ["{root}/shards"]
num_streams = 1
num_workers = 0
[optim]
steps = 2
batch_size = 2
learning_rate = 1e-3
"""


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Ran]]:
    yield from runner(capfd)


@pytest.fixture
def videos(tmp_path: Path, tiny_video: TinyVideo) -> Path:
    for number in range(3):
        tiny_video(tmp_path / "videos" / f"{number}.mp4", seed=number)
    return tmp_path / "videos"


@pytest.fixture
def build(run: Callable[..., Ran], tmp_path: Path, tiny_model_path: Path) -> Callable[..., Ran]:
    """`index build` of my.index with the tiny model, decoding in this process."""
    options = ["--model", tiny_model_path, "--device", "cpu", "--workers", "0"]
    return lambda *arguments: run("index", "build", tmp_path / "my.index", *arguments, *options)


@pytest.fixture
def recipe(tmp_path: Path, tiny_shards: TinyShards) -> Path:
    tiny_shards(tmp_path / "shards", CAPTIONS)
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(root=tmp_path))
    return path


def command_line(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rlt_retrieval", *map(str, arguments)]


def commands(
    group: click.Group = cli, names: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, (*names, name))
        else:
            yield (*names, name), command


COMMANDS = list(commands())
IDS = ["-".join(names) for names, _ in COMMANDS]


# ------------------------------------------------------------------------------------------------- habits


@pytest.mark.parametrize(("names", "command"), COMMANDS, ids=IDS)
def test_every_command_helps_with_an_example_and_explains_its_options(
    run: Callable[..., Ran], names: tuple[str, ...], command: click.Command
) -> None:
    ran = run(*names, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"rlt-retrieval {' '.join(names)} " in ran.out.partition("\n")[2].partition("Options:")[0]
    assert max(map(len, ran.out.splitlines())) <= 80
    for option in command.params:
        assert not isinstance(option, click.Option) or option.help, f"{option.name} has no help"


@pytest.mark.parametrize(("names", "command"), COMMANDS, ids=IDS)
def test_a_command_only_parses_calls_and_prints(names: tuple[str, ...], command: click.Command) -> None:
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(command.callback))).body  # type: ignore[arg-type]
    assert isinstance(function, ast.FunctionDef)
    body = function.body[1:]  # behind the docstring
    statements = [node for part in body for node in ast.walk(part) if isinstance(node, ast.stmt)]
    assert len(statements) <= 20


def test_help_is_there_without_torch(tmp_path: Path) -> None:
    """Importing torch takes seconds, which every --help and every typing mistake would cost."""
    code = "import sys, rlt_retrieval, rlt_retrieval.cli, rlt_retrieval.eval; print([*sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "open_clip", "faiss", "av", "rich"} & set(ast.literal_eval(loaded))
    code = "import sys; sys.argv[1:] = ['train', '-h']; from rlt_retrieval.cli import main\n"
    code += "try: main()\nfinally: assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_wrong_usage_is_exit_code_2(run: Callable[..., Ran], tmp_path: Path) -> None:
    for arguments in (
        ["serch", "x"],
        ["search", "my.index"],
        ["search", "my.index", "text", "-k", "0"],
        ["index", "build", "my.index"],
        ["index", "build", "my.index", "v", "--model", "m", "--backbone", "ViT-B-32"],
        ["index", "build", "my.index", "v", "--backbone", "ViT-B-32"],
        ["index", "build", "my.index", "v", "--decode-timeout-seconds", "0"],
        ["index", "build", "my.index", "v", "--window-seconds", "0"],
        ["eval", "shards"],
    ):
        ran = run(*arguments)
        assert (ran.code, ran.out) == (2, ""), arguments
        assert "Error: " in ran.err
        assert "--help" in ran.err


# --------------------------------------------------------------------------------------- index and search


def test_build_info_and_search(
    build: Callable[..., Ran], run: Callable[..., Ran], videos: Path, tmp_path: Path
) -> None:
    built = build(videos, "--json")
    assert (built.code, built.json) == (0, {"added": 3, "unchanged": 0, "clips": 3, "problems": []})

    info = run("index", "info", tmp_path / "my.index", "--json").json
    assert info["clips"] == 3
    assert info["videos"] == {"incomplete": 0, "ok": 3, "partial": 0, "failed": 0}
    assert info["window_seconds"] == 10
    assert "clips           3" in run("index", "info", tmp_path / "my.index").out

    found = run("search", tmp_path / "my.index", "a dog", "--json", "--device", "cpu")
    hits = [json.loads(line) for line in found.out.splitlines()]
    assert (found.code, [hit["rank"] for hit in hits]) == (0, [1, 2, 3])
    assert {(hit["video"], hit["start_seconds"], hit["end_seconds"]) for hit in hits} == {
        (str(path), 0.0, 1.0) for path in videos.iterdir()
    }
    lines = run("search", tmp_path / "my.index", "a dog", "-k", "2", "--per-video").out.splitlines()
    assert [line.split()[-1] for line in lines] == [hit["video"] for hit in hits[:2]]


def test_the_threads_of_the_encoder_are_those_asked_for(
    build: Callable[..., Ran], videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = VideoTextModel.encode_tokens

    def noted(self: VideoTextModel, packed: PackedTokens) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return encode(self, packed)

    monkeypatch.setattr(VideoTextModel, "encode_tokens", noted)
    monkeypatch.setattr("rlt_retrieval.embed.LANES", 1)
    assert build(videos, "--threads", "3").code == 0
    assert set(seen) == {3}


def test_training_and_evaluation_take_threads_too(
    run: Callable[..., Ran], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("rlt_retrieval.embed.LANES", 1)
    assert run("train", recipe, "--device", "cpu", "--threads", "3").code == 0
    assert asked[0] == 3
    asked.clear()
    evaluate = ["eval", tmp_path / "shards", "--model", tmp_path / "run", "--device", "cpu", "--workers", "0"]
    assert run(*evaluate, "--threads", "5").code == 0
    assert set(asked) == {5}


def test_problems_are_named_on_stderr_and_make_exit_code_3_every_time(
    build: Callable[..., Ran], run: Callable[..., Ran], videos: Path, tmp_path: Path
) -> None:
    (videos / "text.mp4").write_text("no video")
    for _ in range(2):
        ran = build(videos)
        assert ran.code == 3
        assert "problems   1" in ran.out
        assert f"failed    {videos}/text.mp4: not a readable video file" in ran.err
        assert "0.mp4" not in ran.err  # good files are counted, not listed: there may be thousands
    (videos / "0.mp4").unlink()
    ran = build(videos, "--json")
    assert {Path(row["video"]).name: row["status"] for row in ran.json["problems"]} == {
        "text.mp4": "failed", "0.mp4": "vanished",
    }  # fmt: skip
    assert f"failed  {videos}/text.mp4  not a" in run("index", "info", tmp_path / "my.index").out


def test_file_names_that_are_not_utf_8_come_out_as_they_are(
    build: Callable[..., Ran], run: Callable[..., Ran], videos: Path, tiny_video: TinyVideo, tmp_path: Path
) -> None:
    tiny_video(Path(os.fsdecode(os.fsencode(videos) + b"/caf\xe9.mp4")))
    (Path(os.fsdecode(os.fsencode(videos) + b"/bad\xe9.mp4"))).touch()
    assert build(videos).code == 3
    search = ["search", tmp_path / "my.index", "a dog", "--device", "cpu"]
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}  # as in every UTF-8 locale but C's
    found = subprocess.run(command_line(*search), capture_output=True, check=True, env=strict)
    assert b"/caf\xe9.mp4\n" in found.stdout
    names = {Path(json.loads(line)["video"]).name for line in run(*search, "--json").out.splitlines()}
    assert os.fsdecode(b"caf\xe9.mp4") in names


def test_an_empty_index_says_how_to_fill_it(
    build: Callable[..., Ran], run: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").touch()
    assert build(tmp_path / "videos").code == 3
    ran = run("search", tmp_path / "my.index", "a dog", "--device", "cpu")
    assert (ran.code, ran.out) == (0, "")
    assert "holds no clip yet" in ran.err


def test_dry_runs_do_nothing(
    build: Callable[..., Ran], run: Callable[..., Ran], videos: Path, recipe: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    assert build(videos, "--dry-run", "--json").json == {"to_do": 3, "unchanged": 0, "problems": []}
    made = run("shards", "make", videos, tmp_path / "out", "--dry-run", "--json").json
    assert made == {"clips": 3, "captioned": 0, "shards": 1}
    assert run("train", recipe, "--dry-run", "--set", "optim.steps=7").json["optim"]["steps"] == 7
    assert sorted(tmp_path.rglob("*")) == before


# ---------------------------------------------------------------------------------- shards, train and eval


def test_shards_make_writes_what_eval_reads(
    run: Callable[..., Ran], videos: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    rows = [f"{path.name},caption of {path.stem}" for path in sorted(videos.iterdir())]
    (videos / "clips.csv").write_text("\n".join(["video,caption", *rows]))
    made = run("shards", "make", videos / "clips.csv", tmp_path / "shards", "--workers", "0", "--json")
    assert (made.code, made.json) == (0, {"clips": 3, "captioned": 3, "shards": 1, "skipped": 0})

    evaluate = ["eval", tmp_path / "shards", "--model", tiny_model_path, "--device", "cpu", "--workers", "0"]
    scored = run(*evaluate, "--json")
    assert scored.code == 0
    assert {"text_to_video", "video_to_text", "num_videos", "keep_ratio", "skipped"} <= scored.json.keys()
    assert (scored.json["num_videos"], scored.json["num_texts"]) == (3, 3)
    assert scored.json["text_to_video"]["recall@5"] == 1
    table = run(*evaluate)
    assert "R@1" in table.out
    assert "nDCG" in table.out
    assert run(*evaluate, "--set", "reducer=none", "--json").json["keep_ratio"] == 1


def test_shards_make_skips_and_lists_broken_videos(
    run: Callable[..., Ran], videos: Path, tmp_path: Path
) -> None:
    (videos / "bad.mp4").write_text("no video")
    ran = run("shards", "make", videos, tmp_path / "shards", "--workers", "0", "--json")
    assert (ran.code, ran.json["clips"], ran.json["skipped"]) == (3, 3, 1)
    assert f"skipped {videos}/bad.mp4: not a readable video file" in ran.err


def test_train_runs_a_recipe_and_its_model_is_found(
    run: Callable[..., Ran], recipe: Path, tmp_path: Path
) -> None:
    trained = run("train", recipe, "--device", "cpu", "--json")
    assert trained.code == 0, trained.err
    assert trained.json["step"] == 2
    scored = run(
        "eval",
        tmp_path / "shards",
        "--model",
        tmp_path / "run",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--json",
    )
    assert scored.json["num_videos"] == len(CAPTIONS)
    assert scored.json["num_merged_texts"] == 1


def test_eval_skips_samples_without_a_caption(
    run: Callable[..., Ran], tiny_model_path: Path, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    tiny_shards(tmp_path / "shards", ["a red square", "", "a blue circle"])
    evaluate = [
        "eval",
        tmp_path / "shards",
        "--model",
        tiny_model_path,
        "--device",
        "cpu",
        "--workers",
        "0",
        "--json",
    ]
    refused = run(*evaluate)
    assert refused.code == 1
    assert "1 of 3 samples bad, more than max_bad_fraction = 0.1 (first: clip-01" in refused.error
    assert "no caption" in refused.error
    allowed = run(*evaluate, "--max-bad-fraction", "0.5")
    assert (allowed.code, allowed.json["skipped"], allowed.json["num_videos"]) == (3, 1, 2)
    assert "skipped clip-01 in" in allowed.err


def test_a_torn_shard_is_a_line_and_exit_code_3(
    build: Callable[..., Ran],
    run: Callable[..., Ran],
    tiny_model_path: Path,
    tiny_shards: TinyShards,
    tmp_path: Path,
) -> None:
    shard = tiny_shards(tmp_path / "shards", ["one", "two", "three"])[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: content.index(b"clip-02") + 600])
    evaluate = ["eval", shard, "--model", tiny_model_path, "--device", "cpu", "--workers", "0", "--json"]
    assert "truncated" in run(*evaluate).error
    ran = run(*evaluate, "--max-bad-fraction", "1")
    assert (ran.code, ran.json["skipped"]) == (3, 1)
    built = build(shard)
    assert built.code == 3
    assert f"failed    {shard}#clip-02: truncated" in built.err


def test_shards_without_any_good_sample_give_no_score(
    run: Callable[..., Ran], tiny_model_path: Path, tiny_shards: TinyShards, tmp_path: Path
) -> None:
    """Once a division by zero."""
    tiny_shards(tmp_path / "shards", ["", ""])
    ran = run(
        "eval", tmp_path / "shards", "--model", tiny_model_path, "--device", "cpu", "--workers", "0",
        "--max-bad-fraction", "1",
    )  # fmt: skip
    assert ran.code == 1
    assert "no good sample" in ran.error


# ----------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("name", ["missing", "empty", "notes", "missing.tar"])
def test_a_source_without_video_is_one_line(
    build: Callable[..., Ran], run: Callable[..., Ran], tmp_path: Path, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").touch()
    for ran in (build(tmp_path / name), run("shards", "make", tmp_path / name, tmp_path / "out")):
        assert ran.code == 1
        assert ran.error.startswith(f"Error: {tmp_path / name}")
    assert not (tmp_path / "my.index").exists()
    assert not (tmp_path / "out").exists()


def test_missing_things_are_named_with_the_way_out(
    run: Callable[..., Ran], videos: Path, tmp_path: Path
) -> None:
    here = tmp_path / "my.index"
    for arguments, expected in (
        (["search", here, "a dog"], f"{here}: no such index; build it with: rlt-retrieval index build"),
        (["index", "info", videos], "is not an index"),
        (["eval", tmp_path, "--model", tmp_path], "is not a saved model: expected a folder with config.json"),
        (["index", "build", here, videos, "--model", "nowhere"], "nowhere is not a saved model"),
        (
            ["index", "build", here, videos, "--backbone", "ViT-X", "--pretrained", "none"],
            "not an open_clip model",
        ),
        (
            ["index", "build", here, videos, "--pretrained", "weights.pt"],
            "'weights.pt' is neither a known tag nor",
        ),
        (["index", "build", here, videos, "--set", "num_frame=8"], "did you mean 'num_frames'?"),
        (["index", "build", here, videos, "--set", "device=cpu"], "unknown key 'device'"),
        (
            ["index", "build", here, videos, "--pretrained", "none", "--device", "gpu"],
            "device 'gpu' cannot be used",
        ),
        (["train", "nothing"], "recipe 'nothing' is neither a file nor one of: demo"),
    ):
        ran = run(*arguments)
        assert ran.code == 1, arguments
        assert expected in ran.err.splitlines()[-1]
        assert "Traceback" not in ran.err
        assert not here.exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("optim.stepz=5", "unknown key 'optim.stepz'; did you mean 'steps'?"),
        ("optim.steps=many", "optim.steps: Input should be a valid integer"),
        ("optim.steps=0", "optim.steps: Input should be greater than or equal to 1"),
        ("video.layout=flat", "video.layout: Input should be 'joint' or 'frame'"),
        ("optim.batch_size=3", "optim.batch_size"),
        ("steps", "expected key=value"),
    ],
)
def test_a_mistake_in_a_recipe_is_one_line(
    run: Callable[..., Ran], recipe: Path, change: str, expected: str
) -> None:
    ran = run("train", recipe, "--set", "data.num_streams=2", "--set", change)
    assert ran.code == 1
    assert expected in ran.error
    assert not (recipe.parent / "run").exists()


def test_another_model_or_window_is_refused(
    build: Callable[..., Ran],
    run: Callable[..., Ran],
    videos: Path,
    tmp_path: Path,
    make_tiny_model: Callable[..., Any],
) -> None:
    assert build(videos).code == 0
    make_tiny_model(seed=5).save(tmp_path / "other")
    ran = run(
        "index", "build", tmp_path / "my.index", videos, "--model", tmp_path / "other", "--device", "cpu"
    )
    assert ran.code == 1
    assert "was built with another model" in ran.error
    assert "windows of 10 s, not 5 s" in build(videos, "--window-seconds", "5").error


def test_outputs_below_a_file_are_one_line(
    run: Callable[..., Ran], videos: Path, recipe: Path, tiny_model_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments in (
        ["index", "build", file / "my.index", videos, "--model", tiny_model_path, "--device", "cpu"],
        ["shards", "make", videos, file / "shards"],
        ["train", recipe, "--set", f"run_dir={file}/run"],
        ["demo", "--out", file / "demo", "--fast"],
    ):
        ran = run(*arguments)
        assert ran.code == 1, arguments
        assert str(file) in ran.error
        assert ";" in ran.error  # behind it stands the way out


@contextlib.contextmanager
def file_limit(num_bytes: int) -> Iterator[None]:
    """No file of this process can grow beyond that: every further write fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(
    build: Callable[..., Ran], run: Callable[..., Ran], videos: Path, tmp_path: Path
) -> None:
    with file_limit(4096):
        made = run("shards", "make", videos, tmp_path / "shards", "--workers", "0")
        created = build(videos)
    assert (made.code, created.code) == (1, 1)
    assert "clips-000000.tar: cannot write" in made.error
    assert "free space" in made.error
    assert "my.index" in created.error
    assert "free space" in created.error
    assert not (tmp_path / "my.index").exists()
    assert [path.name for path in (tmp_path / "shards").iterdir()] == ["plan.json"]

    assert build(videos).code == 0
    assert run("shards", "make", videos, tmp_path / "shards", "--workers", "0").code == 0


def test_a_disk_that_fills_up_during_a_build_keeps_what_was_committed(
    build: Callable[..., Ran], run: Callable[..., Ran], videos: Path, tiny_video: TinyVideo, tmp_path: Path
) -> None:
    assert build(videos).code == 0
    for number in range(40):
        tiny_video(videos / f"more-{number}.mp4", 0.25)
    with file_limit(20_000):
        ran = build(videos)
    assert ran.code == 1
    assert "free space" in ran.error
    assert run("index", "info", tmp_path / "my.index", "--json").json["clips"] >= 3
    assert build(videos).code == 0
    assert run("index", "info", tmp_path / "my.index", "--json").json["clips"] == 43


def test_an_error_of_the_system_names_the_file(
    build: Callable[..., Ran], videos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/index")

    monkeypatch.setattr(ClipStore, "begin_video", full)
    ran = build(videos)
    assert (ran.code, ran.error) == (
        1, "Error: /data/index: No space left on device; free space there, or choose another place",
    )  # fmt: skip


def test_debug_shows_the_traceback(run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = run("search", tmp_path / "missing", "a dog", "--debug")
    assert ran.code == 1
    assert ran.err.startswith("Traceback")
    assert ran.err.splitlines()[-1].startswith(f"Error: {tmp_path}/missing: no such index")


# ------------------------------------------------------------------------- signals and pipes, for real


def test_ctrl_c_is_one_line_and_exit_code_130(videos: Path, tiny_model_path: Path, tmp_path: Path) -> None:
    """While the worker starts, its interpreter included: nothing waits for it, it says nothing, and it is gone."""
    command = command_line(
        "index", "build", tmp_path / "my.index", videos, "--model", tiny_model_path, "--device", "cpu",
    )  # fmt: skip
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=default_ctrl_c,
    )
    while not (tmp_path / "my.index").exists() and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == "interrupted; the same command continues"
    assert "Traceback" not in err
    wait_until_gone(process.pid)
    with ClipStore.open(tmp_path / "my.index") as store:
        assert store.counts().videos["failed"] == 0


def wait_until_gone(group: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a worker outlived the command")


def test_a_reader_that_goes_away_is_no_traceback(
    build: Callable[..., Ran], videos: Path, tmp_path: Path
) -> None:
    build(videos)
    search = command_line("search", tmp_path / "my.index", "a dog", "--json", "--device", "cpu")
    process = subprocess.Popen(search, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 1

"""The import rules of the design, read from the source: one-way layers, one home for each third-party package."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import rlt_retrieval

PACKAGE = Path(rlt_retrieval.__file__).parent

# Lowest first; a module may import its own package and any lower layer.
LAYERS = (
    ("errors",),
    ("annotations", "config"),
    ("encoders", "data"),
    ("model", "indexing", "eval"),
    ("embed",),
    ("video_index",),
    ("serving", "training", "bench", "viz", "console"),
    ("cli", "demo"),
    ("__main__",),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}

# Modules or folders that alone may import a package.
HOMES = {
    "open_clip": ("encoders/towers/", "encoders/text.py", "training/losses.py"),
    "timm": ("encoders/towers/", "encoders/text.py", "training/losses.py"),
    "flash_attn": ("encoders/attention.py",),
    "faiss": ("indexing/vectors.py",),
    "av": ("data/reader.py", "data/video.py"),
    "fastapi": ("serving/app.py",),
}
WITHOUT_TORCH = ("indexing/", "eval/", "annotations.py", "config.py", "errors.py")
FILES = sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports_of(path: Path) -> set[str]:
    """Full dotted names of all imports of a file, also those inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}: relative imports hide where a name comes from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def inner_imports(path: Path) -> set[str]:
    """Modules of this package that a file imports, without the package's name."""
    prefix = f"{PACKAGE.name}."
    return {name.removeprefix(prefix) for name in imports_of(path) if name.startswith(prefix)}


def layer_of(path: Path) -> str:
    return relative(path).split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    own = layer_of(path)
    if own not in RANK:
        return
    for name in inner_imports(path):
        other = name.split(".")[0]
        if other == own or other not in RANK:  # a name of the package itself, such as __version__
            continue
        allowed = RANK[other] < RANK[own] or (own, other) == ("cli", "demo")
        from_data = (own, other) == ("data", "encoders") and name.split(".")[1] in ("tokenizer", "packing")
        assert allowed or from_data, f"{relative(path)} imports {name}"


def test_every_module_has_a_layer() -> None:
    """A new top-level module must be given its place here."""
    assert {layer_of(path) for path in FILES} - set(RANK) == {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_each_third_party_package_has_its_home(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports_of(path)}
    for package, homes in HOMES.items():
        assert package not in roots or relative(path).startswith(homes), f"{relative(path)} imports {package}"
    if relative(path).startswith(WITHOUT_TORCH):
        assert "torch" not in roots, f"{relative(path)} imports torch"


@pytest.mark.parametrize("package", ["faiss", "flash_attn", "fastapi"])
def test_one_module_alone_imports(package: str) -> None:
    users = [relative(path) for path in FILES if package in {name.split(".")[0] for name in imports_of(path)}]
    assert len(users) <= 1, f"{package} is imported in {users}"


@pytest.mark.parametrize("module", ["rlt_retrieval", "rlt_retrieval.cli", "rlt_retrieval.eval"])
def test_light_imports_stay_light(module: str) -> None:
    """`--help` must not wait for torch; nor must an evaluation of two arrays."""
    code = f"import sys, {module}; print(sorted({{'torch', 'open_clip', 'faiss', 'av'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_public_names_resolve_and_unknown_ones_do_not() -> None:
    for name in rlt_retrieval.__all__:
        assert getattr(rlt_retrieval, name).__name__ == name
        assert name in dir(rlt_retrieval)
    with pytest.raises(AttributeError, match="has no attribute 'VideoModel'"):
        rlt_retrieval.VideoModel  # noqa: B018

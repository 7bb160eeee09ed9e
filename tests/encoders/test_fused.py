"""The fused tokenizer against the plain one, bit by bit, through Triton's interpreter on the CPU.

Shapes: B clips, T frames, H x W pixels.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

CASES = [
    {"tubelet_size": tubelet, "reference": reference, "refresh_every": every}
    for tubelet in (1, 2)
    for reference in ("previous", "anchor")
    for every in (0, 1, 2, 3)
]

# Triton decides when it is imported whether it interprets kernels, so that a process of its own must ask for it.
CHECK = """
import json, sys
import torch
from small_models import repeating_frames
from rlt_retrieval import RunLengthTokenizer, pack
from rlt_retrieval.encoders.fused import tokenize_on_device

def check(frames_BTCHW, tokenizer):
    seen = tokenize_on_device(frames_BTCHW, tokenizer)
    expected = pack([tokenizer(clip) for clip in frames_BTCHW])
    for name in ("patches", "positions", "run_lengths", "cu_seqlens"):
        a, b = getattr(seen, name), getattr(expected, name)
        assert a.dtype == b.dtype and torch.equal(a, b), (name, tokenizer)
    assert (seen.max_seqlen, seen.grids, seen.coverings) == (expected.max_seqlen, expected.grids, expected.coverings)

for settings in json.loads(sys.argv[1]):  # patches of 3 x 3: no power of two
    clips = [repeating_frames(7, change, seed, 6, 3) for seed, change in enumerate((0.0, 0.3, 1.0))]
    check(torch.stack(clips)[..., :3, :].contiguous(), RunLengthTokenizer(3, **settings))
"""
EDGES = """
k = 51  # sums of 229 k, 224 k, 225 k differ by exactly 0.78125: a repetition
frames = torch.zeros(1, 2, 3, 16, 16, dtype=torch.uint8)
for channel, total in enumerate((229 * k, 224 * k, 225 * k)):
    frames[0, 1, channel].flatten()[:] = total // 256
    frames[0, 1, channel].flatten()[: total % 256] += 1
for extra, kept in ((0, 1), (1, 2)):
    frames[0, 1, 2, 15, 15] += extra
    assert tokenize_on_device(frames, RunLengthTokenizer(16, 1, 0.78125)).num_tokens == kept
fade = (64 + torch.arange(40, dtype=torch.uint8)).reshape(1, 40, 1, 1, 1).expand(1, 40, 3, 2, 4).contiguous()
for reference in ("previous", "anchor"):
    for threshold in (-1.0, 0.0, 0.1):
        check(fade, RunLengthTokenizer(2, 1, threshold, reference, 8))
check(frames[:, :1].contiguous(), RunLengthTokenizer(8))  # a single frame
for frames, message in (
    (torch.zeros(1, 2, 3, 4, 5, dtype=torch.uint8), "multiples of the patch size 2"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "expected uint8 [B, T, 3, H, W]"),
    (torch.zeros(1, 2, 3, 4, 4), "torch.float32"),
    (torch.zeros(1, 2, 3, 4, 4, dtype=torch.uint8).transpose(3, 4)[..., :2, :], "not contiguous"),
):
    try:
        tokenize_on_device(frames, RunLengthTokenizer(2))
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
"""


# Kernels must compile for a GPU too, which the interpreter does not check; that needs no GPU.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rlt_retrieval.encoders import fused

pointers = {"runs": "*i32", "starts": "*i32", "changed_before": "*i32", "changed_now": "*i32", "ends": "*i64"}
pointers |= {"positions": "*i32", "run_lengths": "*i32", "frames": "*u8", "kept": "*u8", "patches": "*u8"}

def compiled(kernel, **constants):
    types = {**pointers, "limit": "i64", **dict.fromkeys(constants, "constexpr")}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": fused._WARPS})

for is_anchor in (True, False):
    for tubelet in (1, 2):
        for first in ({}, {"first": 1}):  # Triton makes an argument of 1 a constant
            compared = tubelet if is_anchor else 1
            sizes = {"TUBELET": tubelet, "PATCH": 14, "BLOCK": 1024 * compared}
            compiled(fused._mark_kernel, IS_ANCHOR=is_anchor, COMPARED=compared, **sizes, **first)
assert compiled(fused._gather_kernel, TUBELET=1, PATCH=16, BLOCK=1024).asm["ptx"]
"""


def run_apart(code: str, *arguments: str, interpret: bool = True) -> None:
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=tests,
        env={**os.environ, "TRITON_INTERPRET": str(int(interpret)), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr


def test_tokens_are_bit_equal_to_the_plain_tokenizers() -> None:
    """Odd last frames, refreshes at the very end, patches that are no power of two, still clips among moving ones."""
    run_apart(CHECK, json.dumps(CASES))


def test_exact_differences_slow_fades_and_frames_of_another_kind() -> None:
    run_apart(CHECK + EDGES, "[]")


def test_the_kernels_compile_for_a_gpu() -> None:
    run_apart(COMPILE, interpret=False)

"""The list of models: which are supported and why not, and sizes and costs against open_clip's own modules."""

import re
from pathlib import Path

import open_clip
import pytest
import torch
from small_models import small_config
from torch.utils.flop_counter import FlopCounterMode

from rlt_retrieval.encoders.towers import adapt_tower
from rlt_retrieval.encoders.towers.building import check_backbone, skeleton
from rlt_retrieval.encoders.towers.catalogue import (
    ModelRow,
    describe_model,
    gflops_a_frame,
    list_models,
)
from rlt_retrieval.errors import ModelError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.fixture(scope="module")
def rows() -> dict[str, ModelRow]:
    return {row.name: row for row in list_models()}


def test_every_model_has_a_row_and_all_weights_their_tag(rows: dict[str, ModelRow]) -> None:
    assert list(rows) == open_clip.list_models()
    tags = {(row.name, tag.name) for row in rows.values() for tag in row.tags}
    assert tags == set(open_clip.list_pretrained())


@pytest.mark.parametrize(
    "family", ["ViT-B", "ViT-L", "ViT-H", "ViT-bigG", "coca_", "EVA0", "PE-Core", "ViT-gopt", "MobileCLIP2-L"]
)
def test_whole_families_are_supported(family: str, rows: dict[str, ModelRow]) -> None:
    names = [name for name in rows if name.startswith(family)]
    assert names
    assert [rows[name].reason for name in names] == [""] * len(names)


def test_only_what_is_no_plain_vit_is_not(rows: dict[str, ModelRow]) -> None:
    refused = {name for name, row in rows.items() if not row.supported}
    kinds = (
        "RN",
        "convnext",
        "ViTamin",
        "MobileCLIP-",
        "MobileCLIP2-S",
        "MobileCLIP2-B",
        "swin",
        "vit_relpos",
    )
    assert {name for name in refused if not name.startswith(kinds)} == {
        "ViT-SO400M-14-SigLIP-384",
        "nllb-clip-large-siglip",
    }


def test_the_list_says_what_create_says(rows: dict[str, ModelRow]) -> None:
    for name in ("RN50", "convnext_base", "ViTamin-B", "MobileCLIP-B", "ViT-SO400M-14-SigLIP-384"):
        with pytest.raises(ModelError) as caught:
            check_backbone(open_clip.get_model_config(name))
        assert str(caught.value) == rows[name].reason
    for name in (
        "ViT-B-16",
        "ViT-B-16-SigLIP2",
        "PE-Core-T-16-384",
        "EVA02-B-16",
        "vit_medium_patch16_gap_256",
    ):
        check_backbone(open_clip.get_model_config(name))


@pytest.mark.parametrize("name", ["ViT-S-16-alt", "PE-Core-T-16-384"])
def test_parameters_are_those_of_the_model(name: str) -> None:
    clip = open_clip.create_model(name)
    row = describe_model(name)
    visual = sum(parameter.numel() for parameter in clip.visual.parameters()) / 1e6
    assert row.image_parameters == pytest.approx(visual)
    text = clip.text if hasattr(clip, "text") else clip
    total = sum(parameter.numel() for parameter in text.parameters()) / 1e6
    expected = total - visual if text is clip else total
    assert row.text_parameters == pytest.approx(expected, rel=1e-4)  # logit_scale


@pytest.mark.parametrize(
    "name", ["ViT-B-16", "ViT-B-16-SigLIP", "ViT-L-14-336", "PE-Core-T-16-384", "EVA02-B-16", "coca_ViT-B-32"]
)
def test_the_formula_counts_what_torch_counts_but_the_head(name: str) -> None:
    visual = skeleton(open_clip.get_model_config(name)).visual
    height, width = visual.image_size
    with FlopCounterMode(display=False) as counter:
        visual.train()(torch.empty(1, 3, height, width, device="meta"))
    formula = gflops_a_frame(adapt_tower(visual))
    assert 1 <= counter.get_total_flops() / 1e9 / formula <= 1.05


def test_the_formula_by_hand() -> None:
    """Width 32, 17 rows, MLP of 64, two layers: worked out matrix by matrix."""
    visual = skeleton(small_config()).visual
    embedding = 2 * 16 * (32 * 3 * 8 * 8)
    block = 2 * 17 * (3 * 32 * 32 + 32 * 32 + 2 * 32 * 64) + 2 * 2 * 17 * 17 * 32
    assert gflops_a_frame(adapt_tower(visual)) == pytest.approx((embedding + 2 * block) / 1e9)


def test_a_row_in_full(rows: dict[str, ModelRow]) -> None:
    row = rows["ViT-B-16-SigLIP2-384"]
    assert (row.patch, row.image_size, row.embedding, row.needs_siglip_extra) == (16, (384, 384), 768, True)
    assert row.tags[0].source == "timm/ViT-B-16-SigLIP2-384"
    openai = rows["ViT-B-16"]
    assert not openai.needs_siglip_extra
    noted = {tag.name: tag.licence for tag in openai.tags}
    assert noted["metaclip_400m"] == "cc-by-nc-4.0"
    assert noted["laion2b_s34b_b88k"] == "unknown"


def test_towers_of_transformers_are_sized_without_it(rows: dict[str, ModelRow]) -> None:
    row = rows["xlm-roberta-base-ViT-B-32"]
    assert row.supported
    assert row.needs_siglip_extra
    assert row.text_parameters is None
    assert row.gflops == rows["ViT-B-32"].gflops


def test_a_skeleton_takes_no_memory_and_no_random_number() -> None:
    before = torch.random.get_rng_state()
    visual = skeleton(open_clip.get_model_config("EVA02-E-14")).visual
    assert {parameter.device.type for parameter in visual.parameters()} == {"meta"}
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_table_of_the_page_is_the_list(rows: dict[str, ModelRow]) -> None:
    lines = re.findall(r"^\| `([^`*]+)` \| (\d+) / (\d+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert len(lines) > 20
    for name, pixels, patch, facts in lines:
        row = rows[name]
        tags = row.tags[0].name + (" …" if len(row.tags) > 1 else "")
        assert (row.image_size, row.patch) == ((int(pixels), int(pixels)), int(patch))
        parameters = f"{row.image_parameters:.0f} | {row.text_parameters:.0f}"
        assert facts == f"{parameters} | {row.gflops:.1f} | {row.embedding} | {tags}"

"""Published results that reports stand beside: percent as printed, each with its source."""

from typing import NamedTuple


class Ek100Row(NamedTuple):
    """EPIC-KITCHENS-100 multi-instance retrieval, test split; mAP and nDCG are means of both directions."""

    model: str
    mean_average_precision: str
    ndcg: str
    source: str


class MsrvttRow(NamedTuple):
    """MSR-VTT, 1k-A test set, text to video."""

    model: str
    recall_at_1: str
    recall_at_5: str
    recall_at_10: str
    median_rank: str
    mean_rank: str
    source: str


EK100_ROWS = (
    Ek100Row("random scores", "5.7", "10.9", "Damen et al., IJCV 2022"),
    Ek100Row("AVION ViT-B, from CLIP", "43.4", "59.0", "arXiv 2506.14356"),
    Ek100Row("AVION ViT-B, from CLIP, + SMS", "47.6", "61.2", "arXiv 2506.14356"),
    Ek100Row("AVION ViT-B, EgoClip pretraining", "52.0", "66.5", "arXiv 2309.16669"),
    Ek100Row("AVION ViT-L, EgoClip pretraining", "54.5", "69.0", "arXiv 2309.16669"),
    Ek100Row("AVION ViT-L + SMS", "62.1", "73.0", "arXiv 2406.12256"),
    Ek100Row("EVA02-AT-L + SMS", "63.5", "74.2", "arXiv 2506.14356"),
    Ek100Row("SMS, 2024 challenge (ensemble)", "63.76", "74.25", "arXiv 2406.12256, abstract"),
    Ek100Row("CR-CLIP (cross-modal, not a dual encoder)", "66.78", "82.08", "arXiv 2506.10550, abstract"),
)

MSRVTT_ROWS = (
    MsrvttRow(
        "CLIP4Clip ViT-B/32, meanP, Training-9K", "43.1", "70.4", "80.8", "2.0", "16.2", "arXiv 2104.08860"
    ),
    MsrvttRow(
        "CLIP4Clip ViT-B/32, seqTransf, Training-9K",
        "44.5",
        "71.4",
        "81.6",
        "2.0",
        "15.3",
        "arXiv 2104.08860",
    ),
)

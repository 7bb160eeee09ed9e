"""Write test clips of event_clips.py as a shard, for `rlt-retrieval bench reducers` and `rlt-retrieval eval`.

    python benchmarks/write_event_shards.py runs/events/clips --seed 0 --num-clips 256

The clips are evenly chosen from `held_out_clips(seed)`, so that all kinds are there, as H.264 of high quality (crf 10).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from event_clips import EventClip, held_out_clips

from rlt_retrieval.data.shards import ShardSample, write_shards
from rlt_retrieval.data.video import encode_mp4

FPS = 8
CRF = 10


def samples(clips: list[EventClip]) -> Iterator[ShardSample]:
    for index, clip in enumerate(clips):
        media = encode_mp4(clip.frames_TCHW.transpose(0, 2, 3, 1), fps=FPS, crf=CRF)
        end_seconds = len(clip.frames_TCHW) / FPS
        yield ShardSample(
            f"event-{index:04}", media, (clip.story.caption(),), f"event-{index:04}", 0.0, end_seconds
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="empty folder")
    parser.add_argument("--seed", type=int, default=0, help="of the model that did not see these clips")
    parser.add_argument("--num-clips", type=int, default=256)
    options = parser.parse_args()
    clips = held_out_clips(options.seed)
    spread = clips[:: max(1, len(clips) // options.num_clips)][: options.num_clips]
    for path in write_shards(samples(spread), options.out, samples_per_shard=options.num_clips):
        print(path)


if __name__ == "__main__":
    main()

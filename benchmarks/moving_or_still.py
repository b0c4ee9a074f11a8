"""Videos whose two classes differ in motion alone, as a data folder, with and without differences.

    python benchmarks/moving_or_still.py VIDEO --out DIR

Over pictures of VIDEO (street footage, say, of 795 frames or more) a disk appears now and then, for
3 to 6 s: it stands still, or swings from side to side. Twelve clips of a minute, eight of them with
a point for each appearance. DIR/data has the features of efficientnet-lite0, DIR/means their mean
over frames alone, without the differences between them. Then train and evaluate on either.
"""

from __future__ import annotations

import argparse
import json
import shutil
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from hrpro.clients.cameras.extraction import extract_videos
from hrpro.clients.cameras.extractor import load_extractor

CLIPS, TRAINING_CLIPS, FRAMES, RATE = 12, 8, 1500, 25
HEIGHT, WIDTH, SIDE = 288, 384, 60
BACKGROUND_FRAMES, BACKGROUND_RATE = 795, 10
MEANS = 1280  # of the features, in front of the differences

Image = NDArray[np.uint8]
Action = tuple[str, int, int, int, int]  # label, first frame, frame behind the last, x, y


def disk() -> Image:
    """What appears, (SIDE, SIDE, 3)."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    cv2.circle(image, (30, 30), 28, (230, 120, 30), -1)
    cv2.line(image, (30, 30), (30, 4), (10, 10, 120), 6)
    return image


def draw_actions(random: np.random.Generator) -> list[Action]:
    """Up to six appearances in turn, three of each class."""
    actions: list[Action] = []
    begin = int(random.integers(40, 90))
    for label in random.permutation(["moving", "still"] * 3).tolist():
        length = int(random.integers(70, 150))
        if begin + length > FRAMES - 20:
            break
        x, y = int(random.integers(80, 240)), int(random.integers(60, 180))
        actions.append((label, begin, begin + length, x, y))
        begin += length + int(random.integers(70, 130))
    return actions


def render(path: Path, pictures: list[Image], start: int, flip: bool, shown: list[Action]) -> None:
    """Write one clip."""
    sprite = disk()
    mask = sprite.any(axis=-1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.options = {"crf": "20", "preset": "ultrafast"}
        for number in range(FRAMES):
            image = pictures[(start + number * BACKGROUND_RATE // RATE) % BACKGROUND_FRAMES]
            image = (image[:, ::-1] if flip else image).copy()
            for label, begin, end, x, y in shown:
                if begin <= number < end:
                    swing = np.sin((number - begin) / RATE * 2 * np.pi) if label == "moving" else 0
                    left = x + int(60 * swing)
                    image[y : y + SIDE, left : left + SIDE][mask] = sprite[mask]
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def render_all(video: Path, folder: Path) -> tuple[dict[Path, list[Action]], list[str]]:
    """All clips with what appears in them, and the lines of the points."""
    folder.mkdir(parents=True)
    with av.open(str(video)) as container:
        decoded = islice(container.decode(video=0), BACKGROUND_FRAMES)
        pictures = [each.reformat(WIDTH, HEIGHT, "rgb24").to_ndarray() for each in decoded]
    random = np.random.default_rng(0)
    clips: dict[Path, list[Action]] = {}
    rows = ["class,video_id,point"]
    for number in range(CLIPS):
        path = folder / f"clip{number:02d}.mp4"
        start = int(random.integers(0, BACKGROUND_FRAMES))
        clips[path] = draw_actions(random)
        render(path, pictures, start, bool(number % 2), clips[path])
        if number < TRAINING_CLIPS:
            for label, begin, end, *_ in clips[path]:
                inside = random.uniform(begin + 0.2 * (end - begin), begin + 0.8 * (end - begin))
                rows.append(f"{label},{path.stem},{int(inside)}")
    return clips, rows


def add_labels(data: Path, clips: dict[Path, list[Action]], rows: list[str]) -> None:
    """Add points and annotations to a data folder."""
    content = json.loads((data / "gt_full.json").read_text())
    for path, actions in clips.items():
        content["database"][path.stem]["annotations"] = [
            {"label": label, "segment": [begin / RATE, end / RATE]}
            for label, begin, end, *_ in actions
        ]
    (data / "gt_full.json").write_text(json.dumps(content))
    (data / "point_labels").mkdir()
    (data / "point_labels" / "points.csv").write_text("\n".join(rows) + "\n")


def main() -> None:
    """Render, extract, label."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    data, means = arguments.out / "data", arguments.out / "means"
    clips, rows = render_all(arguments.video, arguments.out / "videos")
    extractor, videos = load_extractor("efficientnet-lite0"), list(clips)
    extract_videos(videos[:TRAINING_CLIPS], extractor, data, "train", lambda _: None)
    extract_videos(videos[TRAINING_CLIPS:], extractor, data, "test", lambda _: None)
    add_labels(data, clips, rows)
    shutil.copytree(data, means, ignore=shutil.ignore_patterns("features.json"))
    for path in (means / "features").rglob("*.npy"):
        np.save(path, np.load(path, allow_pickle=False)[:, :MEANS])


if __name__ == "__main__":
    main()

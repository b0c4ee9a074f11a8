"""Videos to try everything with: a figure that stands, waves and jumps at known times.

    python stick_figure.py FOLDER [VIDEOS] [SECONDS]

writes FOLDER/clip1.mp4, clip2.mp4, ... and FOLDER/truth.csv with what happens when. It needs the
packages av and pillow, which `make setup` installs.
"""

from __future__ import annotations

import csv
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import av
from PIL import Image, ImageDraw

WIDTH, HEIGHT, FRAMES_PER_S = 320, 240, 25


class Scene(NamedTuple):
    """What the figure does, from when to when."""

    action: str
    start_s: float
    end_s: float


def scenes(seconds: float, chance: random.Random) -> Iterator[Scene]:
    """Standing and an action in turn, and standing at the end."""
    now_s = 0.0
    while True:
        begin_s = now_s + chance.uniform(2.5, 5.0)
        end_s = begin_s + chance.uniform(2.5, 4.5)
        if end_s + 1.0 > seconds:
            yield Scene("stand", now_s, seconds)
            return
        yield Scene("stand", now_s, begin_s)
        yield Scene(chance.choice(("wave", "jump")), begin_s, end_s)
        now_s = end_s


def draw(action: str, time_s: float, x: float, colours: list[tuple[int, int, int]]) -> Image.Image:
    """The figure at a moment of its action."""
    image = Image.new("RGB", (WIDTH, HEIGHT), colours[0])
    pen = ImageDraw.Draw(image)
    pen.rectangle((0, 200, WIDTH, HEIGHT), fill=colours[1])
    turn = 2 * math.pi * time_s
    lift = 45 * abs(math.sin(turn * 0.9)) if action == "jump" else 0
    sway = 2 * math.sin(turn * 0.3)
    hip, neck = (x + sway, 150 - lift), (x + sway, 95 - lift)
    spread = 20 + (14 if action == "jump" else 0)
    limbs = [(hip, (x - spread, 200 - lift)), (hip, (x + spread, 200 - lift)), (hip, neck)]
    up = math.radians(60 + 35 * math.sin(turn * 1.6)) if action == "wave" else math.radians(-60)
    down = math.radians(35 if action == "jump" else -60)
    limbs.append((neck, (neck[0] + 50 * math.cos(up), neck[1] + 12 - 50 * math.sin(up))))
    limbs.append((neck, (neck[0] - 50 * math.cos(down), neck[1] + 12 - 50 * math.sin(down))))
    for begin, end in limbs:
        pen.line((begin, end), fill=colours[2], width=7)
    pen.ellipse((neck[0] - 16, neck[1] - 34, neck[0] + 16, neck[1] - 2), fill=colours[2])
    return image


def write_video(file: Path, seconds: float, seed: int) -> list[Scene]:
    """A clip of one figure; what it does."""
    chance = random.Random(seed)
    played = list(scenes(seconds, chance))
    x = chance.uniform(120, 200)
    colours = [tuple(chance.randint(low, low + 60) for _ in range(3)) for low in (180, 110, 10)]
    with av.open(str(file), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_S)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for index in range(round(seconds * FRAMES_PER_S)):
            time_s = index / FRAMES_PER_S
            action = next((each.action for each in played if time_s < each.end_s), "stand")
            frame = av.VideoFrame.from_image(draw(action, time_s, x, colours))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return [each for each in played if each.action != "stand"]


def main(folder: Path, videos: int = 5, seconds: float = 60.0) -> None:
    """Clips, and a table of what happens in them."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "truth.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["video", "action", "start_s", "end_s"])
        for number in range(1, videos + 1):
            name = f"clip{number}"
            for each in write_video(folder / f"{name}.mp4", seconds, seed=number):
                rows.writerow([name, each.action, f"{each.start_s:.2f}", f"{each.end_s:.2f}"])


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))

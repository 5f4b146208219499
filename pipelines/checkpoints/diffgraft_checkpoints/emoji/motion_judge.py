"""The judge of clips: the judge of pictures on every frame, and the way that the object's centre goes.

Object, background and size are what the judge of pictures finds most likely over all frames together. The motion is measured
without a network: whatever differs from the background is the object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image

from . import judge as pictures
from . import motion

FIELDS = ("object", "background", "size", "motion")
UNCLEAR = "unclear"
"""The motion of an object that is not seen, or goes slantwise, back and forth, or by a jump."""

VISIBLE = 48
"""Sum over the colours of the difference to the background (0..765) from which a pixel belongs to the object."""
MOVING = 5.0
"""Pixels between the first and the last frame from which an object moves; rendered ones move by 13 and more."""
SLANT = 0.5
"""Largest ratio of the way across to the way along."""
EVEN = 0.2
"""Least share of the way in each half of the clip."""

Video = Sequence[Image.Image] | np.ndarray
"""Frames as pictures, or an array (frames, height, width, 3), uint8 or 0..1."""


class MotionJudge:
    """Scores clips against their prompts, as `judge.Judge` scores pictures."""

    def __init__(self, judge: pictures.Judge) -> None:
        self.judge = judge

    def predict(self, videos: Sequence[Video]) -> list[dict[str, str]]:
        """What each clip shows: an object (may be "other"), a background, a size, a motion (may be "unclear")."""
        return [self._predict(to_frames(video)) for video in videos]

    @torch.no_grad()
    def _predict(self, frames: list[Image.Image]) -> dict[str, str]:
        logits = self.judge.net(pictures.to_batch(frames))
        classes = self.judge.config.classes
        still = {name: classes[name][int(logits[name].log_softmax(1).mean(0).argmax())] for name in FIELDS if name != "motion"}
        return {**still, "motion": motion_of(motion.to_array(frames))}

    def score(self, videos: Sequence[Video], prompts: Sequence[str]) -> dict[str, list[bool | None]]:
        """For each field and clip: is it as the prompt says? `None` where the prompt does not say."""
        if len(videos) != len(prompts):
            raise ValueError(f"{len(videos)} videos but {len(prompts)} prompts; give one prompt for each video")
        wanted = [asdict(motion.parse_motion(prompt)) for prompt in prompts]
        seen = self.predict(videos)
        return {
            name: [None if want[name] is None else want[name] == have[name] for want, have in zip(wanted, seen, strict=True)]
            for name in FIELDS
        }


def load_bundled() -> MotionJudge:
    """The judge of clips with the network that ships with the bundled `emoji-sd`."""
    return MotionJudge(pictures.load_bundled())


def to_frames(video: Any) -> list[Image.Image]:
    """A `Video` as pictures."""
    if isinstance(video, np.ndarray):
        whole = video if video.dtype == np.uint8 else (video.clip(0, 1) * 255).round().astype(np.uint8)
        return [Image.fromarray(frame) for frame in whole]
    return [frame.convert("RGB") for frame in video]


def center_of(frame: np.ndarray) -> np.ndarray | None:
    """(x, y) of the middle of what differs from the median colour of the border, in pixels; `None`: nothing does."""
    border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    visible = np.abs(frame.astype(int) - np.median(border, axis=0)).sum(axis=-1) > VISIBLE
    if not visible.any():
        return None
    y, x = np.nonzero(visible)
    return np.array([x.mean(), y.mean()])


def motion_of(frames: np.ndarray) -> str:
    """The motion word for (frames, height, width, 3) uint8, by the object's centres in the first, middle and last frames."""
    centers = [center_of(frames[i]) for i in (0, len(frames) // 2, -1)]
    if any(center is None for center in centers):
        return UNCLEAR
    first, middle, last = (np.asarray(center) for center in centers)
    way = last - first
    if np.linalg.norm(way) < MOVING:
        return "still" if np.linalg.norm(middle - first) < MOVING else UNCLEAR
    axis = int(np.abs(way).argmax())
    half = (middle - first)[axis] / way[axis]
    if abs(way[1 - axis]) > SLANT * abs(way[axis]) or not EVEN <= half <= 1 - EVEN:
        return UNCLEAR
    direction = [0, 0]
    direction[axis] = int(np.sign(way[axis]))
    return next(name for name, each in motion.MOTIONS.items() if each == tuple(direction))

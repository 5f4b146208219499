"""The judge of edits: is what the instruction names as it asks? What was to be kept is not judged, as the picture before is not known."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from . import edits
from .judge import FIELDS, Judge
from .judge import load_bundled as load_pictures


class EditJudge:
    """`emoji-sd`'s judge, reading instructions instead of captions."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[bool | None]]:
        """For each field and picture: is it as the instruction asks? `None` where the instruction is about another field."""
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} instructions; give one for each image")
        wanted = [edits.asked(prompt) for prompt in prompts]
        seen = self.judge.predict(images)
        return {
            name: [have[name] == value if field == name else None for (field, value), have in zip(wanted, seen, strict=True)]
            for name in FIELDS
        }


def load_bundled() -> EditJudge:
    """With the network that ships with the bundled `emoji-sd`."""
    return EditJudge(load_pictures())

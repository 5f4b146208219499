"""The captions of single objects as a distribution that is known exactly: every caption with its probability."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from itertools import product

from . import scenes


@lru_cache(maxsize=1)
def captions() -> dict[str, float]:
    """Caption -> probability: a template as often as in training (`scenes.TEMPLATES`), and in it every object, background, size and place
    that it names as likely as any other, held-out combinations too. The probabilities add up to 1."""
    found: dict[str, float] = defaultdict(float)
    for template, share in scenes.TEMPLATES:
        said = list(product(*(values if named(name, template) else [None] for name, values in VALUES.items())))
        for object_, background, size, place in said:
            found[scenes.fill(template, scenes.Labels(str(object_), background, size, place))] += share / len(said)
    return dict(found)


VALUES: dict[str, tuple[str, ...]] = {
    "object": tuple(scenes.OBJECTS), "background": tuple(scenes.BACKGROUNDS), "size": tuple(scenes.SIZES), "place": tuple(scenes.PLACES),
}  # fmt: skip


def named(name: str, template: str) -> bool:
    """Whether captions of this template say the size, the place..."""
    return f"{{{name}}}" in template or (name == "place" and "{phrase}" in template)


def template_of(caption: str) -> str:
    """The template that a caption of the grammar was made from.

    Raises:
        ValueError: it is no caption of the grammar.
    """
    if caption not in captions():
        raise ValueError(f"{caption!r} is not one of the {len(captions())} captions of the grammar")
    labels = scenes.parse_caption(caption)
    return next(template for template, _ in scenes.TEMPLATES if scenes.fill(template, labels) == caption)

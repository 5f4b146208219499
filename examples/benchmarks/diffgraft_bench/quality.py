"""Fidelity and quality of a set of pictures: to the plain pipeline's, to those of many steps, and by the judge."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffgraft.lab.judging import all_right, as_seen, load_judge
from diffgraft.lab.metrics import Share, psnr, share, ssim
from diffgraft.methods.files import write_atomic
from diffgraft.methods.fitness import frechet
from diffgraft.methods.inputs import Pictures
from safetensors.torch import load_file

from .models import BundledModel

if TYPE_CHECKING:
    from .bout import How

LPIPS_WEIGHTS = "alexnet-owt-7be5be79.pth"
TRUE_FEATURES = Path(__file__).with_name("true-features.safetensors")
"""What `python -m diffgraft_bench truth` makes."""


class Quality:
    """What pictures of one pipeline are held against."""

    def __init__(self, model: BundledModel, plain: Pictures, reference: Pictures) -> None:
        self.model, self.plain, self.reference = model, plain, reference
        self.prompts = [sample.wanted or "" for sample in model.samples]
        self.judge: Any = load_judge(model.bundled)
        self.features = getattr(self.judge, "features", None)
        self.truth = load_file(TRUE_FEATURES)["features"].float() if self.features else None
        self.plain_right = self.right([as_seen(frames) for frames in plain])

    @classmethod
    def of(cls, model: BundledModel, how: How, distilled: bool) -> Quality:
        """The plain pipeline's pictures are made once for all processes."""
        many = model.steps if distilled else max(how.reference_steps, model.steps)
        return cls(model, kept(model, how, model.steps), kept(model, how, many))

    def figures(self, made: Pictures) -> dict[str, Any]:
        """The columns of a row; PSNR of equal pictures is left out of the mean."""
        ratios, errors = psnr(made, self.plain), psnr(made, self.reference)
        similar = ssim(made, self.plain)
        row: dict[str, Any] = {
            "identical": sum(math.isinf(r) for r in ratios),
            "psnr": [r if math.isfinite(r) else None for r in ratios],
            "psnr_reference": [r if math.isfinite(r) else None for r in errors],
            "psnr_mean": mean(ratios),
            "psnr_reference_mean": mean(errors),
            "ssim_mean": None if similar is None else statistics.mean(similar),
            "lpips_mean": lpips(made, self.plain),
        }
        images = [as_seen(frames) for frames in made]
        if (found := self.right(images)) is not None and self.plain_right is not None:
            row |= {"right": found.right, "judged": found.total, "right_low": found.low, "right_high": found.high}
            row["plain_right"] = self.plain_right.right
        if self.features is not None and self.truth is not None:
            row["likelihood"] = statistics.mean(self.judge.likelihood(images, self.prompts))
            row["frechet"] = frechet(self.features(images), self.truth)
        return row

    def right(self, images: Sequence[Any]) -> Share | None:
        """How many pictures show what their prompts say; None without a judge."""
        return None if self.judge is None else share(all_right(self.judge.score(images, self.prompts)))


def mean(values: Sequence[float]) -> float | None:
    """Mean of the finite ones."""
    finite = [value for value in values if math.isfinite(value)]
    return statistics.mean(finite) if finite else None


def kept(model: BundledModel, how: How, steps: int) -> Pictures:
    """The plain pipeline's pictures with so many steps."""
    path = model.kept / f"{model.name}-{steps}-steps-{how.samples}.npz"
    if not path.exists():
        buffer = io.BytesIO()
        np.savez(buffer, pictures=model.pictures(model.pipe, steps, how.batch))
        write_atomic(path, buffer.getvalue())
    found: Pictures = np.load(path)["pictures"]
    return found


def render_true_features(judge: Any) -> torch.Tensor:
    """The judge's features [n, d] of true pictures of the held-out captions. Needs the emoji font, so `TRUE_FEATURES` holds them."""
    from diffgraft_checkpoints.train.evaluate import held_out_labels, renders

    found: torch.Tensor = judge.features(renders(held_out_labels(), 1))
    return found


def lpips(made: Pictures, reference: Pictures) -> float | None:
    """LPIPS (AlexNet), where its backbone's weights are on this machine: it is not fetched for a benchmark."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / LPIPS_WEIGHTS).exists():
        return None
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as distance

    def batch(x: Pictures) -> torch.Tensor:
        return torch.from_numpy(x).flatten(0, 1).permute(0, 3, 1, 2)

    return float(distance(batch(made), batch(reference), net_type="alex", normalize=True))

"""E[x_0] and tr Cov[x_0] / d: what is measured, how it is kept, and how it is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from diffgraft import Calibrator, ConfigError, Effects, StepCall, StepOutput, denoisers_of, find_family
from diffgraft.methods.artefacts import Artefact, MadeFor
from diffgraft.methods.layouts import Layout
from diffgraft.methods.schema import Holds, Values
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_cil_start.knobs import PAPER, CilStartConfig
from diffgraft_cil_start.method import Moments, Sums

FEW = 32
"""Clips below which the report says that they are few."""


class Facts(TypedDict):
    """Of an artefact."""

    clips: Annotated[int, Field(ge=1)]
    shape: list[int]


def other_shape(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the mean's shape, which is that of any pipeline's latents, or None."""
    found, said = list(tensors["mean"].shape), facts["shape"]
    return None if found == said else f"the tensor 'mean' has shape {found}, and its fact shape is {said}"


HOLDS = Holds({"mean": Values((...,)), "trace": Values((), low=0)}, Facts, other_shape)
PUBLISHED = Layout(
    {"Expectation_x_0": ("f", "c", "h", "w"), "trCov_d": ()},
    reshapes={"Expectation_x_0": (1, "f", "c", "h", "w"), "trCov_d": (1,)},
    small={"f": 3, "c": 4, "h": 4, "w": 4},
)
"""The authors' files for Stable Video Diffusion (``initial_noise_512.pt``), by the keys that their code reads."""


@dataclass
class Seen:
    """The clean samples of a run."""

    sums: Sums | None = None


class Measure(Calibrator):
    """Sums over the clean samples that the pipeline makes, in the layout of its latents."""

    name = "cil_start_calibration"
    paper = PAPER
    Config = CilStartConfig
    State = Seen
    effects = Effects()

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)
        if call.step.is_last:
            call.shared.sums = Sums.of(out.sample)
        return out

    def collect(self, call: Any) -> dict[str, Tensor]:
        return dict(call.shared.sums._asdict())

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return found([Sums(**record) for record in records])


def found(sums: Iterable[Sums]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, facts) of an artefact.

    Raises:
        ConfigError: of numbers that are not finite.
    """
    first, *others = sums
    for each in others:
        first = first.plus(each)
    mean, trace = first.moments()
    if not (mean.isfinite().all() and trace.isfinite()):
        raise ConfigError("plugin 'cil_start': the latents hold numbers that are not finite")
    return {"mean": mean.float(), "trace": trace.float()}, {"clips": int(first.count), "shape": list(mean.shape)}


def measured_on(pipe: Any, latents: Iterable[Tensor]) -> Artefact:
    """The artefact of real clips or pictures, as the paper measures it; :meth:`Artefact.save` writes it.

    Args:
        pipe: the pipeline that it is for.
        latents: clean latents, one clip or picture each, as the pipeline's denoising loop has them without the batch: of the size and the
            number of frames of your calls, scaled as the autoencoder's config says. ``diffgraft.methods.decoding.to_latents`` makes them of
            pixels for most pipelines.

    Raises:
        ConfigError: fewer than two, of different shapes, or not finite.
    """
    sums: Sums | None = None
    for each in latents:
        new = Sums.of(each[None])
        if sums is not None and new.total.shape != sums.total.shape:
            raise ConfigError(
                f"plugin 'cil_start': latents of {tuple(new.total.shape)} after some of {tuple(sums.total.shape)}; all of one size, please"
            )
        sums = new if sums is None else sums.plus(new)
    if sums is None or sums.count < 2:
        raise ConfigError("plugin 'cil_start': mean and variance are measured on two clips at least; a few hundred are worth something")
    tensors, facts = found([sums])
    family = find_family(type(pipe))
    denoisers = denoisers_of(pipe, family)
    shape = list(tensors["mean"].shape)  # and as the denoiser gets it: with the channels of a start picture
    axis = family.channel_axis - 1 if family.channel_axis > 0 else -1
    shape[axis] = int(denoisers[family.denoisers[0]].config["in_channels"])  # type: ignore[index]
    return Artefact(MadeFor.describe("cil_start", pipe, pipe.scheduler, denoisers, 0, tuple(shape)), tensors, facts)


def moments_of(artefact: Any, published: Any) -> Moments | None:
    """What a run was given; None where it was given nothing.

    Raises:
        ConfigError: a variance below 0.
    """
    if artefact is not None:
        return Moments(artefact.tensors["mean"], artefact.tensors["trace"])
    if published is not None:
        if published.tensors["trCov_d"] < 0:
            raise ConfigError(f"plugin 'cil_start': published: trCov_d = {float(published.tensors['trCov_d']):.4g} is no variance")
        return Moments(published.tensors["Expectation_x_0"].float(), published.tensors["trCov_d"].float())
    return None

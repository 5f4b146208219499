"""One pipeline called again: interrupted, with other steps, sizes, batches, strengths, guidance. Each must equal a fresh one's."""

from __future__ import annotations

from typing import Any

from diffgraft.testing.case import check
from diffgraft.testing.runs import counting
from diffgraft.testing.setting import ANOTHER, STEPS, USUAL, Setting
from diffgraft.testing.subject import Subject, distance, refused, rounding
from diffgraft.testing.tiny import denoisers
from diffgraft.testing.trace import expect_same_trace, trace

PAIR = Setting(samples=(0, 1))


class Stop(Exception):
    """Raised from inside the denoiser."""


class Interrupt(KeyboardInterrupt):
    """Ctrl-C in the middle of a run."""


def break_off(s: Subject, pipe: Any, error: BaseException) -> None:
    """Raise ``error`` from inside the denoiser after six tenths of a run's layer calls; it must arrive at the caller."""
    with refused(type(error), f"{type(error).__name__} from inside the denoiser did not arrive at the caller"):
        with counting(denoisers(pipe, s.family), max(1, int(0.6 * s.fresh().leaves)), error):
            s.run(pipe, ANOTHER)


def interrupted(s: Subject, error: BaseException) -> None:
    """End a run in mid-denoiser; the pipeline must be as between runs, and the next runs like fresh ones."""
    pipe = s.make()
    base = type(pipe)
    modules = not s.stays and not s.family.guidance.bound  # such a pipeline's own processors stay behind
    s.run(pipe)
    before = trace(pipe, base, modules)
    s.attach(pipe)
    break_off(s, pipe, error)
    assert not pipe.plugins.report().completed, "the report calls the broken run completed"
    expect_same_trace(before, trace(pipe, base, modules), "after the broken run")
    s.expect_fresh(pipe, s.other_size or USUAL, "the run after the broken one, at another size")
    s.expect_fresh(pipe, what="the next run")


@check("kind")
def exception(s: Subject) -> None:
    """An exception in mid-run arrives, and clean runs at another and at the same size follow (diffusers E2, E2b; sglang PR #17140)."""
    interrupted(s, Stop("in mid-run"))


@check("kind")
def interrupt(s: Subject) -> None:
    """The same with KeyboardInterrupt, the next run at once at the same size (diffusers E2)."""
    pipe = s.attach(s.make())
    break_off(s, pipe, Interrupt())
    s.expect_fresh(pipe, what="the run after Ctrl-C")


@check("main")
def steps_change(s: Subject) -> None:
    """Steps 4 -> 7 -> 4 (MagCache E17; sglang PR #16490: a warm-up run spoils the count)."""
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    s.expect_fresh(pipe, USUAL.but(num_inference_steps=7), f"7 steps after {STEPS}")
    s.expect_fresh(pipe, what=f"{STEPS} steps after 7")


@check("main", when=lambda s: s.other_size is not None)
def another_size(s: Subject) -> None:
    """Another size and back (sglang PR #17140: the next request with another size fails)."""
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    s.expect_fresh(pipe, s.other_size or USUAL, "the run at another size")
    s.expect_fresh(pipe, what="the run at the first size again")


@check("main", when=lambda s: s.supports(PAIR))
def batch_change(s: Subject) -> None:
    """Batch 1 -> 2 -> 1 (nunchaku #596, #601)."""
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    s.expect_fresh(pipe, PAIR, "batch 2 after batch 1")
    s.expect_fresh(pipe, what="batch 1 after batch 2")


@check("kind", when=lambda s: s.supports(s.several_a_prompt))
def several_a_prompt(s: Subject) -> None:
    """``num_images_per_prompt=2`` and back."""
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    s.expect_fresh(pipe, s.several_a_prompt, "two a prompt after one")
    s.expect_fresh(pipe, what="one after two a prompt")


@check("main", when=lambda s: not s.couples and s.supports(PAIR))
def sample_alone(s: Subject) -> None:
    """Sample i alone = sample i in a batch, up to the last bits of matrix products, or declared (WaveSpeed #57, vLLM-Omni PR #3473)."""
    for i in PAIR.samples:
        alone = Setting(samples=(i,))
        plain = distance(s.baseline(PAIR)[i : i + 1], s.baseline(alone))
        wanted = s.fresh(alone).output
        s.expect_near(s.fresh(PAIR).output[i : i + 1], wanted, rounding(plain, wanted), f"sample {i} in a batch against alone")


@check("main", when=lambda s: s.has_guidance and s.supports(s.unguided))
def guidance_off_on(s: Subject) -> None:
    """Guidance off, on, off (cache-dit C3: branches told apart by parity)."""
    pipe = s.attach(s.make())
    s.expect_fresh(pipe, s.unguided, "without guidance")
    s.expect_fresh(pipe, what="with guidance, after a run without")
    s.expect_fresh(pipe, s.unguided, "without guidance again")


def can_be_cut(s: Subject) -> bool:
    """Whether guidance can end in mid-run: a batch of branches halves only where the pipeline asks in each step whether it is on."""
    guidance = s.family.guidance
    return s.has_guidance and (guidance.layout != "batched" or guidance.active is not None) and s.supports(Setting(cut=1))


@check("main", when=can_be_cut)
def guidance_cut(s: Subject) -> None:
    """Guidance cut off in mid-run, as by ``SDCFGCutoffCallback`` (DeepCache: size error, the batch halves)."""
    cut = Setting(cut=1)
    s.expect_neutral(cut, "cut off in mid-run")
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER)
    s.expect_fresh(pipe, cut, "cut off in mid-run")
    s.expect_fresh(pipe, what="the run after it")


@check("every", when=lambda s: "strength" in s.facts.kwargs)
def strength(s: Subject) -> None:
    """Image-to-image strength .9 -> .6 (DeepCache reuses the previous picture's cache; pruna #50)."""
    pipe = s.attach(s.make())
    s.run(pipe, ANOTHER.but(num_inference_steps=5, strength=0.9))
    s.expect_fresh(pipe, USUAL.but(num_inference_steps=5, strength=0.6), "strength .6 after .9")

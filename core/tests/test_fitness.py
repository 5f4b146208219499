"""What a search minimises, by itself."""

from __future__ import annotations

import pytest
import torch
from diffgraft.methods.fitness import TrajectoryFitness, frechet, make_outputs
from diffgraft.methods.inputs import CallSettings, Sample
from probes import tiny


def test_frechet_distance_against_the_closed_forms():
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 5, generator=rng, dtype=torch.float64) @ torch.randn(5, 5, generator=rng, dtype=torch.float64) for n in (40, 60))
    ca, cb = a.T.cov(), b.T.cov()
    root = torch.linalg.eigvals(ca @ cb).real.clamp_min(0).sqrt().sum()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + ca.trace() + cb.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(float(wanted), rel=1e-9)
    assert frechet(b, a) == pytest.approx(frechet(a, b))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + 2) == pytest.approx(20)
    few = a[:3]  # fewer rows than features: the covariance is singular
    assert frechet(few, few + 1) == pytest.approx(5)
    assert frechet(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(float(4 * ca.trace()))


def test_a_pipeline_without_latents_is_judged_by_its_pictures(tmp_path):
    pipe = tiny("DDIMPipeline")[0]
    pipe.set_progress_bar_config(disable=True)
    fitness, settings = TrajectoryFitness(2), CallSettings(steps=2)
    fitness.prepare(pipe, [Sample(0), Sample(1)], settings, 2, tmp_path, None)
    assert fitness.reference.shape[0] == 2
    assert fitness.loss(make_outputs(pipe, [Sample(0), Sample(1)], settings, 2, True), []) == 0

"""Rotations of a layer's inputs and weights."""

from __future__ import annotations

import pytest
import torch
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.kept import keep, restore
from diffgraft.methods.quant.layers import quantised
from diffgraft.methods.quant.rotation import Rotation, hadamard
from torch import nn


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels", [1, 3, 8, 24, 160])
def test_a_rotation_is_orthogonal_and_leaves_the_product(channels):
    rotate = Rotation(channels)
    R = rotate(torch.eye(channels))
    assert torch.allclose(R @ R.T, torch.eye(channels), atol=1e-6)
    assert rotate.size == next(size for size in (32, 16, 8, 4, 2, 1) if channels % size == 0)
    x, w = seeded(5, channels), seeded(7, channels, seed=1)
    assert torch.allclose(rotate(x) @ rotate(w).T, x @ w.T, atol=1e-5)
    assert torch.equal(Rotation(channels)(x), rotate(x))


def test_hadamard_is_sylvesters():
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    eight = torch.kron(two, torch.kron(two, two)) / 8**0.5
    assert torch.allclose(hadamard(torch.eye(16), 8), torch.block_diag(eight, eight), atol=1e-6)


def test_an_outlier_channel_is_spread_and_the_layer_is_nearer():
    layer, x = nn.Linear(64, 32), seeded(50, 64)
    x[:, 3] *= 100
    grids = UniformAffine(16, "channel"), UniformAffine(8, "token")
    plain, rotated = (quantised(layer, *grids, rotation=rotation) for rotation in (None, Rotation(64)))
    errors = [float((each(x) - layer(x)).norm()) for each in (plain, rotated)]
    assert errors[1] < 0.5 * errors[0]
    off = quantised(layer, UniformAffine(16, "channel"), UniformAffine(16, "token"), rotation=Rotation(64))
    assert torch.allclose(off(x), layer(x), atol=1e-2)
    tensors, facts = keep({"k": rotated})
    other = quantised(layer, *grids, rotation=Rotation(64))
    restore({"k": other}, tensors, facts, "again")
    assert torch.equal(other(x), rotated(x))

"""emoji-text: the grammar's distribution, the exact figures, and the training from end to end on a tiny scale."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft_checkpoints.emoji import grammar, scenes
from diffgraft_checkpoints.train import common, text
from diffusers import LLaDA2Pipeline
from torch import Tensor, nn


def test_the_grammar_is_what_captions_are_drawn_from() -> None:
    known = grammar.captions()
    assert math.isclose(sum(known.values()), 1.0)
    assert len(known) == 64 * (3 * 80 + 40 + 16 + 8 + 10 + 1)
    assert math.isclose(known["a dog face"], 0.05 / 64)
    rng = np.random.default_rng(0)
    every = [*scenes.split()[0], *scenes.split()[1]]
    drawn = [scenes.caption(every[int(rng.integers(len(every)))], rng) for _ in range(4000)]
    assert set(drawn) <= set(known)
    for template, share in scenes.TEMPLATES:
        assert abs(sum(grammar.template_of(each) == template for each in drawn) / len(drawn) - share) < 0.03
    with pytest.raises(ValueError, match="is not one of the"):
        grammar.template_of("a blue dog face")


def test_every_caption_fits_and_comes_back_from_its_tokens() -> None:
    tokenizer = text.build_tokenizer()
    tokens, odds = text.encoded(tokenizer)
    assert tokens.shape == (len(odds), text.TOKENS)
    assert (tokens[:, 0] == tokenizer.bos_token_id).all()
    assert (tokens[:, -1] == tokenizer.eos_token_id).all()
    assert not (tokens == tokenizer.unk_token_id).any()
    assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == list(grammar.captions())
    model = text.build_model(tokenizer)
    assert 0.6e6 < sum(p.numel() for p in model.parameters()) < 0.8e6


class Known(nn.Module):
    """Gives the true conditional distribution of every token, from a short list of texts: what a perfect model would say."""

    def __init__(self, texts: Tensor, odds: Tensor, size: int, mask: int) -> None:
        super().__init__()
        self.texts, self.odds, self.size, self.mask = texts, odds, size, mask

    def forward(self, noisy: Tensor) -> Any:
        fits = ((noisy[:, None] == self.texts) | (noisy[:, None] == self.mask)).all(-1).double() * self.odds
        each = nn.functional.one_hot(self.texts, self.size).double()
        return SimpleNamespace(logits=torch.einsum("nt,tpv->npv", fits, each).log().float())


def test_a_perfect_model_has_no_divergence_and_one_that_knows_no_context_that_of_its_marginals(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = text.build_tokenizer()
    pairs = {f"{size} {name}": 0.0 for size, name in itertools.product(("small", "big"), ("frog", "fish", "owl"))}
    odds = dict(zip(pairs, (0.3, 0.2, 0.1, 0.1, 0.1, 0.2), strict=True))
    monkeypatch.setattr(grammar, "captions", lambda: odds)
    tokens, weights = text.encoded(tokenizer)
    perfect = Known(tokens, weights, len(tokenizer), tokenizer.mask_token_id)
    for order in (range(1, text.TOKENS), range(text.TOKENS - 1, 0, -1)):
        kl, valid = text.divergence_in_order(perfect, tokenizer, list(order))
        assert abs(kl) < 1e-6
        assert abs(valid - 1) < 1e-6
    assert abs(text.divergence_by_loss(perfect, tokenizer, 64)[0]) < 1e-5

    def alone(noisy: Tensor) -> Any:
        """The first word is as it should be, the second does not look at it."""
        return perfect(torch.full_like(noisy, tokenizer.mask_token_id))

    table = weights.view(2, 3)
    expected = float((table * (table / (table.sum(1, keepdim=True) * table.sum(0))).log()).sum())  # the mutual information
    in_order = text.divergence_in_order(alone, tokenizer, list(range(1, text.TOKENS)))
    assert math.isclose(in_order[0], expected, rel_tol=1e-4)
    mean, error = text.divergence_by_loss(alone, tokenizer, 4000)
    assert abs(mean - expected) < 4 * error < 0.1


def test_one_command_trains_resumes_exports_and_measures(tmp_path: Path, resumed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "BATCH", 4)
    monkeypatch.setattr(common, "AVERAGE_EVERY", 1)
    some = dict(list(grammar.captions().items())[::500])
    monkeypatch.setattr(grammar, "captions", lambda: some)

    def train() -> LLaDA2Pipeline:
        text.emoji_text(tmp_path, 4, 0, "cpu", samples=8)
        return text.load(tmp_path / text.NAME)

    resumed(text, "text", train, ["model"], "draw_masked")
    folder = tmp_path / text.NAME
    result = json.loads((folder / "evaluation.json").read_text())
    assert set(result["kl_nats"]) == {"left to right", "mean over orders"}
    assert list(result["samplers"]) == list(text.SAMPLERS)
    assert "scenes" not in result["recipe"]
    assert "{" not in (folder / "README.md").read_text()
    assert {path.name for path in folder.glob("*.txt")} == {"LICENSE-APACHE-2.0.txt"}

"""ZOODiP: a new word for a subject, learned on a quantised model in forward passes only (arXiv 2503.14868).

(Seo, Jeong, Lee, Chun.) Textual inversion learns one row of the text encoder's table. Here its gradient is estimated from differences of
the loss, so nothing is kept for a way back and the denoiser may be of whole numbers; directions in which the row hardly moved are left out
of the estimate, whose noise lies there, and only those timesteps are drawn that a text decides about.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from diffgraft import ArtefactMismatch, Effects, Need, Plugin, RunCall, Target
from diffgraft.methods.artefacts import make_again

from diffgraft_zoodip.fitter import HOLDS, ZerothOrder
from diffgraft_zoodip.knobs import PAPER, ZOODiPConfig
from diffgraft_zoodip.token import knowing, table_of, with_token

__all__ = ["ZOODiP"]
__version__ = "0.1.0"

TEXTS = ("prompt", "negative_prompt")


class ZOODiP(Plugin):
    name = "zoodip"
    paper = PAPER
    families = ("sd",)
    Config = ZOODiPConfig
    neutral: ClassVar[dict[str, Any]] = {"taught": False}
    active: ClassVar[dict[str, Any]] = {"word": "apple", "taught": True}
    effects = Effects(edits=frozenset({"conditioning"}))
    needs = (
        Need(
            "fit",
            "artefact",
            fits=frozenset(),
            holds=HOLDS,
            crosses="what a word means to a model moves little with its weights' roundings",
        ),
    )
    fitting = ZerothOrder
    config: ZOODiPConfig

    def check(self, target: Target) -> None:
        artefact = target.given.get("artefact")
        if artefact is None:
            return
        token, d = artefact.facts["token"], table_of(target.pipe.text_encoder).embedding_dim
        if (found := artefact.tensors[token].shape[-1]) != d:
            raise ArtefactMismatch(
                f"zoodip: the row of {token!r} has {found} numbers, this text encoder's have {d}; {make_again('zoodip', 'fit')}"
            )
        with_token(target.pipe.tokenizer, token)

    def run(self, call: RunCall, next: Any) -> Any:
        artefact = call.given("artefact")
        if artefact is None or not self.config.taught:
            call.note("inactive: no artefact, and so no new word" if artefact is None else "inactive: taught = False")
            return next(call)
        token = artefact.facts["token"]
        if self.config.word:
            call = call.replace(**{name: said(text, self.config.word, token) for name in TEXTS if (text := call.get(name)) is not None})
        if not any(token in line for name in TEXTS for line in lines(call.get(name))):
            call.note(f"inactive: no prompt holds {token!r}")
            return next(call)
        call.note(f"{token!r} was learned in {artefact.facts['fit']['steps'] if 'fit' in artefact.facts else 0} steps")
        with knowing(call.pipe, token, artefact.tensors[token].reshape(-1)):
            return next(call)


def lines(text: Any) -> list[str]:
    """The texts of an argument."""
    return [text] if isinstance(text, str) else list(text or ())


def said(text: Any, word: str, token: str) -> Any:
    """A text, or each of several, with the token in the place of a word, however it is capitalised: CLIP does not tell them apart."""
    pattern = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)
    if isinstance(text, str):
        return pattern.sub(lambda _: token, text)
    return [pattern.sub(lambda _: token, each) for each in text]

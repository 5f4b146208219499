"""One more token: a tokenizer that knows it, and an embedding that has a row for it; the pipeline's own are as they were afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffgraft import ConfigError, Unsupported
from diffgraft.methods.adapters import showing, switch
from torch import Tensor, nn


def table_of(text_encoder: Any) -> nn.Embedding:
    """The embedding of tokens.

    Raises:
        Unsupported: there is none.
    """
    table = text_encoder.get_input_embeddings() if hasattr(text_encoder, "get_input_embeddings") else None
    if not isinstance(table, nn.Embedding):
        raise Unsupported(f"zoodip: no embedding of tokens in this {type(text_encoder).__name__}")
    return table


def showing_row(text_encoder: Any, first: int, row: Tensor) -> AbstractContextManager[None]:
    """The text encoder looks ids from ``first`` on up in ``row``, which stays in its own dtype until then: [d], or
    [batch, 1, d] of each text its own."""
    table = table_of(text_encoder)
    plain = table.forward

    def forward(ids: Tensor) -> Tensor:
        new = ids >= first
        rows = plain(ids.masked_fill(new, 0))
        return torch.where(new[..., None], row.to(rows), rows)

    return showing([switch(table, "forward", forward)])


def with_token(tokenizer: Any, token: str) -> Any:
    """A copy of the tokenizer that knows the token.

    Raises:
        ConfigError: it knows it already.
    """
    new = copy.deepcopy(tokenizer)
    if token in tokenizer.get_vocab() or new.add_tokens(token) != 1:
        raise ConfigError(f"zoodip: the tokenizer knows {token!r} already (pipe.unload_textual_inversion()?); take another token")
    return new


@contextmanager
def knowing(pipe: Any, token: str, row: Tensor) -> Iterator[None]:
    """The pipeline knows ``token`` inside, with ``row`` [d]."""
    with (
        showing([switch(pipe, "tokenizer", with_token(pipe.tokenizer, token))]),
        showing_row(pipe.text_encoder, len(pipe.tokenizer) - 1, row),
    ):
        yield

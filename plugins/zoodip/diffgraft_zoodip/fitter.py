"""``diffgraft fit zoodip``: the row of a token, learned without a backward pass through anything.

The loop of a fit goes down a gradient. What it gets is L + g (e - stop(e)) with the estimated g, whose gradient is g and nothing else:
optimizer, resumption and files are those of every fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError, Fitter, ModulesCall, Unsupported
from diffgraft.methods.artefacts import Fingerprint
from diffgraft.methods.examples import Example
from diffgraft.methods.fitter import Batch
from diffgraft.methods.predictions import SignalNoise, is_flow, known_kind, prediction_target
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import layers_of, put, quantised
from diffgraft.methods.schema import Holds, Values
from torch import Tensor, nn
from typing_extensions import TypedDict

from diffgraft_zoodip.knobs import FitConfig
from diffgraft_zoodip.method import estimate, projected, shrink, still_directions
from diffgraft_zoodip.token import showing_row, table_of, with_token


class Facts(TypedDict):
    """Of what was learned: how prompts name it."""

    token: str


def wrong(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with a file, or None."""
    token = facts["token"]
    if token not in tensors:
        return f"it holds no row of its token {token!r}"
    return None if len(tensors[token]) == 1 else f"it holds {len(tensors[token])} rows of {token!r}: a token is one row here"


HOLDS = Holds({"*": Values(("n", "d"))}, Facts, wrong)
"""The token's row: what ``pipe.load_textual_inversion`` reads too."""


class Row(nn.Module):
    """e [1, d], float32; ``history`` [tau, d], its last values; ``still`` [min(tau, d), d], V and then rows of zeros."""

    history: Tensor
    still: Tensor

    def __init__(self, row: Tensor, tau: int) -> None:
        super().__init__()
        self.row = nn.Parameter(row.detach().float().reshape(1, -1).clone())
        d = self.row.shape[1]
        self.register_buffer("history", torch.zeros(tau, d, device=row.device))
        self.register_buffer("still", torch.zeros(min(tau, d), d, device=row.device))


class ZerothOrder(Fitter):
    Config = FitConfig
    wants: ClassVar[frozenset[str]] = frozenset({"pictures"})
    clip = None
    config: FitConfig
    trained: Row

    # the quantised denoiser -----------------------------------------------------------------------------------------------------------

    def modules(self, call: ModulesCall, next: Any) -> None:
        knobs = self.config
        plain = not any(Fingerprint.of(model).kept for model in call.denoisers.values())
        if plain and (knobs.weight_bits, knobs.input_bits) != (FLOAT, FLOAT):  # one that is quantised is taken as it is
            weights = None if knobs.weight_bits == FLOAT else UniformAffine(knobs.weight_bits, "channel")
            inputs = None if knobs.input_bits == FLOAT else UniformAffine(knobs.input_bits)
            for layer in layers_of(call.denoisers):
                put(call.swap, layer, quantised(layer.module, weights, inputs))
        next(call)

    # what is learned ------------------------------------------------------------------------------------------------------------------

    def build(self, probe: Any) -> nn.Module:
        pipe, family = probe.target.pipe, probe.target.family
        if is_flow(family, probe.scheduler):
            raise Unsupported("zoodip: timesteps are drawn from those of a model's training, and a flow scheduler has none")
        self.kind = known_kind(family, probe.scheduler, "zoodip")
        unet, T = probe.target.denoisers["unet"], int(probe.scheduler.config.num_train_timesteps)
        if unet.config.in_channels != unet.config.out_channels:
            raise Unsupported(
                f"zoodip: this denoiser takes {unet.config.in_channels} channels and gives {unet.config.out_channels}: what lies beside "
                "the latents (a mask, a reference picture) no example says; fit on the pipeline that makes pictures of text alone"
            )
        if self.config.last >= T:
            raise ConfigError(f"zoodip: last = {self.config.last}: this model was trained with timesteps 0 to {T - 1}")
        self.tokenizer = with_token(pipe.tokenizer, self.config.token)
        self.abar = probe.scheduler.alphas_cumprod.detach().cpu().double()
        return Row(self.first_row(pipe), self.config.tau)

    def first_row(self, pipe: Any) -> Tensor:
        """The row of the initial word, or the mean of all."""
        rows: Tensor = table_of(pipe.text_encoder).weight.detach()
        if not self.config.initial:
            return rows.float().mean(0)
        ids = pipe.tokenizer(self.config.initial, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise ConfigError(f"zoodip: initial = {self.config.initial!r} is {len(ids)} tokens of this tokenizer; give a word that is one")
        return rows[ids[0]]

    def ensure_enough(self, pipe: Any, examples: Sequence[Example], rows: Iterable[Sequence[int]]) -> None:
        if other := next((each for each in examples if each.prompt and self.config.token not in each.prompt), None):
            raise ConfigError(f"zoodip: the caption {other.prompt!r} does not name {self.config.token!r}, which is to be learned from it")
        tokenizer = with_token(pipe.tokenizer, self.config.token)
        texts = [self.caption(each) for each in examples]
        there = (ids_of(tokenizer, texts) == len(pipe.tokenizer)).any(1).tolist()
        if cut := next((text for text, is_there in zip(texts, there, strict=True) if not is_there), None):
            raise ConfigError(
                f"zoodip: the caption {cut!r} is cut off before {self.config.token!r}: {tokenizer.model_max_length} tokens are read; "
                "shorten it, or name the token earlier"
            )

    def factor(self, step: int, steps: int) -> float:
        return 1.0

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.rate, eps=1e-3)

    def loss(self, session: Any, batch: Batch) -> Tensor:
        self.remember(batch.step)
        e, asked = self.trained.row, self.asked(session, batch)
        z = torch.randn(self.config.directions, e.shape[1], generator=batch.generator).to(e.device)
        with torch.no_grad():
            g, here = estimate(asked, e[0], z, self.config.mu)
            left = e.shape[1] - int(self.trained.still.any(1).sum())
            g = projected(g * shrink(len(z), left), self.trained.still)
        return here + ((e - e.detach()) * g).sum()

    def remember(self, step: int) -> None:
        """Take the row that the last step left into the history, and find the directions in which it hardly moves anew, once in tau."""
        tau = self.config.tau
        if step == 0:
            return
        with torch.no_grad():
            self.trained.history[(step - 1) % tau] = self.trained.row[0]
            if step % tau == 0:
                V = still_directions(self.trained.history, self.config.nu)
                self.trained.still.zero_()
                self.trained.still[: len(V)] = V

    def asked(self, session: Any, batch: Batch) -> Callable[[Tensor], Tensor]:
        """L, of rows [k, d] -> [k, batch]: |eps_theta(x_t, t, c(e)) - eps|^2, always of the same x_t and t."""
        pipe = self.probe.target.pipe
        x0 = self.latents(batch).float()
        rows, device = len(x0), x0.device
        t = torch.randint(self.config.first, self.config.last + 1, (rows,), generator=batch.generator)
        noise = torch.randn(x0.shape, generator=batch.generator).to(x0)
        a, s = (level.float().view(-1, 1, 1, 1).to(x0) for level in (self.abar[t].sqrt(), (1 - self.abar[t]).sqrt()))
        x, target = a * x0 + s * noise, prediction_target(x0, noise, SignalNoise(a, s), self.kind)
        dtype = next(self.probe.target.denoisers["unet"].parameters()).dtype
        ids, first = ids_of(self.tokenizer, [self.caption(each) for each in batch.examples]).to(device), len(pipe.tokenizer)

        def loss(several: Tensor) -> Tensor:
            parts = [several] if self.config.together else several.split(1)
            return torch.cat([of(part) for part in parts])

        def of(part: Tensor) -> Tensor:
            k = len(part)
            with showing_row(pipe.text_encoder, first, part.repeat_interleave(rows, 0)[:, None]):
                text = pipe.text_encoder(ids.repeat(k, 1))[0]
            asked = x.to(dtype).repeat(k, 1, 1, 1), t.to(device).repeat(k)
            found = session.model(*asked, encoder_hidden_states=text.to(dtype), return_dict=False)[0]
            return (found.float().unflatten(0, (k, rows)) - target.float()).square().mean((2, 3, 4))

        return loss

    def caption(self, example: Example) -> str:
        return example.prompt or self.config.template.replace("{}", self.config.token)

    # the file -------------------------------------------------------------------------------------------------------------------------

    def values(self) -> dict[str, Tensor]:
        more = {"fit history": self.trained.history, "fit still": self.trained.still}  # no token has a blank
        return {self.config.token: self.trained.row, **more}

    def facts(self) -> dict[str, Any]:
        return {"token": self.config.token}

    def to_keep(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self.config.token: values[self.config.token]}


def ids_of(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The tokens of captions [texts, length]."""
    length = tokenizer.model_max_length
    return tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids  # type: ignore[no-any-return]

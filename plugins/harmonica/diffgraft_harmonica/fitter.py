"""How the router is learned: step-wise denoising training (SDT) with the image error proxy-guided objective (IEPO).

One step of the fit is one run of the pipeline from fresh noise. At each of its steps but the first the denoiser is asked twice: the
teacher computes everything and neither sees nor changes the cache, the student mixes each layer's output with the cached one by its score.
The gradient of

    lambda_s MSE(teacher, student) + l1 sum_k r_{s,k}

goes to row s alone, and the run goes on with what the student said. So a row is learned on the states and cached outputs that the rows
before it lead to, as they will be in use. Nothing but noise and prompts (or classes) goes in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffgraft import BlockCall, ConfigError, DenoiseCall, Fitter, RunCall, StepCall, StepOutput, Unsupported
from diffgraft.methods.fitter import Batch
from diffgraft.methods.search import Probe
from torch import Tensor, nn

from diffgraft_harmonica.knobs import RouterFitConfig, routed
from diffgraft_harmonica.method import ALWAYS, guided, image_error_proxy, mixed, squared_error


class Router(nn.Module):
    """rho [T, L] and lambda [T]; the first row is not learned."""

    def __init__(self, steps: int, layers: int) -> None:
        super().__init__()
        logits = torch.randn(steps, layers)
        logits[0] = ALWAYS
        self.logits = nn.Parameter(logits)
        self.register_buffer("lambdas", torch.zeros(steps))
        self.lambdas: Tensor


@dataclass(frozen=True)
class Asked:
    """What the next run is for: the scores r [T, L] that mix its layers, where these are above tau, and whether rows learn in it."""

    scores: Tensor
    above: list[list[bool]]
    learns: bool


@dataclass
class Trajectory:
    """Of a branch: cached outputs by layer, and the scores of the step in progress (None: outputs pass as they are). Of the run
    (``call.shared``): its losses [batch], their mean's gradient with respect to rho, and the latents at its end."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    losses: Tensor | None = None
    gradient: Tensor | None = None
    end: Tensor | None = None


class RouterFitter(Fitter):
    Config = RouterFitConfig
    State = Trajectory
    wants = frozenset({"prompts"})
    clip: ClassVar[float | None] = None
    plugin: Any
    trained: Router
    config: RouterFitConfig

    def build(self, probe: Probe) -> nn.Module:
        self.columns = {block.path: k for k, block in enumerate(routed(probe.target.blocks))}
        if not self.columns:
            raise Unsupported(f"harmonica: {type(probe.target.pipe).__name__} names no attention and feed-forward layers in its blocks")
        if self.plugin.config.threshold == 0:
            raise ConfigError("plugin 'harmonica': threshold = 0 reuses nothing, so there is nothing to learn: give the tau of your runs")
        return Router(probe.steps, len(self.columns))

    def facts(self) -> dict[str, Any]:
        return {"layers": list(self.columns), "threshold": float(self.plugin.config.threshold)}

    def factor(self, step: int, steps: int) -> float:
        return 1.0

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        moving = list(parameters)
        optimizer = torch.optim.AdamW(moving, lr=self.config.rate, weight_decay=0.0)

        @torch.no_grad()
        def clamp(*_: Any) -> None:
            for values in moving:
                values.clamp_(-ALWAYS, ALWAYS)

        optimizer.register_step_post_hook(clamp)
        return optimizer

    # the loss ------------------------------------------------------------------------------------------------------------------------

    def rollout(self, pipe: Any, batch: Batch) -> dict[str, Tensor]:
        scores = self.trained.logits.detach().sigmoid()
        if batch.step % self.config.lambda_every == 0:
            found = image_error_proxy(scores, lambda table: self.trajectory(pipe, batch, table)["end"])
            self.trained.lambdas.copy_(found)
        return self.trajectory(pipe, batch, scores, learns=True)

    def loss(self, session: Any, batch: Batch) -> Tensor:
        """The sum of the run's losses, with their gradient, which was taken step by step so that one graph is held at a time."""
        logits, gradient = self.trained.logits, batch.made["gradient"]
        slope = (logits * gradient.to(logits.device)).sum()
        return batch.made["losses"].to(logits.device) + (slope - slope.detach())

    def trajectory(self, pipe: Any, batch: Batch, scores: Tensor, learns: bool = False) -> dict[str, Tensor]:
        """A run from the batch's noise whose layers are mixed by ``scores`` [T, L]: "end", and where it learns "losses" and "gradient"."""
        above = (scores > self.plugin.config.threshold).tolist()  # once a run: no step waits for the device
        self.asked = Asked(scores, above, learns)
        pipe(**{**self.arguments(batch), "output_type": "latent"})
        found: dict[str, Tensor] = pipe.plugins.report().plugins[self.name].records
        return found

    # the run -------------------------------------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        result, run = next(call), call.shared
        found = {"end": run.end, "losses": run.losses, "gradient": run.gradient}
        call.record({name: value for name, value in found.items() if value is not None})
        return result

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        state, asked, s = call.state, self.asked, call.step.call
        if asked.learns and s > 0:
            return self.learn(call, next)
        if asked.learns:
            rows = call.sample.shape[0] // len(call.branches)
            call.shared.losses = call.sample.new_zeros(rows, dtype=torch.float32)
            call.shared.gradient = torch.zeros_like(asked.scores)
        state.scores = asked.scores[s]
        return next(call)

    def learn(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        """What the student says; the loss of the step and its gradient go to the run.

        The denoiser is differentiated for the sum of squares; lambda and l1 come afterwards, because half precision has no room for them.
        """
        state, run, s = call.state, call.shared, call.step.call
        state.scores = None
        teacher = combined(call, next(call))
        state.scores = r = self.asked.scores[s].clone().requires_grad_()
        with torch.enable_grad():
            student = next(call)
            errors = squared_error(combined(call, student), teacher)
            (slope,) = torch.autograd.grad(errors.sum() * teacher[0].numel(), r)
        r, weight = r.detach(), self.trained.lambdas[s]
        run.losses += weight * errors.detach() + self.config.l1 * r.sum()
        run.gradient[s] = (weight * slope / teacher.numel() + self.config.l1) * r * (1 - r)
        return student.detach()

    def block(self, call: BlockCall, next: Callable[[BlockCall], Tensor]) -> Tensor:
        state, path = call.state, call.info.path
        out = next(call)
        if state.scores is None:
            return out
        k, cached = self.columns[path], state.kept.get(path)
        if cached is not None:
            out = mixed(cached, out, state.scores[k])
        if cached is None or self.asked.above[call.step.call][k]:
            state.kept[path] = out.detach()
        return out

    def select_blocks(self, blocks: Any) -> Any:
        return routed(blocks)

    def step(self, call: StepCall, next: Callable[[StepCall], StepOutput]) -> StepOutput:
        out = next(call)
        if call.step.is_last:
            call.shared.end = out.sample
        return out


def combined(call: DenoiseCall, prediction: Tensor) -> Tensor:
    """What of a prediction the scheduler gets: the branches under guidance, without the learned variance."""
    rows = prediction[:, : call.sample.shape[1]].chunk(len(call.branches))
    parts = dict(zip(call.branches, rows, strict=True))
    if len(parts) == 1:
        return rows[0]
    scale = call.run.guidance_scale(call.model_name)
    return guided(parts["cond"], parts["uncond"], 1.0 if scale is None else scale)

"""The knobs: which of diffusers' caches, and the fields of its config under diffusers' own names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from diffgraft import ConfigError, Paper, PluginConfig
from diffgraft.methods.named import ensure_takes
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from pydantic import Field, field_validator, model_validator

PAPER = Paper(
    title="First Block Cache (after TeaCache, 2411.19108), MagCache (2506.09045), TaylorSeer (2503.06923), SeaCache (2602.18993), "
    "Pyramid Attention Broadcast (2408.12588) and FasterCache (2410.19355), as diffusers has them",
    arxiv="2411.19108",
    implemented="diffusers' own hook classes, called from hook points that know the run, its steps and its guidance branches",
    omitted="TextKVCache, which serves NucleusMoE alone, a model without a family here",
    licence="diffusers is Apache-2.0; its classes are used, not copied",
)
CONFIGS: Mapping[str, type[Any]] = {
    "first_block": FirstBlockCacheConfig,
    "mag": MagCacheConfig,
    "taylorseer": TaylorSeerCacheConfig,
    "sea": SeaCacheConfig,
    "pab": PyramidAttentionBroadcastConfig,
    "faster": FasterCacheConfig,
}
"""method -> what diffusers' ``enable_cache`` takes for it."""
TOLD = frozenset({"num_inference_steps", "calibrate", "current_timestep_callback", "tensor_format", "is_guidance_distilled"})
"""Fields of these that are no knobs: the run itself says them."""
STACK = frozenset({"first_block", "mag", "sea"})
"""Methods that stand for the whole stack of blocks; the others for single layers."""
KINDS = ("spatial", "temporal", "cross")
SKIPS = (*tuple(f"{kind}_attention_timestep_skip_range" for kind in KINDS), "unconditional_batch_timestep_skip_range")
"""The ranges of timesteps in which something is reused."""
RANGES = (*SKIPS, "low_frequency_weight_update_timestep_range", "high_frequency_weight_update_timestep_range")
Range = tuple[float, float]
RANGE = "the scheduler's timesteps (0 to 1000) between which layers are reused, both ends excluded; diffusers' default "
NAMES = "regular expressions for paths of layers in the denoiser; default: diffusers' own"


class DiffusersCacheConfig(PluginConfig):
    """Knobs of diffusers' caches. None is diffusers' own default; a knob that the chosen method does not have is refused."""

    method: Literal["first_block", "mag", "taylorseer", "sea", "pab", "faster", "off"] = Field(
        "first_block",
        description="which cache: FirstBlockCache, MagCache, TaylorSeer, SeaCache, PyramidAttentionBroadcast, FasterCache; off",
    )
    threshold: float | None = Field(
        None, ge=0, description="first_block (0.05): relative change of the first block's residual below which the others are skipped; "
        "mag (0.06): accumulated error of the magnitudes; sea (0.25): accumulated relative change of the filtered latents"
    )  # fmt: skip
    max_skip_steps: int | None = Field(None, ge=1, description="mag (3): K, most calls in a row that are skipped")
    retention_ratio: float | None = Field(None, ge=0, le=1, description="mag (0.2): share of the calls at the beginning that are computed")
    mag_ratios: Literal["flux", "measure"] | tuple[float, ...] | dict[str, tuple[float, ...]] | None = Field(
        None, description="mag: gamma_t, ratio of one call's residual to the last one's, for a whole schedule of any length; one list, or "
        "one a branch; flux: diffusers' FLUX_MAG_RATIOS; measure: compute all, and leave them in the report's records"
    )  # fmt: skip
    cache_interval: int | None = Field(None, ge=1, description="taylorseer (5): calls from one computed to the next")
    disable_cache_before_step: int | None = Field(None, ge=1, description="taylorseer (3): calls at the beginning that are computed")
    disable_cache_after_step: int | None = Field(None, ge=1, description="taylorseer (none): call from which on all are computed")
    max_order: int | None = Field(None, ge=0, le=8, description="taylorseer (1): order of the Taylor series")
    taylor_factors_dtype: Literal["bfloat16", "float16", "float32"] | None = Field(
        None, description="taylorseer (bfloat16): in which the series is kept"
    )
    use_lite_mode: bool = Field(False, description="taylorseer: extrapolate the denoiser's output alone, without running any of it")
    cache_identifiers: tuple[str, ...] | None = Field(None, description=f"taylorseer: layers or blocks to extrapolate; {NAMES}")
    skip_predict_identifiers: tuple[str, ...] | None = Field(
        None, description="taylorseer: layers or blocks that give zeros where others are extrapolated; regular expressions"
    )
    residual_order: int | None = Field(None, ge=0, le=1, description="sea (1): 0 reuses the residual, 1 extrapolates it")
    retention_steps: int | None = Field(None, ge=0, description="sea (1): calls at the beginning that are computed")
    cache_end_steps: int | None = Field(None, ge=0, description="sea (1): calls at the end that are computed")
    max_consecutive_cached: int | None = Field(None, ge=0, description="sea (2): most calls in a row that are skipped; 0: no limit")
    power_exp: float | None = Field(None, gt=0, description="sea (3.0): exponent of the prior of the clean signal's spectrum")
    raw_vision_callback: Any = Field(
        None, description="sea: (denoiser, args, kwargs) -> list of latents (C, T, H, W), where the pipeline packs its latents"
    )
    spatial_attention_block_skip_range: int | None = Field(None, ge=1, description="pab (2 where no range is given), faster (2): N of 1:N")
    temporal_attention_block_skip_range: int | None = Field(None, ge=1, description="pab, faster (none): the same for attention over time")
    cross_attention_block_skip_range: int | None = Field(None, ge=1, description="pab (none): the same for attention to the text")
    spatial_attention_timestep_skip_range: Range | None = Field(None, description=f"pab, faster: {RANGE}(100, 800) and (-1, 681)")
    temporal_attention_timestep_skip_range: Range | None = Field(None, description=f"pab, faster: {RANGE}(100, 800) and (-1, 681)")
    cross_attention_timestep_skip_range: Range | None = Field(None, description=f"pab: {RANGE}(100, 800)")
    spatial_attention_block_identifiers: tuple[str, ...] | None = Field(None, description=f"pab, faster: {NAMES}")
    temporal_attention_block_identifiers: tuple[str, ...] | None = Field(None, description=f"pab, faster: {NAMES}")
    cross_attention_block_identifiers: tuple[str, ...] | None = Field(None, description=f"pab: {NAMES}")
    unconditional_batch_skip_range: int | None = Field(None, ge=1, description="faster (5): the unconditional half is computed once in N")
    unconditional_batch_timestep_skip_range: Range | None = Field(None, description=f"faster: {RANGE}(-1, 641), for the unconditional half")
    low_frequency_weight_update_timestep_range: Range | None = Field(None, description="faster ((99, 901)): where alpha_1 holds")
    high_frequency_weight_update_timestep_range: Range | None = Field(None, description="faster ((-1, 301)): where alpha_2 holds")
    alpha_low_frequency: float | None = Field(None, description="faster (1.1): alpha_1 of the low frequencies' difference")
    alpha_high_frequency: float | None = Field(None, description="faster (1.1): alpha_2 of the high frequencies' difference")
    attention_weight_callback: Any = Field(None, description="faster (0.5): layer -> weight of the last two outputs' difference")
    low_frequency_weight_callback: Any = Field(None, description="faster: denoiser -> alpha_1, in the place of the two knobs for it")
    high_frequency_weight_callback: Any = Field(None, description="faster: denoiser -> alpha_2, in the place of the two knobs for it")

    @field_validator("mag_ratios")
    @classmethod
    def ensure_ratios(cls, value: Any) -> Any:
        """At least one, all above 0."""
        for ratios in value.values() if isinstance(value, dict) else [value] if isinstance(value, tuple) else []:
            if not ratios or min(ratios) <= 0:
                raise ValueError("give at least one ratio, each above 0")
        return value

    @field_validator(*(f"{kind}_attention_block_identifiers" for kind in KINDS), "cache_identifiers", "skip_predict_identifiers")
    @classmethod
    def ensure_expressions(cls, value: Any) -> Any:
        """Regular expressions that compile."""
        for pattern in value or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
        return value

    @field_validator(*RANGES)
    @classmethod
    def ensure_rising(cls, value: Any) -> Any:
        """A range has a lower and an upper end."""
        if value is not None and not value[0] < value[1]:
            raise ValueError("the first timestep of a range is the lower one")
        return value

    @field_validator("raw_vision_callback", "attention_weight_callback", *(f"{part}_frequency_weight_callback" for part in ("low", "high")))
    @classmethod
    def ensure_function(cls, value: Any, info: Any) -> Any:
        """Functions that can be called as diffusers calls them."""
        if value is None:
            return None
        if not callable(value):
            raise ValueError("give a function")
        takes = ("denoiser", "args", "kwargs") if info.field_name == "raw_vision_callback" else ("module",)
        try:
            ensure_takes(str(info.field_name), getattr(value, "__name__", "function"), value, takes)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return value

    @model_validator(mode="after")
    def ensure_of_method(self) -> DiffusersCacheConfig:
        """Every knob that is set belongs to the method."""
        if self.method == "off":
            return self
        for name in type(self).model_fields:
            if name == "method" or getattr(self, name) in (None, False) or name in knobs_of(self.method):
                continue
            owners = [method for method in CONFIGS if name in knobs_of(method)]
            raise ValueError(
                f"{name} = {getattr(self, name)!r} is a knob of method {' or '.join(map(repr, owners))}, and method = {self.method!r} has "
                f"none of that name; it has {', '.join(sorted(knobs_of(self.method)))}"
            )
        if self.method == "mag" and self.mag_ratios is None:
            raise ValueError(
                "mag_ratios = None: MagCache goes by ratios that belong to the model; give 'flux' on FLUX.1-dev, a list, or run once with "
                "mag_ratios='measure' and take them from pipe.plugins.report().plugins['diffusers_cache'].records"
            )
        return self

    @property
    def measures(self) -> bool:
        """Whether MagCache's ratios are measured, so that nothing is skipped."""
        return self.method == "mag" and self.mag_ratios == "measure"

    @property
    def keeps_branches(self) -> bool:
        """Whether one set of hooks has a state for each branch, so that branches can share it: by diffusers' contexts, which PAB and
        FasterCache do not know, and not where ratios differ from branch to branch."""
        return self.method not in ("pab", "faster") and not isinstance(self.mag_ratios, dict)

    @property
    def options(self) -> dict[str, Any]:
        """What was set, as the fields of diffusers' config."""
        found = {name: getattr(self, name) for name in knobs_of(self.method) if getattr(self, name) is not None}
        if (dtype := found.get("taylor_factors_dtype")) is not None:
            found["taylor_factors_dtype"] = getattr(torch, dtype)
        if self.method == "pab" and not any(f"{kind}_attention_block_skip_range" in found for kind in KINDS):
            found["spatial_attention_block_skip_range"] = 2  # what diffusers takes then, with a warning
        return {name: list(value) if name.endswith("identifiers") else value for name, value in found.items()}

    def value(self, name: str) -> Any:
        """A field as the cache will have it: set, or diffusers' default."""
        default = next(field.default for field in fields(CONFIGS[self.method]) if field.name == name)
        return self.options.get(name, default)


def knobs_of(method: str) -> frozenset[str]:
    """The knobs of a method: the fields of its config that the run does not say itself, and none of which is private."""
    names = {field.name for field in fields(CONFIGS[method])} if method in CONFIGS else set()
    return frozenset(name for name in names - TOLD if not name.startswith("_"))

"""Inverse problems as plugins get them: an operator, what was measured, and how noisy it is.

    problem = Problem(downsample(4), y, noise=0.02)
    pipe = load_pipeline("emoji-sd", plugins={"red_diff": {"problem": problem}})

As text, "downsample(4) @ blur(1.5) + noise(0.02)": first the blur. The names are entry points of the group ``diffgraft.operators``.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator
from torch import Tensor

from diffgraft.installed import registry
from diffgraft.installed.errors import ConfigError, choices
from diffgraft.installed.foreign import said
from diffgraft.methods.operators import Operator, Shape, as_operator, dot_test

OPERATORS = "diffgraft.operators"
FALSE_ADJOINT = 1e-6
"""Of the dot test in float64: a true adjoint is at 1e-15."""
FALSE_ADJOINT_32 = 1e-4
"""Of an operator that computes in float32 alone."""
SHAPED = "if y is of other pictures than that: give your class a `domain`, or say Physics(physics, shape=(channels, height, width))"
BRIGHT = 3.0
"""No measurement of a picture in [-1, 1] whose operator keeps constants is beyond; 0 to 255 is."""


@dataclass(frozen=True, eq=False)
class Problem:
    """y = A(x) + noise n.

    operator  A, or a deepinv ``Physics``
    y         [1 or n, ...], floating point: one measurement for all pictures of a run, or one each
    noise     standard deviation in y, 0 or more

    Raises:
        ConfigError: y has other things than finite numbers, is none that A gives, or is not in the range of pictures in [-1, 1]; the
            operator's adjoint is none; noise below 0.
    """

    operator: Operator
    y: Tensor
    noise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "operator", as_operator(self.operator))
        y, name = self.y, type(self.operator).__name__
        if not isinstance(y, Tensor) or not y.is_floating_point() or y.ndim < 2 or not len(y):
            told = f"{list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
            raise ConfigError(f"problem: y = {told}: give a floating-point tensor [n, ...]")
        if not bool(y.isfinite().all()):
            raise ConfigError(f"problem: y has {int((~y.isfinite()).sum())} values that are not finite: a mask is part of the operator")
        if not is_number(self.noise) or not (math.isfinite(self.noise) and self.noise >= 0):
            raise ConfigError(f"problem: noise = {self.noise!r}: give a standard deviation, 0 or more")
        self._ensure_measured(name)
        if self.operator.linear:
            self._ensure_adjoint(name)

    def _ensure_adjoint(self, name: str) -> None:
        """Raises ConfigError where AT of random measurements is not the adjoint's; in float32 where A computes in nothing else."""
        shape, most = (1, *self.y.shape[1:]), FALSE_ADJOINT
        try:
            try:
                error = dot_test(self.operator, shape)
            except (RuntimeError, TypeError, ValueError):
                error, most = dot_test(self.operator, shape, dtype=torch.float32), FALSE_ADJOINT_32
        except (RuntimeError, TypeError, ValueError) as failed:
            raise ConfigError(f"problem: {name}: A or AT fails on random pictures {list(self.shape)}: {said(failed)}; {SHAPED}") from failed
        if not error < most:
            raise ConfigError(
                f"problem: AT of {name} is not the adjoint of its A: <A x, y> and <x, AT y> are {error:.1g} of their size apart"
            )

    def _ensure_measured(self, name: str) -> None:
        """Raises ConfigError where y is no measurement of a picture in [-1, 1]."""
        try:
            operator = self.operator.to(self.y.device, self.y.dtype)
            with torch.no_grad():
                grey = operator.A(torch.ones(self.shape, dtype=self.y.dtype, device=self.y.device))
        except (RuntimeError, TypeError, ValueError) as failed:
            raise ConfigError(f"problem: {name}: A fails on a white picture: {said(failed)}; {SHAPED}") from failed
        if grey.shape != self.y.shape:
            made = f"{list(grey.shape)} of pictures {list(self.shape)}"
            raise ConfigError(f"problem: y has the shape {list(self.y.shape)}, and {name} makes {made}; {SHAPED}")
        if not bool(grey.any()):  # differences of neighbours: nothing is known of their range
            return
        largest, most = float(self.y.abs().max()), BRIGHT * float(grey.abs().max()) + 6 * self.noise
        if largest > most:
            raise ConfigError(
                f"problem: y reaches {largest:.3g}, and {name} gives up to {float(grey.abs().max()):.3g} for pictures in [-1, 1]: give it "
                "in their unit (of bytes: y / 127.5 - 1)"
            )

    @property
    def shape(self) -> Shape:
        """Of the pictures that are looked for: [n, c, h, w] or [n, c, frames, h, w]."""
        return self.operator.domain(tuple(self.y.shape))

    def residual(self, x: Tensor) -> Tensor:
        """Root mean square of A(x) - y for each picture [n]."""
        return (self.operator.A(x) - self.y).flatten(1).square().mean(1).sqrt()

    def to(self, device: torch.device, dtype: torch.dtype) -> Problem:
        """Itself where the pictures are; it is not looked at anew."""
        new: Problem = object.__new__(Problem)
        for name, value in (("operator", self.operator.to(device, dtype)), ("y", self.y.to(device, dtype)), ("noise", self.noise)):
            object.__setattr__(new, name, value)
        return new


def simulated(operator: Operator, truth: Tensor, noise: float = 0.0, generator: torch.Generator | None = None) -> Problem:
    """The problem of finding ``truth`` [n, c, (f,) h, w] again from its measurement."""
    with torch.no_grad():
        y = operator.A(truth)
    if noise:
        y = y + noise * torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y)
    return Problem(operator, y, noise)


# as text -------------------------------------------------------------------------------------------------------------------------------


def read_operator(text: str) -> tuple[Operator, float]:
    """(operator, noise) of "downsample(4) @ blur(1.5) + noise(0.02)".

    Raises:
        ConfigError: it is not written like that, names no installed operator, or gives one what it does not take.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ConfigError(f"problem = {text!r}: {error.msg} at {error.offset}; write it like {EXAMPLE!r}") from None
    noise = 0.0
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.Add):
        name, args, kwargs = _called(tree.right, text)
        if name != "noise" or len(args) != 1 or kwargs or not is_number(args[0]):
            raise ConfigError(f"problem = {text!r}: behind + comes noise(its standard deviation), as in {EXAMPLE!r}")
        tree, noise = tree.left, float(args[0])
    return _operator(tree, text), noise


EXAMPLE = "downsample(4) @ blur(1.5) + noise(0.02)"


def _operator(node: ast.expr, text: str) -> Operator:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return _operator(node.left, text) @ _operator(node.right, text)
    name, args, kwargs = _called(node, text)
    make: Callable[..., Any] | None = registry.find_named(OPERATORS, name)
    if make is None:
        raise ConfigError(f"problem = {text!r}: {name!r} is no operator{choices(name, registry.by_name(OPERATORS), 'Installed')}")
    try:
        return as_operator(make(*args, **kwargs), name)
    except TypeError as error:
        raise ConfigError(f"problem = {text!r}: {name}: {error}") from None


def _called(node: ast.expr, text: str) -> tuple[str, list[Any], dict[str, Any]]:
    """Name and arguments of "name(1, key=2)" or "name"."""
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and all(keyword.arg for keyword in node.keywords):
        try:
            args = [ast.literal_eval(each) for each in node.args]
            return node.func.id, args, {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in node.keywords}
        except ValueError:
            pass
    raise ConfigError(f"problem = {text!r}: {ast.unparse(node)} is no operator with numbers or texts; write it like {EXAMPLE!r}")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def fetch_problem(plugin: Any, need: Any, value: Any, target: Any) -> Problem:
    """A problem for a plugin, or a dict of its parts, whose operator may be text."""
    knob = f"plugin {plugin.name!r}: {need.knob}"
    if isinstance(value, Problem):
        return value
    if not isinstance(value, Mapping) or not {"operator", "y"} <= set(value) <= {"operator", "y", "noise"}:
        told = f"a dict of {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise ConfigError(f"{knob} = {told}: give a Problem(operator, y, noise), or a dict of these")
    operator, noise = value["operator"], value.get("noise", 0.0)
    if isinstance(operator, str):
        operator, told_noise = read_operator(operator)
        noise = value.get("noise", told_noise)
    return Problem(as_operator(operator, knob), value["y"], noise)


def _no_text(value: Any) -> Any:
    """Raises ValueError for what people write where a problem is wanted, and is none."""
    if value is None or isinstance(value, (Problem, Mapping)):
        return value
    told = "text says the operator alone, and the measurement y is missing" if isinstance(value, str) else f"a {type(value).__name__}"
    raise ValueError(
        f"{told}: give Problem(operator, y, noise), or a dict {{'operator': 'mask(0.5)', 'y': y, 'noise': 0.02}}; a measurement in a file "
        "is for `diffgraft restore --problem TEXT --measurement FILE`"
    )


ProblemKnob = Annotated[Problem | dict[str, Any] | None, BeforeValidator(_no_text)]
"""Of a plugin's ``problem`` knob."""

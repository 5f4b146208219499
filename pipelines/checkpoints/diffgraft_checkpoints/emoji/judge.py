"""The judge: a small classifier that says whether a picture shows what its caption says.

It is trained on rendered scenes and on their round trips through the autoencoder, blurred and noisy (see
`diffgraft_checkpoints.train.judge`). One of its object classes is "other": scrambled objects and shapeless blobs, so that
a picture which merely has the right colours does not pass.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import scenes

OTHER = "other"
FIELDS = ("object", "background", "size", "place")
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass
class JudgeConfig:
    """Class names of each field, in output order, and the width of the network."""

    classes: dict[str, list[str]] = field(
        default_factory=lambda: {
            "object": [*scenes.OBJECTS, OTHER],
            "background": list(scenes.BACKGROUNDS),
            "size": list(scenes.SIZES),
            "place": list(scenes.PLACES),
        }
    )
    width: int = 32
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)


class JudgeNet(nn.Module):
    """(N, 3, 64, 64) pictures in -1..1 -> features (N, 6 * width) and one row of logits for each field."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        w = config.width
        plan = ((3, w, 2), (w, 2 * w, 2), (2 * w, 2 * w, 1), (2 * w, 4 * w, 2), (4 * w, 4 * w, 1))
        layers: list[nn.Module] = []
        for inputs, outputs, stride in plan:
            layers += [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.where = nn.Sequential(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(4 * w * 16, 2 * w), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(6 * w, len(config.classes[name])) for name in FIELDS})

    def features(self, pictures: Tensor) -> Tensor:
        """What (maxima over the picture) and where (a coarse map), side by side."""
        x = self.trunk(pictures)
        return torch.cat([x.amax(dim=(2, 3)), self.where(x)], dim=1)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        features = self.features(pictures)
        return {name: head(features) for name, head in self.heads.items()}


class Judge:
    """The network with its class names: scores pictures against their prompts."""

    def __init__(self, config: JudgeConfig, net: JudgeNet) -> None:
        self.config = config
        self.net = net.eval()

    @classmethod
    def from_pretrained(cls, path: str | Path) -> Judge:
        """Load a judge from a folder with `config.json` and `model.safetensors`."""
        folder = Path(path)
        if not (folder / _CONFIG).is_file():
            raise FileNotFoundError(f"no judge in {folder}: {_CONFIG} is missing")
        config = JudgeConfig(**json.loads((folder / _CONFIG).read_text()))
        net = JudgeNet(config)
        net.load_state_dict({k: v.float() for k, v in load_file(folder / _WEIGHTS).items()})
        return cls(config, net)

    def save_pretrained(self, path: str | Path) -> None:
        """Write the folder that `from_pretrained` reads (weights in fp16)."""
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG).write_text(json.dumps(asdict(self.config), indent=1) + "\n")
        state = {k: v.half() if v.is_floating_point() else v for k, v in self.net.state_dict().items()}
        save_file(state, folder / _WEIGHTS)

    @torch.no_grad()
    def predict(self, images: Sequence[Image.Image]) -> list[dict[str, str]]:
        """The most likely class of each field for each picture; an object may be "other"."""
        if not images:
            return []
        logits = [self.net(part) for part in to_batch(images).split(64)]
        best = {name: torch.cat([part[name] for part in logits]).argmax(1).tolist() for name in FIELDS}
        return [{name: self.config.classes[name][best[name][i]] for name in FIELDS} for i in range(len(images))]

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> dict[str, list[bool | None]]:
        """For each field and picture: is it as the prompt says? `None` where the prompt does not say.

        Of a pair each half of the picture is judged alone, so "object" says that each is where it should be, and "place" is left open.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts; give one prompt for each image")
        wanted = [scenes.parse_prompt(prompt) for prompt in prompts]
        seen = iter(self.predict(apart(images, wanted)))
        scores: dict[str, list[bool | None]] = {name: [] for name in FIELDS}
        for labels in wanted:
            found = [(asdict(each), next(seen)) for each in labels]
            for name in FIELDS:
                open_ = len(found) > 1 and name == "place"
                said = [want[name] == have[name] for want, have in found if want[name] is not None and not open_]
                scores[name].append(all(said) if said else None)
        return scores

    @torch.no_grad()
    def likelihood(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """For each picture the mean log-probability (at most 0) of what its prompt says, over the fields that it names.

        Where `score` says right or wrong this says how nearly: what a search can climb.
        """
        wanted = [scenes.parse_prompt(prompt) for prompt in prompts]
        parts = apart(images, wanted)
        logs = [{name: row.log_softmax(1) for name, row in self.net(part).items()} for part in to_batch(parts).split(64)] if parts else []
        rows = iter([{name: part[name][i] for name in FIELDS} for part in logs for i in range(len(part["object"]))])
        answer = []
        for labels in wanted:
            said = [
                row[name][self.config.classes[name].index(value)]
                for each, row in zip(labels, rows, strict=False)
                for name, value in asdict(each).items()
                if value is not None and not (len(labels) > 1 and name == "place")
            ]
            answer.append(float(torch.stack(said).mean()) if said else 0.0)
        return answer

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, 6 * width) penultimate features, for Frechet distances."""
        return torch.cat([self.net.features(part) for part in to_batch(images).split(64)])


def load_bundled() -> Judge:
    """The judge that ships with the bundled `emoji-sd`."""
    from ..bundled import emoji_sd

    return Judge.from_pretrained(Path(emoji_sd.path) / "judge")


def reward(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """`Judge.likelihood` of the bundled judge, as the reward "emoji_judge"."""
    return bundled_once().likelihood(images, prompts)


@cache
def bundled_once() -> Judge:
    """The bundled judge, read once."""
    return load_bundled()


def apart(images: Sequence[Image.Image], wanted: Sequence[Sequence[scenes.Labels]]) -> list[Image.Image]:
    """One picture for each object that is asked for: of a pair each half alone."""
    return [part if len(labels) == 1 else isolate(part, each.place or "")
            for part, labels in zip(images, wanted, strict=True) for each in labels]  # fmt: skip


def isolate(image: Image.Image, place: str) -> Image.Image:
    """The picture with the half away from `place` painted over in its background colour (the median of its border)."""
    pixels = np.array(image.convert("RGB").resize((scenes.SIZE, scenes.SIZE)))
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    middle = scenes.SIZE // 2
    away = {"left": np.s_[:, middle:], "right": np.s_[:, :middle], "top": np.s_[middle:], "bottom": np.s_[:middle]}[place]
    pixels[away] = np.median(border, axis=0).astype(np.uint8)
    return Image.fromarray(pixels)


def to_batch(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size as a (N, 3, 64, 64) float tensor in -1..1."""
    side = (scenes.SIZE, scenes.SIZE)
    small = [im.convert("RGB") if im.size == side else im.convert("RGB").resize(side) for im in images]
    return torch.from_numpy(np.stack([np.asarray(im) for im in small])).permute(0, 3, 1, 2).float() / 127.5 - 1

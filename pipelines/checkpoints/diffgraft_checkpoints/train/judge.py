"""Stage 2: the judge, trained on rendered scenes, their round trips, and broken objects labelled "other"."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from ..emoji.judge import FIELDS, OTHER, Judge, JudgeConfig, JudgeNet
from .common import Stage, console, step_generator, write_atomic
from .pool import CLASSES, Pool, to_bytes, to_float, to_images
from .vae import round_trip

BATCH = 64
ROUND_TRIPS = 5000
"""How many of the pool's scenes are also shown after a round trip through the autoencoder."""
BROKEN_SHARE = 0.12


def soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """A third of the pictures slightly blurred (3 x 3), all with a little noise."""
    count = len(pictures)
    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    share = torch.rand(count, 1, 1, 1, generator=generator) * (torch.rand(count, 1, 1, 1, generator=generator) < 0.33)
    noise = torch.randn(pictures.shape, generator=generator) * 0.06 * torch.rand(count, 1, 1, 1, generator=generator)
    return pictures.lerp(blurred, share) + noise


def break_object(picture: Tensor, center: Tensor, generator: torch.Generator) -> Tensor:
    """(3, 64, 64) with its object made unrecognisable: quadrants swapped, or melted to a blob of the same colours."""
    x, y = (int(v) for v in center.round().clamp(8, 56))
    half = min(x, y, 64 - x, 64 - y, 22)
    box = (slice(None), slice(y - half, y + half), slice(x - half, x + half))
    broken, part = picture.clone(), picture[box]
    if torch.rand((), generator=generator) < 0.5:
        pieces = [part[:, :half, :half], part[:, :half, half:], part[:, half:, :half], part[:, half:, half:]]
        order = ((3, 2, 1, 0), (1, 0, 3, 2), (2, 3, 0, 1), (1, 2, 3, 0))
        a, b, c, d = (pieces[i] for i in order[int(torch.randint(4, (), generator=generator))])
        broken[box] = torch.cat([torch.cat([a, b], 2), torch.cat([c, d], 2)], 1)
    else:
        cells = 3 + int(torch.randint(2, (), generator=generator))
        melted = F.adaptive_avg_pool2d(part[None], cells)
        broken[box] = F.interpolate(melted, size=part.shape[1:], mode="bilinear")[0]
    return broken


def train_judge(pool: Pool, held_out: Pool, vae: AutoencoderKL, folder: Path, steps: int, seed: int, accelerator: Accelerator) -> Judge:
    """The trained judge (fp32, CPU), with its accuracy on held-out scenes in its config."""
    torch.manual_seed(seed + 1)
    config = JudgeConfig()
    net = JudgeNet(config)
    stage = Stage("judge", folder, {"net": net}, steps, 2e-3, accelerator, ema=0.995, weight_decay=0.05)
    trips_file = folder / f"round-trips-{vae.config.scaling_factor}.pt"
    if not trips_file.exists():
        console.print("judge: pictures through the autoencoder")
        trips = round_trip(vae, pool.pictures[:ROUND_TRIPS])
        write_atomic(trips_file, lambda p: torch.save(trips, p))
    trips = torch.load(trips_file, weights_only=True)
    other = config.classes["object"].index(OTHER)

    def loss(step: int) -> Tensor:
        generator = step_generator(seed + 1, step)
        soft = torch.randint(len(trips), (BATCH * 2 // 5,), generator=generator)
        true = torch.randint(len(pool.pictures), (BATCH - len(soft),), generator=generator)
        index = torch.cat([soft, true])
        pictures = to_float(torch.cat([trips[soft], pool.pictures[true]]))
        labels = pool.labels[index].clone()
        for i in torch.nonzero(torch.rand(BATCH, generator=generator) < BROKEN_SHARE).flatten().tolist():
            pictures[i] = break_object(pictures[i], pool.centers[index[i]], generator)
            labels[i, 0] = other
        logits = net(soften(pictures, generator).to(accelerator.device))
        labels = labels.to(accelerator.device)
        return sum(F.cross_entropy(logits[name].float(), labels[:, i]) for i, name in enumerate(FIELDS))

    net.load_state_dict(stage.run(loss)["net"])
    judge = Judge(config, net.cpu())
    config.accuracy = measured(judge, held_out, vae, folder / f"judge-accuracy-{steps}.json", seed)
    console.print(f"judge: {config.accuracy}", highlight=False)
    return judge


def measured(judge: Judge, held_out: Pool, vae: AutoencoderKL, path: Path, seed: int) -> dict[str, dict[str, float]]:
    """The judge's accuracy on held-out scenes, their round trips and broken objects; kept in `path`."""
    if not path.exists():
        result = {
            "true renders": accuracy(judge, held_out.pictures, held_out.labels),
            "VAE round trips": accuracy(judge, round_trip(vae, held_out.pictures), held_out.labels),
            "broken objects called other": broken_accuracy(judge, held_out, seed),
        }
        write_atomic(path, lambda p: p.write_text(json.dumps(result, indent=1)))
    return json.loads(path.read_text())


def accuracy(judge: Judge, pictures: Tensor, labels: Tensor) -> dict[str, float]:
    """Share of right answers for each field on uint8 pictures (N, 3, 64, 64) with class indices (N, 4)."""
    seen = judge.predict(to_images(pictures))
    wanted = [[names[i] for names, i in zip(CLASSES, row, strict=True)] for row in labels.tolist()]
    right = {name: sum(s[name] == w[f] for s, w in zip(seen, wanted, strict=True)) for f, name in enumerate(FIELDS)}
    return {name: round(count / len(seen), 4) for name, count in right.items()}


def broken_accuracy(judge: Judge, pool: Pool, seed: int) -> dict[str, float]:
    """Share of pictures with a broken object that the judge calls "other"."""
    generator = step_generator(seed + 2, 0)
    broken = [break_object(p, c, generator) for p, c in zip(to_float(pool.pictures), pool.centers, strict=True)]
    seen = judge.predict(to_images(to_bytes(torch.stack(broken))))
    return {"object": round(sum(s["object"] == OTHER for s in seen) / len(seen), 4)}

"""emoji-text: a masked diffusion language model of the captions (MDLM, Sahoo et al., arXiv 2406.07524) as a `LLaDA2Pipeline`.

The captions come from a grammar, so the distribution that it should have learned is known exactly.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from accelerate import Accelerator
from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

from ..emoji import grammar, scenes
from . import export as exporting
from .common import Stage, console, keep_freed_memory, make_accelerator, step_generator
from .recipe import Device, Out, Seed, Steps, describe, read_recipe, write_recipe

NAME = "emoji-text"
TOKENS = 24
"""Tokens of a text: one that begins it, then the caption, then ends to fill it up."""
WRITTEN = TOKENS - 1
"""Tokens that the model writes."""
WIDTH, LAYERS, HEADS = 128, 4, 4
BATCH, LEARNING_RATE = 64, 2e-3
LEAST_MASKED = 1e-3
BEGIN, END, MASK, UNKNOWN = "<begin>", "<end>", "<mask>", "<unknown>"
SAMPLERS: dict[str, dict[str, Any]] = {
    f"{steps} steps": {"num_inference_steps": steps, "temperature": 1.0, "threshold": 1.0, "editing_threshold": None}
    for steps in (WRITTEN, 12, 6, 3)
}
"""How the pipeline is called: with a threshold of 1 it writes its most certain tokens, as many a step as the steps need."""
Samples = Annotated[int, typer.Option(min=8, help="Captions to draw with each number of steps.")]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Every word of the captions is one token, the comma too; a text begins with one token, which is the pipeline's prompt."""
    words = sorted({word for caption in grammar.captions() for word in caption.replace(",", " ,").split()})
    vocabulary = {token: i for i, token in enumerate([END, BEGIN, MASK, UNKNOWN, *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.WordPiece(cleanup=True)  # "face ," is "face,"
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, vocabulary[BEGIN])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=END,
        mask_token=MASK,
        unk_token=UNKNOWN,
        model_max_length=TOKENS,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> BertForMaskedLM:
    """An untrained transformer of about 0.7 M parameters that sees the whole text at once, and no time."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=3 * WIDTH,
            max_position_embeddings=TOKENS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            type_vocab_size=1,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encoded(tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor]:
    """All captions of the grammar (N, 24) as tokens, and the probability of each (N,) in fp64."""
    known = grammar.captions()
    tokens = tokenizer(list(known), padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    return tokens, torch.tensor(list(known.values()), dtype=torch.float64)


def draw_masked(count: int, generator: torch.Generator) -> Tensor:
    """(count,) shares of tokens to hide, spread evenly over 0..1, in random order."""
    return ((torch.randperm(count, generator=generator) + torch.rand(count, generator=generator)) / count).clamp(min=LEAST_MASKED)


def train_text(tokenizer: PreTrainedTokenizerFast, folder: Path, steps: int, seed: int, accelerator: Accelerator) -> BertForMaskedLM:
    """The trained model (averaged weights, fp32, CPU).

    MDLM's loss with the linear schedule: of each text a share t of the tokens is hidden, and the cross-entropy of those is divided by t,
    which makes it a bound on the text's negative log-likelihood.
    """
    torch.manual_seed(seed + 10)
    texts, odds = encoded(tokenizer)
    model = build_model(tokenizer)

    def loss(step: int) -> Tensor:
        generator = step_generator(seed + 10, step)
        clean = texts[torch.multinomial(odds, BATCH, replacement=True, generator=generator)]
        share = draw_masked(BATCH, generator).view(-1, 1)
        hidden = torch.rand(clean.shape, generator=generator) < share
        hidden[:, 0] = False  # the pipeline's prompt
        noisy = torch.where(hidden, tokenizer.mask_token_id, clean)
        clean, noisy, hidden, share = (each.to(accelerator.device) for each in (clean, noisy, hidden, share))
        nats = F.cross_entropy(model(noisy).logits.float().transpose(1, 2), clean, reduction="none")
        return (nats * hidden / share).sum() / BATCH / WRITTEN

    averages = Stage("text", folder, {"model": model}, steps, LEARNING_RATE, accelerator).run(loss)
    trained = build_model(tokenizer)
    trained.load_state_dict(averages["model"])
    return trained.eval()


def build_pipeline(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> LLaDA2Pipeline:
    """The parts as a pipeline whose block is the whole text."""
    return LLaDA2Pipeline(model=model, scheduler=BlockRefinementScheduler(block_length=TOKENS), tokenizer=tokenizer)


def load(folder: Path) -> LLaDA2Pipeline:
    """The pipeline in a folder. diffusers 0.42 neither writes nor reads the tokenizer of a `LLaDA2Pipeline`, so it is given."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
    return LLaDA2Pipeline.from_pretrained(folder, tokenizer=tokenizer, local_files_only=True)


# measuring ------------------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def log_odds(model: nn.Module, noisy: Tensor, mask: int, batch: int = 2048) -> Tensor:
    """(N, 24, vocabulary) log-probabilities for texts with hidden tokens; a hidden token is never predicted to stay hidden."""
    rows = []
    for part in noisy.split(batch):
        logits = model(part).logits.float()
        logits[..., mask] = -torch.inf
        rows.append(logits.log_softmax(-1))
    return torch.cat(rows)


def divergence_in_order(model: nn.Module, tokenizer: PreTrainedTokenizerFast, order: Sequence[int]) -> tuple[float, float]:
    """KL(grammar || model) in nats a caption when the model writes one token at a time in this order of places, and the probability that
    what it writes so is a caption of the grammar. Both are exact: sums over all captions."""
    texts, odds = encoded(tokenizer)
    mask = tokenizer.mask_token_id
    total = torch.zeros(len(texts), dtype=torch.float64)
    for i, place in enumerate(order):
        seen = texts.clone()
        seen[:, list(order[i:])] = mask
        distinct, row = seen.unique(dim=0, return_inverse=True)
        total += log_odds(model, distinct, mask)[:, place][row, texts[:, place]].double()
    return float((odds * (odds.log() - total)).sum()), float(total.exp().sum())


@torch.no_grad()
def true_odds(texts: Tensor, odds: Tensor, noisy: Tensor, mask: int, vocabulary: int) -> Tensor:
    """(N, 24, vocabulary) probabilities of every token given the tokens of `noisy` (N, 24) that are not hidden, as the grammar has them."""
    fits = torch.stack([((row == texts) | (row == mask)).all(1) for row in noisy]) * odds
    fits /= fits.sum(1, keepdim=True)
    return torch.stack([fits @ F.one_hot(texts[:, place], vocabulary).double() for place in range(texts.shape[1])], dim=1)


def divergence_by_loss(model: nn.Module, tokenizer: PreTrainedTokenizerFast, count: int, seed: int = 0) -> tuple[float, float]:
    """KL(grammar || model) in nats a caption, averaged over all orders of writing, and its standard error.

    That is what MDLM's loss bounds: estimated on `count` drawn captions, each with a random share of its tokens hidden, from the exact
    divergence of every hidden token's distribution from the grammar's.
    """
    texts, odds = encoded(tokenizer)
    mask, found = tokenizer.mask_token_id, []
    generator = step_generator(seed, 0)
    drawn = texts[torch.multinomial(odds, count, replacement=True, generator=generator)]
    hidden_count = torch.randint(1, WRITTEN + 1, (count, 1), generator=generator)  # of a random order, all that is not written yet
    rank = torch.rand(count, WRITTEN, generator=generator).argsort(1).argsort(1)
    hidden = F.pad(rank < hidden_count, (1, 0))
    noisy = torch.where(hidden, mask, drawn)
    for part, its_hidden, its_count in zip(noisy.split(64), hidden.split(64), hidden_count.split(64), strict=True):
        true = true_odds(texts, odds, part, mask, len(tokenizer))
        log_model = log_odds(model, part, mask).double()
        apart = torch.where(true > 0, true * (true.clamp_min(1e-300).log() - log_model), 0.0).sum(2)
        found.append((apart * its_hidden).sum(1) * WRITTEN / its_count.squeeze(1))
    values = torch.cat(found)
    return float(values.mean()), float(values.std() / math.sqrt(count))


def generate(pipe: LLaDA2Pipeline, count: int, seed: int = 0, batch: int = 256, **call: Any) -> list[str]:
    """`count` captions, drawn by the pipeline itself in batches."""
    pipe.set_progress_bar_config(disable=True)
    texts: list[str] = []
    for start in range(0, count, batch):
        begin = torch.full((min(batch, count - start), 1), pipe.tokenizer.bos_token_id)
        generator = torch.Generator().manual_seed(seed + start)
        texts += pipe(input_ids=begin, gen_length=WRITTEN, block_length=TOKENS, generator=generator, **call).texts
    return texts


def figures(texts: Sequence[str]) -> dict[str, Any]:
    """Of drawn captions: the share that the grammar has, how many different ones there are, and how their templates are spread."""
    known = [text for text in texts if text in grammar.captions()]
    counts = Counter(grammar.template_of(text) for text in known)
    shares = {template: counts[template] / max(1, len(known)) for template, _ in scenes.TEMPLATES}
    apart = sum(abs(shares[template] - share) for template, share in scenes.TEMPLATES) / 2
    return {
        "valid": round(len(known) / len(texts), 4),
        "different": len(set(known)),
        "templates_apart": round(apart, 4),
        "wrong": [text for text in texts if text not in grammar.captions()][:8],
    }


def evaluate(pipe: LLaDA2Pipeline, count: int) -> dict[str, Any]:
    """All figures of the card."""
    texts, odds = encoded(pipe.tokenizer)
    result: dict[str, Any] = {
        "captions": len(texts),
        "entropy_nats": round(float(-(odds * odds.log()).sum()), 4),
        "samples": count,
        "kl_nats": {},
        "samplers": {},
    }
    kl, valid = divergence_in_order(pipe.model, pipe.tokenizer, range(1, TOKENS))
    result["kl_nats"]["left to right"] = {"kl": round(kl, 4), "valid": round(valid, 5)}
    mean, error = divergence_by_loss(pipe.model, pipe.tokenizer, count)
    result["kl_nats"]["mean over orders"] = {"kl": round(mean, 4), "standard_error": round(error, 4)}
    rng = np.random.default_rng(0)
    known = list(grammar.captions())
    result["true_draws"] = figures([known[i] for i in rng.choice(len(known), count, p=odds.numpy() / float(odds.sum()))])
    for name, call in SAMPLERS.items():
        began = time.perf_counter()
        drawn = generate(pipe, count, **call)
        seconds = round((time.perf_counter() - began) / count, 4)
        result["samplers"][name] = {**figures(drawn), "seconds_per_caption": seconds, "examples": drawn[:8]}
        console.print(f"{name}: {result['samplers'][name]}", highlight=False)
    return result


CARD = """---
license: apache-2.0
pipeline_tag: text-generation
library_name: diffusers
---
# emoji-text

A small real masked diffusion language model: a standard `LLaDA2Pipeline` around a `BertForMaskedLM` of {millions} M parameters that writes
captions of emoji-sd ("a small dog face on the left on a blue background"). The captions come from a grammar, so the distribution that it
should have learned is known exactly. It was trained from scratch by diffgraft's own script, to try methods for discrete diffusion without a
download and without a GPU. It is not meant for anything else.

```python
from diffusers import LLaDA2Pipeline
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/to/emoji-text/tokenizer")
pipe = LLaDA2Pipeline.from_pretrained("path/to/emoji-text", tokenizer=tokenizer)
text = pipe("", gen_length={written}, block_length={tokens}, num_inference_steps={written}, temperature=1.0, threshold=1.0,
            editing_threshold=None).texts[0]
```

The tokenizer is given because diffusers 0.42 neither writes nor reads that of a `LLaDA2Pipeline`; `gen_length` and `block_length`, because
a text has {tokens} tokens, of which the first is the (empty) prompt. A caption may be begun: `pipe("a small", gen_length={begun}, ...)`.
diffgraft has no family for this pipeline yet, so `load_pipeline` does not take it and no plugin works on it.

## Figures

The grammar has {captions} captions; the entropy of its distribution is {entropy} nats a caption. fp16 weights loaded as fp32.

KL divergence of what the model writes from the grammar, KL(grammar || model) in nats a caption, when it writes one token at a time. From
left to right it is exact, a sum over all captions, and so is the probability that it writes a caption of the grammar; the mean over all
orders, which MDLM's loss bounds, is estimated (with its standard error):

| order | KL | writes a caption of the grammar |
|---|---|---|
{divergences}

{samples} captions drawn by the pipeline itself, most certain tokens first, at temperature 1, beside as many drawn from the grammar:

| | captions of the grammar | different ones | templates apart |
|---|---|---|---|
{samplers}

- Templates apart: total variation distance between the shares of the eight templates among the valid captions and those of the grammar.
  The pipeline writes its most certain token first, which changes what it writes: the samples are not the distribution above.
- {seconds} s a caption with {written} steps (batches of 256) on the machine below.

Written with {written} steps: {examples}.

{notes}## Recipe

Command: `{command}`

| stage | steps | time |
|---|---|---|
{stages}

Hardware: {hardware}. Versions: {versions}. Parameters: {parts}.

- Data: captions drawn anew in every step: the templates of emoji-sd's training as often as there, every object, background, size and place
  as likely as any other. Tokens: every word is one, {vocabulary} in all.
- Model: {layers} layers of width {width}, no time; AdamW (learning rate {learning_rate:g}, cosine), batch {batch}, bf16 autocast, averaged
  weights (.998).
- Loss: MDLM's, linear schedule: of each text a share t of the tokens is hidden, t spread evenly over a batch, cross-entropy divided by t.

## Limits

It writes these captions and nothing else.

## Licence

Apache-2.0; no artwork went into it.
"""


def emoji_text(out: Out, steps: Steps = 3000, seed: Seed = 0, device: Device = "auto", samples: Samples = 2048) -> None:
    """Train a masked diffusion language model on the captions, export, measure."""
    keep_freed_memory()
    accelerator = make_accelerator(device)
    tokenizer = build_tokenizer()
    state = out / "state"
    pipe = build_pipeline(train_text(tokenizer, state, steps, seed, accelerator), tokenizer)
    exporting.export(out / NAME, pipe, artwork=False)
    tokenizer.save_pretrained(out / NAME / "tokenizer")
    write_recipe(out, NAME, describe(NAME, pipe, state, ("text",), {"": steps}, None, seed, device))
    measure_text(out, samples)


def measure_text(
    out: Out,
    samples: Samples = 2048,
    notes: Annotated[Path | None, typer.Option(help="Markdown with a person's remarks, for the model card.")] = None,
) -> None:
    """Measure OUT/emoji-text against the grammar; write its model card."""
    folder = out / NAME
    pipe = load(folder)
    result = evaluate(pipe, samples)
    recipe = read_recipe(out, NAME)
    exporting.save_figures(folder, {"recipe": recipe, **result})
    rows = [("the grammar itself", result["true_draws"]), *result["samplers"].items()]
    first = result["samplers"][next(iter(SAMPLERS))]
    card = CARD.format(
        **exporting.recipe_values(recipe),
        notes=exporting.remarks(notes.read_text() if notes else ""),
        millions=round(recipe["parameters"]["model"] / 1e6, 2),
        tokens=TOKENS,
        written=WRITTEN,
        begun=TOKENS - 3,
        captions=result["captions"],
        entropy=result["entropy_nats"],
        divergences="\n".join(divergence_row(name, row) for name, row in result["kl_nats"].items()),
        samples=samples,
        samplers="\n".join(
            f"| {name} | {100 * row['valid']:.1f} % | {row['different']} | {row['templates_apart']} |" for name, row in rows
        ),
        seconds=first["seconds_per_caption"],
        examples="; ".join(f'"{text}"' for text in first["examples"]),
        vocabulary=len(pipe.tokenizer),
        layers=LAYERS,
        width=WIDTH,
        learning_rate=LEARNING_RATE,
        batch=BATCH,
    )
    (folder / "README.md").write_text(card)
    console.print(f"KL: {result['kl_nats']}", highlight=False)


def divergence_row(name: str, row: dict[str, float]) -> str:
    """One order's figures as a row of the card."""
    error = f" ± {row['standard_error']}" if "standard_error" in row else ""
    return f"| {name} | {row['kl']}{error} | {100 * row['valid']:.2f} % |" if "valid" in row else f"| {name} | {row['kl']}{error} | |"

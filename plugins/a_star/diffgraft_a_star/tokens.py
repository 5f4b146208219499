"""Which tokens of a prompt are the concepts: found before a run begins, by the pipeline's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffgraft import ConfigError, RunCall
from diffgraft.methods.inputs import parameters

Indices = tuple[int, ...]
Concept = str | int | Indices

ENDS = re.compile(r"above|at|behind|below|beside|by|for|from|in|inside|into|near|next|of|on|onto|over|to|under|with|\W")
"""What a noun phrase ends before: a preposition, or a comma and the like."""
NOT_NOUNS = re.compile(
    "an?|the|this|that|its|his|her|their|my|your|some|one|two|three|four|five|small|little|tiny|big|large|huge|"
    "red|orange|yellow|green|blue|purple|pink|brown|black|white|gray|grey|golden|silver"
)
"""Words in front of the noun: articles, numbers, sizes and colours."""


def find(call: RunCall, objects: Sequence[Concept] | None) -> list[list[Indices]]:
    """Token indices by prompt and concept.

    Raises:
        ConfigError: a concept is not in a prompt, beyond the tokens that are read, or (``objects`` None) a prompt does not join two nouns.
    """
    prompt = call.get("prompt")
    if prompt is None:
        embeds = call.get("prompt_embeds")
        return [] if embeds is None else [embedded(objects, embeds.shape[1])] * len(embeds)  # without either the pipeline says so itself
    return [of_prompt(call, each, objects) for each in ([prompt] if isinstance(prompt, str) else prompt)]


def embedded(objects: Sequence[Concept] | None, limit: int) -> list[Indices]:
    """Where the prompt was given as embeddings of ``limit`` tokens."""
    if objects is None or any(isinstance(each, str) for each in objects):
        raise ConfigError(
            f"plugin 'a_star': objects = {objects!r}: prompt_embeds was given, so there is no prompt to find words in; give token indices, "
            "as objects=[2, (5, 6)]"
        )
    return [checked(each, limit, "prompt_embeds") for each in objects if not isinstance(each, str)]


def of_prompt(call: RunCall, prompt: str, objects: Sequence[Concept] | None) -> list[Indices]:
    """Token indices of each concept in one prompt. A word that is asked for twice is its first and its second occurrence."""
    if objects is None:
        objects = nouns(prompt)
        if len(objects) < 2:
            raise ConfigError(
                f"plugin 'a_star': prompt {prompt!r} does not name two objects joined by 'and' (found: {', '.join(objects) or 'none'}); "
                "say which words are the objects, as objects=['cat', 'dog']"
            )
    tokenizer = tokenizer_of(call.pipe)
    text, limit = as_read(call, prompt), token_limit(call)
    found: list[Indices] = []
    for number, each in enumerate(objects):
        if not isinstance(each, str):
            found.append(checked(each, limit, f"prompt {prompt!r}"))
            continue
        phrase = as_read(call, each)
        spans = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE)]
        nth = sum(each == other for other in objects[:number])
        if nth >= len(spans):
            times = "" if nth == 0 else f" {nth + 1} times"
            raise ConfigError(
                f"plugin 'a_star': objects = {list(objects)!r}: {each!r} is not{times} in the prompt {prompt!r}; name words that are"
            )
        found.append(checked(token_range(tokenizer, text, *spans[nth]), limit, f"{each!r} of the prompt {prompt!r}"))
    return found


def as_read(call: RunCall, text: str) -> str:
    """The text that the tokenizer gets: learned words of several tokens written out, captions cleaned."""
    pipe = call.pipe
    if hasattr(pipe, "maybe_convert_prompt"):
        text = pipe.maybe_convert_prompt(text, tokenizer_of(pipe))
    if hasattr(pipe, "_text_preprocessing"):
        text = pipe._text_preprocessing(text, clean_caption=argument(call, "clean_caption"))[0]
    return text


def token_limit(call: RunCall) -> int:
    """How many tokens the denoiser gets to see."""
    return int(argument(call, "max_sequence_length") or tokenizer_of(call.pipe).model_max_length)


def tokenizer_of(pipe: Any) -> Any:
    """The tokenizer of the text that the denoiser's cross-attention sees (SDXL's refiner has the second one alone)."""
    return pipe.tokenizer if pipe.tokenizer is not None else pipe.tokenizer_2


def argument(call: RunCall, name: str) -> Any:
    """An argument of the call, or its default; None where the pipeline has none of this name."""
    taken = parameters(call.pipe).get(name)
    return call.get(name, None if taken is None else taken.default)


def token_range(tokenizer: Any, text: str, start: int, end: int) -> Indices:
    """The tokens of ``text[start:end]``, which begins and ends at word boundaries.

    Tokenizers split at words first, so the tokens of the text as far as a word are the first tokens of the whole.
    """
    whole, bare = tokenizer(text).input_ids, ids(tokenizer, text)
    offset = next(i for i in range(len(whole)) if whole[i : i + len(bare)] == bare)
    before, until = ids(tokenizer, text[:start].rstrip()), ids(tokenizer, text[:end])
    first, last = len(before), len(until)
    if bare[:first] != before or bare[:last] != until:
        raise ConfigError(f"plugin 'a_star': objects: which tokens of {text!r} are {text[start:end]!r} cannot be told; give their indices")
    return tuple(range(offset + first, offset + last))


def ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids without special tokens."""
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []


def checked(indices: int | Sequence[int], limit: int, where: str) -> Indices:
    """Indices within the tokens that are read."""
    found = (indices,) if isinstance(indices, int) else tuple(indices)
    if not found or min(found) < 0 or max(found) >= limit:
        raise ConfigError(f"plugin 'a_star': objects: tokens {list(found)} of {where}: the model reads tokens 0 to {limit - 1}")
    return found


def nouns(prompt: str) -> list[str]:
    """The nouns that a prompt joins by "and": of each part, the words before the first comma or preposition, without articles,
    numbers, sizes and colours. "a red cat face on the left and a star" -> ["cat face", "star"]."""
    found = []
    for part in re.split(r"\band\b", prompt, flags=re.IGNORECASE):
        words = re.findall(r"[^\s,.;:]+|[,.;:]", part)
        stop = next((i for i, word in enumerate(words) if ENDS.fullmatch(word.lower())), len(words))
        found.append(" ".join(word for word in words[:stop] if not NOT_NOUNS.fullmatch(word.lower())))
    return [] if "" in found else found

"""A transformers text encoder with its tokenizer, for plugins that read the prompt with another model than the pipeline's own."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from diffgraft.installed.errors import ConfigError
from diffgraft.installed.unread import why_not_loaded
from diffgraft.kernel.weights import kept_by

ENDINGS = ("TextModel", "TextModelWithProjection", "EncoderModel")
"""Of the classes that are text encoders by themselves."""


@dataclass(frozen=True, eq=False)
class Encoder:
    """A text encoder and the tokenizer that goes with it."""

    tokenizer: Any = field(repr=False)
    model: nn.Module = field(repr=False)


def read_encoder(source: str | os.PathLike[str], plugin: str, knob: str) -> Encoder:
    """The encoder of a folder, or of a Hub id: ``owner/name``, or ``owner/name/text_encoder_2`` for a part of a pipeline, whose tokenizer
    is then ``tokenizer_2`` beside it (in a folder likewise).

    Raises:
        ConfigError: it cannot be read, with the reason and the way out. Nothing but safetensors is read, and no code of a repository.
    """
    text = os.fspath(source).rstrip("/")
    place, part = text, ""
    if not os.path.isdir(text) and text.count("/") == 2 and not text.startswith((".", "/", "~")):
        place, _, part = text.rpartition("/")
    beside = Path(os.path.abspath(text)).parent / os.path.basename(text).replace("text_encoder", "tokenizer")
    try:
        config = transformers.AutoConfig.from_pretrained(place, subfolder=part, trust_remote_code=False)
        words = place if part or not beside.is_dir() else beside
        tokenizer = transformers.AutoTokenizer.from_pretrained(words, subfolder=part and beside.name, trust_remote_code=False)
        model = class_for(config).from_pretrained(place, subfolder=part, use_safetensors=True)
    except (OSError, ValueError, SafetensorError, KeyError, ImportError) as error:
        why = why_not_loaded(error, lacks="such folder with a config.json")
        raise ConfigError(f"plugin {plugin!r}: {knob} = {text!r}: no text encoder with its tokenizer can be loaded: {why}") from error
    return Encoder(tokenizer, model.eval().requires_grad_(False))


def follow(encoder: Encoder, device: torch.device, dtype: torch.dtype) -> None:
    """Bring an encoder to a device and a dtype; what its class keeps in 32 bits beside float16 (T5 overflows) stays so, and a quantised one
    is where it is."""
    if kept_by(encoder.model):
        return
    wide = set(getattr(encoder.model, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else set()
    for name, module in encoder.model.named_modules():
        for value in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            own = torch.float32 if wide & {*name.split(".")} else dtype
            value.data = value.data.to(device, own if value.is_floating_point() else value.dtype)


def class_for(config: Any) -> Any:
    """The class that reads the text encoder of a checkpoint, without a decoder or a picture's side."""
    named = next((name for name in getattr(config, "architectures", None) or () if name.endswith(ENDINGS)), None)
    if named is not None and hasattr(transformers, named):
        return getattr(transformers, named)
    if config.model_type == "clip":  # the two sides in one file
        return transformers.CLIPTextModel
    reader = transformers.AutoModelForTextEncoding
    return reader if type(config) in reader._model_mapping else transformers.AutoModel

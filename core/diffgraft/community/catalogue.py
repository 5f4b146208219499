"""The catalogue of published plugins: a plain file that `diffgraft search` reads. Nothing in it is ever installed by itself.

The file that comes with diffgraft is `plugins.json`, written from the plugins' own metadata and from what the community sent in; a newer
one can be given as a path or an address. `plugins.schema.json` says how it looks.
"""

from __future__ import annotations

import json
import os
import posixpath
import re
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from http.client import HTTPException
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import Self

from diffgraft.installed.errors import CatalogueError, nearest
from diffgraft.installed.foreign import plain, said

FIRST_PARTY = "github.com/diffgraft"
"""Publisher of the plugins that are developed together with the core."""
FORGES = ("github.com", "gitlab.com", "codeberg.org", "huggingface.co", "bitbucket.org")
"""Hosts on which the first part of a path is an account."""
WEIGHTS = {"name": 8, "paper": 4, "summary": 3, "hook_points": 2, "families": 2, "dist": 1, "publisher": 1}
"""What a word found in a field is worth."""
SECONDS = 10
"""How long an address may take to answer; the whole of a catalogue may take six times as long."""
LARGEST = 20_000_000
"""Bytes of a catalogue that are read at most."""
MOST = 50_000
"""Plugins that a catalogue may have."""
ARXIV = r"\d{4}\.\d{4,5}|[a-z-]+(\.[A-Z]{2})?/\d{7}"
"""A paper's number, without a version."""

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(_[a-z0-9]+)*$", max_length=60)]
Line = Annotated[str, Field(min_length=1, max_length=400, pattern=r"^[^\x00-\x1f\x7f-\x9f]*$")]
"""Text of one line without control characters: it is printed on terminals."""
Word = Annotated[str, Field(pattern=r"^(\*|[a-z][a-z0-9_]*)$", max_length=60)]


def normal(address: str) -> str:
    """An https address as it is followed: host in small letters, no port that says nothing, ``..`` resolved.

    Raises:
        ValueError: it names a user, another port or a host in other letters, or has in it what programs read in different ways.
    """
    parts = urlsplit(address)
    host = (parts.hostname or "").rstrip(".")
    if parts.scheme != "https" or not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", host, re.ASCII):
        raise ValueError("it must be an https address of a host in plain letters")
    if "@" in parts.netloc or parts.port not in (None, 443) or "\\" in address or not address.isascii():
        raise ValueError("it must have no user, no port, no backslash and plain letters only")
    path = re.sub("%2e", ".", parts.path, flags=re.IGNORECASE)  # browsers take it for a dot
    slash = "/" if path.endswith("/") and path.strip("/") else ""
    path = posixpath.normpath(f"/{path.lstrip('/')}").rstrip("/") + slash if path else ""
    return f"https://{host}{path}" + (f"?{parts.query}" if parts.query else "") + (f"#{parts.fragment}" if parts.fragment else "")


Address = Annotated[str, Field(pattern=r"^https://[^\s<>\"']+$", max_length=300), AfterValidator(normal)]


class PaperEntry(BaseModel):
    """Where the method comes from."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: Line
    arxiv: Annotated[str, Field(pattern=f"^({ARXIV})?$", description="2312.00858; empty where there is none")] = ""


class CataloguedPlugin(BaseModel):
    """One published plugin."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: Name = Field(description="as in plugins=[...] and as the entry point")
    dist: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$", max_length=100, description="what pip installs")]
    summary: Line
    paper: PaperEntry
    hook_points: tuple[Name, ...] = Field(min_length=1, max_length=50)
    families: tuple[Word, ...] = Field(min_length=1, max_length=200)
    tier: Literal["none", "bronze", "silver", "gold"] = "none"
    homepage: Address

    @property
    def publisher(self) -> str:
        """Who stands behind the homepage: its host, on a forge with the account ("github.com/diffgraft")."""
        address = urlsplit(self.homepage)
        account = address.path.strip("/").partition("/")[0]
        return f"{address.netloc}/{account}".lower() if address.netloc in FORGES else address.netloc


class Catalogue(BaseModel):
    """All published plugins. ``known`` are the publishers that those who wrote the file vouch for. Whom this diffgraft trusts it knows by
    the file that came with it (`is_known`): a file from elsewhere can vouch for nobody."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    schema_version: Literal[1] = 1
    known: tuple[Line, ...] = Field((FIRST_PARTY,), max_length=1000)
    plugins: tuple[CataloguedPlugin, ...] = Field((), max_length=MOST)

    @model_validator(mode="after")
    def _unique(self) -> Self:
        for field in ("name", "dist"):
            numbers = Counter(getattr(plugin, field) for plugin in self.plugins)
            if twice := sorted(value for value, number in numbers.items() if number > 1):
                raise ValueError(f"{field} {', '.join(twice[:20])} stands in the catalogue twice: names are taken by who comes first")
        return self

    def search(self, words: Sequence[str]) -> list[CataloguedPlugin]:
        """Plugins in which every word is found, best first; all when there is no word.

        Raises:
            CatalogueError: none, with the nearest names.
        """
        scored = [(score(plugin, words), plugin) for plugin in self.plugins]
        found = sorted((pair for pair in scored if pair[0] > 0 or not words), key=lambda pair: (-pair[0], pair[1].name))
        if not found:
            near = nearest("_".join(words).lower(), (plugin.name for plugin in self.plugins))
            asked = " and ".join(map(repr, words))
            raise CatalogueError(f"no plugin in the catalogue has {asked}{near} `diffgraft search` alone lists all.")
        return [plugin for _, plugin in found]


def score(plugin: CataloguedPlugin, words: Iterable[str]) -> int:
    """How well a plugin answers: 0 unless each word is part of some field."""
    texts = {field: text_of(getattr(plugin, field)).lower() for field in WEIGHTS}
    total = 0
    for word in words:
        hits = [weight for field, weight in WEIGHTS.items() if word.lower() in texts[field]]
        if not hits:
            return 0
        total += max(hits) + (WEIGHTS["name"] if word.lower() == plugin.name else 0)
    return total


def text_of(value: Any) -> str:
    if isinstance(value, PaperEntry):
        return f"{value.title} {value.arxiv}"
    return value if isinstance(value, str) else " ".join(value)


def is_known(plugin: CataloguedPlugin) -> bool:
    """Whether the people behind diffgraft vouch for this package: what it says of itself (its homepage) is what the list that came with
    this diffgraft says of the package of that name. A homepage alone proves nothing: anybody may name ours."""
    return vouched().get(plugin.dist) == (plugin.name, plugin.publisher)


@cache
def vouched() -> dict[str, tuple[str, str]]:
    """Package -> (plugin, publisher) of everything in the shipped catalogue whose publisher it knows."""
    ours = shipped()
    return {plugin.dist: (plugin.name, plugin.publisher) for plugin in ours.plugins if plugin.publisher in ours.known}


# files -------------------------------------------------------------------------------------------------------------------------------


def shipped() -> Catalogue:
    """The catalogue that came with this diffgraft."""
    return parse(files("diffgraft.community").joinpath("plugins.json").read_text(encoding="utf-8"), "plugins.json of diffgraft")


def read(source: str | os.PathLike[str] | None) -> Catalogue:
    """The catalogue at a path or an https address; the shipped one for None: no network unless an address is given.

    Raises:
        CatalogueError: it cannot be read, or is no catalogue.
    """
    if source is None:
        return shipped()
    name = os.fspath(source)
    try:
        if name.startswith("https://"):
            content = fetch(name)
        elif "://" in name:
            raise CatalogueError(f"{name}: a catalogue is read from a file or an https:// address")
        else:
            with Path(name).open("rb") as file:
                content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise CatalogueError(f"{name} has more than {LARGEST} bytes: it is no catalogue of plugins")
        return parse(content.decode("utf-8"), name)
    except (OSError, HTTPException, ValueError) as error:
        raise CatalogueError(f"{name} cannot be read: {said(error)}") from error


class OnlyHttps(HTTPRedirectHandler):
    """Follows no redirect to an address that anybody on the way could answer."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        if not newurl.lower().startswith("https://"):
            raise CatalogueError(f"{req.full_url} leads to {plain(newurl)}: a catalogue is read from https:// only")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


urlopen = build_opener(OnlyHttps).open


def fetch(address: str) -> bytes:
    """What an address answers, up to a byte more than a catalogue may have."""
    content, ends = bytearray(), time.monotonic() + 6 * SECONDS
    with urlopen(address, timeout=SECONDS) as answer:
        while len(content) <= LARGEST and (part := answer.read1(LARGEST + 1 - len(content))):
            content += part
            if time.monotonic() > ends:
                raise TimeoutError(f"it took more than {6 * SECONDS} seconds")
    return bytes(content)


def parse(text: str, source: str) -> Catalogue:
    """Raises CatalogueError with every fault of the text."""
    try:
        return Catalogue.model_validate_json(text)
    except ValidationError as error:
        found = error.errors(include_url=False, include_context=False, include_input=False)[:20]
        faults = [plain(f"{'.'.join(map(str, fault['loc'])) or 'file'}: {fault['msg']}") for fault in found]
        raise CatalogueError(f"{source} is no catalogue of plugins:\n  - " + "\n  - ".join(faults)) from error


def dump(catalogue: Catalogue) -> str:
    """The file's text: sorted, one line a value, so that a change shows as one."""
    plain = catalogue.model_dump(mode="json")
    plain["plugins"].sort(key=lambda plugin: plugin["name"])
    return json.dumps(plain, indent=1, ensure_ascii=False) + "\n"


def schema() -> str:
    """The JSON schema of the file."""
    return json.dumps({"$schema": "https://json-schema.org/draft/2020-12/schema", **Catalogue.model_json_schema()}, indent=1) + "\n"

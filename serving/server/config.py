"""Read what one pkd-serve was asked for. Every option is a flag and an environment variable; the flag wins.

Secrets are files: no option takes a key itself, since arguments and environment can be read by others.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args

from pkd.serving.core.options import Settings, check
from pkd.serving.galleries.open import StoreUrl
from pkd.serving.observability.logs import LogFormat
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.gpu import Device

OTHERS = frozenset({"PKD_SHARED", "PKD_CACHE", "PKD_KEY_PASSPHRASE"})
"""Variables of other commands of pkd."""
SERVICE_LINK = re.compile(r"PKD(_[A-Z0-9_]+)?_(SERVICE_(HOST|PORT(_.*)?)|PORT(_\d+_(TCP|UDP)(_.*)?)?)|PKD_PORT")
"""Variables that Kubernetes sets in every pod beside a Service whose name begins with pkd."""
YES, NO = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off", ""})
GPU_THREADS = 64
"""Worker threads in front of a GPU: as many as fill two of the largest batches, one that runs and one that gathers."""

LIMITS = frozenset(each.name for each in fields(Settings))
"""The options that are fields of Settings."""


@dataclass(frozen=True)
class Option:
    """Describe one option: its flag, its variable and its values."""

    name: str
    """Name of the field of Configuration or Settings."""
    flag: str
    variable: str
    kind: str
    """``yes`` for a switch, ``list``, or a placeholder for the value in --help."""
    says: str
    default: str
    """Default for people, as --help shows it."""
    parse: Callable[[str], Any] = str


@dataclass(frozen=True)
class Configuration:
    """Hold everything that a server process needs to know, as plain data: it is handed to worker processes."""

    bundles: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    detector: str | None = None
    api_keys: str | None = None
    insecure_no_keys: bool = False
    trust_key: tuple[str, ...] = ()
    gallery: str | None = None
    master_key: str | None = None
    audit: str | None = None
    milvus_token: str | None = None
    milvus_shards: int = 1
    log: LogFormat = "text"
    log_requests: bool = False
    traces: bool = False
    settings: Settings = field(default_factory=Settings)


def _switch(text: str) -> bool:
    if text.lower() not in YES | NO:
        raise InputError("give 1 or 0.")
    return text.lower() in YES


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,15}", text) or not low <= int(text) <= high:
            raise InputError(f"give a number from {low} to {high}.")
        return int(text)

    return parse


def _one_of(*known: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in known:
            raise InputError(f"give {' or '.join(known)}.")
        return text

    return parse


def _gallery(text: str) -> str:
    StoreUrl(text)
    return text


def _setting(name: str, kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value: float = kind(text)
        except ValueError:
            raise InputError(f"give a {'whole ' if kind is int else ''}number.") from None
        check(name, value)
        return value

    return parse


def _default(setting: Field[float]) -> str:
    if setting.default is MISSING:
        return f"one per core; {GPU_THREADS} with --device cuda"
    return str(setting.default) if setting.default >= 1e4 else f"{setting.default:g}"


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(os.pathsep) if part)


OPTIONS: tuple[Option, ...] = (
    Option("host", "--host", "PKD_HOST", "ADDRESS", "address to listen on", "127.0.0.1, only this machine"),
    Option("port", "--port", "PKD_PORT", "N", "port; 0 picks a free one", "8000", _whole(0, 65535)),
    Option(
        "workers",
        "--workers",
        "PKD_WORKERS",
        "N",
        "processes that share port and galleries",
        "1",
        _whole(1, 256),
    ),
    Option(
        "device",
        "--device",
        "PKD_DEVICE",
        "cpu|cuda",
        "where encoders run; on a GPU the crops of many requests go through together",
        "cpu",
        _one_of(*get_args(Device)),
    ),
    Option(
        "detector",
        "--detector",
        "PKD_DETECTOR",
        "SPEC",
        "YuNet .onnx file, insightface:PACK or insightface:FOLDER",
        "none: only aligned crops are taken",
    ),
    Option(
        "gallery",
        "--gallery",
        "PKD_GALLERY",
        "DIR|milvus[+tls]://HOST:PORT",
        "where galleries are kept: a folder of this machine, or a Milvus server",
        "none: no galleries",
        _gallery,
    ),
    Option(
        "master_key",
        "--master-key",
        "PKD_MASTER_KEY_FILE",
        "FILE",
        "the key that every gallery's key is wrapped by; kept away from the galleries and their backups",
        "none; needed with --gallery",
    ),
    Option(
        "audit",
        "--audit",
        "PKD_AUDIT_FILE",
        "FILE",
        "audit log of this machine, beside Milvus, which cannot keep one",
        "none; needed with milvus://",
    ),
    Option(
        "milvus_token",
        "--milvus-token",
        "PKD_MILVUS_TOKEN_FILE",
        "FILE",
        "file that holds USER:PASSWORD of Milvus",
        "none: Milvus asks for none",
    ),
    Option(
        "milvus_shards",
        "--milvus-shards",
        "PKD_MILVUS_SHARDS",
        "N",
        "parts that a new gallery has in Milvus, for its nodes to share",
        "1",
        _whole(1, 64),
    ),
    Option(
        "api_keys",
        "--api-keys",
        "PKD_API_KEYS_FILE",
        "FILE",
        "lines SHA256 NAME SCOPES [rate=N/s]; read again when it changes; see --new-api-key",
        "none; needed beyond loopback",
    ),
    Option(
        "insecure_no_keys",
        "--insecure-no-keys",
        "PKD_INSECURE_NO_KEYS",
        "yes",
        "listen beyond loopback without keys, for anyone to use",
        "off",
        _switch,
    ),
    Option(
        "trust_key",
        "--trust-key",
        "PKD_TRUST_KEY_FILES",
        "list",
        "ed25519 public key; refuse bundles and certificates that no such key has signed; repeatable",
        "none: they may come from anyone",
        _list,
    ),
    Option(
        "log", "--log", "PKD_LOG", "text|json", "form of the lines on stderr", "text", _one_of(*get_args(LogFormat))
    ),
    Option(
        "log_requests", "--log-requests", "PKD_LOG_REQUESTS", "yes", "log a line for every request, too", "off", _switch
    ),
    Option(
        "traces",
        "--traces",
        "PKD_TRACES",
        "yes",
        "send OpenTelemetry spans to where OTEL_EXPORTER_OTLP_ENDPOINT says",
        "off",
        _switch,
    ),
    *(
        Option(
            each.name,
            f"--{each.name.replace('_', '-')}",
            f"PKD_{each.name.upper()}",
            "N",
            each.metadata["says"],
            _default(each),
            _setting(each.name, int if each.type == "int" else float),
        )
        for each in fields(Settings)
        if each.metadata
    ),
)
"""In the order of --help."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for every option. Their values stay text until ``configure``."""
    for option in OPTIONS:
        says = f"{option.says} (default: {option.default}; ${option.variable})".replace("%", "%%")
        if option.kind == "yes":
            parser.add_argument(option.flag, action="store_const", const="1", help=says)
        elif option.kind == "list":
            parser.add_argument(option.flag, action="append", metavar="FILE", help=says)
        else:
            parser.add_argument(option.flag, metavar=option.kind, help=says)


def configure(args: argparse.Namespace, environment: Mapping[str, str]) -> Configuration:
    """Read flags, else variables, else defaults. Raises InputError that names the flag or the variable at fault."""
    _refuse_unknown_variables(environment)
    given: dict[str, Any] = {}
    for option in OPTIONS:
        given_text = getattr(args, option.flag[2:].replace("-", "_"))
        source, text = (
            (option.flag, given_text) if given_text is not None else (option.variable, environment.get(option.variable))
        )
        if isinstance(text, list):
            given[option.name] = tuple(text)
        elif text is not None and (text or option.kind == "yes"):
            try:
                given[option.name] = option.parse(text)
            except InputError as error:
                raise InputError(f"{source} {text}: {error}{_hint(source, text)}") from None
    if given.get("device") == "cuda":
        given.setdefault("threads", GPU_THREADS)
    bundles = tuple(args.bundles) or _list(environment.get("PKD_BUNDLES", ""))
    if not bundles:
        raise InputError("no bundle to serve. Give one as an argument or in PKD_BUNDLES; pkd-export makes them.")
    settings = Settings(**{name: value for name, value in given.items() if name in LIMITS})
    made = Configuration(
        bundles, settings=settings, **{name: value for name, value in given.items() if name not in LIMITS}
    )
    _check_combinations(made)
    return made


def _check_combinations(made: Configuration) -> None:
    """Check what no option can see alone."""
    from pkd.serving.api.api_keys import is_loopback

    if not is_loopback(made.host) and not made.api_keys and not made.insecure_no_keys:
        raise InputError(
            f"--host {made.host} can be reached by others. Pass --api-keys FILE (PKD_API_KEYS_FILE), "
            "or --insecure-no-keys to let anyone in."
        )
    if made.gallery and not made.master_key:
        raise InputError(
            f"--gallery {made.gallery}: templates are encrypted under a master key. Pass --master-key FILE "
            "(PKD_MASTER_KEY_FILE), a file that lies elsewhere."
        )
    if made.gallery and made.master_key and Path(made.gallery).resolve() in Path(made.master_key).resolve().parents:
        raise InputError(
            f"--master-key {made.master_key}: lies with the galleries; whoever copies those would have both. "
            "Keep it elsewhere."
        )
    milvus = bool(made.gallery and StoreUrl(made.gallery).milvus)
    if milvus and not made.audit:
        raise InputError(f"--gallery {made.gallery}: Milvus keeps no audit log. Pass --audit FILE (PKD_AUDIT_FILE).")
    shards = made.milvus_shards if made.milvus_shards > 1 else None
    for option, value in (
        ("--audit", made.audit),
        ("--milvus-token", made.milvus_token),
        ("--milvus-shards", shards),
    ):
        if value and not milvus:
            raise InputError(f"{option} {value}: it is for --gallery milvus://HOST:PORT alone. Leave it out.")
    if made.master_key and not made.gallery:
        raise InputError(f"--master-key {made.master_key}: there is no gallery to use it for. Pass --gallery, too.")
    if made.settings.device == "cuda" and made.workers > 1:
        raise InputError(
            f"--workers {made.workers}: one process keeps a GPU busy, several would only share it. Pass --workers 1."
        )


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {option.variable for option in OPTIONS} | {"PKD_BUNDLES"} | OTHERS
    for name in environment:
        if name.startswith("PKD_") and name not in known and not SERVICE_LINK.fullmatch(name):
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            files = "Secrets are taken from files only. " if re.search("KEY|SECRET|TOKEN", name) else ""
            raise InputError(f"{name}: no such setting; {meant}{files}See pkd-serve --help.")


def _hint(source: str, text: str) -> str:
    if source == "PKD_PORT" and text.startswith("tcp://"):
        return " Kubernetes set this for a Service named pkd: set enableServiceLinks: false in the pod."
    return ""


def table() -> str:
    """Write every option as a row of Markdown: docs/operations.md holds this text."""
    rows = [
        f"| `{option.flag}` | `{option.variable}` | {option.says} | {option.default} |".replace(
            "cpu|cuda", r"cpu\|cuda"
        )
        for option in OPTIONS
    ]
    return "\n".join(["| flag | variable | what it is | default |", "| --- | --- | --- | --- |", *rows])

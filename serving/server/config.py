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
from pkd.toolkit.certificates.certificate import Assurance
from pkd.toolkit.core.errors import InputError
from pkd.toolkit.core.gpu import Device

OTHERS = frozenset({"PKD_SHARED", "PKD_CACHE", "PKD_KEY_PASSPHRASE", "PKD_BIN"})
"""Variables of other commands of pkd, and of scripts that try them."""
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
    kind: str
    """``yes`` for a switch, ``list``, or a placeholder for the value in --help."""
    help: str
    default: str
    """Default for people, as --help shows it."""
    parse: Callable[[str], Any] = str

    @property
    def flag(self) -> str:
        """Return its flag: ``--master-key``."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """Return its environment variable: ``PKD_MASTER_KEY_FILE``, for secrets are given as files."""
        return f"PKD_{self.name.upper()}" + {"FILE": "_FILE", "list": "_FILES"}.get(self.kind, "")


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


def _list(text: str) -> tuple[str, ...]:
    return tuple(part for part in text.split(os.pathsep) if part)


def _option(value: Any, kind: str, help: str, default: str, parse: Callable[[str], Any] = str) -> Any:
    """Make a field of Configuration that is an option; ``value``: its default."""
    return field(default=value, metadata={"kind": kind, "help": help, "default": default, "parse": parse})


@dataclass(frozen=True)
class Configuration:
    """Hold everything that a server process needs to know, as plain data: it is handed to worker processes."""

    bundles: tuple[str, ...]
    host: str = _option("127.0.0.1", "ADDRESS", "address to listen on", "127.0.0.1, only this machine")
    port: int = _option(8000, "N", "port; 0 picks a free one", "8000", _whole(0, 65535))
    workers: int = _option(1, "N", "processes that share port and galleries", "1", _whole(1, 256))
    detector: str | None = _option(
        None,
        "SPEC",
        "YuNet .onnx file, insightface:PACK or insightface:FOLDER",
        "none: only aligned crops are taken",
    )
    gallery: str | None = _option(
        None,
        "DIR|milvus[+tls]://HOST:PORT",
        "place where galleries are kept: a folder of this machine, or a Milvus server",
        "none: no galleries",
        _gallery,
    )
    master_key: str | None = _option(
        None,
        "FILE",
        "the key that every gallery's key is wrapped by; kept away from the galleries and their backups",
        "none; needed with --gallery",
    )
    audit: str | None = _option(
        None,
        "FILE",
        "audit log of this machine, beside Milvus, which cannot keep one",
        "none; needed with milvus://",
    )
    milvus_token: str | None = _option(
        None, "FILE", "file that holds USER:PASSWORD of Milvus", "none: Milvus asks for none"
    )
    milvus_shards: int = _option(
        1, "N", "parts that a new gallery has in Milvus, for its nodes to share", "1", _whole(1, 64)
    )
    api_keys: str | None = _option(
        None,
        "FILE",
        "lines SHA256 NAME SCOPES [rate=N/s]; read again when it changes; see --new-api-key",
        "none; needed beyond loopback",
    )
    policies: str | None = _option(
        None,
        "FILE",
        "JSON of what each gallery demands, such as quality; read again when it changes",
        "none: what the server demands",
    )
    liveness: str | None = _option(
        None,
        "FILE",
        "JSON that names whose signed verdicts on living people are believed",
        "none: no verdict is believed",
    )
    attack_detector: str | None = _option(
        None,
        "FILE",
        "ONNX model that tells attacks from living people in photographs that come without a signed verdict",
        "none: no model is run",
    )
    attack_certificate: str | None = _option(
        None, "FILE", "certificate that pkd-pad wrote of that model, with its threshold", "none"
    )
    oidc: str | None = _option(
        None,
        "FILE",
        "JSON that names an OpenID Connect issuer whose access tokens are taken beside keys",
        "none: keys alone",
    )
    device_classes: str | None = _option(
        None,
        "FILE",
        "JSON of the encoder that each class of devices is to run; read again when it changes",
        "none: there are no device classes",
    )
    insecure_no_keys: bool = _option(
        False, "yes", "listen beyond loopback without keys, for anyone to use", "off", _switch
    )
    no_page: bool = _option(False, "yes", "serve no page for browsers at /", "off", _switch)
    open_metrics: bool = _option(
        False, "yes", "answer /metrics without a key; keep it from strangers by the proxy", "off", _switch
    )
    trust_key: tuple[str, ...] = _option(
        (),
        "list",
        "ed25519 public key; refuse bundles and certificates that no such key has signed; repeatable",
        "none: they may come from anyone",
        _list,
    )
    log: LogFormat = _option("text", "text|json", "form of the lines on stderr", "text", _one_of(*get_args(LogFormat)))  # noqa: RUF009
    log_requests: bool = _option(False, "yes", "log a line for every request, too", "off", _switch)
    traces: bool = _option(
        False, "yes", "send OpenTelemetry spans to where OTEL_EXPORTER_OTLP_ENDPOINT says", "off", _switch
    )
    settings: Settings = field(default_factory=Settings)


def _setting(each: Field[Any]) -> Option:
    """Make the option of a field of Settings, whose range is checked with its name."""

    def parse(text: str) -> float:
        try:
            value: float = int(text) if each.type == "int" else float(text)
        except ValueError:
            raise InputError(f"give a {'whole ' if each.type == 'int' else ''}number.") from None
        check(each.name, value)
        return value

    default = f"one per core; {GPU_THREADS} with --device cuda"
    if each.default is not MISSING:
        default = str(each.default) if each.default >= 1e4 else f"{each.default:g}"
    return Option(each.name, "N", each.metadata["says"], default, parse)


DEVICE = Option(
    "device",
    "cpu|cuda",
    "device that encoders run on; on a GPU the crops of many requests go through together",
    "cpu",
    _one_of(*get_args(Device)),
)
ASSURANCE = Option(
    "assurance",
    "point|bound",
    "meaning of target rates, where a request states none: met on average, or kept with 95 % confidence",
    "point",
    _one_of(*get_args(Assurance)),
)
_OWN = [Option(each.name, **each.metadata) for each in fields(Configuration) if each.metadata]
OPTIONS = (*_OWN[:3], DEVICE, *_OWN[3:], ASSURANCE, *(_setting(each) for each in fields(Settings) if each.metadata))
"""Options in the order of --help."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for every option. Their values stay text until ``configure``."""
    for option in OPTIONS:
        says = f"{option.help} (default: {option.default}; ${option.variable})".replace("%", "%%")
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

    if not is_loopback(made.host) and not (made.api_keys or made.oidc or made.insecure_no_keys):
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
    if bool(made.attack_detector) != bool(made.attack_certificate):
        given = "--attack-detector" if made.attack_detector else "--attack-certificate"
        raise InputError(
            f"{given} {made.attack_detector or made.attack_certificate}: a model is run with the certificate that was "
            "measured of it (pkd-pad). Pass both --attack-detector and --attack-certificate, or neither."
        )
    if made.attack_detector and not made.policies:
        raise InputError(f"--attack-detector {made.attack_detector}: no gallery asks for it. Pass --policies, too.")
    if made.policies and not made.gallery:
        raise InputError(f"--policies {made.policies}: there is no gallery to apply it to. Pass --gallery, too.")
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
        f"| `{option.flag}` | `{option.variable}` | {option.help} | {option.default} |".replace(
            "cpu|cuda", r"cpu\|cuda"
        )
        for option in OPTIONS
    ]
    return "\n".join(["| flag | variable | what it is | default |", "| --- | --- | --- | --- |", *rows])

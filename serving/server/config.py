"""Read what one pkd-serve was asked for. Every option is a flag and an environment variable; the flag wins.

Secrets are files: no option takes a key itself, since arguments and environment can be read by others.

Options are models, as in every command (``cli_options``); variables are read here and not by pydantic-settings. That
takes a misspelt variable for none, which would leave ``PKD_API_KEY`` without effect, and its errors are six lines that
name the field and neither flag nor variable (both in tests/unit/serving/server/test_config.py).
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field
from pydantic.fields import FieldInfo

from pkd.serving.core.options import Settings, is_loopback
from pkd.serving.galleries.open import StoreUrl
from pkd.serving.observability.logs import LogFormat
from pkd.toolkit.core.cli_options import Argument, Model, Options, flag, validate_options
from pkd.toolkit.core.cli_options import add_options as add_fields
from pkd.toolkit.core.errors import InputError

OTHERS = frozenset({"PKD_SHARED", "PKD_CACHE", "PKD_KEY_PASSPHRASE", "PKD_BIN"})
"""Variables of other commands of pkd, and of scripts that try them."""
SERVICE_LINK = re.compile(r"PKD(_[A-Z0-9_]+)?_(SERVICE_(HOST|PORT(_.*)?)|PORT(_\d+_(TCP|UDP)(_.*)?)?)|PKD_PORT")
"""Variables that Kubernetes sets in every pod beside a Service whose name begins with pkd."""
GPU_THREADS = 64
"""Worker threads in front of a GPU: as many as fill two of the largest batches, one that runs and one that gathers."""


def _gallery(text: str) -> str:
    try:
        return StoreUrl(text).url
    except InputError as error:
        raise ValueError(str(error)) from None


File = Annotated[str | None, Argument("FILE")]


class ServerOptions(Options):
    """Hold what is served, where, and to whom."""

    bundles: Annotated[tuple[str, ...], Argument("BUNDLE", positional=True)] = ()
    """Folder, zip or BUNDLE/targets/NAME; the first teacher is the default."""
    host: Annotated[str, Argument("ADDRESS")] = "127.0.0.1"
    """Address to listen on; by default only this machine reaches it."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port number; 0 picks a free one."""
    workers: int = Field(default=1, ge=1, le=256)
    """Number of processes that share port and galleries."""
    detector: Annotated[str | None, Argument("SPEC")] = None
    """YuNet .onnx file, insightface:PACK or insightface:FOLDER; without one only aligned crops are taken."""
    gallery: Annotated[Annotated[str, AfterValidator(_gallery)] | None, Argument("DIR|milvus[+tls]://HOST:PORT")] = None
    """Place where galleries are kept: a folder of this machine, or a Milvus server; without one there are none."""
    master_key: File = None
    """Key that every gallery's key is wrapped by, needed with --gallery; kept away from galleries and their backups."""
    audit: File = None
    """Audit log of this machine, needed beside Milvus, which cannot keep one."""
    milvus_token: File = None
    """File that holds USER:PASSWORD of Milvus, where it asks for one."""
    milvus_shards: int = Field(default=1, ge=1, le=64)
    """Number of parts that a new gallery has in Milvus, for its nodes to share."""
    api_keys: File = None
    """Lines SHA256 NAME SCOPES [rate=N/s], needed beyond loopback; read again when it changes; see --new-api-key."""
    policies: File = None
    """JSON of what each gallery demands, such as quality; read again when it changes."""
    liveness: File = None
    """JSON that names whose signed verdicts on living people are believed; without it none is."""
    attack_detector: File = None
    """ONNX model that tells attacks from living people in photographs that come without a signed verdict."""
    attack_certificate: File = None
    """Certificate that pkd-pad wrote of that model, with its threshold."""
    oidc: File = None
    """JSON that names an OpenID Connect issuer whose access tokens are taken beside keys."""
    device_classes: File = None
    """JSON of the encoder that each class of devices is to run; read again when it changes."""
    insecure_no_keys: bool = False
    """Listen beyond loopback without keys, for anyone to use."""
    no_page: bool = False
    """Serve no page for browsers at /."""
    open_metrics: bool = False
    """Answer /metrics without a key; keep it from strangers by the proxy."""
    trust_key: Annotated[tuple[str, ...], Argument("FILE", repeatable=True)] = ()
    """File of an ed25519 public key; refuse bundles and certificates that no such key has signed; repeatable."""
    log: LogFormat = "text"
    """Form of the lines on stderr."""
    log_requests: bool = False
    """Log a line for every request, too."""
    traces: bool = False
    """Send OpenTelemetry spans to where OTEL_EXPORTER_OTLP_ENDPOINT says."""


class Configuration(ServerOptions):
    """Hold everything that a server process needs to know, as plain data: it is handed to worker processes."""

    settings: Settings = Field(default_factory=Settings)


MODELS: tuple[type[Options], ...] = (ServerOptions, Settings)
"""Models whose fields are the options, in the order of --help."""


def variable(name: str) -> str:
    """Name the environment variable of an option: ``PKD_MASTER_KEY_FILE``, for secrets are given as files."""
    field = _fields()[name]
    file = any(isinstance(each, Argument) and each.metavar == "FILE" for each in field.metadata)
    return f"PKD_{name.upper()}{('_FILES' if _is_many(field) else '_FILE') if file else ''}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for every option, whose help names its variable, too."""
    for model in MODELS:
        add_fields(parser, model, note=lambda name: f" (${variable(name)})")


def configure(args: argparse.Namespace, environment: Mapping[str, str]) -> Configuration:
    """Read flags, else variables, else defaults. Raises InputError that names the flag or the variable at fault."""
    _refuse_unknown_variables(environment)
    if "port" not in args and environment.get("PKD_PORT", "").startswith("tcp://"):
        raise InputError(
            f"PKD_PORT {environment['PKD_PORT']}: Kubernetes set this for a Service named pkd: set "
            "enableServiceLinks: false in the pod."
        )
    settings = _read(Settings, args, environment)
    if settings.device == "cuda" and "threads" not in settings.model_fields_set:
        settings = settings.model_copy(update={"threads": GPU_THREADS})
    made = Configuration(**dict(_read(ServerOptions, args, environment)), settings=settings)
    if not made.bundles:
        raise InputError("no bundle to serve. Give one as an argument or in PKD_BUNDLES; pkd-export makes them.")
    _check_combinations(made)
    return made


def _read(model: type[Model], args: argparse.Namespace, environment: Mapping[str, str]) -> Model:
    values: dict[str, Any] = {}
    names: dict[str, str] = {}
    for name, field in model.model_fields.items():
        given, text = vars(args).get(name), environment.get(variable(name))
        if given is not None and given != []:
            values[name] = given
        elif text:
            values[name] = tuple(filter(None, text.split(os.pathsep))) if _is_many(field) else text
            names[name] = variable(name)
    return validate_options(model, values, names)


def _fields() -> Mapping[str, FieldInfo]:
    return {name: field for model in MODELS for name, field in model.model_fields.items()}


def _is_many(field: FieldInfo) -> bool:
    return bool(field.default == ())


def _check_combinations(made: Configuration) -> None:
    """Check what no option can see alone."""
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
    known = {variable(name) for name in _fields()} | OTHERS
    for name in environment:
        if name.startswith("PKD_") and name not in known and not SERVICE_LINK.fullmatch(name):
            near = difflib.get_close_matches(name, known, 1)
            meant = f"did you mean {near[0]}? " if near else ""
            files = "Secrets are taken from files only. " if re.search("KEY|SECRET|TOKEN", name) else ""
            raise InputError(f"{name}: no such setting; {meant}{files}See pkd-serve --help.")


def table() -> str:
    """Write every option as a row of Markdown: docs/operations.md holds this text."""
    rows = [
        f"| {'argument' if name == 'bundles' else f'`{flag(name)}`'} | `{variable(name)}` | {field.description} "
        f"| {_default(field)} |"
        for name, field in _fields().items()
    ]
    return "\n".join(["| flag | variable | what it is | default |", "| --- | --- | --- | --- |", *rows])


def _default(field: FieldInfo) -> str:
    if field.default_factory:
        return "one per core"
    if field.default in (None, ()):
        return "none"
    return "off" if field.default is False else str(field.default)

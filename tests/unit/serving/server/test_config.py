"""Options: flags, variables and defaults; errors that name which of them is at fault; the page that lists them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from pkd.serving.cli.serve import make_serve_parser
from pkd.serving.core.options import Settings
from pkd.serving.server import config
from pkd.serving.server.config import MODELS, Configuration, configure, variable
from pkd.toolkit.core.errors import InputError

ROOT = Path(__file__).resolve().parents[4]


def configured(*arguments: Any, **environment: Any) -> Any:
    return configure(make_serve_parser().parse_args(list(arguments)), environment)


def test_defaults_are_those_of_the_settings_and_only_this_machine_is_listened_to() -> None:
    made = configured("bundle")
    assert made == Configuration(bundles=("bundle",))
    assert (made.host, made.workers, made.settings) == ("127.0.0.1", 1, Settings())


def test_a_flag_wins_over_a_variable_and_a_variable_over_the_default() -> None:
    assert configured("b", PKD_QUEUE="7", PKD_HOST="localhost").settings.queue == 7
    assert configured("b", "--queue", "9", PKD_QUEUE="7").settings.queue == 9
    assert configured("b", "--port", "0", PKD_PORT="9000").port == 0
    assert configured("b", PKD_PORT="").port == 8000  # set to nothing: not set
    assert configured("b", PKD_BUNDLES="c").bundles == ("b",)
    assert configured(PKD_BUNDLES=os.pathsep.join("cd")).bundles == ("c", "d")
    assert configured("b", PKD_TRUST_KEY_FILES=os.pathsep.join("xy")).trust_key == ("x", "y")
    assert configured("b", "--trust-key", "z", PKD_TRUST_KEY_FILES="x").trust_key == ("z",)


@pytest.mark.parametrize(("text", "on"), [("1", True), ("true", True), ("YES", True), ("0", False), ("", False)])
def test_switches(text: str, on: Any) -> None:
    assert configured("b", PKD_LOG_REQUESTS=text).log_requests is on


def test_every_option_takes_both_forms_and_gives_the_same() -> None:
    texts = {
        "host": "::1",
        "device": "cuda",
        "assurance": "bound",
        "log": "json",
        "api_keys": "keys",
        "detector": "d",
        "gallery": "g",
        "master_key": "m",
        "audit": "a",
        "milvus_token": "t",
        "trust_key": "t",
        **dict.fromkeys(("port", "workers", "milvus_shards", "threads", "queue", "drain_seconds"), "3"),
        **dict.fromkeys(("max_body", "max_stream"), "2048"),
    }
    milvus = {"PKD_GALLERY": "milvus://localhost:19530", "PKD_MASTER_KEY_FILE": "m", "PKD_AUDIT_FILE": "b"}
    policies = {"PKD_POLICIES_FILE": "p", "PKD_GALLERY": "g", "PKD_MASTER_KEY_FILE": "m"}
    together = {
        "gallery": {"PKD_MASTER_KEY_FILE": "m"},
        "master_key": {"PKD_GALLERY": "g"},
        "policies": {"PKD_GALLERY": "g", "PKD_MASTER_KEY_FILE": "m"},
        "attack_detector": {**policies, "PKD_ATTACK_CERTIFICATE_FILE": "c"},
        "attack_certificate": {**policies, "PKD_ATTACK_DETECTOR_FILE": "d"},
        "audit": milvus,
        "milvus_token": milvus,
        "milvus_shards": milvus,
    }
    for name, field in {name: field for model in MODELS for name, field in model.model_fields.items()}.items():
        if name == "bundles":
            continue
        switch = field.annotation is bool
        text = "1" if switch else texts.get(name, "0.25")
        option = f"--{name.replace('_', '-')}"
        other = together.get(name, {})
        by_flag = configured("b", *([option] if switch else [option, text]), **other)
        assert by_flag == configured("b", **{**other, variable(name): text}), option
        assert by_flag != configured("b"), option


@pytest.mark.parametrize(
    ("variable", "text", "said"),
    [
        ("PKD_PORT", "http", "PKD_PORT http: give a whole number"),
        ("PKD_PORT", "70000", "PKD_PORT 70000: must lie between 0 and 65535"),
        ("PKD_PORT", "tcp://10.0.0.1:80", "enableServiceLinks: false"),
        ("PKD_THREADS", "0", "PKD_THREADS 0: must lie between 1 and 1024"),
        ("PKD_THREADS", "1.5", "PKD_THREADS 1.5: give a whole number"),
        ("PKD_TARGET_FMR", "nan", "PKD_TARGET_FMR nan"),
        ("PKD_DEVICE", "gpu", "PKD_DEVICE gpu: give 'cpu' or 'cuda'"),
        ("PKD_TRACES", "maybe", "PKD_TRACES maybe: give 1 or 0"),
        ("PKD_GALLERY", "mysql://db", "PKD_GALLERY mysql://db: give a folder, milvus://HOST:PORT"),
        ("PKD_GALLERY", "milvus://db", "PKD_GALLERY milvus://db"),
        ("PKD_GALLERY", "galleries", "PKD_MASTER_KEY_FILE"),
        ("PKD_MASTER_KEY_FILE", "key", "Pass --gallery"),
        ("PKD_MASTER_KEY_FILE", "g/../g/deep/key", "lies with the galleries"),
        ("PKD_AUDIT_FILE", "log", "--audit log: it is for --gallery milvus://"),
        ("PKD_MILVUS_TOKEN_FILE", "token", "--milvus-token token: it is for"),
        ("PKD_MILVUS_SHARDS", "2", "--milvus-shards 2: it is for"),
        ("PKD_HOST", "0.0.0.0", "PKD_API_KEYS_FILE"),
        ("PKD_THREAD", "3", "PKD_THREAD: no such setting; did you mean PKD_THREADS"),
        ("PKD_MASTER_KEY", "00ff", "PKD_MASTER_KEY: no such setting; did you mean PKD_MASTER_KEY_FILE.* files only"),
        ("PKD_API_KEYS", "secret", "PKD_API_KEYS: no such setting; did you mean PKD_API_KEYS_FILE"),
    ],
)
def test_what_cannot_be_is_refused_by_name(variable: str, text: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        configured("b", **{variable: text}, **({"PKD_GALLERY": "g"} if "lies with" in said else {}))
    if variable in ("PKD_MASTER_KEY", "PKD_API_KEYS"):
        assert text not in str(refused.value)


def test_what_kubernetes_sets_beside_a_service_is_not_ours() -> None:
    links = {
        "PKD_SERVICE_HOST": "10.0.0.1",
        "PKD_SERVICE_PORT_HTTP": "80",
        "PKD_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "PKD_PORT_8000_TCP_ADDR": "10.0.0.1",
        "PKD_SERVE_PORT": "tcp://10.0.0.1:8000",
        "PKD_CACHE": "/tmp",
    }
    assert configured("b", **links) == configured("b")


def test_nothing_to_serve_and_a_gpu_for_several() -> None:
    with pytest.raises(InputError, match="PKD_BUNDLES"):
        configured()
    assert configured("b", "--device", "cuda").settings.threads == config.GPU_THREADS
    assert configured("b", "--device", "cuda", "--threads", "3").settings.threads == 3
    with pytest.raises(InputError, match="--workers 2: one process keeps a GPU busy"):
        configured("b", "--device", "cuda", "--workers", "2")


def test_workers_are_handed_what_was_configured() -> None:
    milvus = ["--gallery", "milvus://localhost:19530", "--master-key", "m"]
    with pytest.raises(InputError, match="--audit FILE"):
        configured("b", *milvus)
    made = configured("b", "--queue", "5", *milvus, "--audit", "a")
    assert pickle.loads(pickle.dumps(made)) == made


def test_the_page_lists_every_option() -> None:
    """docs/operations.md holds the table that the code makes: print(config.table())."""
    assert config.table() in (ROOT / "docs/operations.md").read_text(encoding="utf-8")

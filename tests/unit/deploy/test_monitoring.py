"""Alarms and dashboard: what they ask for is what a running server counts, and Prometheus takes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pkd.serving.api.problems import TYPES
from tests.support import gallery_fixtures as made
from tests.support.gallery_fixtures import problem

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
RULES = DEPLOY / "prometheus" / "pkd.rules.yml"
DASHBOARD = DEPLOY / "grafana" / "pkd.json"
NAME = re.compile(r"\bpkd_[a-z_]+")
LABELS = re.compile(r"\b(type|outcome|kind|route|status|encoder)(?:=~|=)\\?\"([^\"\\]+)")


def expressions() -> list[str]:
    rules = [rule["expr"] for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    return rules + [one["expr"] for panel in json.loads(DASHBOARD.read_text())["panels"] for one in panel["targets"]]


def test_every_metric_that_is_asked_for_is_counted_by_a_running_server(tmp_path: Path) -> None:
    with made.serving(made.fleet(tmp_path / "bundles"), tmp_path / "store") as client:
        made.gallery(client, "g")
        made.enrol(client, "g", "ann", made.image(0))
        problem(client.get("/v1/galleries/other"), 404, "unknown-gallery")
        side = {"gallery": "g", "subject": "ann"}
        client.post("/v1/verify", json={"a": side, "b": side})
        page = client.get("/metrics").text
    counted = set(NAME.findall("\n".join(line for line in page.splitlines() if not line.startswith("#"))))
    asked = {name for expression in expressions() for name in NAME.findall(expression)}
    counted |= {"pkd_gallery_templates"}  # set by the sweep, once a minute; test_metrics.py
    assert asked and asked <= counted, asked - counted
    alarms = NAME.findall(RULES.read_text())
    assert {"pkd_store_up", "pkd_ready_workers", "pkd_refusals_total"} <= set(alarms)


def test_labels_that_are_asked_for_exist() -> None:
    for expression in expressions():
        for label, values in LABELS.findall(expression):
            if label == "type":
                assert set(values.split("|")) <= set(TYPES), values
            if label == "outcome":
                assert values in ("match", "no_match", "ambiguous")


def test_the_dashboard_is_of_the_form_that_grafana_imports() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert (
        board["uid"]
        and board["schemaVersion"] >= 36
        and len({one["id"] for one in board["panels"]}) == len(board["panels"])
    )
    names = {one["name"] for one in board["templating"]["list"]}
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24 and panel["title"] and panel["targets"]
        assert set(re.findall(r"\$\{?([a-z]\w*)", json.dumps(panel))) <= names
    taken = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in board["panels"]]
    assert len(set(taken)) == len(taken)


def test_every_alarm_says_what_it_is_about() -> None:
    for group in yaml.safe_load(RULES.read_text())["groups"]:
        for rule in group["rules"]:
            if "alert" in rule:
                assert rule["labels"]["severity"] in ("warning", "critical")
                assert {"summary", "description"} <= rule["annotations"].keys()


def test_prometheus_takes_the_rules_and_they_fire_when_they_should() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool here (Debian: prometheus)")
    for arguments in (["check", "rules", RULES.name], ["test", "rules", "pkd.rules.test.yml"]):
        done = subprocess.run([promtool, *arguments], cwd=RULES.parent, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr

"""infra/kubernetes against Kubernetes' own schemas, strictly: manifests, a run of the work pool, a training's Job."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun, WorkPool
from prefect.utilities.templating import apply_values
from prefect.workers.base import BaseJobConfiguration

from infra.deploy import TYPES, base_job_template
from infra.kubernetes.__main__ import PORT, job
from wav.cluster import GPU
from wav.local.ports import PORTS
from wav.local.services import AWAITED

PROJECT = Path(__file__).resolve().parents[1]
FOLDER = PROJECT / "infra" / "kubernetes"
MANIFESTS = sorted(path.name for path in FOLDER.glob("*.yaml") if path.name != "pool.yaml")
VERSION = "1.34"


def read(name: str) -> list[dict[str, Any]]:
    """The objects of a file."""
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def validate(found: dict[str, Any]) -> None:
    """Kubernetes' schema, which takes no field that it does not know."""
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    validator.validate(found, VERSION, strict=True)


def pods() -> dict[str, dict[str, Any]]:
    """Pod templates of all manifests by the role of their labels."""
    templates = [
        found["spec"]["template"] for name in MANIFESTS for found in read(name) if "template" in found.get("spec", {})
    ]
    return {template["metadata"]["labels"]["role"]: template for template in templates}


@pytest.mark.parametrize("name", MANIFESTS)
def test_kubernetes_knows_every_field(name: str) -> None:
    for found in read(name):
        validate(found)


def run_of_the_pool(kind: str, deployment: str) -> dict[str, Any]:
    """What Prefect's worker is told to make for a run of a deployment."""
    template = base_job_template(kind)
    WorkPool.model_validate({"name": "wav", "type": kind, "base_job_template": template})
    listed = yaml.safe_load((PROJECT / "prefect.yaml").read_text())["deployments"]
    (entry,) = (entry for entry in listed if entry["name"] == deployment)
    known = template["variables"]["properties"]
    values = {name: variable["default"] for name, variable in known.items() if "default" in variable}
    chosen = entry["work_pool"].get("job_variables", {})
    assert set(chosen) <= set(known), "a deployment sets what the pool refuses"
    values |= chosen | {"name": "run", "env": {}, "labels": {}}
    return dict(apply_values(template["job_configuration"], values))


@pytest.mark.parametrize("kind", TYPES)
def test_a_run_names_neither_its_command_nor_what_runs_it(kind: str) -> None:
    """Prefect's workers fill in their own command where a template has none."""
    template = base_job_template(kind)
    known = template["variables"]
    assert known["additionalProperties"] is False
    asked = set(re.findall(r"{{\s*(\w+)\s*}}", json.dumps(template["job_configuration"])))
    assert asked <= set(known["properties"])
    refused = {"command", "working_dir", "image", "namespace", "service_account", "volumes", "privileged"}
    assert not refused & set(known["properties"])
    made = asyncio.run(BaseJobConfiguration.from_template_and_values(template, {"command": "mine"}, client=MagicMock()))
    made.prepare_for_flow_run(FlowRun(flow_id=uuid4(), name="run"))
    assert made.command == "prefect flow-run execute"


@pytest.mark.parametrize(("deployment", "gpus"), [("train-joint", 1), ("encode", 0)])
def test_a_run_of_the_pool_has_the_gpus_of_its_deployment(deployment: str, gpus: int) -> None:
    manifest = run_of_the_pool("kubernetes", deployment)["job_manifest"]
    pod = manifest["spec"]["template"]["spec"]
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1), "Prefect's worker refuses a Job without them"
    container = pod["containers"][0]
    container["args"], container["env"] = ["true"], []  # lists by the time that Prefect's worker sends them
    validate(manifest)
    assert container["resources"]["limits"] == {"nvidia.com/gpu": gpus}
    kwargs = run_of_the_pool("docker", deployment)["container_create_kwargs"]
    assert kwargs["device_requests"][0]["count"] == gpus
    run_of_the_pool("process", deployment)


def test_a_training_s_job_runs_the_ranks_of_its_nodes() -> None:
    made = job("wav-train-0", 4, 8, ["wav.training.loop", "spec.json"])
    validate(made)
    assert (made["spec"]["completions"], made["spec"]["parallelism"]) == (4, 4)
    container = made["spec"]["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    said = " ".join(container["args"])
    assert "--nnodes 4" in said
    assert "--nproc-per-node 8" in said
    (service,) = (found for found in read("train.yaml") if found["kind"] == "Service")
    assert f"--master-addr wav-train-0-0.{service['metadata']['name']} --master-port {PORT} -m wav.training" in said
    assert service["spec"]["ports"][0]["port"] == PORT
    assert service["spec"]["selector"].items() <= made["spec"]["template"]["metadata"]["labels"].items()


def test_the_manifests_agree_with_each_other_and_the_code() -> None:
    objects = [found for name in MANIFESTS for found in read(name)]
    services = {found["metadata"]["name"]: found["spec"] for found in objects if found["kind"] == "Service"}
    found = pods()
    for name, spec in services.items():
        assert spec["selector"]["role"] in found, name
    assert services["prefect"]["ports"] == [{"port": PORTS["prefect"][1]}]
    assert services["s3"]["ports"] == [{"port": PORTS["s3"][1]}]
    prefect = {entry["name"]: entry.get("value") for entry in found["prefect"]["spec"]["containers"][0]["env"]}
    assert prefect["PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER"] == AWAITED
    for role in ("dask-cpu", "dask-gpu"):
        said = " ".join(found[role]["spec"]["containers"][0]["command"])
        assert said.startswith("dask worker tcp://dask:8786 --nthreads 1 --memory-limit 0 --no-dashboard")
        assert (f"--resources {GPU}=1" in said) == (role == "dask-gpu")


def test_no_pod_has_more_rights_than_it_needs_and_nothing_holds_a_secret() -> None:
    for role, template in pods().items():
        assert template["metadata"]["labels"]["app"] == "wav", "the network policy admits these alone"
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"], role
        assert role == "worker" or pod["automountServiceAccountToken"] is False, role
        for container in pod["containers"]:
            limits = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert container["securityContext"] == limits, role
            for entry in container.get("env", []):
                assert "value" not in entry or not any(word in entry["name"] for word in ("KEY", "PASSWORD", "AUTH"))
    kinds = {found["kind"] for name in MANIFESTS for found in read(name)}
    assert "Secret" not in kinds
    assert "NetworkPolicy" in kinds

"""The kustomize base renders to objects that a cluster accepts; no kubectl needed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from orchestrator.executors.placement import NODE

ROOT = Path(__file__).parents[2]
BASE = ROOT / "k8s" / "base"
SCHEMAS = ROOT.parent / "shared" / "data" / "kuberay-v1.7.0-crd-schemas.json"


def render(base: Path) -> list[dict[str, Any]]:
    """What `kubectl kustomize` does with the features the base uses."""
    settings = yaml.safe_load((base / "kustomization.yaml").read_text())
    objects = [
        document
        for name in settings["resources"]
        for document in yaml.safe_load_all((base / name).read_text())
    ]
    for generator in settings["configMapGenerator"]:
        data = {name: (base / name).read_text() for name in generator["files"]}
        metadata = {"name": generator["name"]}
        objects.append(
            {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
        )
    for document in objects:
        if document["kind"] != "Namespace":
            document["metadata"]["namespace"] = settings["namespace"]
        for container in containers(document):
            container["image"] = tagged(container["image"], settings["images"])
    return objects


def containers(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [found for item in node for found in containers(item)]
    if not isinstance(node, dict):
        return []
    own = [*node.get("containers", []), *node.get("initContainers", [])]
    return [*own, *(found for item in node.values() for found in containers(item))]


def tagged(image: str, rules: list[dict[str, str]]) -> str:
    for rule in rules:
        if image == rule["name"]:
            return f"{rule.get('newName', image)}:{rule['newTag']}"
    return image


def pod_specs(node: Any) -> list[dict[str, Any]]:
    if isinstance(node, list):
        return [found for item in node for found in pod_specs(item)]
    if not isinstance(node, dict):
        return []
    own = [node] if "containers" in node else []
    return [*own, *(found for item in node.values() for found in pod_specs(item))]


def strict(schema: Any) -> Any:
    """Refuse unknown fields, as the API server does with strict field validation."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: strict(value) for key, value in schema.items()}
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object":
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") is True
        if not open_ended and schema["properties"]:
            closed.setdefault("additionalProperties", False)
    return closed


def one(objects: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    (found,) = [document for document in objects if document["kind"] == kind]
    return found


@pytest.fixture
def objects() -> list[dict[str, Any]]:
    return render(BASE)


@pytest.fixture
def job(objects: list[dict[str, Any]]) -> dict[str, Any]:
    return one(objects, "RayJob")


def test_rayjob_is_accepted_by_the_crd_schema(job: dict[str, Any]) -> None:
    if not SCHEMAS.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS.name}")
    schema = strict(json.loads(SCHEMAS.read_text())["schemas"]["RayJob"])
    jsonschema.Draft202012Validator(schema).validate(job)


def test_crd_schema_refuses_a_misspelt_field(job: dict[str, Any]) -> None:
    if not SCHEMAS.exists():
        pytest.skip(f"KubeRay's schemas are not at {SCHEMAS.name}")
    schema = strict(json.loads(SCHEMAS.read_text())["schemas"]["RayJob"]["properties"]["spec"])
    job["spec"]["shutdownAfterJobFinish"] = job["spec"].pop("shutdownAfterJobFinishes")
    with pytest.raises(jsonschema.ValidationError, match="shutdownAfterJobFinish"):
        jsonschema.Draft202012Validator(schema).validate(job["spec"])


def test_rayjob_frees_the_cluster_when_it_ends(job: dict[str, Any]) -> None:
    assert job["spec"]["shutdownAfterJobFinishes"] is True
    assert job["spec"]["ttlSecondsAfterFinished"] > 0


def test_every_pod_runs_without_root(job: dict[str, Any]) -> None:
    pods = pod_specs(job)
    assert len(pods) == 3  # submitter, head, worker
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_image_runs_as_the_user_that_the_pods_ask_for(job: dict[str, Any]) -> None:
    dockerfile = (BASE.parent / "Dockerfile").read_text()
    (user,) = re.findall(r"^USER (\d+)$", dockerfile, flags=re.MULTILINE)
    assert {pod["securityContext"]["runAsUser"] for pod in pod_specs(job)} == {int(user)}


def test_images_are_those_the_dockerfile_says_to_build(job: dict[str, Any]) -> None:
    (built,) = re.findall(r"docker build .*-t (\S+)", (BASE.parent / "Dockerfile").read_text())
    assert {container["image"] for container in containers(job)} == {built}


def mounted(pod: dict[str, Any]) -> dict[str, dict[str, Any]]:
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    mounts = pod["containers"][0]["volumeMounts"]
    return {mount["mountPath"]: volumes[mount["name"]] for mount in mounts}


def test_entrypoint_runs_a_sweep_that_every_ray_pod_mounts(objects: list[dict[str, Any]]) -> None:
    config_map, job = one(objects, "ConfigMap"), one(objects, "RayJob")
    command, subcommand, sweep, *_ = job["spec"]["entrypoint"].split()
    assert (command, subcommand) == ("dipgo-sweep", "run")
    assert Path(sweep).name in config_map["data"]
    for pod in pod_specs(job["spec"]["rayClusterSpec"]):
        volume = mounted(pod)[str(Path(sweep).parent)]
        assert volume["configMap"]["name"] == config_map["metadata"]["name"]


def test_storage_is_the_claim_and_the_entrypoint_writes_there(
    objects: list[dict[str, Any]],
) -> None:
    claim, job = one(objects, "PersistentVolumeClaim"), one(objects, "RayJob")
    assert "storage=/storage" in job["spec"]["entrypoint"]
    for pod in pod_specs(job["spec"]["rayClusterSpec"]):
        assert mounted(pod)["/storage"]["persistentVolumeClaim"] == {
            "claimName": claim["metadata"]["name"]
        }


def test_everything_lives_in_the_namespace(objects: list[dict[str, Any]]) -> None:
    name = one(objects, "Namespace")["metadata"]["name"]
    spaces = {d["metadata"].get("namespace") for d in objects if d["kind"] != "Namespace"}
    assert spaces == {name}


def test_sweep_of_the_base_is_the_repositorys() -> None:
    copy, original = BASE / "quickstart.yaml", ROOT / "sweeps" / "quickstart.yaml"
    assert copy.read_text() == original.read_text(), (
        "run: cp sweeps/quickstart.yaml k8s/base/quickstart.yaml"
    )


def test_every_ray_node_declares_what_a_latency_task_takes_whole(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        quoted = group["rayStartParams"]["resources"]  # KubeRay puts it into a shell command
        assert json.loads(json.loads(quoted)) == {NODE: 1}


def test_ray_version_is_the_tested_one(job: dict[str, Any]) -> None:
    (pinned,) = re.findall(
        r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE
    )
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == pinned

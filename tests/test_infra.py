"""What stands under infra/ is what the tools accept by their own schemas and parsers; commands run without Docker."""

import json
import os
import re
import shlex
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import yaml
from kubernetes_validate import validate

from infra.local_cluster import Node

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def pods(document: dict) -> Iterator[tuple[str, dict]]:
    """Pod templates of a RayCluster or RayJob, with the name of their group."""
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]


def ray_clusters() -> list[dict]:
    return [load(path) for path in KUBERAY if path.name != "network.yaml"]


def ray_commands() -> list[str]:
    """Every `ray start` of the compose file and of the launcher's file."""
    services, launcher = load(INFRA / "compose.yaml")["services"], load(INFRA / "ray-cluster.yaml")
    commands = [service["command"] for service in services.values() if "command" in service]
    commands += launcher["head_start_ray_commands"] + launcher["worker_start_ray_commands"]
    return [command for command in commands if command.startswith("ray start")]


def test_the_launchers_file_is_valid_by_rays_own_schema_before_and_after_its_defaults() -> None:
    import ray.autoscaler
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = load(INFRA / "ray-cluster.yaml")
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(config, schema)
    validate_config(prepare_config(config))
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**config, "worker_count": 3}, schema)


def test_ray_takes_every_start_command() -> None:
    from ray.scripts.scripts import start

    assert len(ray_commands()) == 4
    for command in ray_commands():
        text = re.sub(r"\$\{\w+:-(\w+)\}", r"\1", command).replace("$RAY_HEAD_IP", "10.0.0.1")
        context = start.make_context("start", shlex.split(text)[2:])
        assert context.params["head"] == ("--head" in command)
        assert context.params["disable_usage_stats"]


def test_kubernetes_takes_every_pod_and_policy() -> None:
    policy = load(INFRA / "kuberay" / "network.yaml")
    validate(policy, "1.31", strict=True)
    for document in ray_clusters():
        for name, template in pods(document):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **template["metadata"]}}
            validate({**pod, "spec": template["spec"]}, "1.31", strict=True)


def test_kuberay_manifests_have_only_known_fields() -> None:
    cluster = {
        "rayVersion",
        "authOptions",
        "enableInTreeAutoscaling",
        "autoscalerOptions",
        "headGroupSpec",
        "workerGroupSpecs",
    }
    job = {
        "entrypoint",
        "submissionMode",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "backoffLimit",
        "rayClusterSpec",
    }
    group = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    for document in ray_clusters():
        assert document["apiVersion"] == "ray.io/v1"
        spec = document["spec"]
        if document["kind"] == "RayJob":
            assert set(spec) == job
            spec = spec["rayClusterSpec"]
        assert set(spec) <= cluster
        assert set(spec["headGroupSpec"]) == {"serviceType", "rayStartParams", "template"}
        for worker in spec["workerGroupSpecs"]:
            assert set(worker) == group
            assert worker["minReplicas"] <= worker["replicas"] <= worker["maxReplicas"]


def test_clusters_ask_for_a_token_and_expose_no_dashboard() -> None:
    for document in ray_clusters():
        spec = document["spec"].get("rayClusterSpec", document["spec"])
        assert spec["authOptions"] == {"mode": "token"}
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"
    compose = load(INFRA / "compose.yaml")
    for service in ("head", "worker"):
        assert compose["services"][service]["environment"]["RAY_AUTH_MODE"] == "token"
    for service in compose["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    launcher = load(INFRA / "ray-cluster.yaml")
    assert "--env RAY_AUTH_MODE=token" in launcher["docker"]["run_options"]
    assert any(target.endswith("/.ray/auth_token") for target in launcher["file_mounts"])
    assert "--dashboard-host=127.0.0.1" in launcher["head_start_ray_commands"][1]
    assert "RAY_AUTH_MODE=token" in (INFRA / "Dockerfile").read_text()


def test_the_policy_selects_every_pod_and_lets_only_nodes_operator_and_submitter_in() -> None:
    policy = load(INFRA / "kuberay" / "network.yaml")["spec"]
    labels = policy["podSelector"]["matchLabels"]
    assert policy["policyTypes"] == ["Ingress", "Egress"]
    for document in ray_clusters():
        for _, template in pods(document):
            assert labels.items() <= template["metadata"]["labels"].items()
    for rule in policy["ingress"]:
        assert all("ipBlock" not in source and source["podSelector"]["matchLabels"] for source in rule["from"])


def test_pods_take_credentials_from_a_secret_and_have_no_rights_to_spare() -> None:
    for document in ray_clusters():
        for _, template in pods(document):
            (container,) = template["spec"]["containers"]
            assert not container.get("envFrom")
            for variable in container["env"]:
                secret = {"name": "fiberwalk-storage", "key": variable["name"], "optional": True}
                assert variable["valueFrom"] == {"secretKeyRef": secret}
            assert template["spec"]["securityContext"]["runAsNonRoot"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["resources"]["limits"] == container["resources"]["requests"]


def test_no_credential_is_written_in_infra() -> None:
    for path in INFRA.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text()
            assert not re.search(
                r"AKIA[0-9A-Z]{16}|(secret|token|password)['\"]?\s*[:=]\s*['\"]?[0-9a-zA-Z+/]{20,}", text, re.I
            ), path


@pytest.mark.parametrize("end", [Node.kill, Node.stop])
def test_a_node_ends_with_all_that_it_started_and_nothing_else(end: Callable[[Node], None]) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    node = Node(subprocess.Popen(["sh", "-c", "sleep 60 & sleep 60 & wait"], start_new_session=True))
    while len(node.family()) < 3:
        time.sleep(0.02)
    family = node.family()
    end(node)
    _, left = psutil.wait_procs(family, timeout=5)
    assert not left and bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_makefile_and_ci_are_the_commands_of_the_readme() -> None:
    dry = subprocess.run(["make", "-n", "demo", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "fiberwalk run configs/digits.yaml" in dry and "-m pytest" in dry
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert "make --no-print-directory test" in (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1]


def test_the_pinned_versions_cover_what_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = (
        project["dependencies"] + project["optional-dependencies"]["test"] + project["optional-dependencies"]["lint"]
    )
    names = {re.split(r"[\[<>=,; ]", item)[0].lower().replace("_", "-") for item in wanted} - {"fiberwalk"}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    assert names <= pinned, names - pinned
    assert "torch==2.13.0" in lines
    assert json.dumps(lines).count("file://") == 0

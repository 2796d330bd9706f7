"""A short campaign of random faults; the long one is `tests/bench/fault_campaign.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench.fault_campaign import Campaign, play
from tests.drivers import Drivers
from tests.proxy import Proxy
from tests.s3server import S3Server


@pytest.mark.cluster
@pytest.mark.s3
def test_a_round_of_random_faults_ends_like_the_undisturbed_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with S3Server(tmp_path / "s3") as server, Proxy(server.port) as proxy:
        for name, value in (server.environment | {"AWS_ENDPOINT_URL": proxy.endpoint}).items():
            monkeypatch.setenv(name, value)
        campaign = Campaign(tmp_path, seed=7, modes=("serial",))
        campaign.places, campaign.faults = ("s3",), (3, 3)
        with Drivers(tmp_path) as drivers:
            result = play(campaign, 0, drivers, server, proxy)
    assert result.injected, "no fault met the run"
    assert result.problems == []
    assert result.statuses[-1] == 0

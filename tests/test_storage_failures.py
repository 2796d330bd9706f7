"""Storage that fails: passing failures are waited out, all others are one clear line without a secret."""

from __future__ import annotations

import datetime
import errno
import os
import resource
import socket
import time
from pathlib import Path

import pytest

from pipeline.backends import base
from pipeline.backends.base import Patience, passing, scrub
from pipeline.backends.s3 import PART
from pipeline.errors import InputError, RunError
from pipeline.storage import Storage
from tests.s3server import READER, READER_SECRET, SECRET, S3Server


def test_only_passing_failures_are_tried_again():
    def answer(code: str) -> OSError:
        error = OSError(errno.EINVAL, "from the server")
        error.response = {"Error": {"Code": code}}  # type: ignore[attr-defined]
        return error

    assert all(passing(answer(code)) for code in ("500", "503", "SlowDown", "InternalError", "RequestTimeout"))
    assert not any(
        passing(answer(code)) for code in ("403", "AccessDenied", "NoSuchBucket", "PreconditionFailed", "404")
    )
    assert all(passing(error) for error in (ConnectionResetError(), TimeoutError(), base.Truncated()))
    assert not any(
        passing(error) for error in (FileNotFoundError(), PermissionError(), OSError(errno.ENOSPC, ""), ValueError())
    )


def test_retries_end_at_the_deadline_and_say_how_to_go_on(monkeypatch: pytest.MonkeyPatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(base.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(base.time, "sleep", lambda seconds: clock.append(clock.pop() + seconds))

    def fail(attempt: int) -> None:
        calls.append(attempt)
        raise ConnectionResetError("reset")

    with pytest.raises(RunError, match="Writing x failed .* run again"):
        Patience(100.0).retry(fail, "Writing x")
    assert 92 < clock[0] <= 100
    assert calls == list(range(len(calls)))
    assert 15 < len(calls) < 40


def test_a_lost_answer_to_a_create_that_succeeded_counts_as_ours(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    storage = Storage.open(f"s3://{s3.bucket}/lost-{os.urandom(4).hex()}")
    backend = storage._backend()
    request, lost = backend.request, []  # type: ignore[attr-defined]

    def lose_first(method: str, **arguments):
        answer = request(method, **arguments)
        if method in ("put_object", "complete_multipart_upload") and not lost:
            lost.append(method)
            raise ConnectionResetError("after the server had committed")
        return answer

    monkeypatch.setattr(backend, "request", lose_first)
    for data in (b"small", os.urandom(2 * PART + 1)):
        lost.clear()
        assert storage.create(f"ours-{len(data)}", data)
        assert len(lost) == 1
    Storage.open(storage.uri).create("theirs", b"by another")
    lost.clear()
    monkeypatch.setattr(backend, "request", lambda *a, **k: reset_once(lost, request, *a, **k))
    assert not storage.create("theirs", b"by us")
    assert storage.read("theirs") == b"by another"


def reset_once(lost: list, request, method: str, **arguments):
    if method == "put_object" and not lost:
        lost.append(method)
        raise ConnectionResetError("before the server had it")
    return request(method, **arguments)


def refusal(uri: str) -> str:
    began = time.monotonic()
    with pytest.raises(InputError) as caught:
        Storage.open(uri).check_writable()
    assert time.monotonic() - began < 30
    message = str(caught.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def test_bad_places_on_disk_are_refused_in_one_line(tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    assert "a file is in the way" in refusal(str(tmp_path / "file"))
    assert "a file is in the way" in refusal(str(tmp_path / "file" / "below"))
    assert "cannot write" in refusal("/proc/nothing")
    assert (tmp_path / "file").read_text() == "in the way"


def test_a_full_disk_is_refused_and_leaves_nothing(tmp_path: Path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))  # Python ignores SIGXFSZ, so that writing gives EFBIG
    try:
        assert "limit" in refusal(str(tmp_path / "runs"))
        with pytest.raises(RunError, match="limit"):
            Storage.open(str(tmp_path)).create("x", bytes(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.s3
def test_bad_places_on_s3_are_refused_in_one_line(s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    place = f"s3://{s3.bucket}/place"
    assert "no such bucket" in refusal("s3://no-such-bucket-here/x")
    with monkeypatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
        assert "secret key is wrong" in refusal(place)
        patch.setenv("AWS_ACCESS_KEY_ID", "unknown")
        assert "access key is not known" in refusal(place)
        patch.setenv("AWS_ACCESS_KEY_ID", READER)
        patch.setenv("AWS_SECRET_ACCESS_KEY", READER_SECRET)
        assert "may not write" in refusal(place)
    with monkeypatch.context() as patch:
        import botocore.auth

        now = botocore.auth.get_current_datetime
        patch.setattr(botocore.auth, "get_current_datetime", lambda *a, **k: now(*a, **k) - datetime.timedelta(hours=2))
        assert "clock" in refusal(place)
    assert Storage.open(place).list() == []
    with pytest.raises(InputError, match=r"cannot be listed: .*bucket"):
        Storage.open("s3://no-such-bucket-here/x").list()


@pytest.mark.s3
@pytest.mark.parametrize("kind", ["down", "silent"])
def test_an_endpoint_that_does_not_answer_is_refused_within_half_a_minute(s3: S3Server, monkeypatch, kind: str):
    if kind == "down":
        monkeypatch.setattr("pipeline.storage.CHECK_PATIENCE", 2.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if kind == "silent":
            listener.listen(1)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert "does not answer" in refusal(f"s3://{s3.bucket}/place")


def test_credentials_are_refused_in_uris_and_removed_from_messages(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(InputError, match="environment") as caught:
        Storage.open("s3://key:hidden-word@bucket/x")
    assert "hidden-word" not in str(caught.value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret")
    text = scrub("a very-secret thing\n http://u:p@host/ X-Amz-Signature=abc&b")
    assert "very-secret" not in text
    assert "u:p" not in text
    assert "abc" not in text
    assert "\n" not in text

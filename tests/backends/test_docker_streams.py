"""Pieces of a pull and of an output, put together; no engine needed."""

from __future__ import annotations

import io
import struct
from typing import Any

import pytest

from dispatcher.backends.base import PullProgress
from dispatcher.backends.docker_streams import PullReader, log_frames


def line(layer: str, status: str, current: int = 0, total: int = 0) -> dict[str, Any]:
    """A line of a pull, as an engine writes it."""
    return {"id": layer, "status": status, "progressDetail": {"current": current, "total": total}}


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> PullReader:
    """One that reports whatever moves."""
    monkeypatch.setattr("dispatcher.backends.docker_streams.REPORT_INTERVAL", 0)
    return PullReader("app:1")


def test_layers_are_added_up(reader: PullReader) -> None:
    reader.read({"id": "1", "status": "Pulling from app"})
    reader.read(line("a", "Already exists"))
    reader.read(line("b", "Downloading", 30, 100))
    reader.read(line("c", "Downloading", 10, 50))
    reader.read(line("b", "Download complete"))
    assert reader.read(line("b", "Pull complete")) == PullProgress(
        "app:1", bytes_done=110, bytes_total=150, layers_done=2, layers_total=3
    )


@pytest.mark.parametrize(
    "still",
    [
        {"status": "Digest: sha256:0"},
        {"id": "1", "status": "Pulling from app"},
        line("a", "Waiting"),
        line("a", "Retrying in 4 seconds"),
        line("a", "Downloading", 30, 100),
    ],
)
def test_standstill_is_no_progress(reader: PullReader, still: dict[str, Any]) -> None:
    assert reader.read(line("a", "Downloading", 30, 100)) is not None
    assert reader.read(still) is None


def test_unpacking_is_progress(reader: PullReader) -> None:
    reader.read(line("a", "Extracting", 1, 100))
    assert reader.read(line("a", "Extracting", 2, 100)) is not None


def test_reports_are_paced_but_the_end_of_a_layer_is_told() -> None:
    reader = PullReader("app:1")
    told = [reader.read(line("a", "Downloading", done, 1000)) for done in range(1, 1000)]
    assert sum(report is not None for report in told) < 10
    assert reader.read(line("a", "Pull complete")) is not None


class Trickle(io.BytesIO):
    """A body that comes byte by byte."""

    def read(self, amt: int | None = -1) -> bytes:
        return super().read(1 if amt else 0)


def frame(stream: int, piece: bytes) -> bytes:
    """A piece as the engine frames it."""
    return struct.pack(">BxxxL", stream, len(piece)) + piece


def test_frames_are_unpacked_in_order() -> None:
    body = frame(1, b"out\n") + frame(2, b"") + frame(2, b"\xff\x00") + frame(1, b"more")
    for source in (io.BytesIO(body), Trickle(body)):
        assert list(log_frames(source)) == [b"out\n", b"\xff\x00", b"more"]


def test_body_that_breaks_off_ends_with_the_last_whole_piece() -> None:
    body = frame(1, b"whole") + frame(1, b"broken off")[:-3]
    assert list(log_frames(io.BytesIO(body))) == [b"whole"]

"""What goes wrong with Redis, sorted by what can be done about it."""

from __future__ import annotations

import pytest
from redis import exceptions

from dispatcher.errors import QueueError, QueueRefused, QueueUnavailable
from dispatcher.queue.connection import sorted_errors


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (exceptions.ConnectionError("reset"), QueueUnavailable),
        (exceptions.TimeoutError("slow"), QueueUnavailable),
        (exceptions.BusyLoadingError("loading"), QueueUnavailable),
        (exceptions.ReadOnlyError("replica"), QueueUnavailable),
        (exceptions.OutOfMemoryError("full"), QueueUnavailable),
        # redis-py takes the word they begin with off their text.
        (exceptions.MasterDownError("Link with MASTER is down"), QueueUnavailable),
        (exceptions.ClusterDownError("The cluster is down"), QueueUnavailable),
        (exceptions.TryAgainError("Multiple keys request during rehashing"), QueueUnavailable),
        (exceptions.ResponseError("UNBLOCKED force unblock from blocking operation"), QueueUnavailable),
        (exceptions.ResponseError("LOADING Redis is loading"), QueueUnavailable),
        (exceptions.ResponseError("Error running script (f): @user: -OOM command not"), QueueUnavailable),
        (OSError("no route"), QueueUnavailable),
        (exceptions.ResponseError("WRONGTYPE a key holds another kind"), QueueRefused),
        (exceptions.ResponseError("ERR nobody has ever seen this"), QueueRefused),
        (exceptions.InvalidResponse("not a reply"), QueueRefused),
        (exceptions.DataError("an input of a kind it can't send"), QueueRefused),
        (exceptions.RedisError("anything"), QueueRefused),
    ],
)
def test_every_error_of_redis_is_one_of_ours(error: Exception, kind: type[QueueError]) -> None:
    with pytest.raises(QueueError) as sorted_as, sorted_errors():
        raise error
    assert type(sorted_as.value) is kind
    assert sorted_as.value.recoverable == (kind is QueueUnavailable)
    assert str(error) in str(sorted_as.value)
    assert sorted_as.value.__cause__ is error


def test_a_mistake_of_ours_stays_one() -> None:
    with pytest.raises(KeyError), sorted_errors():
        raise KeyError("x")

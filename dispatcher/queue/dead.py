"""Dead letters: what could not run as it was written, to be seen, tried again or dropped."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from dispatcher.errors import (
    DispatcherError,
    ExpiredTask,
    InvalidTask,
    TaskNotFound,
    TaskRefused,
)
from dispatcher.queue.connection import command, sorted_errors
from dispatcher.queue.exchange import ms
from dispatcher.queue.scripts import Scripts
from dispatcher.queue.store import Store
from dispatcher.queue.wire import parse_document
from dispatcher.task import Task

#: Letters of one read; each may hold TASK_MAX_BYTES.
PAGE = 100
_ENTRY_ID = re.compile(r"[0-9]{1,19}-[0-9]{1,19}")


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """One entry of the dead-letter stream."""

    entry_id: str
    id: str
    reason: str
    message: str
    queue: str
    attempt: int
    source_id: str
    finished_at: str
    #: The original bytes; None if they were too large to keep.
    task: bytes | None
    task_bytes: int
    task_sha1: str = ""


class DeadLetters:
    """The dead-letter stream. Every call may raise QueueUnavailable.

    A letter is named by its own id (of its entry in the stream), or by its task's, which stands
    for the newest of that task.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._redis = store.redis
        self._keys = store.keys
        self._key = store.keys.of("dead")
        self._scripts = Scripts(store.redis, store.keys.stream)

    async def newest(self, limit: int = 100) -> list[DeadLetter]:
        """Up to ``limit``, the newest first."""
        found: list[DeadLetter] = []
        async for page in self._backwards(max(1, min(limit, PAGE))):
            found += page
            if len(found) >= limit:
                break
        return found[:limit]

    async def entry_ids(self) -> list[str]:
        """The own ids of all, the oldest first."""
        return [letter.entry_id async for page in self._backwards(PAGE) for letter in page][::-1]

    async def drop(self, ids: Sequence[str]) -> list[bool]:
        """Forget letters; whether each was there, in order."""
        entries = await self._entries(ids)
        with sorted_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for wanted in ids:
                    pipe.xdel(self._key, entries.get(wanted, "0-0"))
                return [bool(count) for count in await pipe.execute()]

    async def retry(self, ids: Sequence[str]) -> list[str | DispatcherError]:
        """Make letters tasks again; for each, in order, the new task's id or why there is none.

        What the letter's document says of ``id``, ``idempotency_key``, ``delay`` and
        ``not_before`` does not hold for the new task. Asked again for a letter that was retried,
        the answer is the same. Errors are TaskNotFound, InvalidTask, ExpiredTask, QueueFull and
        UnknownQueue; a letter that can't be retried stays.
        """
        entries = await self._entries(ids)
        answers: list[str | DispatcherError] = []
        for start in range(0, len(ids), PAGE):
            part = ids[start : start + PAGE]
            told = await self._revive(await self._letters([entries[i] for i in part if i in entries]))
            for wanted in part:
                answer = told.get(entries.get(wanted, ""))
                answers.append(await self._retried_before(wanted) if answer is None else answer)
        return answers

    # --- reading ------------------------------------------------------------------------

    async def _backwards(self, count: int) -> AsyncIterator[list[DeadLetter]]:
        """All letters in pages, the newest first; what comes meanwhile is not among them."""
        end = "+"
        while True:
            page = await command(self._redis, "XREVRANGE", self._key, end, "-", "COUNT", count)
            yield [_dead_letter(entry_id.decode(), fields) for entry_id, fields in page]
            if len(page) < count:
                return
            end = f"({page[-1][0].decode()}"

    async def _entries(self, ids: Sequence[str]) -> dict[str, str]:
        """The letters' own ids. There is no index of tasks: theirs are looked for in all letters."""
        found = {wanted: wanted for wanted in ids if _ENTRY_ID.fullmatch(wanted)}
        missing = set(ids) - found.keys()
        if missing:
            async for page in self._backwards(PAGE):
                for letter in page:
                    if letter.id in missing:
                        missing.remove(letter.id)
                        found[letter.id] = letter.entry_id
                if not missing:
                    break
        return found

    async def _letters(self, entries: Sequence[str]) -> list[DeadLetter]:
        """Those that are there, each once."""
        with sorted_errors():
            async with self._redis.pipeline(transaction=False) as pipe:
                for entry in dict.fromkeys(entries):
                    pipe.xrange(self._key, entry, entry)
                pages = await pipe.execute()
        return [_dead_letter(entry_id.decode(), fields) for page in pages for entry_id, fields in page]

    # --- trying again -------------------------------------------------------------------

    async def _revive(self, letters: Sequence[DeadLetter]) -> dict[str, str | DispatcherError]:
        """By the letters' own ids: the new task's id, or why there is none; nothing of one that
        went meanwhile."""
        told: dict[str, str | DispatcherError] = {}
        tasks: list[tuple[DeadLetter, Task]] = []
        for letter in letters:
            try:
                tasks.append((letter, _task_of(letter)))
            except TaskRefused as refusal:
                told[letter.entry_id] = refusal
        args: list[str] = []
        for letter, task in tasks:
            args += [
                letter.entry_id,
                self._new_id(letter.entry_id),
                task.digest(),
                task.document().decode(),
                task.queue,
                ms(task.expires_at.timestamp() if task.expires_at else None),
            ]
        replies = await self._scripts.call("revive", args) if args else []
        for (letter, task), (verdict, task_id, *limit) in zip(tasks, replies, strict=True):
            match verdict.decode():
                case "new" | "known":
                    told[letter.entry_id] = task_id.decode()
                case "gone":  # somebody else was faster
                    pass
                case refused:
                    error = await self._store.refusal(refused, task.queue, *limit or [0])
                    told[letter.entry_id] = type(error)(f"dead letter {letter.id}: {error}")
        return told

    async def _retried_before(self, wanted: str) -> str | DispatcherError:
        """The task that a letter which is gone was made, as far as that is remembered."""
        if _ENTRY_ID.fullmatch(wanted):
            task_id = self._new_id(wanted)
            known = bool(await command(self._redis, "EXISTS", self._keys.record(task_id)))
        else:
            reply = await command(self._redis, "HGET", self._keys.record(wanted), "retried_as")
            task_id, known = (reply or b"").decode(), bool(reply)
        return task_id if known else TaskNotFound(f"no dead letter {wanted!r}")

    def _new_id(self, entry_id: str) -> str:
        """The id of the task that a letter becomes: always the same, and nobody else's."""
        return hashlib.sha256(f"{self._key} {entry_id}".encode()).hexdigest()[:32]


def _task_of(letter: DeadLetter) -> Task:
    """The task that the letter would be. Raises InvalidTask, ExpiredTask."""
    if letter.task is None:
        raise InvalidTask(
            f"of dead letter {letter.id} {letter.task_bytes} bytes were too many to be kept"
            " (TASK_MAX_BYTES); submit it anew",
            field="task",
        )
    try:
        task = parse_document(letter.task)
        if task.expires_at is not None and task.expires_at.timestamp() <= time.time():
            raise ExpiredTask(f"{task.expires_at.isoformat()} has passed", field="expires_at")
    except TaskRefused as refusal:
        told = type(refusal)(
            f"dead letter {letter.id} can't run as it is: {refusal};"
            " correct it and submit it: `dispatcher dead list --json` has the original"
        )
        told.field = refusal.field
        raise told from refusal
    # The stream an entry lies in is its queue, unless its document names another.
    queue = task.queue if "queue" in task.model_fields_set else letter.queue
    return task.model_copy(
        update={"queue": queue, "id": None, "idempotency_key": None, "delay": None, "not_before": None}
    )


def _dead_letter(entry_id: str, fields: dict[bytes, bytes]) -> DeadLetter:
    def text(name: str) -> str:
        return fields.get(name.encode(), b"").decode("utf-8", "replace")

    task = fields.get(b"task")
    return DeadLetter(
        entry_id=entry_id,
        id=text("id"),
        reason=text("reason"),
        message=text("message"),
        queue=text("queue"),
        attempt=int(text("attempt") or 1),
        source_id=text("source_id"),
        finished_at=text("finished_at"),
        task=task,
        task_bytes=len(task) if task is not None else int(text("task_bytes") or 0),
        task_sha1=text("task_sha1"),
    )

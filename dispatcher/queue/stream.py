"""The source ``redis-stream``: tasks come by XADD.

Its doorbell is a plain XREAD, which takes nothing. Each stream's cursor makes it ring once for
what is new.
"""

from __future__ import annotations

from dispatcher.queue.source import Source


class StreamSource(Source):
    """Takes tasks from the streams of the queues this instance serves."""

    async def listen(self) -> None:
        """See ``Source.listen``: one blocking read of all streams."""
        await self._listen_to_streams(*map(self._keys.queue, self._queues))

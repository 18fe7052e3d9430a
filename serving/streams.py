"""Answers that are sent while they are made, as server-sent events."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import TypeVar

from pydantic import BaseModel

T = TypeVar("T")


def server_sent(name: str, content: BaseModel | Mapping[str, object]) -> str:
    """One event. JSON has no line breaks of its own."""
    text = content.model_dump_json() if isinstance(content, BaseModel) else json.dumps(content, ensure_ascii=False)
    return f"event: {name}\ndata: {text}\n\n"


async def in_one_task(events: AsyncIterator[T]) -> AsyncGenerator[T, None]:
    """The same events, made in a task of their own, whoever reads them from whichever task: a deadline that is set
    within a generator holds for the task that set it. The task ends with the reader."""
    queue: asyncio.Queue[T | None] = asyncio.Queue()

    async def run() -> None:
        try:
            async for event in events:
                queue.put_nowait(event)
        finally:
            queue.put_nowait(None)

    task = asyncio.ensure_future(run())
    try:
        while (event := await queue.get()) is not None:
            yield event
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

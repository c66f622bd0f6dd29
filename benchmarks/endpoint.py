"""Many chat completions of an OpenAI API, as rows that a later run does not ask for again."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
from openai import APIError, AsyncOpenAI
from tqdm import tqdm

from benchmarks.metrics import metrics
from lenvm_vllm.api.answers import SAMPLED
from trainer.rows import Rows

TIMEOUT_S = 3600
RETRIES = 4
OWN = ("model", "messages", "temperature", "top_p", "max_tokens")  # of the client's API


@dataclass(frozen=True, slots=True)
class Job:
    """One request. facts: what its row says beside the answer; their values name the row.

    bare: the text that is to be answered, where the last message has more than that.
    """

    facts: dict[str, Any]
    messages: list[dict[str, Any]]
    body: dict[str, Any]
    bare: str | None = None

    @property
    def key(self) -> str:
        return "/".join(map(str, self.facts.values()))

    @property
    def request(self) -> str:
        """The text that is answered: `bare`, or the last message's, without pictures."""
        if self.bare is not None:
            return self.bare
        content = self.messages[-1]["content"]
        parts = [content] if isinstance(content, str) else [p.get("text", "") for p in content]
        return "".join(parts)


def without_row(jobs: Sequence[Job], rows: Rows) -> list[Job]:
    """The jobs that are still to be asked. Raises ValueError where a row or another job of the same
    name has another text to answer."""
    asked: dict[str, str] = {}
    for job in jobs:
        row = rows.get(job.key, {})
        if asked.setdefault(job.key, row.get("request", job.request)) != job.request:
            where = rows.path.parent if rows.path else "the data"
            raise ValueError(f"data: another prompt is named {job.key} in {where}")
    return [job for job in jobs if job.key not in rows]


@dataclass(frozen=True, slots=True)
class Endpoint:
    """url: with its /v1. model: as it is served. concurrency: requests open at once.

    with_ids: whether answers are token ids as well, which vLLM returns.
    """

    url: str
    model: str
    concurrency: int = 32
    with_ids: bool = True

    @property
    def key(self) -> str:
        return os.environ.get("OPENAI_API_KEY", "none")

    def refuses(self, fields: dict[str, Any]) -> bool:
        """Whether a request with these is a 400: how a plugin that reads them is told."""
        body = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1, **fields}
        headers = {"Authorization": f"Bearer {self.key}"}
        answer = httpx.post(
            f"{self.url}/chat/completions",
            json={"model": self.model, **body},
            headers=headers,
            timeout=TIMEOUT_S,
        )
        if answer.status_code not in (200, 400):
            raise ValueError(f"url: {self.url} answers {answer.status_code} {answer.text[:300]}")
        return answer.status_code == 400

    def answer(
        self,
        jobs: Sequence[Job],
        rows: Rows,
        measured: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
    ) -> list[dict[str, Any]]:
        """The rows of all jobs, those that are missing asked for.

        measured: what is kept of a row that came.

        A row: key, facts, request, text, length in tokens, sampled (tokens with those that were
        dropped for it), finish (stop or length) and, with ids, prompt_ids and ids.

        Raises ValueError where the endpoint refuses a request, and as `without_row`.
        """
        missing = without_row(jobs, rows)
        steps, blind = self._steps()
        asyncio.run(self._fill(missing, rows, len(jobs), measured))
        more, lost = (now - then for now, then in zip(self._steps(), (steps, blind), strict=True))
        if lost:
            tell = f"warning: {lost:.0f} of {more:.0f} guided steps at {self.url} had no values"
            print(tell, file=sys.stderr)
        return [rows[job.key] for job in jobs]

    def _steps(self) -> tuple[float, float]:
        """Guided steps so far, and those of them without values; 0 where no plugin tells."""
        counts: dict[str, float] = {}
        with contextlib.suppress(httpx.HTTPError):
            counts = metrics(self.url.removesuffix("/v1"))
        return counts.get("lenvm_steps_total", 0), counts.get("lenvm_fallback_steps_total", 0)

    async def _fill(
        self,
        jobs: Sequence[Job],
        rows: Rows,
        total: int,
        measured: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> None:
        gate = asyncio.Semaphore(self.concurrency)
        bar = tqdm(total=total, initial=total - len(jobs), desc="answers", file=sys.stderr)
        client = AsyncOpenAI(
            base_url=self.url, api_key=self.key, timeout=TIMEOUT_S, max_retries=RETRIES
        )

        async def fill(job: Job) -> None:
            async with gate:
                rows.add(measured(await self._one(client, job)))
                bar.update()

        async with client:
            try:
                await asyncio.gather(*map(fill, jobs))
            except APIError as error:
                raise ValueError(f"url: {self.url}: {error}") from error
            finally:
                bar.close()

    async def _one(self, client: AsyncOpenAI, job: Job) -> dict[str, Any]:
        own: dict[str, Any] = {name: job.body[name] for name in OWN if name in job.body}
        more = {name: value for name, value in job.body.items() if name not in OWN}
        raw = await client.chat.completions.with_raw_response.create(
            model=self.model,
            messages=job.messages,  # type: ignore[arg-type]
            extra_body={"return_token_ids": True, **more} if self.with_ids else more,
            **own,
        )
        reply = raw.parse()
        (choice,) = reply.choices
        length = reply.usage.completion_tokens if reply.usage else 0
        row = {
            "key": job.key,
            **job.facts,
            "request": job.request,
            "text": choice.message.content or "",
            "length": length,
            "sampled": int(raw.headers.get(SAMPLED, length)),
            "finish": choice.finish_reason,
        }
        if self.with_ids:
            try:
                row["prompt_ids"] = (reply.model_extra or {})["prompt_token_ids"]
                row["ids"] = (choice.model_extra or {})["token_ids"]
            except KeyError as error:
                name = f"{self.url} answers without {error}, which vLLM returns"
                raise ValueError(f"url: {name}") from error
        return row

"""A streamed answer with a progress bar of its length, for the OpenAI client.

    python examples/stream_with_progress.py --url http://127.0.0.1:8000/v1 --tokens 100

Needs `openai` and `rich`.
"""

import argparse
from collections.abc import Iterator
from typing import Any

from openai import OpenAI
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text


def choices(client: OpenAI, prompt: str, tokens: int) -> Iterator[Any]:
    """The parts of an answer of so many tokens; each fourth tells how far it is."""
    stream = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": prompt}],
        stream=True,
        extra_body={"length_target": {"tokens": tokens, "progress": 4}},
    )
    for chunk in stream:
        yield from chunk.choices


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="Explain how a bicycle stays upright.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--tokens", type=int, default=100)
    args = parser.parse_args()

    text, told = Text(), TextColumn("{task.completed:.0f} of {task.total:.0f} tokens expected")
    bar = Progress(BarColumn(), told)
    task = bar.add_task("", total=args.tokens)
    with Live(Group(text, bar)):
        for choice in choices(
            OpenAI(base_url=args.url, api_key=args.key), args.prompt, args.tokens
        ):
            text.append(choice.delta.content or "")
            # Fields that the OpenAI client does not know are kept as they come.
            progress = getattr(choice, "length_progress", None)
            result = getattr(choice, "length_result", None)
            if progress:
                expected = progress["expected"]  # None while the value server is away
                rest = args.tokens - progress["tokens"] if expected is None else expected
                total = progress["tokens"] + max(rest, 0)
                bar.update(task, completed=progress["tokens"], total=total)
            if result:
                bar.update(task, completed=result["tokens"], total=result["tokens"])
    print(f"\n{result['tokens']} tokens, {result['end']} end")


if __name__ == "__main__":
    main()

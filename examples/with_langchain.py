"""An answer and a stream of a wanted length by LangChain, and how each of them ended.

    python examples/with_langchain.py --url http://127.0.0.1:8000/v1 --tokens 80

Needs `langchain-openai`. In a chain: `model.bind(extra_body={"length_target": 80})`. LangChain
refuses `length_target` as an argument of its own, and in `model_kwargs`.
"""

import argparse
from typing import Any

from langchain_openai import ChatOpenAI


class GuidedChat(ChatOpenAI):
    """ChatOpenAI drops every field of an answer that OpenAI does not have; this one keeps
    `length_result`. The two methods are those that LangChain's own models of other providers
    override; they are not public, and were tried with langchain-openai 1.7.
    """

    def _create_chat_result(self, response: Any, generation_info: Any = None) -> Any:
        result = super()._create_chat_result(response, generation_info)
        answer = response if isinstance(response, dict) else response.model_dump()
        for generation, choice in zip(result.generations, answer["choices"], strict=True):
            keep(choice, generation)
        return result

    def _convert_chunk_to_generation_chunk(self, chunk: dict, *args: Any) -> Any:
        generation = super()._convert_chunk_to_generation_chunk(chunk, *args)
        for choice in chunk.get("choices") or ():
            keep(choice, generation)
        return generation


def keep(choice: dict[str, Any], generation: Any) -> None:
    if "length_result" in choice:
        generation.message.response_metadata["length_result"] = choice["length_result"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="Explain how a bicycle stays upright.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=80)
    args = parser.parse_args()

    model = GuidedChat(
        base_url=args.url,
        api_key=args.key,
        model=args.model,
        extra_body={"length_target": args.tokens},
    )
    reply = model.invoke(args.prompt)
    print(reply.content, reply.response_metadata["length_result"], sep="\n")

    # A call may ask for another length than its model does.
    whole = None
    at_most = {"length_target": {"mode": "at_most", "tokens": args.tokens}}
    for part in model.stream(args.prompt, extra_body=at_most):
        print(part.content, end="", flush=True)
        whole = part if whole is None else whole + part
    print("", whole.response_metadata["length_result"], sep="\n")


if __name__ == "__main__":
    main()

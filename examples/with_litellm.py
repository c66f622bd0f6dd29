"""An answer and a stream of a wanted length by LiteLLM, and how each of them ended.

    python examples/with_litellm.py --url http://127.0.0.1:8000/v1 --tokens 80

Needs `litellm`. Its streams end with a chunk of its own, so that their `length_result` is lost;
the finish reason and the usage remain, and `choice.length_progress` on the way. In
`litellm.responses` the length has to be `extra_body={"length_target": 80}`: other parameters that
OpenAI does not have are dropped there without a word.
"""

import argparse

import litellm


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="Explain how a bicycle stays upright.")
    parser.add_argument("--url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--key", default="none")
    parser.add_argument("--model", default="SmolLM2-135M-Instruct")
    parser.add_argument("--tokens", type=int, default=80)
    args = parser.parse_args()
    asked = {
        "model": f"hosted_vllm/{args.model}",
        "api_base": args.url,
        "api_key": args.key,
        "messages": [{"role": "user", "content": args.prompt}],
    }

    reply = litellm.completion(**asked, length_target=args.tokens)
    choice = reply.choices[0]
    print(choice.message.content, choice.provider_specific_fields["length_result"], sep="\n")

    at_most = {"mode": "at_most", "tokens": args.tokens}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    end = None
    for chunk in litellm.completion(**asked, **stream, length_target=at_most):
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
            end = choice.finish_reason or end
        usage = getattr(chunk, "usage", None)
    # "length": the target cut it.
    print("", f"{usage.completion_tokens} tokens, {end}", sep="\n")


if __name__ == "__main__":
    main()

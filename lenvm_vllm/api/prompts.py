"""The prompt of a request, where it is one and plain text."""

from typing import Any

# The parts of a content that are text, and where in them it stands.
_PARTS = {"text": "text", "input_text": "text", "output_text": "text"}
_PARTS |= {"refusal": "refusal", "thinking": "thinking"}
_BESIDE = {"type", "annotations", "cache_control", "citations", "closed", "logprobs", "signature"}


def text_of(content: Any) -> str | None:
    """The text of a message's content, a string or a list of text parts; None for other parts.

    Joined as vLLM does it.
    """
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = [_text_of_part(part) for part in content]
    return None if None in texts else "\n".join(text for text in texts if text is not None)


def _text_of_part(part: Any) -> str | None:
    if not isinstance(part, dict):
        return part if isinstance(part, str) else None
    name = _PARTS.get(str(part.get("type", "text")), "")
    value = part.get(name)
    return value if isinstance(value, str) and part.keys() <= _BESIDE | {name} else None


def is_text(request: dict[str, Any]) -> bool:
    """Whether the prompt of a chat or text completion is one, and text or token ids alone.

    A call of a tool in the history has no content.
    """
    if "messages" not in request:
        return _of_completion(request.get("prompt")) is not None
    messages = request["messages"]
    return isinstance(messages, list) and all(
        isinstance(message, dict)
        and (message.get("content") is None or text_of(message["content"]) is not None)
        for message in messages
    )


def to_predict(request: dict[str, Any], shown: bool = False) -> dict[str, Any] | None:
    """What `/v1/predict` takes, of a request to any route; None for what is no plain text.

    shown: pictures of a chat, which have to stand in it, go along.
    """
    messages = request.get("messages", request.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, list):
        found = _of_completion(request.get("prompt", request.get("token_ids")))
        return None if found == {"token_ids": []} else found
    system = text_of(request.get("system", request.get("instructions")))
    first = [] if system is None else [{"role": "system", "content": system}]
    plain = [_plain(message, shown) for message in messages]
    return {"messages": [*first, *plain]} if plain and None not in plain else None


def _of_completion(prompt: Any) -> dict[str, Any] | None:
    """Text or token ids, also out of a list that holds no other, as some clients send it."""
    if isinstance(prompt, list) and len(prompt) == 1 and type(prompt[0]) is not int:
        prompt = prompt[0]
    if isinstance(prompt, str):
        return {"prompt": prompt}
    ids = isinstance(prompt, list) and all(type(token) is int for token in prompt)
    return {"token_ids": prompt} if ids else None


def _plain(message: Any, shown: bool) -> dict[str, Any] | None:
    """A message with its text for its content, or its parts where pictures are among them."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return None
    content = message.get("content")
    text = text_of(content)
    if text is None and shown and isinstance(content, list):
        parts = [_shown(part) for part in content]
        return None if None in parts else message | {"content": parts}
    return None if text is None else message | {"content": text}


def _shown(part: Any) -> dict[str, Any] | None:
    """A part of text or a picture in OpenAI's form."""
    if isinstance(part, dict) and part.get("type") == "image_url":
        return part
    text = _text_of_part(part)
    return None if text is None else {"type": "text", "text": text}

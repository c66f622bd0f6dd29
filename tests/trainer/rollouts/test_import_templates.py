"""Answers that only the chat template can write: with reasoning or tool calls."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.support.logs import END, REPLY, USER, Import, encoded, figures, plain, write
from tests.support.tiny import tiny_tokenizer
from trainer.rollouts.import_logs import import_logs

TOOLS = {
    "messages": [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "2"},
        {"role": "assistant", "content": "Two", "reasoning": "Hm"},
    ],
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "chat_template_kwargs": {"mark": "!"},
}
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name + ';' }}{% endfor %}"
    "{% for m in messages %}{{ '<|start|>' + m.role + mark + '\n' }}"
    "{% if m.reasoning_content %}{{ '[' + m.reasoning_content + ']' }}{% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + ':' + (c.function.arguments.a + 1)"
    " | string }}{% endfor %}{{ m.content + '<|end|>' }}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' + mark + '\n' }}{% endif %}"
)


def test_tools_and_reasoning_are_what_the_template_writes(imported: Import, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE.replace("mark", "(mark or '')"))
    first, second = imported(TOOLS, chat_template=template)
    assert first["prompt_ids"] == encoded("f;<|start|>user!\nHi<|end|>\n<|start|>assistant!\n")
    assert first["completion_ids"] == encoded("f:2<|end|>")
    assert first["finish_reason"] == "stop"
    assert second["completion_ids"] == encoded("[Hm]Two<|end|>")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('no tools') }}", r"^model: .*no tools"),
        (
            "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('no tools') }}"
            "{% endif %}{% endfor %}",
            r"log\.jsonl: line 1: messages: the chat template refuses them: no tools",
        ),
        ("{% if add_generation_prompt %}?{% endif %}", r"line 1: the answer: .* must be without"),
    ],
)
def test_turns_that_a_template_cannot_write_are_named(
    template: str, message: str, imported: Import, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(ValueError, match=message):
        imported(TOOLS, chat_template=tmp_path / "t.jinja")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"reasoning": " Hm\n"}, "reasoning_content: 'Hm', must be written by the chat template"),
        (
            {"tool_calls": [{"function": {"name": "look_up"}}]},
            r"tool_calls\.function\.name: 'look_up', must be written",
        ),
    ],
)
def test_what_a_template_leaves_out_is_no_shorter_answer(
    more: Any, message: str, imported: Import, capsys: pytest.CaptureFixture[str]
) -> None:
    line = {"messages": [USER, REPLY | more]}
    with pytest.raises(ValueError, match=rf"line 1: {message}"):
        imported(line)
    assert len(imported(line, {"messages": [USER, REPLY]}, skip_bad=True)) == 1
    assert figures(capsys.readouterr().out)["bad"] == 1


def test_each_token_that_may_end_a_text_is_an_end(tmp_path: Path) -> None:
    """As of models that end their calls otherwise than their answers."""
    tiny_tokenizer(("<|call|>",)).save_pretrained(tmp_path / "model")
    ends = {"eos_token_id": [END, 258]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(ends))
    written = TEMPLATE.replace("'<|end|>'", "('<|call|>' if m.tool_calls else '<|end|>')")
    (tmp_path / "t.jinja").write_text(written.replace("mark", "(mark or '')"))
    log = write(tmp_path / "log.jsonl", TOOLS)
    out = tmp_path / "out"
    import_logs(log, out, model=str(tmp_path / "model"), chat_template=tmp_path / "t.jinja")
    first, second = pq.read_table(out).to_pylist()
    assert first["completion_ids"] == [*plain("f:2"), 258]
    assert second["completion_ids"] == [*plain("[Hm]Two"), END]

"""A real `vllm run-batch`: lengths in a file of requests."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from lenvm_vllm.commands.processes import free_port
from lenvm_vllm.commands.servers import VLLM
from tests.support.servers import BARE_FLAG
from tests.support.tiny_llm import tiny_llm
from value_server.contract.units import count

pytestmark = pytest.mark.e2e


def test_a_file_of_requests(tmp_path: Path) -> None:
    """Without a value server, so inside its rails alone."""
    targets = {
        "exact": {"tokens": 30, "tolerance": 0},
        "words": {"words": 9, "tolerance": 0},
        "wrong": 0,
        "no unit": {"sentences": 9},
    }
    asked = [
        {
            **{"custom_id": name, "method": "POST", "url": "/v1/chat/completions"},
            "body": {
                **{"model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
                "length_target": target,
            },
        }
        for name, target in targets.items()
    ]
    beams = {**asked[0]["body"], "use_beam_search": True}
    asked.append({**asked[0], "custom_id": "beams", "body": beams})
    given, found = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    given.write_text("\n".join(map(json.dumps, asked)))
    command = [
        *VLLM, "run-batch", "-i", str(given), "-o", str(found), *BARE_FLAG,
        "--model", str(tiny_llm(tmp_path / "model")), "--served-model-name", "tiny",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "512",
    ]  # fmt: skip
    env = {
        **{"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"},
        "LENVM_URL": f"http://127.0.0.1:{free_port()}",
    }
    run = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    lines = [json.loads(line) for line in found.read_text().split("\n") if line]
    answers = {line["custom_id"]: line for line in lines}
    assert answers["exact"]["response"]["body"]["usage"]["completion_tokens"] == 30
    text = answers["words"]["response"]["body"]["choices"][0]["message"]["content"]
    assert count(text, "words") == 9
    refused = {
        "wrong": "length_target.tokens",
        "no unit": "length_target.sentences",
        "beams": "use_beam_search",
    }
    for name, named in refused.items():
        assert answers[name]["response"]["status_code"] == 400
        assert named in str(answers[name]["error"])

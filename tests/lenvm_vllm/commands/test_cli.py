"""The `lenvm` command: help for every option, and one line for what is wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lenvm_vllm.commands.cli import app, main

COMMANDS = (
    *(
        "serve",
        "rollout",
        "import-logs",
        "distil",
        "train",
        "evaluate",
        "tokens",
        "import",
        "export",
    ),
    *("predict", "doctor", "demo"),
)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_renders(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    app([command, "--help"], result_action="return_value")
    assert f"Usage: lenvm {command}" in capsys.readouterr().out


def test_help_has_a_line_for_each_command_and_loads_none() -> None:
    script = (
        "import sys; from lenvm_vllm.commands.cli import app; app(['--help'], "
        "result_action='return_value');"
        "sys.exit('torch' in sys.modules)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script], env={"COLUMNS": "80"}, stdout=subprocess.PIPE, check=True
    ).stdout.decode()
    for command in COMMANDS:
        (line,) = re.findall(rf"^│ {command} +(.+?) +│$", shown, re.MULTILINE)
        assert line.endswith("."), "cut, or on two lines"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    arguments = app[command].assemble_argument_collection(parse_docstring=True)
    assert [a.name for a in arguments if a.show and not a.parameter.help] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "x", "y", "--model", "m", "--gamma", "2"],
            "gamma: 2.0, must be between 0 and 1",
        ),
        (["rollout", "{}/none", "{}/out", "--model", "m"], "No such file or directory: '{}/none'"),
        (["evaluate", "{}/none", "{}/none"], "{}/none/config.json: no such file"),
    ],
)
def test_what_is_wrong_is_one_line_and_exit_code_1(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["lenvm", *(a.format(tmp_path) for a in arguments)])
    with pytest.raises(SystemExit) as exit_:
        main()
    text = exit_.value.code  # Python prints a text to stderr and exits with 1
    assert isinstance(text, str)
    assert text.startswith("error: ")
    assert text.endswith(message.format(tmp_path))
    assert "\n" not in text


def test_options_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the command line go first, and what the file spells wrong is named."""
    monkeypatch.setattr(app, "config", app.config)  # which `main` sets
    config = tmp_path / "run.yaml"
    config.write_text("model: m\nholdout: 0.5\ngamma: 2\nlora:\n  rank: 4\n")
    command = ["lenvm", "train", "x", "y", "--config", str(config)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"error: gamma: 2\.0, must be"):
        main()
    monkeypatch.setattr(sys, "argv", [*command, "--gamma", "3"])
    with pytest.raises(SystemExit, match=r"error: gamma: 3\.0, must be"):
        main()
    config.write_text("model: m\nholdin: 0.5\n")
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert 'Unknown option: "[holdin]"' in capsys.readouterr().err


def test_what_is_no_yaml_is_told_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "config", app.config)  # which `main` sets
    config = tmp_path / "run.yaml"
    config.write_text("model: m\nlora: [1\n")
    monkeypatch.setattr(sys, "argv", ["lenvm", "train", "x", "y", "--config", str(config)])
    with pytest.raises(SystemExit, match=rf'^error: config: .* "{config}", line 2, column 7 '):
        main()


def test_a_message_of_several_lines_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_arguments: list[str], **_options: object) -> None:
        raise ValueError("first\n  second")

    monkeypatch.setattr("lenvm_vllm.commands.cli.app", fail)
    with pytest.raises(SystemExit, match=r"^error: first second$"):
        main()

"""The `lenvm` command. Subcommands load when they run, so that each needs its own extra only."""

import sys
from argparse import ArgumentParser
from pathlib import Path

from cyclopts import App
from cyclopts.config import Yaml

COMMANDS = {
    "serve": "value_server.serve:serve",
    "rollout": "trainer.rollouts.rollout:rollout",
    "import-logs": "trainer.rollouts.import_logs:import_logs",
    "distil": "trainer.lookahead.distil:distil",
    "train": "trainer.training.train:train",
    "evaluate": "trainer.evaluation.evaluate:evaluate",
    "tokens": "trainer.evaluation.tokens:tokens",
    "import": "trainer.paper_checkpoints:import_checkpoint",
    "export": "trainer.paper_checkpoints:export_checkpoint",
    "predict": "lenvm_vllm.commands.predict:predict",
    "doctor": "lenvm_vllm.commands.doctor:doctor",
    "demo": "lenvm_vllm.commands.demo:demo",
}
# In the help of all; that of one command is its docstring, which is known once it is loaded.
LINES = {
    "serve": "Serve the value model in CHECKPOINT until interrupted.",
    "rollout": "Sample completions of PROMPTS into shards in OUTPUT.",
    "import-logs": "Make rollouts of production logs.",
    "distil": "Write values of likely next tokens, to learn.",
    "train": "Train a value model on ROLLOUTS, write it to OUTPUT.",
    "evaluate": "Evaluate CHECKPOINT on the held-out prompts of ROLLOUTS.",
    "tokens": "Score the tokens that lengthen or shorten a text.",
    "import": "Read a checkpoint of the paper's own code.",
    "export": "Write CHECKPOINT as the paper's own code.",
    "predict": "Predict the length of the answer to PROMPT.",
    "doctor": "Check an installation and say what to do.",
    "demo": "Length control on a small real model; ends with a JSON line.",
}
# The extra whose packages a command needs beside those that are always there.
EXTRAS = {"value_server": "server", "trainer": "trainer", "lenvm_vllm.commands.demo": "demo"}

app = App(
    name="lenvm",
    help="Length control for LLM serving. With --config FILE.yaml a command takes its options "
    "from there; the command line wins.",
)
for name, target in COMMANDS.items():
    app.command(target, name=name, help=LINES[name])


def main() -> None:
    """Run a command; what is wrong with its input is one line on stderr and exit code 1."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    config, arguments = parser.parse_known_args(sys.argv[1:])
    files = [config.config] if config.config else []
    app.config = [Yaml(file, must_exist=True, use_commands_as_keys=False) for file in files]
    try:
        for file in files:
            _check_yaml(Path(file))
        app(arguments, result_action="return_none")
    except ImportError as error:
        sys.exit(_missing(error, arguments[0]))
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def _check_yaml(file: Path) -> None:
    """Raises ValueError with the place of what is no YAML: cyclopts tells neither file nor line."""
    import yaml

    if not file.is_file():  # cyclopts says so
        return
    with file.open("rb") as opened:
        try:
            yaml.safe_load(opened)
        except yaml.YAMLError as error:
            raise ValueError(f"config: {error}") from error


def _missing(error: ImportError, command: str) -> str:
    """What to install. Raises the error again where that is not known."""
    cause = error.__cause__ or error  # cyclopts has an error of its own around it
    needs = ["vllm"] if getattr(cause, "name", None) == "vllm" else []
    needs += [own for part, own in EXTRAS.items() if COMMANDS.get(command, "").startswith(part)]
    if not needs or not isinstance(cause, ModuleNotFoundError):
        raise error
    return f"error: {command}: {cause}; pip install 'lenvm-vllm[{needs[0]}]'"


if __name__ == "__main__":
    main()

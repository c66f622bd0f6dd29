"""The `lenvm` command. Subcommands load when they run, so that each needs its own extra only."""

import sys
from argparse import ArgumentParser

from cyclopts import App
from cyclopts.config import Yaml

# Command: where it is, the extra whose packages it needs beside those that are always there, and
# its line, which is here as a docstring is known only once its module is loaded.
COMMANDS = {
    "serve": (
        "value_server.serve:serve",
        "server",
        "Serve the value model in CHECKPOINT until interrupted.",
    ),
    "rollout": (
        "trainer.rollouts.rollout:rollout",
        "trainer",
        "Sample completions of PROMPTS into shards in OUTPUT.",
    ),
    "train": (
        "trainer.training.train:train",
        "trainer",
        "Train a value model on ROLLOUTS, write it to OUTPUT.",
    ),
    "evaluate": (
        "trainer.evaluation.evaluate:evaluate",
        "trainer",
        "Evaluate CHECKPOINT on the held-out prompts of ROLLOUTS.",
    ),
    "tokens": (
        "trainer.evaluation.tokens:tokens",
        "trainer",
        "Score the tokens that lengthen or shorten a text.",
    ),
    "import": (
        "trainer.paper_checkpoints:import_checkpoint",
        "trainer",
        "Read a checkpoint of the paper's own code.",
    ),
    "export": (
        "trainer.paper_checkpoints:export_checkpoint",
        "trainer",
        "Write CHECKPOINT as the paper's own code.",
    ),
    "predict": (
        "lenvm_vllm.commands.predict:predict",
        "",
        "Print the length of an answer that PROMPT suggests.",
    ),
    "doctor": (
        "lenvm_vllm.commands.doctor:doctor",
        "",
        "Check an installation and say what to do.",
    ),
    "demo": (
        "lenvm_vllm.commands.demo:demo",
        "demo",
        "Length control on a small real model; ends with a JSON line.",
    ),
}

app = App(
    name="lenvm",
    help="Length control for LLM serving. With --config FILE.yaml a command takes its options "
    "from there; those on the command line go first.",
)
for name, (target, _, line) in COMMANDS.items():
    app.command(target, name=name, help=line)


def main() -> None:
    """Run a command; what is wrong with its input is one line on stderr and exit code 1."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    config, arguments = parser.parse_known_args(sys.argv[1:])
    files = [config.config] if config.config else []
    app.config = [Yaml(file, must_exist=True, use_commands_as_keys=False) for file in files]
    try:
        app(arguments, result_action="return_none")
    except ImportError as error:
        sys.exit(_missing(error, arguments[0]))
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


def _missing(error: ImportError, command: str) -> str:
    """What to install. Raises the error again where that is not known."""
    cause = error.__cause__ or error  # cyclopts has an error of its own around it
    own = COMMANDS[command][1] if command in COMMANDS else ""
    extra = "vllm" if getattr(cause, "name", None) == "vllm" else own
    if not extra or not isinstance(cause, ModuleNotFoundError):
        raise error
    return f"error: {command}: {cause}; pip install 'lenvm-vllm[{extra}]'"


if __name__ == "__main__":
    main()

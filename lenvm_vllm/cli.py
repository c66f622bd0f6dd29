"""The `lenvm` command. Subcommands load when they run, so that each needs its own extra only."""

import sys

from cyclopts import App

app = App(name="lenvm", help="Length control for LLM serving.")
app.command("value_server.serve:serve", name="serve")
app.command("trainer.rollout:rollout", name="rollout")
app.command("trainer.train:train", name="train")
app.command("trainer.evaluate:evaluate", name="evaluate")
app.command("lenvm_vllm.predict:predict", name="predict")
app.command("lenvm_vllm.demo:demo", name="demo")


def main() -> None:
    """Run a command; what is wrong with its input is one line on stderr and exit code 1."""
    try:
        app(sys.argv[1:])
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()

"""`python -m trainer rollout | train | evaluate`: the same commands as those of `lenvm`."""

import sys

from cyclopts import App

app = App(name="trainer", help="Makes length value models.")
for name in ("rollout", "train", "evaluate"):
    app.command(f"trainer.{name}:{name}", name=name)


def main() -> None:
    """Run a command; what is wrong with its input is one line on stderr and exit code 1."""
    try:
        app(sys.argv[1:], result_action="return_none")
    except (OSError, ValueError) as error:
        sys.exit("error: " + " ".join(str(error).split()))


if __name__ == "__main__":
    main()

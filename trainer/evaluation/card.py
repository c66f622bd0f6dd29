"""README.md of a checkpoint: what it was made from and how well it predicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.evaluation.forecasts import ALL
from trainer.output import table
from value_server.contract.checkpoint import LenvmConfig

CARD_FILE = "README.md"
# Of no use to a reader: they are read by `lenvm evaluate`, `run` by `lenvm train`.
INTERNAL = ("baselines", "prompt_sketch", "run")

LOOKAHEAD_TEXT = (
    "The lookahead head beside exact values of the served model's likeliest next tokens:"
)

SEES = {
    True: "It sees the pictures of a prompt, by tower and projector of that model.",
    False: "It reads text alone: the pictures of a prompt are blanks to it.",
}


def write_card(
    checkpoint: Path, config: LenvmConfig, figures: Mapping[str, Any] | None = None
) -> None:
    """Write `checkpoint`/README.md; `figures` are those of `lenvm evaluate`."""
    facts = {name: value for name, value in config.training.items() if name not in INTERNAL}
    lines = [
        "---",
        f"base_model: {config.base_model}",
        "library_name: lenvm-vllm",
        "tags: [length-value-model]",
        "---",
        "# Length value model",
        "",
        f"Predicts at every token how many are still to come, in texts that are sampled from the "
        f"model it was trained on. Built on {config.base_model}, {config.num_layers} layers, "
        f"gamma {config.gamma:.6g}, target {config.target}. {SEES[config.pictures]}",
        "",
        "```console",
        "$ lenvm serve .",
        "```",
        "",
        "## Training",
        "",
        table([{"setting": name, "value": str(value)} for name, value in facts.items()]),
    ]
    if figures:
        lines += ["", "## Evaluation", "", evaluation_text(figures), "", result_table(figures)]
        if "lookahead" in figures:
            lines += ["", LOOKAHEAD_TEXT, "", agreement_table(figures["lookahead"])]
    (checkpoint / CARD_FILE).write_text("\n".join(lines) + "\n")


def evaluation_text(figures: Mapping[str, Any]) -> str:
    """One paragraph: on what, and what the columns of the table are."""
    return (
        f"On {figures['completions']} completions of {figures['prompts']} prompts "
        f"({figures.get('rollouts', 'not named')}), of which {figures['cut']} were cut. MRE and "
        "median error: over prompts, of |L̂ - L| / L at the prompt's end, L the length of the mean "
        "value of its completions; rank correlation: of L̂ and L over all prompts; R²: of the "
        "value at every token of the finished completions."
    )


def result_table(figures: Mapping[str, Any]) -> str:
    """Markdown of `result_rows`."""
    return table(result_rows(figures))


def result_rows(figures: Mapping[str, Any]) -> list[dict[str, str]]:
    """The model and each baseline in a row; MRE by domain, R² of values."""
    return [
        {"predictor": name}
        | {f"MRE {domain}": f"{error:.1%}" for domain, error in row["mre"].items()}
        | {"median error": f"{row['median_error'][ALL]:.1%}"}
        | {"rank correlation": _two_digits(row["rank_correlation"][ALL])}
        | {"R²": _two_digits(row["r2"])}
        for name, row in {"this model": figures, **figures["baselines"]}.items()
    ]


def _two_digits(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def agreement_table(figures: Mapping[str, float]) -> str:
    """Markdown: how well a lookahead head agrees with exact values, in a row."""
    names = {
        "positions": "positions",
        "r2_within": "R² within a step",
        "r2_within_even": "the same, candidates alike",
        "r2_mean": "R² of the step's mean",
        "correlation": "correlation in a step (median)",
    }
    effect = {"effect at 0.2 nats, of the exact": f"{figures['effect']:.0%}"}
    return table([{title: figures[name] for name, title in names.items()} | effect])

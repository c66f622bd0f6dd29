"""Pictures of lengths. matplotlib loads when one is drawn."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.checks import check

PICTURES = (".png", ".svg", ".pdf")


def check_picture(field: str, path: Path | None) -> None:
    """Raises ValueError unless a picture can be written under that name."""
    good = path is None or path.suffix in PICTURES
    check(good, field, str(path), "a name in " + ", ".join(PICTURES))


def plot_calibration(figures: Mapping[str, Any], path: Path) -> None:
    """Predicted against true length, and the error by position, of `figures.summarise`."""
    _calibration(figures)(path)


def calibration_svg(figures: Mapping[str, Any]) -> str:
    """The same as an element of a page."""
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    _calibration(figures)(drawn, format="svg", metadata=nothing)
    return drawn.getvalue()[drawn.getvalue().index("<svg") :]  # behind what begins a file


def _calibration(figures: Mapping[str, Any]) -> Any:
    """What saves the picture."""
    left, right, save = _two_axes()
    points = figures["calibration"]
    predicted = [point["predicted"] for point in points]
    left.plot(predicted, [point["true"] for point in points], "o-")
    left.axline((0, 0), slope=1, color="grey", linestyle=":")
    left.set(xlabel="predicted tokens to come", ylabel="true tokens to come")
    errors = figures["length_error_by_position"]
    right.bar([f"{float(position):.0%}" for position in errors], list(errors.values()))
    right.set(xlabel="of the completion written", ylabel="median |error| / tokens to come")
    return save


def plot_lengths(lengths: Mapping[str, Sequence[int]], path: Path) -> None:
    """A histogram of completion lengths by domain, and the share that is no longer than each."""
    left, right, save = _two_axes()
    left.hist(list(lengths.values()), bins=40, stacked=True, label=list(lengths))
    left.set(xlabel="completion tokens", ylabel="completions")
    left.legend()
    for domain, values in lengths.items():
        right.ecdf(values, label=domain)
    right.set(xlabel="completion tokens", ylabel="share of completions")
    save(path)


def plot_clouds(weights: Mapping[str, Mapping[str, float]], path: Path) -> None:
    """Two word clouds side by side, each of words with their weights."""
    from wordcloud import WordCloud

    left, right, save = _two_axes()
    for axis, (title, words) in zip((left, right), weights.items(), strict=True):
        axis.set_title(title)
        axis.axis("off")
        if words:
            cloud = WordCloud(width=800, height=600, background_color="white", random_state=0)
            axis.imshow(cloud.generate_from_frequencies(dict(words)).to_array())
    save(path)


def _two_axes() -> tuple[Any, Any, Any]:
    """Left, right, and what saves both, in a folder that need not be there."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)

    def save(place: Any, **options: Any) -> None:
        if isinstance(place, Path):
            place.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(place, **options)

    return left, right, save

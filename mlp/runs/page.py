"""A run as one self-contained HTML file: settings, numbers, pictures, slowest epochs."""

import base64
import html
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .disk import write_text
from .report import epoch_times

PAGE = "report.html"
_SLOWEST = 5
_STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;margin:1em 0}td,th{padding:.2em .8em;text-align:left;"
    "border-bottom:1px solid #ddd}img{max-width:100%;margin:1em 0}h2{margin-top:2em}"
)
_TITLES = {
    "curves": "Loss and accuracy",
    "samples": "Test images with predictions",
    "confusion": "Confusion matrix",
    "weights": "Weights of the first layer",
    "times": "Seconds of each epoch",
}


def write(
    folder: Path,
    settings: dict[str, Any],
    history: list[dict[str, Any]],
    draw: Callable[[Path], list[Path]],
) -> Path:
    """Write report.html of a run and return its path.

    draw: called with a folder, writes SVG files there and returns their paths.
    """
    parts = [f"<h1>{_text(folder.name)}</h1>", _table(["setting", "value"], settings.items())]
    if history:
        parts.append(_table(["last epoch", ""], history[-1].items()))
    with tempfile.TemporaryDirectory() as place:
        paths = draw(Path(place))
        if history:
            times = Path(place) / "times.svg"
            epoch_times(history, times)
            paths.append(times)
        for path in paths:
            parts += [f"<h2>{_TITLES.get(path.stem, _text(path.stem))}</h2>", _image(path)]
    slowest = sorted(history, key=lambda row: -row["seconds"])[:_SLOWEST]
    rows = [(row["epoch"], f"{row['seconds']:.3f} s") for row in slowest]
    parts.append(_table(["slowest epochs", "seconds"], rows))
    title = f"<title>{_text(folder.name)}</title>"
    head = f'<meta charset="utf-8">{title}<style>{_STYLE}</style>'
    body = "\n".join(parts)
    page = f"<!DOCTYPE html>\n<html><head>{head}</head>\n<body>\n{body}\n</body></html>\n"
    write_text(folder / PAGE, page)
    return folder / PAGE


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, dict):
        return html.escape(", ".join(f"{key} {item}" for key, item in value.items()) or "none")
    if isinstance(value, (list, tuple)):
        return html.escape(" ".join(map(str, value)) or "none")
    return html.escape(str(value))


def _table(names: list[str], rows: Iterable[tuple[Any, Any]]) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in names)
    body = "".join(f"<tr><td>{_text(a)}</td><td>{_text(b)}</td></tr>" for a, b in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _image(path: Path) -> str:
    """A picture embedded in the page.

    As an <img>, an SVG runs no scripts, and its ids do not clash with those of other pictures.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<img alt="{_text(path.stem)}" src="data:image/svg+xml;base64,{data}">'

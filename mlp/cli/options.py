"""The table of options. A row has an option's name, type, help and smallest value.

The group of a row decides the use of its value:

    RECIPE      replaces the recipe's field of the same name
    LOSS        is passed to the loss, by its own name
    OPTIMIZER   is passed to the optimizer, by its own name
    RUN         is stored in the run's config.json
    CALL        is used for this call only

To add an option to `handgrad train`, add a row to its group. An option that was not given has the
value None, or False for a flag. This file imports nothing heavy, so that --help is fast.
"""

import inspect
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

Values = dict[str, Any]


class Option(NamedTuple):
    """One option, or one argument, of a command."""

    name: str
    kind: Any
    help: str
    default: Any = None
    least: float | None = None  # the smallest value
    most: float | None = None  # the largest value
    parse: Callable[[str], Any] | None = None  # text -> value; its ValueError names the right form
    is_argument: bool = False
    may_change: bool = False  # with --resume; other options must equal the stored ones
    each: Callable[[str], Any] | None = None  # text -> value, for several values with "/" between

    @property
    def flag(self) -> str:
        """The option on the command line, such as --batch-size."""
        return self.name if self.is_argument else f"--{self.name.replace('_', '-')}"

    def parameter(self) -> inspect.Parameter:
        """The parameter of a function's signature from which typer makes the option."""
        if self.is_argument:
            row, kind = typer.Argument(help=self.help), self.kind
            default = inspect.Parameter.empty if self.default is ... else self.default
        else:
            row, default = typer.Option(self.flag, help=self.help), self.default
            kind = self.kind
        if default is None:
            kind = kind | None
        return inspect.Parameter(
            self.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=default,
            annotation=Annotated[kind, row],
        )

    def read(self, value: Any) -> Any:
        """The value in the form for the command. ValueError, which names the option, if invalid."""
        if value is None:
            return None
        if self.each is not None:
            one = self._replace(each=None, parse=_one(self.each))
            return [one._in_range(one.read(part.strip())) for part in value.split("/")]
        if self.parse is not None:
            try:
                return self.parse(value)
            except ValueError as error:
                raise ValueError(f"{self.flag} must be {error}, got {value!r}") from None
        return self._in_range(value)

    def _in_range(self, value: Any) -> Any:
        if self.least is not None and not value >= self.least:
            raise ValueError(f"{self.flag} must be at least {self.least:g}, got {value}")
        if self.most is not None and not value <= self.most:
            raise ValueError(f"{self.flag} must be at most {self.most:g}, got {value}")
        return value


def _one(each: Callable[[str], Any]) -> Callable[[str], Any]:
    """As `each`, but its error names the expected kind of number."""
    if each not in (int, float):
        return each

    def parse(text: str) -> Any:
        try:
            return each(text)
        except ValueError:
            raise ValueError("a whole number" if each is int else "a number") from None

    return parse


def positive(text: str) -> float:
    """A positive, finite number from a text."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError("a positive number")
    return value


def widths(text: str) -> tuple[int, ...]:
    """Widths from a text: "100,50" gives (100, 50), and "" gives ()."""
    try:
        return tuple(int(part) for part in text.split(",")) if text.strip() else ()
    except ValueError:
        raise ValueError("widths with commas, such as 100,50") from None


def seed(text: str) -> int:
    """A whole number that torch's generators accept as a seed."""
    expected = "a whole number from 0 to 2⁶³"
    try:
        value = int(text)
    except ValueError:
        raise ValueError(expected) from None
    if not 0 <= value <= 2**63:
        raise ValueError(expected)
    return value


def command(app: typer.Typer, name: str, *rows: Option) -> Callable:
    """Register a function of one dict of values as a command with these options."""

    def register(function: Callable[[Values], None]) -> Callable[[Values], None]:
        def call(**given):
            function({row.name: row.read(given[row.name]) for row in rows})

        call.__doc__ = function.__doc__
        # typer reads the options from the signature
        vars(call)["__signature__"] = inspect.Signature([row.parameter() for row in rows])
        call.__annotations__ = {}
        app.command(name)(call)
        return function

    return register


def given(rows: tuple[Option, ...], values: Values) -> Values:
    """The values of those of these rows that were given."""
    return {row.name: values[row.name] for row in rows if values.get(row.name) is not None}


_NAMES = "`handgrad recipes` lists them"

RECIPE = (
    Option("hidden", str, "widths of the hidden layers, such as 100,50", parse=widths),
    Option("activation", str, f"such as relu or tanh; {_NAMES}"),
    Option("loss", str, f"such as cross_entropy or mse; {_NAMES}"),
    Option("optimizer", str, f"such as sgd or adam; {_NAMES}"),
    Option("batch_size", int, "samples in a step", least=1),
    Option("epochs", int, "passes over the training data", least=1, may_change=True),
    Option("schedule", str, f"of the learning rate, such as cosine; {_NAMES}"),
    Option("warmup", int, "epochs in which the learning rate rises to its value", least=0),
    Option(
        "early_stopping",
        int,
        "end after so many epochs without a lower loss: of --validation, else of the test rows",
        least=1,
    ),
    Option("augment", int, "shift training images at random by up to so many pixels", least=0),
    Option("clip_norm", str, "largest norm of all gradients of a step together", parse=positive),
)
LOSS = (
    Option(
        "label_smoothing",
        float,
        "share of each label given to all classes alike",
        least=0,
        most=1,
    ),
)
OPTIMIZER = (
    Option("lr", float, "learning rate", least=0),
    Option("momentum", float, "momentum, for the optimizers that have one", least=0),
    Option("weight_decay", float, "pull of weights towards 0, as the optimizer has it", least=0),
)
_READING = (
    Option(
        "standardize",
        str,
        "auto (the default: a table whose columns differ tenfold in scale), yes or no",
    ),
    Option(
        "image",
        str,
        "shape of an image in flat rows, such as 28x28 or 3x32x32; size of the images of a folder",
    ),
    Option(
        "task",
        str,
        "classification, regression or multilabel; default: what the targets' type says",
    ),
    Option("target", str, "of a table: the column to predict, or several with commas"),
    Option("drop", str, "of a table: columns to leave out, with commas"),
)
_HELD = (
    Option("validation", float, "share of the rows to measure on besides the test rows", least=0),
    Option("class_weight", str, "balanced: rare classes weigh as much as frequent ones"),
)
RUN = (
    Option("seed", str, "of initial weights and sample order; default 0", parse=seed),
    Option("engine", str, f"auto (the default), or one by name; {_NAMES}", may_change=True),
    Option("device", str, "auto (the default), cpu, cuda, cuda:1, …", may_change=True),
    Option("precision", str, f"fp32 (the default), bf16, …; {_NAMES}"),
    Option(
        "data_dir",
        Path,
        "folder of data sets; default $HANDGRAD_DATA, else the cache",
        may_change=True,
    ),
    *_READING,
    *_HELD,
)
CALL = (
    Option("out", Path, "run folder; default runs/DATASET, numbered"),
    Option("force", bool, "replace the run in --out", False),
    Option("plots", bool, "draw all pictures of `handgrad report` at the end", False),
    Option("log", str, "csv or tensorboard, or both with a comma: numbers for other programs"),
    Option("devices", int, "processes that share each batch, one for each device", least=1),
    Option("seeds", int, "train so many networks, --seed and on; mean and deviation", least=1),
    Option("resume", bool, "go on with the run in --out, up to --epochs", False),
)
DATASET = Option(
    "dataset",
    str,
    "digits (the default), mnist, fashion-mnist, kmnist, or a path: .csv, .tsv, .parquet, .npz, "
    ".npy, .mat, image folder",
    is_argument=True,
)
NAMED_RECIPE = Option("recipe", str, "settings by name; see `handgrad recipes`")
TRAIN = (DATASET, NAMED_RECIPE, *RECIPE, *LOSS, *OPTIMIZER, *RUN, *CALL)

DEVICES = Option(
    "devices", int, "devices that train at once, each a share of the networks", least=1
)

RUN_FOLDER = Option("run", Path, "a run folder", ..., is_argument=True)
RUN_DATA = Option("data_dir", Path, "as for train; default: the run's")
DEVICE = Option("device", str, "auto, cpu, cuda, cuda:1, …", "auto")
EVALUATE = (
    RUN_FOLDER,
    Option("top", int, "k of the top-k accuracy; default 5, or all classes if fewer", least=1),
    RUN_DATA,
    DEVICE,
)
REPORT = (
    Option("runs", list[Path], "a run folder; several are compared", ..., is_argument=True),
    Option("html", bool, "write report.html, one file with everything, instead of pictures", False),
    Option("out", Path, "folder for the figure of several runs; default: this one"),
    RUN_DATA,
    DEVICE,
)
RUNS = (Option("folder", Path, "where to look; default: runs", is_argument=True),)
PREDICT = (
    RUN_FOLDER,
    Option("images", list[Path], "PNG or JPEG files, or a table", ..., is_argument=True),
    DEVICE,
    Option("out", Path, "CSV file for the predictions of a table; default: print them"),
)
EXPORT = (
    RUN_FOLDER,
    Option("file", Path, "the file to write, such as model.onnx", ..., is_argument=True),
    Option("format", str, "onnx or torch; default: torch for .pt and .pth, else onnx"),
)
SWEEP = (
    DATASET,
    Option("replicas", int, "how many networks", 16, least=1),
    Option(
        "lr",
        str,
        "learning rate, or LOW:HIGH, spread over the networks in equal ratios",
        "0.01:1.0",
    ),
    Option(
        "hidden",
        str,
        "widths of the hidden layers; this and the five below take several values with / between, "
        "such as 64/100,50: all combinations are trained, each by all --replicas",
        "100,50",
        each=widths,
    ),
    Option("activation", str, "as for train", "relu", each=str),
    Option("optimizer", str, "as for train", "sgd", each=str),
    Option("momentum", str, "for the optimizers that have one", least=0, each=float),
    Option("weight_decay", str, "as for train", least=0, each=float),
    Option("batch_size", str, "samples in a step", "32", least=1, each=int),
    Option("loss", str, "as for train"),
    Option("epochs", int, "passes over the training data", 10, least=1),
    Option("schedule", str, "as for train"),
    Option("early_stopping", int, "as for train, for each network on its own", least=1),
    Option("validation", float, "share of the rows that rank the networks", least=0),
    Option("class_weight", str, "as for train"),
    Option("seed", str, "of the first network; the others count on", "0", parse=seed),
    Option("top", int, "rows of the table to print", 10, least=0),
    DEVICE,
    DEVICES,
    Option("data_dir", Path, "as for train"),
    *_READING,
    Option("out", Path, "folder for sweep.jsonl and every network; none is written without it"),
)
SEARCH = (
    DATASET,
    Option("trials", int, "settings that are tried", 32, least=1),
    Option("folds", int, "parts of the training rows, of which each is predicted once", 5, least=2),
    Option(
        "halving", bool, "a few epochs for all settings, more for the best third each time", False
    ),
    Option("epochs", int, "passes over the training rows, at most", 100, least=1),
    Option("scoring", str, "a score of scikit-learn; default: accuracy, or R² of numbers"),
    Option("seed", str, "of settings, weights and folds", "0", parse=seed),
    Option("top", int, "rows of the table to print", 10, least=0),
    DEVICES,
    Option("data_dir", Path, "as for train"),
    *_READING,
    Option("out", Path, "run folder of the winner; default runs/DATASET, numbered"),
    Option("force", bool, "replace the run in --out", False),
)
DATA = (
    DATASET,
    Option("data_dir", Path, "as for train"),
    *_READING,
    Option("plots", bool, "draw samples.png, or columns.png of a table, and classes.png", False),
    Option("out", Path, "folder for the pictures; default: this one"),
)
INFO = (Option("check", bool, "check every kernel against its float64 reference", False),)

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


def whole(text: str) -> int:
    """A whole number from a text."""
    try:
        return int(text)
    except ValueError:
        raise ValueError("a whole number") from None


def number(text: str) -> float:
    """A number from a text."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError("a number") from None
    if math.isinf(value):
        raise ValueError("a finite number")
    return value


def path(text: str) -> Path:
    """A path from a text that is not empty. `Path("")` would be the current folder."""
    if not text:
        raise ValueError("a path; . is the current folder")
    return Path(text)


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


def decimal(text: str) -> str:
    """A decimal point, "." or ","."""
    if text not in (".", ","):
        raise ValueError(". or ,")
    return text


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


# Kind of a value -> its word in the help. A flag has no value.
_WORDS = {str: "NAME", int: "N", float: "NUMBER", Path: "PATH"}
# Kind -> its parser. typer's own errors do not name the value.
_PARSERS: dict[Any, Callable[[str], Any]] = {int: whole, float: number, Path: path}


class Option(NamedTuple):
    """One option, or one argument, of a command."""

    name: str
    kind: Any
    help: str  # sentences: what it does, its unit, and the default, unless typer adds that
    default: Any = None  # ... for an argument that must be given
    least: float | None = None  # the smallest value
    most: float | None = None  # the largest value
    parse: Callable[[str], Any] | None = None  # text -> value; its ValueError names the right form
    is_argument: bool = False
    may_change: bool = False  # with --resume; other options must equal the stored ones
    each: Callable[[str], Any] | None = None  # text -> value, for several values with "/" between
    word: str = ""  # the value in the help, such as WIDTHS; "" takes that of the kind

    @property
    def flag(self) -> str:
        """The option on the command line, such as --batch-size."""
        return self.name if self.is_argument else f"--{self.name.replace('_', '-')}"

    @property
    def shown(self) -> str | None:
        """The value in the help, such as WIDTHS, or None for a flag."""
        return self.word or _WORDS.get(self.kind)

    def parameter(self) -> inspect.Parameter:
        """The parameter of a function's signature from which typer makes the option."""
        kind, default = self.kind, self.default
        if kind in _PARSERS:
            kind, default = str, default if default in (None, ...) else str(default)
        if self.is_argument:
            row = typer.Argument(help=self.help, metavar=self.shown)
            default = inspect.Parameter.empty if default is ... else default
        else:
            row = typer.Option(self.flag, help=self.help, metavar=self.shown)
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
            return [self._one(self.each, part.strip()) for part in value.split("/")]
        parse = self.parse or _PARSERS.get(self.kind)
        return value if parse is None else self._one(parse, value)

    def _one(self, parse: Callable[[str], Any], text: str) -> Any:
        try:
            value = parse(text)
        except ValueError as error:
            raise ValueError(f"{self.flag} must be {error}, got {text!r}") from None
        if self.least is not None and not value >= self.least:
            raise ValueError(f"{self.flag} must be at least {self.least:g}, got {value}")
        if self.most is not None and not value <= self.most:
            raise ValueError(f"{self.flag} must be at most {self.most:g}, got {value}")
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


_NAMES = "`handgrad recipes` lists the names."
_RECIPES = "Default: the recipe's."

RECIPE = (
    Option(
        "hidden",
        str,
        f"Widths of the hidden layers, such as 100,50. An empty text means none. {_RECIPES}",
        parse=widths,
        word="WIDTHS",
    ),
    Option(
        "activation", str, f"Activation of the hidden layers, such as relu. {_NAMES} {_RECIPES}"
    ),
    Option(
        "loss",
        str,
        f"Loss, such as cross_entropy or mse. {_NAMES} Default: the recipe's, or one that fits the "
        "targets.",
    ),
    Option("optimizer", str, f"Optimizer, such as sgd or adam. {_NAMES} {_RECIPES}"),
    Option("batch_size", int, f"Samples in a step. {_RECIPES}", least=1),
    Option("epochs", int, f"Passes over the training data. {_RECIPES}", least=1, may_change=True),
    Option(
        "schedule",
        str,
        f"How the learning rate changes, such as cosine; constant means not. {_NAMES} {_RECIPES}",
    ),
    Option(
        "warmup",
        int,
        f"Epochs in which the learning rate rises to its value; 0 means none. {_RECIPES}",
        least=0,
    ),
    Option(
        "early_stopping",
        int,
        "End after so many epochs without a lower loss, and keep the best weights. The loss is "
        "that of --validation, else of the test rows. Default: train all epochs.",
        least=1,
    ),
    Option(
        "augment",
        int,
        "Shift each training image at random by up to so many pixels in each epoch; 0 means none. "
        f"{_RECIPES}",
        least=0,
    ),
    Option(
        "clip_norm",
        str,
        "Scale the gradients of a step down to this norm of all together, if it is larger. "
        "Default: the gradients stay.",
        parse=positive,
        word="NUMBER",
    ),
)
LOSS = (
    Option(
        "label_smoothing",
        float,
        "Share of each label that is given to all classes alike, 0 to 1. Default: 0.",
        least=0,
        most=1,
    ),
)
OPTIMIZER = (
    Option("lr", float, f"Learning rate. {_RECIPES}", least=0),
    Option(
        "momentum",
        float,
        f"Momentum of an optimizer that has one, 0 to 1. {_RECIPES}",
        least=0,
        most=1,
    ),
    Option(
        "weight_decay",
        float,
        "Factor that pulls weights towards 0, as torch's optimizer of this name defines it. "
        f"{_RECIPES}",
        least=0,
    ),
)
_READING = (
    Option(
        "standardize",
        str,
        "Subtract each column's mean and divide by its deviation: yes, no, or auto, which does it "
        "if the columns differ tenfold in scale. Default: auto.",
        word="auto|yes|no",
    ),
    Option(
        "image",
        str,
        "Height x width of the images, or channels x height x width, in pixels, such as 28x28. "
        "Flat rows are read so, and the images of a folder are resized. Default: found from the "
        "data.",
        word="SHAPE",
    ),
    Option(
        "task",
        str,
        "classification, regression, or multilabel for a table with several targets of 0 and 1. "
        "Default: found from the targets.",
        word="TASK",
    ),
    Option(
        "target",
        str,
        "Column of a table to predict, or several with commas. A table needs it.",
        word="COLUMNS",
    ),
    Option(
        "drop",
        str,
        "Columns of a table to leave out, with commas. Default: none.",
        word="COLUMNS",
    ),
    Option(
        "decimal",
        str,
        "Decimal point of a table in a text file, . or , and the other one may group thousands. "
        "Default: a point, or also a comma if semicolons separate the columns.",
        parse=decimal,
        word=".|,",
    ),
)
_HELD = (
    Option(
        "validation",
        float,
        "Share of all rows, 0 to 1, that is held out besides the test rows, and measured after "
        "each epoch. Default: 0.",
        least=0,
    ),
    Option(
        "class_weight",
        str,
        "balanced: the loss counts rare classes as much as frequent ones. Default: each sample "
        "counts alike.",
        word="balanced",
    ),
)
_DATA_DIR = "Folder into which data sets are downloaded. Default: "
DATA_DIR = Option(
    "data_dir", Path, f"{_DATA_DIR}$HANDGRAD_DATA, else the cache folder.", may_change=True
)
RUN = (
    Option(
        "seed",
        str,
        "Seed of the initial weights and of the samples' order. Default: 0.",
        parse=seed,
        word="N",
    ),
    Option(
        "engine",
        str,
        f"How an epoch is computed: auto, the fastest that serves, or one by name. {_NAMES} "
        "Default: auto.",
        may_change=True,
    ),
    Option(
        "device",
        str,
        "auto, the GPU if there is one; or cpu, cuda, cuda:1, … Default: auto.",
        may_change=True,
    ),
    Option("precision", str, f"Number format, such as bf16. {_NAMES} Default: fp32."),
    DATA_DIR,
    *_READING,
    *_HELD,
)
_NUMBERED = "Default: runs/DATASET, or runs/DATASET-2, -3, … if that is taken."
_FORCE = Option("force", bool, "Replace the run in --out.", False)
CALL = (
    Option("out", Path, f"Run folder to write. {_NUMBERED}"),
    _FORCE,
    Option("plots", bool, "At the end, draw all pictures of `handgrad report`.", False),
    Option(
        "log",
        str,
        "Also write each epoch's numbers for other programs: csv, tensorboard, or several with "
        "commas. Default: none.",
        word="NAMES",
    ),
    Option(
        "devices",
        int,
        "Share each batch between so many processes, one for each device. Default: one process.",
        least=1,
    ),
    Option(
        "seeds",
        int,
        "Train so many networks, whose seeds count on from --seed, each into its own run folder, "
        "and print mean and deviation. Default: one network.",
        least=1,
    ),
    Option("resume", bool, "Go on with the run in --out, up to --epochs.", False),
)
DATASET = Option(
    "dataset",
    str,
    "digits, mnist or another name; or the path of a table, such as t.csv, of arrays, such as "
    "a.npz, or of a folder of images. `handgrad recipes` lists names and formats. Default: digits.",
    is_argument=True,
    word="DATASET",
)
NAMED_RECIPE = Option(
    "recipe", str, "Network and settings by name. `handgrad recipes` shows them. Default: default."
)
TRAIN = (DATASET, NAMED_RECIPE, *RECIPE, *LOSS, *OPTIMIZER, *RUN, *CALL)

DEVICES = Option(
    "devices",
    int,
    "Devices that train at once, each a share of the networks. Default: one.",
    least=1,
)

RUN_FOLDER = Option(
    "run", Path, "A run folder that `handgrad train` wrote.", ..., is_argument=True, word="RUN"
)
RUN_DATA = Option("data_dir", Path, f"{_DATA_DIR}the run's.")
DEVICE = Option("device", str, "auto, the GPU if there is one; or cpu, cuda, cuda:1, …", "auto")
EVALUATE = (
    RUN_FOLDER,
    Option(
        "top",
        int,
        "A sample counts for the top-k accuracy if its class is among so many likeliest ones. "
        "Default: 5, or all classes if there are fewer.",
        least=1,
    ),
    RUN_DATA,
    DEVICE,
)
REPORT = (
    Option(
        "runs",
        list[Path],
        "Run folders that `handgrad train` wrote. Several are compared.",
        ...,
        is_argument=True,
        word="RUN",
    ),
    Option(
        "html", bool, "Write report.html, one file with everything, instead of pictures.", False
    ),
    Option(
        "out", Path, "Folder for compare.png of several runs. Default: the folder of the first."
    ),
    RUN_DATA,
    DEVICE,
)
RUNS = (
    Option(
        "folder",
        Path,
        "Folder that is searched, with all folders in it. Default: runs.",
        is_argument=True,
        word="FOLDER",
    ),
)
PREDICT = (
    RUN_FOLDER,
    Option(
        "files",
        list[Path],
        "Image files for a run on images, else one file of rows: a table, such as t.csv, or for a "
        "run on arrays also arrays, such as a.npz.",
        ...,
        is_argument=True,
        word="FILE",
    ),
    DEVICE,
    Option("out", Path, "CSV file to write with the predictions for rows. Default: print them."),
)
EXPORT = (
    RUN_FOLDER,
    Option(
        "file", Path, "The file to write, such as model.onnx.", ..., is_argument=True, word="FILE"
    ),
    Option("format", str, "onnx or torch. Default: found from the name of FILE."),
)
_TOP = Option("top", int, "Rows of the table to print.", 10, least=0)
SWEEP = (
    DATASET,
    Option("replicas", int, "Networks of each setting.", 16, least=1),
    Option(
        "lr",
        str,
        "Learning rate, or LOW:HIGH, from which the networks get rates in equal ratios.",
        "0.01:1.0",
        word="NUMBER",
    ),
    Option(
        "hidden",
        str,
        "Widths of the hidden layers, such as 100,50. This option and the next five take several "
        "values with / between, such as 64/100,50. All combinations are trained, each by all "
        "--replicas.",
        "100,50",
        each=widths,
        word="WIDTHS",
    ),
    Option("activation", str, f"Activation of the hidden layers. {_NAMES}", "relu", each=str),
    Option("optimizer", str, f"Optimizer. {_NAMES}", "sgd", each=str),
    Option(
        "momentum",
        str,
        "Momentum of an optimizer that has one, 0 to 1. Default: 0.",
        least=0,
        most=1,
        each=number,
        word="NUMBER",
    ),
    Option(
        "weight_decay",
        str,
        "Factor that pulls weights towards 0. Default: the optimizer's.",
        least=0,
        each=number,
        word="NUMBER",
    ),
    Option("batch_size", str, "Samples in a step.", "32", least=1, each=whole, word="N"),
    Option("loss", str, f"Loss. {_NAMES} Default: one that fits the targets."),
    Option("epochs", int, "Passes over the training data.", 10, least=1),
    Option("schedule", str, f"How the learning rates change. {_NAMES} Default: constant."),
    Option(
        "early_stopping",
        int,
        "End a network after so many epochs without a lower loss, and keep its best weights. "
        "Default: train all epochs.",
        least=1,
    ),
    Option(
        "validation",
        float,
        "Share of all rows, 0 to 1, that is held out to rank the networks. Default: 0, and the "
        "test rows rank them.",
        least=0,
    ),
    _HELD[1],
    Option(
        "seed", str, "Seed of the first network. The others count on.", "0", parse=seed, word="N"
    ),
    _TOP,
    DEVICE,
    DEVICES,
    DATA_DIR,
    *_READING,
    Option(
        "out",
        Path,
        "Folder for sweep.jsonl and all networks. Default: nothing is written.",
    ),
)
SEARCH = (
    DATASET,
    Option("trials", int, "Settings that are tried.", 32, least=1),
    Option(
        "folds",
        int,
        "Parts of the training rows. Each is predicted by networks that learned from the others.",
        5,
        least=2,
    ),
    Option(
        "halving",
        bool,
        "Train all settings for a few epochs, then the best third for more, and so on.",
        False,
    ),
    Option("epochs", int, "The most passes over the training rows.", 100, least=1),
    Option(
        "scoring",
        str,
        "Score that ranks the settings, one of scikit-learn's. Default: accuracy, or R² of a "
        "regression.",
    ),
    Option("seed", str, "Seed of settings, weights and folds.", "0", parse=seed, word="N"),
    _TOP,
    DEVICES,
    DATA_DIR,
    *_READING,
    Option("out", Path, f"Run folder of the best setting. {_NUMBERED}"),
    _FORCE,
)
DATA = (
    DATASET,
    DATA_DIR,
    *_READING,
    Option(
        "plots",
        bool,
        "Draw two pictures: samples.png, or columns.png of a table; and classes.png, or "
        "targets.png of a regression.",
        False,
    ),
    Option("out", Path, "Folder for the pictures. Default: the current folder."),
)
INFO = (Option("check", bool, "Compare every kernel with its float64 reference.", False),)

"""The command line. An error is one line on stderr, and exit status 2.

A command takes its options from the table in `options.py`, and passes their values to the file that
does the work. That file is imported only then, because it imports torch.
"""

import os
from typing import Annotated

import typer

from . import options, versions
from .options import Values, command
from .terminal import accept_all_characters, complain, say

_INTERRUPTED = 130  # the exit status of shells and typer after Ctrl-C

app = typer.Typer(
    help="Train multilayer perceptrons by hand-written backpropagation.",
    rich_markup_mode=None,
    add_completion=False,
    context_settings={"max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def start(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    if version:
        say(f"handgrad {versions.version('handgrad')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


@command(app, "train", *options.TRAIN)
def train(values: Values) -> None:
    """Train a network into a run folder.

    Prints a line for each epoch. The folder gets weights, history, settings and pictures.
    """
    from . import devices

    if values["devices"] is not None:
        devices.start(values)
        return
    from . import training

    training.train(values)


@command(app, "evaluate", *options.EVALUATE)
def evaluate(values: Values) -> None:
    """Measure a trained network on its test data.

    Prints loss, accuracy, top-k accuracy and the accuracy of each class, or the errors of a
    regression.
    """
    from . import results

    results.evaluate(values)


@command(app, "report", *options.REPORT)
def report(values: Values) -> None:
    """Draw the pictures of a run, or compare several runs.

    The pictures are curves, test images with predictions, the confusion matrix, and the weights of
    the first layer. Several runs get one table and one figure.
    """
    from . import results

    results.report(values)


@command(app, "predict", *options.PREDICT)
def predict(values: Values) -> None:
    """Predict images, or the rows of a file.

    Prints the class and the probability of each image, or a prediction for each row. Images of
    another size are resized, with a note.
    """
    from . import results

    results.predict(values)


@command(app, "runs", *options.RUNS)
def runs(values: Values) -> None:
    """List the runs in a folder, with settings and scores."""
    from . import comparing

    comparing.runs(values)


@command(app, "export", *options.EXPORT)
def export(values: Values) -> None:
    """Write a trained network for other programs.

    The file is an ONNX file, or the weights of plain torch modules.
    """
    from . import exporting

    exporting.run(values)


@command(app, "sweep", *options.SWEEP)
def sweep(values: Values) -> None:
    """Train many networks at once.

    Prints a table with the best networks first, and the accuracy of the mean of all.
    """
    from . import sweeping

    sweeping.sweep(values)


@command(app, "search", *options.SEARCH)
def search(values: Values) -> None:
    """Search for good settings by cross-validation.

    Each setting is measured on folds of the training rows. The best one is trained into a run
    folder.
    """
    from . import searching

    searching.search(values)


@command(app, "data", *options.DATA)
def data(values: Values) -> None:
    """Describe a data set without training.

    Prints samples, range, scale, classes, and columns that are constant.
    """
    from . import looking

    looking.data(values)


@command(app, "recipes")
def recipes(values: Values) -> None:
    """Show all recipes, and all names that options take."""
    from . import about

    about.recipes()


@command(app, "info", *options.INFO)
def info(values: Values) -> None:
    """Show versions, the device and the backends."""
    from . import about

    about.info(values)


def run(argv: list[str]) -> int:
    """Run a command and return the exit status: 0, 2 after an error, 130 after Ctrl-C.

    An error is one line on stderr. With HANDGRAD_DEBUG=1 it is raised with its traceback.
    """
    accept_all_characters()
    versions.typed[:] = ["handgrad", *argv]
    try:
        status = app(argv, standalone_mode=False) or 0
        if status == _INTERRUPTED:
            complain("interrupted; a training goes on with --out RUN --resume")
        return status
    except Exception as error:
        if os.environ.get("HANDGRAD_DEBUG"):
            raise
        complain(_message(error))
        return 2
    except KeyboardInterrupt:
        complain("interrupted; a training goes on with --out RUN --resume")
        return _INTERRUPTED


def _message(error: Exception) -> str:
    """The message of an error for a user. For an unexpected error it names the type too."""
    if hasattr(error, "format_message"):  # an error of typer
        missing = hasattr(error, "param_type")  # only its error for an argument left out has this
        needed = getattr(getattr(error, "param", None), "help", None) if missing else None
        return f"{error.format_message()} {needed or ''}".strip()
    from ..engines import Diverged

    if isinstance(error, (ValueError, IndexError, OSError, Diverged)) or hasattr(
        error, "exit_code"
    ):
        return str(error)
    return f"{type(error).__name__}: {error} (HANDGRAD_DEBUG=1 shows where)"

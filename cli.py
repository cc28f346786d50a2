"""The command line: the table of commands, and the exit code of every error.

A command is imported when it is called, so that ``penult --help`` answers at once. Commands are in ``extractor/commands/`` and
``classifiers/commands/``; each parses, calls and prints.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import io
import os
import signal
import sys
from typing import Any

import click

from extractor.commands.console import loudness, say
from extractor.signals import leaving_in_time
from store.environment import redirect_matplotlib
from store.errors import PenultError, did_you_mean, outcome

# By heading and name: module and function, and the first sentence of the help, of at most 60 characters.
COMMANDS: dict[str, dict[str, tuple[str, str]]] = {
    "To see it work": {
        "demo": ("classifiers.commands.demo:demo", "Show every step on handwritten digits, in two minutes."),
    },
    "From images to features": {
        "extract": ("extractor.commands.extract:extract", "Pass images through a backbone once; cache the features."),
        "info": ("extractor.commands.caches:info", "Show what is in a cache: rows, labels, failures."),
        "verify": ("extractor.commands.caches:verify", "Check every file of a cache against its checksum."),
        "compact": ("extractor.commands.caches:compact", "Write a cache as one self-contained HDF5 file, or prune it."),
    },
    "From features to decisions": {
        "train": ("classifiers.commands.train:train", "Train a head on cached features and save it as a bundle."),
        "evaluate": ("classifiers.commands.evaluate:evaluate", "Evaluate a bundle on a cache or a dataset, with intervals."),
        "predict": ("classifiers.commands.predict:predict", "Predict label and probability of images, or of folders."),
        "report": ("classifiers.commands.evaluate:report", "Make the report page of a bundle again, or for other images."),
        "fuse": ("classifiers.commands.predict:fuse", "Make one ONNX file of a bundle, for any program."),
    },
    "Comparisons: which backbone, and does fine-tuning pay": {
        "sweep": ("classifiers.commands.sweep:sweep", "Extract with several backbones, and rank them."),
        "finetune": ("classifiers.commands.finetune:finetune", "Fine-tune a backbone end to end on the same split."),
        "compare": ("classifiers.commands.compare:compare", "Compare bundles on the same held-out images."),
    },
    "Jobs and regression tests": {
        "run": ("classifiers.commands.jobs:run", "Run a job file, as a scheduler does."),
        "runs": ("classifiers.commands.jobs:runs", "Show the history of a job."),
        "check": ("classifiers.commands.regression:check", "Regression test on cached features: exit 65 on a change."),
        "diff": ("classifiers.commands.regression:diff", "Show what changed from one cache to another, and why."),
    },
    "Backbones and their weights": {
        "backbones": ("extractor.commands.backbones:backbones", "List the backbones, or show one."),
        "export": ("extractor.commands.backbones:export", "Export a backbone to ONNX at its penultimate layer."),
        "weights": ("extractor.commands.weights:weights", "Bring torchvision's weights to machines without internet."),
    },
}


class ClosedPipeError(Exception):
    """Nobody reads the output any more."""


class Penult(click.Group):
    """The group of the commands in the table; each is imported when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in COMMANDS.values():
            if cmd_name in section:
                module, _, function = section[cmd_name][0].partition(":")
                command: click.Command = getattr(importlib.import_module(module), function)
                return command
        return None

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest commands if there is none of the name."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in self.list_commands(ctx):
            message = f"no command {name!r}{did_you_mean(name, self.list_commands(ctx), 'penult --help lists them')}"
            raise click.UsageError(message, ctx)
        return super().resolve_command(ctx, args)

    def make_context(self, *arguments: Any, **facts: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **facts)  # prints --help and --version
        except BrokenPipeError as error:  # click would exit with 1
            raise ClosedPipeError from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise ClosedPipeError from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, section in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(f"{name:9}", summary) for name, (_, summary) in section.items()])


@click.group(cls=Penult, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="penult", message="%(prog)s %(version)s")
def cli() -> None:
    """Extract once, train in seconds: cached features of frozen backbones.

    Example: penult extract photos/ -m resnet50 -o photos.cache
    """


cli.params += loudness()


def main() -> None:
    """Run a command and exit with its code, at most 20 seconds after SIGTERM or Ctrl-C."""
    # Tables of many thousand rows are not garbage; scanning them for some took a tenth of the time of an unchanged extract.
    gc.set_threshold(100_000, 20, 100)
    atexit.register(_keep_garbage)
    # SIGTERM ends a command at once, with the code a scheduler expects; the pipeline finishes its batch first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    redirect_matplotlib()
    _open_streams()
    try:
        with leaving_in_time():
            code = _run()
    except (ClosedPipeError, BrokenPipeError):  # `penult predict ... | head`; Python must not complain at exit
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        code = 141
    # The work is done. At exit Python restores the default handlers, and a signal would then kill it.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(code)


def _keep_garbage() -> None:
    """Do not look for garbage in what ends with the process: that took a tenth of the time of `penult predict`."""
    if "torch" not in sys.modules:  # its libraries would print what they miss
        gc.freeze()


def _open_streams() -> None:
    """Make stdout and stderr safe to write to."""
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed by the caller: the next file would get what is printed
        pass
    os.close(spare)
    sys.stdout, sys.stderr = sys.stdout or os.fdopen(1, "w"), sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):  # a label in another script must not crash a run under LANG=C
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run() -> int:
    """Run the command and print its error, if there is one; return the exit code."""
    try:
        code: int = cli.main(prog_name="penult", standalone_mode=False)
        sys.stdout.flush()
    except (ClosedPipeError, BrokenPipeError):
        raise
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        error.show(usage := io.StringIO())
        say(usage.getvalue().rstrip(), err=True, keep="\n")
        code = 2
    except (click.Abort, KeyboardInterrupt):
        code = 130
    except (PenultError, OSError) as error:
        code, text = outcome(error)
        say(f"error: {text}", err=True)
        for note in getattr(error, "__notes__", ()):
            say(note, err=True)
    except Exception as error:
        import traceback

        say(traceback.format_exc().rstrip(), err=True, keep="\n\t")
        code, _ = outcome(error)
    return code


if __name__ == "__main__":
    main()

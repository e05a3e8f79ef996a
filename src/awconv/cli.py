"""The command line: parses, calls one function, prints."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from awconv.command_parser import (
    AnyPath,
    Positional,
    add_arguments,
    first_line,
    imported,
    made,
    make_parser,
    parse,
    positional_first,
)
from awconv.extras import require
from awconv.own_code import import_own, taken_out
from awconv.process_age import process_age
from awconv.terminal import say
from awconv.usage import UsageError, expanded, is_text
from awconv.version import __version__

_TERMINATED = 128 + signal.SIGTERM
_NO_MEMORY = "there is not enough memory; take smaller images or batches"


_GOES_ON = "the same command with --ckpt_path=last goes on"


@dataclass(frozen=True)
class Command:
    """A command that parses its arguments and calls one function.

    Attributes:
        summary: for the list of commands.
        function: ``module:name``, imported when the command is called.
        positional: its positional argument.
        further: another one, after it.
        passes_on: pass the arguments after ``--`` as ``overrides``, and the whole command line as ``command``.
        takes_bytes: arguments may be file names that are not UTF-8.
        takes_data: takes ``data``, the class and the arguments of a data set, given as for ``awconv fit``.
        needs_data: whether these must be given.
        says_command: pass the whole command line as ``command``.
        says_begun: pass the time at which the command began as ``begun``.
    """

    summary: str
    function: str
    positional: Positional | None = None
    further: Positional | None = None
    passes_on: bool = False
    takes_bytes: bool = False
    takes_data: bool = False
    needs_data: bool = True
    says_command: bool = False
    says_begun: bool = False

    def run(self, name: str, arguments: Sequence[str], begun: float) -> int:
        """Parses and calls."""
        given: dict[str, Any] = {"begun": begun} if self.says_begun else {}
        function = imported(self.function)
        parser = make_parser(prog=f"awconv {name}", description=first_line(function))
        parser.add_argument("--config", action="config", help="a YAML file of arguments")
        if self.passes_on:
            parser.epilog = (
                f"Arguments of awconv fit for every run follow --, as in: awconv {name} ... -- --trainer.max_epochs=5"
            )
            end = arguments.index("--") if "--" in arguments else len(arguments)
            given |= {"overrides": list(arguments[end + 1 :])}
        if self.passes_on or self.says_command:
            given["command"] = shlex.join(["awconv", name, *arguments])
        if self.passes_on:
            arguments = arguments[:end]
        if self.further is not None:
            arguments = positional_first(arguments)
        skip = set(given)
        if self.takes_data:
            import_module("awconv.training.data_option").add_data(parser, self.needs_data)
            skip |= {"data"}
        add_arguments(parser, function, (self.positional, self.further), skip)
        parsed = parse(parser, arguments, f"awconv {name} ... -- " if self.passes_on else "")
        parsed.pop("config")
        return function(**made(function, parsed), **given)


@dataclass(frozen=True)
class Benchmark(Command):
    """A command with subcommands. Each calls a function named after it.

    Attributes:
        subjects: the subcommands, with their positional arguments.
    """

    subjects: tuple[tuple[str, Positional | None], ...] = ()

    def run(self, name: str, arguments: Sequence[str], begun: float) -> int:
        """Parses and calls."""
        parser = make_parser(prog=f"awconv {name}", description=self.summary)
        subcommands = parser.add_subcommands(dest="subject")
        functions = {subject: imported(f"{self.function}_{subject}") for subject, _ in self.subjects}
        for subject, positional in self.subjects:
            description = first_line(functions[subject])
            subparser = make_parser(description=description)
            add_arguments(subparser, functions[subject], (positional,))
            subcommands.add_subcommand(subject, subparser, help=description)
        parsed = parse(parser, arguments)
        return functions[parsed["subject"]](**parsed[parsed["subject"]])


@dataclass(frozen=True)
class Training(Command):
    """A command of Lightning's command line."""

    def run(self, name: str, arguments: Sequence[str], begun: float) -> int:
        """Prints the short help, or hands the arguments on."""
        if {"-h", "--help"}.intersection(arguments):
            require("lightning", extra="train")
            from awconv.training.help_page import help_page

            print(help_page(name), end="")
            return 0
        return _train(name, ["--help" if argument == "--help-all" else argument for argument in arguments])


def _train(command: str, arguments: Sequence[str]) -> int:
    require("lightning", extra="train")
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from awconv.training import TrainingCLI
    from awconv.training.notice import NoticeError
    from awconv.training.quiet import without_noise

    try:
        with without_noise():
            TrainingCLI([command, *arguments], save_config=command == "fit")
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
    except NoticeError:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            say(f"awconv {command}: the time of the job is nearly over; {_GOES_ON}")
        return _TERMINATED
    except SIGTERMException:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]  # of processes that train together
            say(f"awconv {command}: stopped by SIGTERM; {_GOES_ON}")
        return _TERMINATED
    except SystemExit as error:
        if not isinstance(error.__context__, KeyboardInterrupt):  # which Lightning makes an exit of
            raise
        say(f"awconv {command}: stopped by Ctrl-C; {_GOES_ON}")
        return 128 + signal.SIGINT
    return 0


_RECIPE = Positional("recipe", "a YAML file for awconv fit")
COMMANDS: dict[str, Command] = {
    "demo": Command(
        "train a small ResNet, plain and with AW, on scanned digits, and compare them",
        "awconv.compare:demo",
        passes_on=True,
    ),
    "fit": Training("train a network by a recipe (YAML) and overrides", ""),
    "validate": Training("evaluate a checkpoint on the validation split", ""),
    "test": Training("evaluate a checkpoint on the test split", ""),
    "compare": Command(
        "train variants of a recipe over the same seeds, and compare them",
        "awconv.compare:compare",
        _RECIPE,
        passes_on=True,
        says_begun=True,
    ),
    "ablate": Command(
        "compare settings of the attention branch on the validation split",
        "awconv.compare:ablate",
        _RECIPE,
        passes_on=True,
        says_begun=True,
    ),
    "publish": Command(
        "write a finished run's weights or adapter with a model card",
        "awconv.publish:publish",
        Positional("run", "the record of a run of awconv compare, such as aw-seed0.json"),
    ),
    "export": Command(
        "write a trained network for ONNX Runtime, OpenVINO or AOTInductor, and check it",
        "awconv.export:export",
        Positional(
            "source", "a checkpoint, a folder, an adapter, or a name with weights in timm or on the hub", type=str
        ),
    ),
    "fold": Command(
        "make plain convolutions of the layers whose attention matters least, on held-out images",
        "awconv.fold_command:fold",
        Positional("ckpt", "a checkpoint, a training's folder, what publish wrote, or a name in timm", type=str),
        takes_data=True,
    ),
    "explain": Command(
        "show where a network's attention acts, and what it is worth, on a page with Grad-CAM",
        "awconv.explain.command:explain",
        Positional("ckpt", "a checkpoint, a training's folder, what publish wrote, or a name in timm", type=str),
        Positional(
            "files",
            "image files, and folders to search for them; or none, and --data",
            several=True,
            optional=True,
            type=AnyPath(),
        ),
        takes_bytes=True,
        takes_data=True,
        needs_data=False,
        says_command=True,
    ),
    "predict": Command(
        "classify image files with a checkpoint or an adapter, or find the objects in them",
        "awconv.predict:predict",
        Positional("images", "image files, and folders to search for them", several=True, type=AnyPath()),
        takes_bytes=True,
    ),
    "serve": Command(
        "answer for images over HTTP by a trained network, with a page to try it",
        "awconv.serve:serve",
        Positional(
            "ckpt", "a checkpoint, a training's folder, what publish wrote, or a name in timm", optional=True, type=str
        ),
    ),
    "models": Command(
        "list the networks with attention, and their cost relative to the plain ones",
        "awconv.model_costs:models",
    ),
    "bench": Benchmark(
        "measure runtime relative to plain layers and networks, and loading (op, model, detector, export, data)",
        "awconv.bench:bench",
        subjects=(
            ("op", None),
            ("model", Positional("networks", "such as aw_resnet50", several=True, type=str)),
            ("detector", Positional("networks", "such as aw_resnet50", several=True, type=str)),
            ("export", Positional("networks", "such as aw_resnet50", several=True, type=str)),
            ("data", Positional("folder", "photographs to take; or none, and two of scikit-learn's", optional=True)),
        ),
    ),
}

_LIST = "\n".join(f"  {name:<9} {command.summary}" for name, command in COMMANDS.items())
USAGE = f"""awconv {__version__}: convolutions whose weights adapt to each image

usage: awconv COMMAND [ARGUMENTS]

{_LIST}

awconv COMMAND --help lists a command's arguments. --import=FILE.py, of every command, runs a file that registers
networks of your own with timm.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: the command and its arguments; those of the process by default.

    Returns:
        The exit status: 0 for success, 1 for an error or a broken image, 2 for arguments that cannot be parsed, 124
        after a time limit, 130 after Ctrl-C, 143 after SIGTERM.
    """
    begun = time.monotonic() - (process_age() if args is None else 0.0)  # to import the libraries has taken seconds
    command, *arguments = (sys.argv[1:] if args is None else args) or [""]
    if command in ("", "-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        print(f"awconv: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    for argument in arguments:
        if not COMMANDS[command].takes_bytes and not is_text(argument):
            say(f"awconv {command}: an argument is not UTF-8, give another name: {argument}")
            return 2
    arguments = [expanded(argument) for argument in arguments]
    before = signal.signal(signal.SIGTERM, _end) if _is_main_thread() else None
    try:
        arguments = [_renamed(command, argument) for argument in arguments]
        status = COMMANDS[command].run(command, _with_imports(command, arguments), begun)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # as when `head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more is written at the end
        return 128 + signal.SIGPIPE
    except UsageError as error:
        say(*f"awconv {command}: {error}".splitlines())
        return 2
    except (ModuleNotFoundError, OSError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        say(*f"awconv {command}: {_message(error, arguments)}".splitlines())
        return 1
    except RuntimeError as error:
        if "can't allocate memory" not in str(error) and type(error).__name__ != "OutOfMemoryError":  # torch's, both
            raise
        reason = str(error).splitlines()[0].partition("DefaultCPUAllocator: ")
        say(f"awconv {command}: {_NO_MEMORY}: {reason[2] or reason[0]}")
        return 1
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        if error.code == _TERMINATED:
            say(f"awconv {command}: stopped by SIGTERM")
            return _TERMINATED
        raise
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _renamed(command: str, argument: str) -> str:
    """``--ckpt`` and ``--ckpt_path`` name a checkpoint in every command."""
    name, equals, value = argument.partition("=")
    if isinstance(COMMANDS[command], Training):
        return f"--ckpt_path{equals}{value}" if name == "--ckpt" else argument
    return f"--ckpt{equals}{value}" if name == "--ckpt_path" else argument


def _with_imports(command: str, arguments: list[str]) -> list[str]:
    """Runs what ``--import`` names. Commands that train get the names, too, which belong to their settings."""
    own, others = taken_out(arguments)
    if not own:
        return arguments
    import_own(own)
    named = f"--import={','.join(own)}"
    if isinstance(COMMANDS[command], Training):
        return [named, *others]
    if COMMANDS[command].passes_on:
        return [*others, *([] if "--" in others else ["--"]), named]
    return others


def _end(*_: object) -> None:
    sys.exit(_TERMINATED)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # which alone may handle signals


def _message(error: Exception, arguments: Sequence[str]) -> str:
    """An error's message, without the traceback that PyTorch adds in processes that load data."""
    if isinstance(error, RecursionError):
        return "an argument or a file is nested too deeply"
    if isinstance(error, OverflowError):
        long = [argument.partition("=")[0] for argument in arguments if re.search(r"\d{300}", argument)]
        return f"a number is too large: {error} ({', '.join(long) or 'in a file'})"
    if isinstance(error, MemoryError):
        return f"{_NO_MEMORY}: {error}"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return f"{error.filename}: {os.strerror(error.errno)}; give another place, or mend this one"
    text = str(error)
    return text.rstrip().rpartition(f"{type(error).__name__}: ")[2] if "DataLoader worker process" in text else text

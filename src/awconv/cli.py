"""The command line: parses, calls one function, prints."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from awconv.extras import require
from awconv.terminal import say
from awconv.version import __version__

USAGE = f"""awconv {__version__}: convolutions whose kernels adapt to each image

usage: awconv COMMAND [ARGUMENTS]

  demo      train a small ResNet and its AW twin on scanned digits, and compare them
  fit       train a network by a recipe (YAML) and overrides
  validate  evaluate a checkpoint on the validation split
  test      evaluate a checkpoint on the test split
  compare   train the variants of a recipe over seeds, and report how they compare
  ablate    the same over the choices that an AW branch leaves, on the validation split
  publish   write the weights of a finished run for others, with a model card
  predict   classify image files with a checkpoint, or find the objects in them
  models    list the models with attention, and what they cost beside their twins without
  bench     time a layer (bench op), networks (bench model NAME ...) or detectors (bench detector) beside plain ones

awconv COMMAND --help lists a command's arguments.
"""


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        args: the command and its arguments; those of the process by default.

    Returns:
        The exit status: 0 if all went well, 1 after an error of the user's or a broken image, 2 for arguments that
        cannot be parsed, 130 after Ctrl-C, 143 after SIGTERM.
    """
    command, *arguments = (sys.argv[1:] if args is None else args) or [""]
    if command in ("", "-h", "--help"):
        print(USAGE, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    commands = {
        "demo": _function,
        "compare": _function,
        "ablate": _function,
        "predict": _function,
        "publish": _function,
        "models": _function,
        "bench": _bench,
        "fit": _lightning,
        "validate": _lightning,
        "test": _lightning,
    }
    if command not in commands:
        print(f"awconv: unknown command {command!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    for argument in arguments:
        if command != "predict" and not _is_text(argument):  # whose files may be called anything
            say(f"awconv {command}: an argument is not UTF-8, give another name: {argument}")
            return 2
    arguments = [_expanded(argument) for argument in arguments]
    before = signal.signal(signal.SIGTERM, _end) if _is_main_thread() else None
    try:
        return commands[command](command, arguments)
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


_TERMINATED = 128 + signal.SIGTERM
_NO_MEMORY = "there is not enough memory; take smaller images or batches"


def _end(*_: object) -> None:
    sys.exit(_TERMINATED)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()  # which alone may handle signals


def _message(error: Exception, arguments: Sequence[str]) -> str:
    """What an error says, without the traceback that PyTorch puts before one of a process that loads data."""
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


def _expanded(argument: str) -> str:
    """An argument ``--name=~/path`` with the user's folder, which a shell puts only where ``~`` begins a word."""
    name, equals, value = argument.partition("=")
    return f"{name}={os.path.expanduser(value)}" if equals and value.startswith("~/") else argument


def _is_text(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _function(command: str, arguments: Sequence[str]) -> int:
    require("lightning", extra="train")
    jsonargparse = require("jsonargparse", extra="train")
    from awconv.compare import ablate, compare, demo
    from awconv.model_costs import models
    from awconv.predict import predict
    from awconv.publish import publish
    from awconv.training.yaml_files import bounded_yaml

    functions: dict[str, Callable[..., int]] = {
        "demo": demo,
        "compare": compare,
        "ablate": ablate,
        "predict": predict,
        "publish": publish,
        "models": models,
    }
    function = functions[command]
    parser = jsonargparse.ArgumentParser(prog=f"awconv {command}", description=(function.__doc__ or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="a YAML file of arguments")
    skip = set()
    if command in ("compare", "ablate"):
        parser.add_argument("recipe", type=Path, help="a YAML file for awconv fit")
        skip |= {"recipe"}
    if command == "publish":
        parser.add_argument("run", type=Path, help="the file of a run of awconv compare: aw-seed0.json")
        skip |= {"run"}
    if command == "predict":
        # A function, and not the class: jsonargparse would write a Path as UTF-8, which names of files need not be.
        parser.add_argument("images", type=_path, nargs="+", help="image files, and folders that are searched for them")
        skip |= {"images"}
    others: dict[str, object] = {}
    if command in ("demo", "compare", "ablate"):
        others["command"] = shlex.join(["awconv", command, *arguments])
        parser.epilog = "Arguments after -- go to every run, as awconv fit takes them: -- --trainer.max_epochs=5"
        skip |= {"overrides", "command"}
        if "--" in arguments:
            split = arguments.index("--")
            others["overrides"] = arguments[split + 1 :]
            arguments = arguments[:split]
    parser.add_function_arguments(function, skip=skip)
    with bounded_yaml():
        given = parser.parse_args(list(arguments)).as_dict()
    given.pop("config")
    return function(**given, **others)


def _path(name: str) -> Path:
    return Path(name)


def _bench(command: str, arguments: Sequence[str]) -> int:
    jsonargparse = require("jsonargparse", extra="train")
    from awconv.bench import bench_detector, bench_model, bench_op
    from awconv.training.yaml_files import bounded_yaml

    parser = jsonargparse.ArgumentParser(prog=f"awconv {command}", description="Times AW-convolution beside others.")
    subcommands = parser.add_subcommands(dest="subject")
    functions: dict[str, Callable[..., int]] = {"op": bench_op, "model": bench_model, "detector": bench_detector}
    several = {"model": "networks", "detector": "backbones"}
    for name, function in functions.items():
        description = (function.__doc__ or "").split("\n")[0]
        subject = jsonargparse.ArgumentParser(description=description)
        if name in several:
            subject.add_argument(several[name], nargs="+", help="such as aw_resnet50")
        subject.add_function_arguments(function, skip={*several.values()})
        subcommands.add_subcommand(name, subject, help=description)
    with bounded_yaml():
        given = parser.parse_args(list(arguments)).as_dict()
    return functions[given["subject"]](**given[given["subject"]])


def _lightning(command: str, arguments: Sequence[str]) -> int:
    require("lightning", extra="train")
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch.utilities import rank_zero_only
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from awconv.training import TrainingCLI

    try:
        TrainingCLI([command, *arguments], save_config=command == "fit")
    except MisconfigurationException as error:
        raise ValueError(str(error)) from error
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


_GOES_ON = "the same command with --ckpt_path=last goes on"

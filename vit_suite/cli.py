"""The command line: which commands there are, their help, and what a failure prints.

Exit status: 0 = done; 2 = the input is wrong (one sentence); 1 = any other failure (one line, and a log of the
traceback). 130 = interrupted (Ctrl-C), 143 = terminated (SIGTERM), 75 = stopped by SIGUSR1: after these three, a
training goes on when it is started again.

`vit-suite --help` answers as fast as Python starts, because everything is imported inside functions. The code of a
command, and with it torch, is imported after its options and paths have been checked.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
from collections import namedtuple
from typing import Any

from vit_suite.errors import short
from vit_suite.output import patient_output

Command = namedtuple("Command", "help config run words", defaults=[""])
"""One line of help; "module:Class" of the options; "module:function" that takes an object of that class; the option
that bare words before the first `--` belong to (`recipes show NAME`), if the command takes such."""

LONGEST_CAUSE = 300
"""Most characters of an unexpected error that are shown; the log has all of it."""

COMMANDS = {
    "demo": Command(
        "A tour without downloads: generated images, a short training, kNN, attention masks",
        "vit_suite.config:DemoConfig",
        "vit_suite.commands.demo:run",
    ),
    "pretrain": Command(
        "Train a backbone",
        "vit_suite.config:PretrainConfig",
        "vit_suite.commands.pretrain:run",
    ),
    "finetune": Command(
        "Train a checkpoint's backbone on labels",
        "vit_suite.config:FinetuneConfig",
        "vit_suite.commands.finetune:run",
    ),
    "knn": Command(
        "Score a backbone by weighted k nearest neighbours",
        "vit_suite.config:KNNConfig",
        "vit_suite.commands.knn:run",
    ),
    "linear": Command(
        "Score a backbone by linear heads on its frozen features",
        "vit_suite.config:LinearConfig",
        "vit_suite.commands.linear:run",
    ),
    "predict": Command(
        "Name the class of every image with a fine-tuned head",
        "vit_suite.config:PredictConfig",
        "vit_suite.commands.predict:run",
    ),
    "attention": Command(
        "Show where a backbone looks: heat maps, overlays, masks",
        "vit_suite.config:AttentionConfig",
        "vit_suite.commands.attention:run",
    ),
    "embed": Command(
        "Write the features of images to a file",
        "vit_suite.config:EmbedConfig",
        "vit_suite.commands.embed:run",
    ),
    "neighbours": Command(
        "Look at a file of features: nearest images, duplicates, clusters",
        "vit_suite.config:NeighboursConfig",
        "vit_suite.commands.neighbours:run",
    ),
    "localize": Command(
        "Score where a backbone looks against masks or boxes",
        "vit_suite.config:LocalizeConfig",
        "vit_suite.commands.localize:run",
    ),
    "export": Command(
        "Write a backbone for timm, Hugging Face, ONNX or torch.export, and check it",
        "vit_suite.config:ExportConfig",
        "vit_suite.commands.export:run",
    ),
    "make_shards": Command(
        "Pack a data set into tar files, for disks that are slow at small files",
        "vit_suite.config:MakeShardsConfig",
        "vit_suite.commands.make_shards:run",
    ),
    "profile": Command(
        "Say where the time of a training step goes",
        "vit_suite.config:ProfileConfig",
        "vit_suite.commands.profile:run",
    ),
    "launch": Command(
        "Submit a training or another command to SLURM, or say how it is",
        "vit_suite.config:LaunchConfig",
        "vit_suite.commands.launch:run",
        "command",
    ),
    "doctor": Command(
        "Look at a training, a folder or a checkpoint before it waits in a queue",
        "vit_suite.config:DoctorConfig",
        "vit_suite.commands.doctor:run",
        "targets",
    ),
    "report": Command(
        "Write a page on a run, or on several side by side",
        "vit_suite.config:ReportConfig",
        "vit_suite.commands.report:run",
        "runs",
    ),
    "recipes": Command(
        "List the recipes in the package, or print one",
        "vit_suite.config:RecipesConfig",
        "vit_suite.commands.recipes:run",
        "words",
    ),
}


def program() -> int:
    """`vit-suite` as a process of its own: `main`, and a quick end of the process."""
    status: list[int] = []
    atexit.register(_end, status)  # the first handler that is registered is the last one that runs
    status.append(main())
    return status[0]


def _end(status: list[int]) -> None:
    """End this process without Python's last collection of garbage. That walks half a million objects of torch, takes
    2.5 seconds of CPU time, and frees what the system frees anyway."""
    if not status:
        return  # an exception that `main` does not answer: Python reports it
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):
        return  # Python's own way out says what could not be written
    os._exit(status[0])


def main(argv: list[str] | None = None) -> int:
    """Run a command line (sys.argv without one); returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with patient_output() as out:
        status = _answer(argv)
        out.flush()
    _leave(status)
    if out.error and not status:
        return _complain(f"error: the output could not be shown: {out.error.strerror}", 1)
    return status


def _leave(status: int) -> None:
    """End this process at once, if it is a rank that failed while the others may wait for it. Python's own way out
    would wait for them too (training/together.py)."""
    ranks = sys.modules.get("vit_suite.distributed")  # not imported here: it imports torch
    if ranks is not None and ranks.torn:
        sys.stderr.flush()
        os._exit(status or 1)


def _answer(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        return _say(overview())
    if argv[0] in ("-V", "--version"):
        from vit_suite import __version__

        return _say(f"vit-suite {__version__}")
    return _run(argv)


def _run(argv: list[str]) -> int:
    from vit_suite.errors import UserError
    from vit_suite.signals import Stopped

    config = None
    try:
        command = _find(argv[0])
        config_class, words = _load(command.config), argv[1:]
        if command.words and words and not words[0].startswith("-"):
            words = [f"--{command.words}", *words]
        if choose := getattr(config_class, "for_words", None):  # `launch COMMAND` has the options of COMMAND too
            config_class = choose(words)
        if "--help" in words or "-h" in words:
            return _say(command_help(argv[0], config_class, [word for word in words if word not in ("--help", "-h")]))
        from vit_suite.environment import check_environment, choose_waiting
        from vit_suite.parsing import dump_config, load_config
        from vit_suite.places import check_places

        check_environment()
        choose_waiting()
        show = {"--print_config", "--print-config"}
        config = load_config(None, [word for word in words if word not in show], config_class)
        if show.intersection(words):
            return _say(dump_config(config).rstrip())
        check_places(config, lambda key: _unused(argv[0], config, key))
        _load(command.run)(config)
        return 0
    except UserError as error:
        return _complain(f"error: {_one_line(error)}", 2)
    except Stopped as stop:
        return _complain(str(stop), stop.status)
    except KeyboardInterrupt:
        return _complain("interrupted", 130)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning answers Ctrl-C with sys.exit(1)
            return _complain("interrupted", 130)
        # Lightning answers a SIGTERM before the first step with this exception, which would exit with 0.
        if type(stop).__name__ == "SIGTERMException":
            return _complain("terminated before the end", 143)
        raise
    except Exception as error:
        if isinstance(error, OSError) and (refusal := _refusal(error)):
            return _complain(f"error: {refusal}", 2)
        log = _write_log(argv, config)
        return _complain(f"error: {_cause(error)} (traceback: {log})", 1)


def _find(name: str) -> Command:
    from vit_suite.errors import UserError, unknown_name

    if name.startswith("-"):
        raise UserError(f"expected a command before '{name}'. Known: {', '.join(COMMANDS)}.")
    if name not in COMMANDS:
        raise unknown_name("command", name, COMMANDS)
    return COMMANDS[name]


def _unused(command: str, config: Any, key: str) -> bool:
    """Whether this command line neither reads nor writes what the option `key` names."""
    if command == "profile":
        return key == "run.output"
    if command == "launch":  # data and weights may lie where the nodes alone see them
        used = ["status"] if config.status is not None else ["sweep"]
        used += [] if config.dry_run or config.status is not None else ["run.output", "folder"]
        return key not in used
    return False


def _load(place: str):
    from importlib import import_module

    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


# -- What goes wrong ---------------------------------------------------------------------------------------------------


def _say(text: str) -> int:
    print(text, flush=True)
    return 0


def _complain(text: str, status: int) -> int:
    print(f"vit-suite: {text}", file=sys.stderr, flush=True)
    return status


def _refusal(error: OSError) -> str | None:
    """The sentence for a file that the system refused to open or write; None for any other fault."""
    from vit_suite.places import reason

    if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG) or error.filename is None:
        return None
    advice = "give a shorter one" if error.errno == errno.ENAMETOOLONG else "name another, or ask its owner for access"
    return f"'{short(str(error.filename))}': {reason(error)}; {advice}."


def _one_line(error: BaseException) -> str:
    """The message without line breaks. torch wraps an error of a loader's worker in a traceback: only the worker's own
    message is kept."""
    message = str(error).strip()
    if "Original Traceback" in message:
        message = message.splitlines()[-1].partition(": ")[2] or message.splitlines()[-1]
    return " ".join(message.split())


def _cause(error: Exception) -> str:
    message = _one_line(error)
    message = message if len(message) <= LONGEST_CAUSE else message[: LONGEST_CAUSE - 3] + "..."
    cause = f"{type(error).__name__}: {message}" if message else type(error).__name__
    if _disk_full(error):
        cause += " Make room and give the same command again; a training goes on from its last checkpoint."
    if type(error).__name__ == "OutOfMemoryError":  # torch.cuda's, without importing torch to ask
        cause += " Use a smaller batch_size or image size; pretrain keeps its batch with a larger trainer.accumulate."
    return cause


def _disk_full(error: Exception) -> bool:
    """Whether a disk had no room. Libraries that write files themselves (safetensors, onnx) say it in words."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    words = str(error)
    return os.strerror(errno.ENOSPC) in words or os.strerror(errno.EDQUOT) in words


def _write_log(argv: list[str], config) -> str:
    """Append the traceback to a log in the run directory, else in the working directory, else in the temporary one."""
    import shlex
    import tempfile
    import time
    import traceback
    from pathlib import Path

    output = getattr(getattr(config, "run", config), "output", None)
    folders = [Path(output)] if output and Path(output).is_dir() else []
    for folder in [*folders, Path(), Path(tempfile.gettempdir())]:
        path = folder / "vit-suite-error.log"
        try:
            with path.open("a", encoding="utf-8") as log:
                log.write(
                    f"{time.strftime('%Y-%m-%d %H:%M:%S')} vit-suite {shlex.join(argv)}\n{traceback.format_exc()}\n"
                )
            return str(path)
        except OSError:
            continue
    traceback.print_exc()
    return "above"


# -- Help --------------------------------------------------------------------------------------------------------------


def overview() -> str:
    """What `vit-suite --help` prints."""
    commands = "\n".join(f"  {name:<12}{command.help}" for name, command in COMMANDS.items())
    return f"""Train vision transformers, measure what they learned, and see where they look.

usage: vit-suite COMMAND [--config FILE] [--OPTION VALUE ...]

{commands}

vit-suite COMMAND --help lists the options of a command; vit-suite --version the version."""


def command_help(name: str, config_class: type, words: list[str]) -> str:
    """Every option of a command by group: what it does, its type, limits and default. `words` may choose the method."""
    import shutil
    import textwrap

    from vit_suite.options import Schema, attribute_docs
    from vit_suite.parsing import chosen, read_arguments

    schema = Schema(config_class, chosen(read_arguments(words)[1]))
    width = max(60, min(130, shutil.get_terminal_size((110, 24)).columns))
    parts = [
        f"usage: vit-suite {name} [--config FILE] [--OPTION VALUE ...]",
        textwrap.fill(" ".join((config_class.__doc__ or "").split()), width),
        _entry("--config FILE", "YAML with any of the options below; options on the command line win over it", width)
        + "\n"
        + _entry("--print_config", "Print the resolved options as YAML and stop", width),
    ]
    for group, cls in schema.groups.items():
        docs = attribute_docs(cls)
        options = [option for key, option in schema.options.items() if key.rpartition(".")[0] == group]
        texts = {option.key: f"{docs.get(option.key.rpartition('.')[2], '')} {_facts(option)}" for option in options}
        rows = [_entry(f"--{key}", text, width) for key, text in texts.items()]
        if group:
            rows.insert(0, textwrap.fill(f"{group}: {' '.join((cls.__doc__ or '').split())}", width))
        if rows:
            parts.append("\n".join(rows))
    return "\n\n".join(parts)


def _entry(option: str, text: str, width: int, column: int = 32) -> str:
    """`  --option   text`, the text wrapped beside the option, or below it where the option is long."""
    import textwrap

    lines = textwrap.wrap(text, width - column)
    head = f"  {option}".ljust(column) + lines.pop(0) if len(option) + 4 <= column else f"  {option}"
    return "\n".join([head, *(" " * column + line for line in lines)])


def _facts(option) -> str:
    """`[float (at least 0), default 0.0005]`"""
    from vit_suite.options import REQUIRED

    default = option.default
    if default is REQUIRED:
        return f"[{option.type_name}, required]"
    if default is None:
        return f"[{option.type_name}, optional]"
    if isinstance(default, list):
        default = " ".join(map(str, default))
    return f"[{option.type_name}, default {str(default).lower() if isinstance(default, bool) else default}]"

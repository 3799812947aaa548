"""The command line's entry: finds the command, runs it, and turns every failure into plain words and an exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from caffelite import __version__, environment
from caffelite.cli import COMMANDS, load_command
from caffelite.cli.common import normalise, report
from caffelite.errors import SpecError, nearest

USAGE = """usage: caffelite COMMAND [flags]

Trains and runs Caffe's prototxt nets.

commands:
{commands}

Flags are Caffe's: one dash or two, "-flag value" or "-flag=value".
"caffelite COMMAND --help" explains a command; "caffelite --version" prints the version.

example:
  caffelite train --solver solvers/nin.prototxt
"""


def usage() -> str:
    """The text of `caffelite --help`."""
    width = max(len(name) for name in COMMANDS)
    return USAGE.format(commands="\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 success, 1 a failed run, 2 a bad command line or file, 130 interrupted."""
    try:
        status = run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except SystemExit as stop:  # argparse after --help
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        # The reader (head, less) has gone: nothing is wrong, and flushing again at exit would only complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (Exception, KeyboardInterrupt) as error:
        return report(error)
    return status


def run(argv: list[str]) -> int:
    """Parses `argv` and runs the command it names. Raises what the command raises."""
    argv = normalise(argv)
    if argv[:1] == ["help"] and len(argv) > 1:
        argv = [argv[1], "--help"]
    flags_first = bool(argv) and argv[0].startswith("-")  # Caffe takes flags before the command too
    position = next((i for i, word in enumerate(argv) if word.replace("_", "-") in COMMANDS), None) if flags_first else 0
    if not argv or position is None or argv[position].replace("_", "-") not in COMMANDS:
        return _no_command(argv)
    name = argv.pop(position).replace("_", "-")
    for slip in environment.slips():
        print(f"caffelite: warning: {slip}", file=sys.stderr)
    command = load_command(name)
    parser = command.build_parser(f"caffelite {name}")
    return int(command.run(parser.parse(argv)))


def _no_command(argv: Sequence[str]) -> int:
    if argv and argv[0] in ("-h", "--help", "help"):
        print(usage(), end="")
        return 0
    if argv and argv[0] in ("-V", "--version"):
        print(f"caffelite {__version__}")
        return 0
    words = [word for word in argv if not word.startswith("-")]
    if not words:
        print(usage(), end="", file=sys.stderr)
        return 2
    near = nearest(words[0], COMMANDS)
    raise SpecError(f"unknown command '{words[0]}'", hint=f"did you mean '{near}'?" if near else "commands: " + ", ".join(COMMANDS))


if __name__ == "__main__":
    sys.exit(main())

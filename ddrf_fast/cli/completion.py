"""`ddrf-fast --print-completion SHELL`: what makes a shell complete the command."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FILES = ("VIS", "IR", "IMAGES", "OUT", "FILE", "DIR", "PATH", "CLEAN")  # metavars of what may be a path


class PrintCompletion(argparse.Action):
    """Prints the script and stops."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        try:
            import shtab  # here, because nothing else needs it
        except ModuleNotFoundError:
            parser.error("shell completion needs shtab: pip install 'ddrf-fast[completion]'")
        _complete_paths(parser, shtab.FILE)
        print(shtab.complete(parser, str(values)))
        parser.exit()


def _complete_paths(parser: argparse.ArgumentParser, how: object) -> None:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _complete_paths(command, how)
        elif action.type is Path or action.metavar in _FILES:
            action.complete = how  # type: ignore[attr-defined]

"""Scripts that complete the command in a shell, written from the commands and options that there are.

They are plain lists, so pressing the tab key starts no Python.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import typer

PROGRAM = "tether"


@dataclass(frozen=True)
class Option:
    """An option, and what may follow it."""

    names: list[str]
    help: str
    takes: str
    """`nothing`, `file`, `choice` or `text`."""
    choices: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """A command with its options, the words that may be its argument, and whether files may be."""

    name: str
    help: str
    options: list[Option]
    words: list[str]
    files: bool


HELP = Option(["--help", "-h"], "Show this message and exit", "nothing")


def script(app: typer.Typer, shell: str) -> str:
    """The script that completes the commands of an application in `bash`, `zsh` or `fish`."""
    group: Any = typer.main.get_command(app)
    own = [_option(each, None) for each in group.params]
    return _SHELLS[shell]([*own, HELP], [_command(name, command) for name, command in group.commands.items()])


def _command(name: str, command: Any) -> Command:
    if hasattr(command, "commands"):
        return _group(name, command)
    hints = get_type_hints(command.callback)
    options = [each for each in command.params if each.param_type_name == "option"]
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    words = [word for each in arguments for word in _choices(hints[each.name])]
    return Command(
        name,
        _first_sentence(command.help),
        [*(_option(each, hints[each.name]) for each in options), HELP],
        words,
        files=bool(arguments) and not words,
    )


def _group(name: str, group: Any) -> Command:
    """A group of commands as one: their names are its words, and it has the options of all of them."""
    inner = [_command(each, command) for each, command in group.commands.items()]
    options = {option.names[0]: option for command in inner for option in command.options if option != HELP}
    return Command(name, _first_sentence(group.help), [*options.values(), HELP], [each.name for each in inner], True)


def _option(option: Any, hint: Any) -> Option:
    choices = _choices(hint)
    takes = "nothing" if option.is_flag else "choice" if choices else "file" if _holds(hint, Path) else "text"
    return Option([*option.opts, *option.secondary_opts], _first_sentence(option.help), takes, choices)


def _choices(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [str(value) for value in get_args(hint)]
    return [word for part in get_args(hint) for word in _choices(part)]


def _holds(hint: Any, kind: type) -> bool:
    return hint is kind or any(_holds(part, kind) for part in get_args(hint))


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=\.)\s", " ".join((text or "").split("\n\n")[0].split()))[0].rstrip(".")


def _names(options: list[Option]) -> list[str]:
    return [name for option in options for name in option.names]


# --------------------------------------------------------------------------- bash


def _bash(own: list[Option], commands: list[Command]) -> str:
    lines = [
        f"# Completion of {PROGRAM} in bash. To have it in every shell, add to ~/.bashrc:",
        f'#   eval "$({PROGRAM} completion bash)"',
        f"_{PROGRAM}() {{",
        "    local IFS=$'\\n'  # names of files may hold spaces",
        '    local word="${COMP_WORDS[COMP_CWORD]}" before="${COMP_WORDS[COMP_CWORD-1]}" command="" each',
        "    COMPREPLY=()",
        '    for each in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do',
        f'        case "$each" in {"|".join(command.name for command in commands)}) command="$each"; break ;; esac',
        "    done",
        '    case "$command $before" in',
    ]
    for command in commands:
        for option in command.options:
            pattern = "|".join(f'"{command.name} {name}"' for name in option.names)
            if option.takes == "choice":
                lines.append(f"        {pattern}) {_words(option.choices)}; return ;;")
            elif option.takes == "file":
                lines.append(f"        {pattern}) {FILES}; return ;;")
            elif option.takes == "text":
                lines.append(f"        {pattern}) return ;;")
    first = _words([*(command.name for command in commands), *_names(own)])
    lines += ["    esac", '    case "$command $word" in', f'        " "*) {first} ;;']
    for command in commands:
        lines.append(f'        "{command.name} -"*) {_words(_names(command.options))} ;;')
        if command.files or command.words:
            what = _words(command.words, files=command.files) if command.words else FILES
            lines.append(f'        "{command.name} "*) {what} ;;')
    lines += ["    esac", "}", f"complete -o filenames -F _{PROGRAM} {PROGRAM}", ""]
    return "\n".join(lines)


FILES = 'COMPREPLY=($(compgen -f -- "$word"))'


def _words(words: list[str], *, files: bool = False) -> str:
    listed = "\\n".join(words)
    return f"COMPREPLY=($(compgen {'-f ' if files else ''}-W $'{listed}' -- \"$word\"))"


# --------------------------------------------------------------------------- zsh


def _zsh(own: list[Option], commands: list[Command]) -> str:
    lines = [
        f"# Completion of {PROGRAM} in zsh. To have it in every shell, add to ~/.zshrc, after compinit:",
        f'#   eval "$({PROGRAM} completion zsh)"',
        f"_{PROGRAM}() {{",
        "    local context state line",
        f"    _arguments -C {' '.join(_zsh_options(own))} '1:command:->command' '*::argument:->argument'",
        '    case "$state" in',
        "        command)",
        "            local -a commands=(",
        *(f"                {shlex.quote(f'{command.name}:{command.help}')}" for command in commands),
        "            )",
        "            _describe command commands ;;",
        "        argument)",
        '            case "${line[1]}" in',
    ]
    for command in commands:
        words = f"'{'1' if command.files else '*'}:word:({' '.join(command.words)})'" if command.words else ""
        rest = f"{words} '*:file:_files'".strip() if command.files else words
        lines.append(f"                {command.name}) _arguments {' '.join(_zsh_options(command.options))} {rest} ;;")
    lines += ["            esac ;;", "    esac", "}", f"compdef _{PROGRAM} {PROGRAM}", ""]
    return "\n".join(lines)


def _zsh_options(options: list[Option]) -> list[str]:
    after = {"nothing": "", "file": ":file:_files", "text": ":value: "}
    found = []
    for option in options:
        says = re.sub(r"([\[\]\\:])", r"\\\1", option.help)
        takes = after.get(option.takes, f":word:({' '.join(option.choices)})")
        found += [shlex.quote(f"*{name}[{says}]{takes}") for name in option.names]
    return found


# --------------------------------------------------------------------------- fish


def _fish(own: list[Option], commands: list[Command]) -> str:
    names = " ".join(command.name for command in commands)
    first = f"not __fish_seen_subcommand_from {names}"
    lines = [
        f"# Completion of {PROGRAM} in fish. To have it in every shell:",
        f"#   {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish",
        f"complete -c {PROGRAM} -n {shlex.quote(first)} -f",
        *(_fish_option(option, first) for option in own),
    ]
    for command in commands:
        within = f"__fish_seen_subcommand_from {command.name}"
        lines.append(f"complete -c {PROGRAM} -n {shlex.quote(first)} -a {command.name} -d {_fish_quoted(command.help)}")
        if command.words or not command.files:
            words = f" -a {_fish_quoted(' '.join(command.words))}" if command.words else ""
            lines.append(f"complete -c {PROGRAM} -n {shlex.quote(within)}{'' if command.files else ' -f'}{words}")
        lines += [_fish_option(option, within) for option in command.options]
    return "\n".join([*lines, ""])


def _fish_option(option: Option, condition: str) -> str:
    names = [f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names]
    takes = {"nothing": "", "file": " -r -F", "text": " -x"}.get(
        option.takes, f" -x -a {_fish_quoted(' '.join(option.choices))}"
    )
    says = _fish_quoted(option.help)
    return f"complete -c {PROGRAM} -n {shlex.quote(condition)} {' '.join(names)}{takes} -d {says}"


def _fish_quoted(text: str) -> str:
    """In fish's single quotes a backslash and a quote are written with a backslash."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}

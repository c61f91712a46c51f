"""The door of every binary: flags in, one-line errors out.

`--preset` names a config, a dataclass; `--config.FIELD=VALUE` changes a field of it.
"""

import copy
import dataclasses
import errno
import logging
import os
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from experiments.harness.running import stopping, watchdog
from jaxquant import checks

FLAGS = flags.FLAGS
_BAD_INPUT = 2
_OUT_OF_MEMORY = " (a smaller model, batch or sequence takes less memory; more devices have more)"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_BAD_PATH = (
    *(errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EACCES, errno.EPERM, errno.EROFS),
)


def option(default: Any, meaning: str) -> Any:
    """Returns a field of a config, with its meaning and choices for --help."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def check_positive(config: Any, *names: str) -> None:
    """Raises a ValueError unless each named field is a finite number above zero."""
    for name in names:
        checks.check_positive(f"config.{name}", getattr(config, name))


def check_whole(config: Any, *names: str) -> None:
    """Raises a ValueError unless each named field is a whole number of at least 1, or holds such numbers."""
    for name in names:
        field = getattr(config, name)
        if not isinstance(field, tuple | list):
            checks.check_whole(f"config.{name}", field, 1)
            continue
        for value in field:
            checks.check_whole(f"each of config.{name}", value, 1)


def check_each_once(config: Any, *names: str, may_be_empty: bool = False) -> None:
    """Raises a ValueError unless each named field has values, none of them twice."""
    for name in names:
        values = getattr(config, name)
        if len(set(values)) != len(values) or not (values or may_be_empty):
            least = "values" if may_be_empty else "at least one value"
            raise ValueError(f"config.{name} needs {least}, each once; got {values}")


def check_choices(config: Any, name: str, known: Collection[Any]) -> None:
    """Raises a ValueError unless all values of a field are known ones."""
    for value in getattr(config, name):
        if value not in known:
            choices = ", ".join(map(str, known))
            raise ValueError(f"config.{name} are of {choices}; got {value!r}")


def main(
    run: Callable[[Any], None], presets: Mapping[str, Any], default: str, about: str | None = None
) -> None:
    """Parses flags and calls run(config); bad input ends with one line and exit status 2.

    Args:
        run: the binary.
        presets: config dataclasses by name.
        default: the preset where none is given.
        about: what it does, for --help; the binary's docstring where not given.
    """
    flags.DEFINE_string("preset", default, f"One of {', '.join(presets)}.")

    def parse(argv: list[str]) -> list[str]:
        try:
            return _parse(argv, presets, about)
        except (flags.Error, ValueError, AttributeError, KeyError, TypeError) as error:
            _fail(_one_line(error), _BAD_INPUT)
            raise

    def checked(argv: list[str]) -> None:
        _quiet()
        try:
            if len(argv) > 1:
                raise ValueError(f"unexpected argument {argv[1]!r}; flags start with --")
            if "workdir" in FLAGS and FLAGS.workdir == "":
                raise ValueError("--workdir names a folder; got an empty name")
            run(FLAGS.config)
        except ValueError as error:
            _fail(_one_line(error), _BAD_INPUT)
        except OSError as error:
            if error.errno in _FULL:
                advice = ". What was finished is kept: free some space and run this again"
            elif error.errno in _BAD_PATH:
                advice = ""
            else:
                raise
            _leave(f"{_one_line(error)}{advice}", _BAD_INPUT)
        except stopping.Preempted as error:
            _fail(str(error), stopping.RESTART)
        except watchdog.Hung as error:
            _leave(str(error), stopping.RESTART)
        except RuntimeError as error:
            _fail(f"{error}{_OUT_OF_MEMORY if 'RESOURCE_EXHAUSTED' in str(error) else ''}", 1)
        except KeyboardInterrupt:
            _leave("stopped; the same command goes on from here", 130)

    app.run(checked, flags_parser=parse)


def _parse(argv: list[str], presets: Mapping[str, Any], about: str | None) -> list[str]:
    """Parses flags in two passes: the preset first, because --config.FIELD changes its fields."""
    if any(a in ("--help", "-h", "--helpshort", "-help", "--helpfull") for a in argv[1:]):
        named = [a.partition("=")[2] for a in argv[1:] if a.lstrip("-").startswith("preset=")]
        chosen = next((name for name in named if name in presets), str(FLAGS["preset"].default))
        try:
            _print_help(presets, chosen, about)
            sys.stdout.flush()
        except (
            BrokenPipeError
        ):  # its reader, as head, has seen enough; Python flushes once more at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    config_arguments = [a for a in argv[1:] if a.startswith(("--config", "-config"))]
    FLAGS([a for a in argv if a not in config_arguments])
    if FLAGS.preset not in presets:
        raise ValueError(f"--preset is one of {', '.join(presets)}; got {FLAGS.preset!r}")
    preset = presets[FLAGS.preset]
    for argument in config_arguments:
        name, _, value = argument.lstrip("-").partition("=")
        field = name.removeprefix("config").removeprefix(".")
        may_be_empty = "=" in argument and isinstance(getattr(preset, field, None), str)
        if not hasattr(preset, field) or not (value or may_be_empty):
            raise ValueError(
                f"{argument!r} is not --config.FIELD=VALUE with a field of {', '.join(vars(preset))}"
            )
    _define_config(preset)
    FLAGS.unparse_flags()
    return FLAGS(argv)


def _print_help(presets: Mapping[str, Any], chosen: str, about: str | None) -> None:
    FLAGS.mark_as_parsed()
    if len(presets) == 1:  # there is nothing to choose
        delattr(FLAGS, "preset")
    print(about or sys.modules["__main__"].__doc__ or "", end="\n\n")
    for module in FLAGS.flags_by_module_dict():
        if module.startswith(("experiments", sys.argv[0])) or module == "__main__":
            _, _, own = FLAGS.module_help(module).lstrip().partition("\n")
            print(own)
    if not vars(presets[chosen]):
        return
    print(f"\n  --config.FIELD=VALUE changes a field of the preset; here with {chosen}'s values:")
    for field in dataclasses.fields(presets[chosen]):
        print(f"    --config.{field.name}={getattr(presets[chosen], field.name)}")
        if meaning := field.metadata.get("meaning"):
            print(f"      {meaning}")


def _define_config(preset: Any) -> None:
    config_flags.DEFINE_config_dataclass("config", copy.deepcopy(preset), "What the study does.")


def _quiet() -> None:
    """Keeps our own warnings on the screen and drops the libraries' messages."""
    # Orbax logs at length, here and through asyncio, what it then raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    ours = logging.getLogger("experiments")
    ours.setLevel(logging.WARNING)  # absl has just raised the root's
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("warning: %(message)s"))
    ours.addHandler(handler)
    ours.propagate = False


def _one_line(error: BaseException) -> str:
    is_pair = len(error.args) > 1 and not isinstance(error, OSError)
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    text = ": ".join(map(str, error.args)) if is_pair else text
    return " ".join(text.split()) or type(error).__name__


def _leave(message: str, status: int) -> None:
    """`_fail` at once, whatever threads of libraries hang, or would say of what they did not finish."""
    print(f"error: {message}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _fail(message: str, status: int) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(status)

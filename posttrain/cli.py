"""The command `posttrain`.

Heavy libraries are imported by the command that needs them, so that `--help` and a mistake in a flag cost nothing.
"""

import argparse
import difflib
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple, NoReturn

from posttrain import __version__
from posttrain.bench.commands import add_command
from posttrain.rollout.commands import add_commands
from posttrain.train.config import ConfigError, TrainConfig, fields_of, read_yaml
from posttrain.train.dpo_config import DPOConfig
from posttrain.train.grpo_config import GRPOConfig
from posttrain.train.sft_config import SFTConfig


class _Method(NamedTuple):
    """A command that trains."""

    name: str
    config: type[TrainConfig]
    trainer: str  # module:class
    help: str


_METHODS = (
    _Method("sft", SFTConfig, "posttrain.train.sft:SFTTrainer", "supervised fine-tuning"),
    _Method("dpo", DPOConfig, "posttrain.train.dpo:DPOTrainer", "direct preference optimisation"),
    _Method("grpo", GRPOConfig, "posttrain.train.grpo:GRPOTrainer", "group-relative policy optimisation"),
)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"posttrain: error: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code: 0 done, 2 input that can't be used, 130 stopped by Ctrl-C."""
    options, unknown = _parser().parse_known_args(arguments)
    if hasattr(options, "words"):  # argparse takes those before the first option only
        options.words += [each for each in unknown if not each.startswith("-")]
        unknown = [each for each in unknown if each.startswith("-")]
    try:
        if unknown:
            raise ConfigError(_unknown_flag(unknown[0], options))
        return options.run(options)
    except KeyboardInterrupt as stop:
        print(f"posttrain: {str(stop) or 'stopped'}", file=sys.stderr)
        return 130
    except (ConfigError, OSError) as error:
        print(f"posttrain: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _unknown_flag(flag: str, options: argparse.Namespace) -> str:
    name = flag.partition("=")[0]
    known = fields_of(options.method.config) if options.run is _train else ()
    nearest = difflib.get_close_matches(name.replace("-", "_").strip("_"), known, n=1)
    hint = f"; did you mean --{nearest[0]}?" if nearest else ""
    return f"unknown argument {name}{hint}"


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="posttrain", description="Post-training of language models.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"posttrain {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="command")
    for method in _METHODS:
        about = method.help[0].upper() + method.help[1:] + "."
        command = commands.add_parser(method.name, help=method.help, description=about, allow_abbrev=False)
        _add_fields(command, method.config)
        command.set_defaults(run=_train, method=method)
    add_commands(commands)
    add_command(commands)
    doctor = commands.add_parser("doctor", help="show what this machine has and which backends it would use")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_fields(parser: argparse.ArgumentParser, config: type[TrainConfig]) -> None:
    parser.add_argument("--config", metavar="FILE", help="YAML file with any of the settings below; flags override it")
    defaults = config()
    for name, (field, hint) in fields_of(config).items():
        text = field.metadata["help"].replace("%", "%%")
        if field.metadata["choices"]:
            text += f"; one of {', '.join(field.metadata['choices'])}"
        default = getattr(defaults, name)
        if default is not None:
            text += f" (default: {','.join(map(str, default)) if isinstance(default, list) else default})"
        flags = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        bare: Any = {"nargs": "?", "const": "true"} if hint is bool or bool in getattr(hint, "__args__", ()) else {}
        parser.add_argument(*flags, dest=name, default=argparse.SUPPRESS, metavar="VALUE", help=text, **bare)


def _train(options: argparse.Namespace) -> int:
    method: _Method = options.method
    values = read_yaml(options.config) if options.config else {}
    flags = {name: value for name, value in vars(options).items() if name in fields_of(method.config)}
    config = method.config.from_mapping(values | flags, source=options.config or "flags")

    from transformers.utils.logging import disable_progress_bar

    from posttrain.data.rows import DataError
    from posttrain.models import ModelError

    disable_progress_bar()  # ours shows the training; the others are of loading and saving files
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT uses its older names
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it warns of kernels that it lacks
    module, _, name = method.trainer.partition(":")
    try:
        result = getattr(import_module(module), name)(args=config).train()
    except (DataError, ModelError) as error:
        raise ConfigError(str(error)) from error
    print(f"{result.global_step} steps, loss {result.loss:.4f}; checkpoint in {result.checkpoint}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from posttrain.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())

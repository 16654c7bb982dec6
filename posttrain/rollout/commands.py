"""The commands `posttrain generate` and `posttrain chat`."""

import argparse
from pathlib import Path
from typing import Any

from posttrain.train.config import ConfigError

_DRAWS = ("n", "seed", "max_tokens", "temperature", "top_k", "top_p", "min_p", "stop")


def add_commands(commands: Any) -> None:
    """Add both to the parsers of `posttrain`."""
    generate = commands.add_parser(
        "generate",
        help="completions of the prompts in a file",
        description="Completions of the prompts in a file. A run that was stopped goes on where it was.",
        allow_abbrev=False,
    )
    generate.add_argument("--prompts", required=True, metavar="FILE", help="rows with a column 'prompt' or 'messages'")
    generate.add_argument("--out", required=True, metavar="FILE", help="JSON lines, one for each prompt")
    generate.add_argument("--n", type=int, default=1, metavar="N", help="completions of each prompt (default: 1)")
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default: 0)")
    generate.set_defaults(run=_generate)
    chat = commands.add_parser(
        "chat", help="talk to a model", description="Talk to a model; an empty line ends it.", allow_abbrev=False
    )
    chat.add_argument("--system", metavar="TEXT", help="what the model is told first")
    chat.set_defaults(run=_chat, n=1, seed=None)
    for parser in (generate, chat):
        _add_options(parser)


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="PATH", help="folder or hub id of a model or an adapter")
    parser.add_argument("--dtype", default="float32", metavar="NAME", help="of the weights (default: float32)")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of a completion (default: 256)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="0 is greedy (default: 1)")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only the likeliest, up to this share")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P", help="only this likely against the likeliest")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends a completion; may be repeated"
    )


def _generate(options: argparse.Namespace) -> int:
    params = _params(options)
    from posttrain.data.load import load_rows
    from posttrain.data.rows import DataError
    from posttrain.rollout.results import Results, check_row

    try:
        rows = load_rows(options.prompts)
        for index, row in enumerate(rows):
            check_row(row, rows.where(index))
        prompts = [_prompt(row, rows.where(index)) for index, row in enumerate(rows)]
        results = Results(Path(options.out), prompts, _settings(options))
    except DataError as error:
        raise ConfigError(str(error)) from error
    with results:
        before = len(results.done)
        open_ = [index for index in range(len(prompts)) if index not in results.done]
        if open_:
            engine = _engine(options, keep_prefixes=False)

            def on_finish(number: int, completions: list[Any]) -> None:
                index = open_[number]
                results.add(index, prompts[index], dict(rows[index]), completions)

            try:
                engine.generate([prompts[index] for index in open_], params, on_finish=on_finish, progress=True)
            except ValueError as error:
                raise ConfigError(str(error)) from error
    print(f"{len(results.done) - before} prompts done, {before} were done before; in {options.out}")
    return 0


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What completions depend on besides their prompts."""
    model = Path(options.model)
    known = {name: getattr(options, name) for name in ("dtype", *_DRAWS)}
    return {"model": str(model.resolve()) if model.exists() else options.model, **known}


def _chat(options: argparse.Namespace) -> int:
    params = _params(options)
    engine = _engine(options, keep_prefixes=True)
    if options.system and not engine.tokenizer.chat_template:
        raise ConfigError(f"--system needs a chat template, and the tokenizer of {options.model} has none")
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while True:
        try:
            said = input("> ")
        except EOFError:
            said = ""
        if not said:
            return 0
        messages.append({"role": "user", "content": said})
        prompt = messages if engine.tokenizer.chat_template else said
        answer = ""
        try:
            for piece in engine.stream([prompt], params):
                answer += piece.text
                print(piece.text, end="", flush=True)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        print()
        messages.append({"role": "assistant", "content": answer})


def _params(options: argparse.Namespace) -> Any:
    from posttrain.rollout.params import SamplingParams

    try:
        return SamplingParams(**{name: getattr(options, name) for name in _DRAWS})
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _engine(options: argparse.Namespace, keep_prefixes: bool) -> Any:
    from transformers.utils.logging import disable_progress_bar

    from posttrain.models import ModelError, load
    from posttrain.rollout.engine import Engine

    disable_progress_bar()
    try:
        model, tokenizer = load(options.model, dtype=options.dtype)
    except ModelError as error:
        raise ConfigError(str(error)) from error
    return Engine(model, tokenizer, keep_prefixes=keep_prefixes)


def _prompt(row: Any, where: str) -> Any:
    from posttrain.data.rows import DataError

    for name in ("prompt", "messages"):
        if name in row:
            if not isinstance(row[name], str) and not (isinstance(row[name], list) and row[name]):
                raise DataError(f"{where}: column {name!r} must be a text or a list of messages, got {row[name]!r:.80}")
            return row[name]
    raise DataError(f"{where}: no column 'prompt' or 'messages', only {', '.join(map(repr, row))}")

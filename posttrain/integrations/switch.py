"""One line that puts our ops into transformers, TRL and PEFT for the whole process, and one that takes them out.

Hooks, and there are no others:

    transformers.PreTrainedModel.from_pretrained    a causal LM that it has loaded is prepared
    peft.PeftModel.__init__                         so is one that it wraps, with its adapters
    transformers.Trainer.__init__                   so is the model a trainer was given, with the adapters on it by then
    transformers.Trainer.train, evaluate, predict   the same for a trainer that was made before `enable`
    transformers.Trainer.compute_loss               its model computes the loss without logits where only that counts,
    transformers.Trainer.prediction_step            and so in evaluation (trainer_steps.py)
    trl.trainer.utils                               the one place where TRL calls its language head
    trl's SFT, DPO, KTO, GRPO and RLOO trainers     the methods that run models (trl_batches.py), when made or used
    trl's GRPO and RLOO trainers                    the method that generates (trl_generation.py), when made or used

On a CPU, TRL scores every position and masks the result, and on a GPU those that count; with our op it is the latter
on both.
"""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

from posttrain.integrations.counting import count, forget, say
from posttrain.integrations.models import attach, detach
from posttrain.integrations.trainer_steps import loss_without_logits, without_logits
from posttrain.integrations.trl_batches import BATCHES, methods, shared
from posttrain.integrations.trl_generation import GENERATION, by_engine
from posttrain.integrations.trl_logprob import language_head
from posttrain.integrations.versions import installed

_HEAD = "_ChunkedLogProbFunction"

_undo: list[tuple[Any, str, Any]] = []  # owner, name, what it was


def enable(*, allow_untested: bool = False) -> None:
    """Put our ops into what a script does with transformers, TRL and PEFT from here on, and print what was replaced.

    Models get our ops when they are loaded, and those loaded before or made in another way when a trainer gets them
    or is used. A second call changes nothing.

    Args:
        allow_untested: also hook versions of the libraries that weren't tested.

    Raises:
        ValueError: an untested version, with the tested ones; nothing is replaced then.
    """
    if _undo:
        return
    versions = installed(allow_untested)
    forget()
    for library in versions:
        import_module(library)
    try:
        _hook(versions)
    except BaseException:
        disable()
        raise


def disable() -> None:
    """Undo `enable`: the libraries get their functions back, and the models that it changed their own modules.

    What `counters` says stays until the next `enable`.
    """
    while _undo:
        owner, name, before = _undo.pop()
        setattr(owner, name, before)
    detach()


def _hook(versions: dict[str, str]) -> None:
    say(f"posttrain is in {', '.join(f'{library} {number}' for library, number in versions.items())}:")
    _hook_transformers()
    say("  causal language models, when loaded, wrapped by PEFT or trained: norms, rotary, MLP, attention, LoRA")
    say("  transformers' own Trainer: its loss by linear_logprob, padding left out, common prefixes computed once")
    if "trl" in versions:
        say(_hook_trl(versions["trl"]))


def _replace(owner: Any, name: str, new: Any) -> None:
    _undo.append((owner, name, vars(owner)[name]))
    setattr(owner, name, new)


def _hook_transformers() -> None:
    from peft import PeftModel
    from transformers import PreTrainedModel, Trainer

    import posttrain.models.attention  # noqa: F401  registers the name

    loading = vars(PreTrainedModel)["from_pretrained"].__func__
    _replace(PreTrainedModel, "from_pretrained", classmethod(_loading(loading)))
    _replace(PeftModel, "__init__", _wrapping(PeftModel.__init__))
    _replace(Trainer, "__init__", _making(Trainer.__init__))
    for name in ("train", "evaluate", "predict"):
        _replace(Trainer, name, _using(vars(Trainer)[name]))
    ours = without_logits(Trainer.compute_loss)
    _replace(Trainer, "compute_loss", ours)
    evaluating = loss_without_logits(Trainer.prediction_step, lambda trainer: type(trainer).compute_loss is ours)
    _replace(Trainer, "prediction_step", evaluating)


def _loading(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("attn_implementation") == "posttrain":  # TRL's reference model: asks for what the policy has
            del kwargs["attn_implementation"]
        loaded = theirs(cls, *args, **kwargs)
        attach(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    return from_pretrained


def _wrapping(theirs: Callable[..., None]) -> Callable[..., None]:
    @wraps(theirs)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        theirs(self, *args, **kwargs)
        attach(self)

    return __init__


def _making(theirs: Callable[..., None]) -> Callable[..., None]:
    @wraps(theirs)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        _hook_methods(type(self))
        theirs(self, *args, **kwargs)
        count("trainer made")
        if self.args.torch_compile:
            say("posttrain: under torch.compile batches keep their padding, and prefixes aren't shared")
        _attach_models(self)

    return __init__


def _using(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a trainer that may have been made without our hooks."""

    @wraps(theirs)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        _hook_methods(type(self))
        _attach_models(self)
        return theirs(self, *args, **kwargs)

    return method


def _attach_models(trainer: Any) -> None:
    _refuse_parts_of_sequences(trainer.accelerator)
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:
            attach(trainer.accelerator.unwrap_model(model, keep_torch_compile=False))


def _refuse_parts_of_sequences(accelerator: Any) -> None:
    """Raises `ValueError` where processes share the tokens of a sequence: our attention needs all of them."""
    found = getattr(accelerator, "parallelism_config", None)
    if found is not None and (found.cp_enabled or found.sp_enabled):
        raise ValueError(
            f"posttrain's attention takes whole sequences, and this trainer divides them (cp_size {found.cp_size}, "
            f"sp_size {found.sp_size}); call posttrain.disable() before the model is loaded"
        )


def _hook_methods(trainer: type) -> None:
    """Those of TRL's that run models (trl_batches.py) and that generate (trl_generation.py)."""
    hooked = [(owner, name) for owner, name, _ in _undo]
    for names, ours, otherwise in (
        (BATCHES, shared, "its batches keep their padding"),
        (GENERATION, by_engine, "transformers draws its completions"),
    ):
        for cls, name in methods(trainer, names):
            if name not in vars(cls):
                say(f"posttrain: this trl's {cls.__name__} has no {name}, so {otherwise}")
            elif (cls, name) not in hooked:
                _replace(cls, name, ours(vars(cls)[name]))


def _hook_trl(version: str) -> str:
    """What was replaced in TRL, in words."""
    from trl.trainer import utils

    theirs = getattr(utils, _HEAD, None)
    if theirs is None:
        return f"  not replaced: the language head in TRL's trainers, which trl {version} calls elsewhere"
    _replace(utils, _HEAD, language_head(theirs))
    if hasattr(utils, "_use_triton"):  # since 1.16; before, positions without a target were left out everywhere
        on_a_gpu = utils._use_triton
        _replace(utils, "_use_triton", lambda device: device.type == "cpu" or on_a_gpu(device))
    return (
        "  the language head in TRL's trainers: linear_logprob\n"
        "  the batches of TRL's SFT, DPO, KTO, GRPO and RLOO trainers: no padding, common prefixes computed once\n"
        "  the completions of its GRPO and RLOO trainers: by posttrain's engine"
    )

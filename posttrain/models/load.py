"""Load a causal LM and its tokenizer, prepared."""

import json
import os
from pathlib import Path
from typing import Any

import torch

from posttrain.models import quantized
from posttrain.models.adapters import is_adapter, load_adapter
from posttrain.models.causal_lm import ModelError
from posttrain.models.prepare import prepare


def load(
    path_or_id: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    attn_implementation: str = "posttrain",
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
    use_bnb_nested_quant: bool = False,
) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder or a model hub, with our ops put in by `prepare`.

    Args:
        path_or_id: a folder with a model, a folder with a PEFT adapter (which names its model), or a hub id.
        dtype: of the weights, a torch dtype or its name; "auto" keeps that of the checkpoint.
        device: where the model goes; the first GPU by default, or the CPU if there is none.
        attn_implementation: "posttrain", or one of transformers', which `hidden_states` runs padded.
        trust_remote_code: whether code that comes with the model may run.
        load_in_4bit: quantise the frozen linear layers, all but the language head, to NF4 as bitsandbytes does, which
            needn't be installed. A checkpoint in bitsandbytes' NF4 is loaded as it is, with or without this.
        use_bnb_nested_quant: with load_in_4bit, keep the statistics of the 4-bit weights in 8 bits ("double
            quantisation").

    Raises:
        ModelError: what is wrong with the folder, the id or the checkpoint, in one line.
    """
    path = os.path.expanduser(path_or_id)
    _check(path)
    if use_bnb_nested_quant and not load_in_4bit:
        raise ModelError("use_bnb_nested_quant is for 4-bit weights: set load_in_4bit too")
    kind = _dtype(dtype)
    own = {} if attn_implementation == "posttrain" else {"attn_implementation": attn_implementation}
    if is_adapter(path):
        base = _model_of_adapter(path)
        try:
            model, tokenizer = _load(base, _tokenizer_of_adapter(path) or base, kind, trust_remote_code, own)
            _quantize(model, base, load_in_4bit, use_bnb_nested_quant)
        except ModelError as problem:
            where = "" if os.path.isabs(base) else f", looked up from {os.getcwd()}"
            raise ModelError(f"the adapter in {path} is for the model {base}{where}: {problem}") from problem
        model = load_adapter(model, path)
    else:
        model, tokenizer = _load(path, path, kind, trust_remote_code, own)
        _quantize(model, path, load_in_4bit, use_bnb_nested_quant)
    model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    prepare(model, attention=attn_implementation == "posttrain")
    return model, tokenizer


def _load(
    base: str, words: str, dtype: str | torch.dtype, trust_remote_code: bool, options: dict[str, Any]
) -> tuple[Any, Any]:
    """The model in `base` and the tokenizer in `words`, as transformers loads them."""
    _check(base)
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    outage = None if Path(base).is_dir() else _outage(base)
    shared: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": outage is not None}
    options = {**shared, "adapter_kwargs": {"local_files_only": outage is not None}, **options}
    try:
        model, missing = _load_model(base, dtype, options)
        tokenizer = AutoTokenizer.from_pretrained(words, **shared)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as problem:
        raise ModelError(f"can't load {base}: {outage or _first_line(problem)}") from problem
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # what transformers makes up without its files
        raise ModelError(f"no tokenizer in {words}: it has no vocabulary")
    if missing:
        raise ModelError(f"can't load {base}: the checkpoint lacks {len(missing)} weights, {missing[0]} among them")
    return model, tokenizer


def _load_model(base: str, dtype: str | torch.dtype, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """The model in `base`, and the names of the weights that its checkpoint lacks."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    shared = {name: options[name] for name in ("trust_remote_code", "local_files_only")}
    config = AutoConfig.from_pretrained(base, **shared)
    common = {"dtype": dtype, "output_loading_info": True}
    loaded: Any
    if not quantized.is_nf4(config):
        loaded = AutoModelForCausalLM.from_pretrained(base, use_safetensors=True, **common, **options)
        return loaded[0], sorted(loaded[1]["missing_keys"])
    tensors = _tensors(base, options["local_files_only"])
    matrices = quantized.unpack(tensors, dtype if isinstance(dtype, torch.dtype) else config.dtype)
    del config.quantization_config
    own: Any = {name: options[name] for name in options if name == "attn_implementation"}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model, info = model_class.from_pretrained(None, config=config, state_dict=tensors, **common, **own)
    model.config._name_or_path = model.name_or_path = base
    quantized.install(model, matrices)
    return model, sorted(info["missing_keys"])


def _tensors(base: str, local: bool) -> dict[str, torch.Tensor]:
    """All tensors of the safetensors files in a folder or a hub id."""
    from safetensors.torch import load_file
    from transformers.utils import cached_file

    def path(name: str, needed: bool = True) -> str:
        found = cached_file(base, name, local_files_only=local, _raise_exceptions_for_missing_entries=needed)
        return found or ""

    if index := path("model.safetensors.index.json", needed=False):
        files = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        files = ["model.safetensors"]
    return {name: tensor for file in files for name, tensor in load_file(path(file)).items()}


def _quantize(model: Any, base: str, wanted: bool, nested: bool) -> None:
    if not wanted or quantized.is_nf4(model.config):
        return
    if method := quantized.quantization_of(model.config):
        raise ModelError(f"load_in_4bit: {base} is quantised already ({method})")
    quantized.quantize(model, nested=nested)


def _outage(model_id: str) -> str | None:
    """Why only copies on this machine can be loaded, or None if the model hub answers.

    One request: transformers would try every file six times, for half a minute.
    """
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        get_hf_file_metadata(hf_hub_url(model_id, "config.json"))
    except (HfHubHTTPError, ValueError):
        return None  # an answer, or no id at all: transformers says what is wrong
    except Exception as problem:  # its class depends on the version of huggingface_hub
        return f"no such folder, no whole copy on this machine, and {constants.ENDPOINT} is out of reach ({problem})"
    return None


def _tokenizer_of_adapter(folder: str) -> str | None:
    """`folder`, if it has a tokenizer of its own."""
    names = ("tokenizer.json", "tokenizer_config.json")
    return folder if any((Path(folder) / name).is_file() for name in names) else None


def _model_of_adapter(folder: str) -> str:
    """The folder or id of the model that the adapter in `folder` belongs to."""
    path = Path(folder) / "adapter_config.json"
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as problem:
        raise ModelError(f"{path} names no base_model_name_or_path ({_first_line(problem)})") from problem
    if not isinstance(base, str):
        raise ModelError(f"{path} names no base_model_name_or_path (it is {base!r})")
    return base


def _check(path: str) -> None:
    """Raise if `path` is a folder without a model, or is meant as a folder and isn't there."""
    folder = Path(path)
    if folder.is_dir():
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            raise ModelError(f"no model in {path}: the folder has no config.json")
    elif folder.exists():
        raise ModelError(f"{path} is a file; a model is a folder or a hub id")
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1:
        raise ModelError(f"no such folder: {path}")


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"dtype must be 'auto' or a floating dtype of torch such as 'bfloat16', got {dtype!r}")
    return found


def _first_line(problem: Exception) -> str:
    return str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__

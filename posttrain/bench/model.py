"""Models of a shape with random weights, in pairs: as transformers makes them and prepared, on the same weights."""

from copy import deepcopy
from typing import Any

import torch

from posttrain.bench.device import DEVICE, DTYPE, WIDER
from posttrain.bench.shapes import ModelShape


def make_models(shape: ModelShape, positions: int) -> tuple[Any, Any, Any]:
    """(prepared, plain, plain in the wider dtype); the first two share their weights."""
    import transformers

    from posttrain.models import prepare

    config_class = getattr(transformers, f"{shape.family}TextConfig" if shape.window else f"{shape.family}Config")
    windowed = {"sliding_window": shape.window} if shape.window else {}
    config = config_class(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_heads,
        head_dim=shape.width,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        **windowed,
    )
    with torch.device(DEVICE):
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()
    wide = deepcopy(plain).to(WIDER)
    prepared = twin(plain)
    prepare(prepared)
    return prepared, plain, wide


def twin(model: Any) -> Any:
    """The same model once more, on the same weights."""
    return deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})

"""Write tiny-model: the configuration and tokenizer of the model that the demo trains from scratch.

    python examples/make_tiny_model.py                        rewrites examples/tiny-model (no weights)
    python examples/make_tiny_model.py --weights runs/start   a copy with seeded random weights, ready to train

The tokenizer works on bytes, so it keeps any text, and has one token for each word of the arithmetic data. Every
digit is a token of its own.
"""

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, set_seed

FOLDER = Path(__file__).parent / "tiny-model"
SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
WORDS = ("What", " is", "Compute", " +", " -", " *", " =", " ?", "Ones", "Tens", "Hundreds", "Thousands", "Answer")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|' + message.role + '|>' -}}
    {%- if message.role == 'assistant' -%}
        {%- generation -%}{{- message.content + '<|end|>' -}}{%- endgeneration -%}
    {%- else -%}
        {{- message.content + '<|end|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, words, digits and the marks of a chat."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [word.replace(" ", "Ġ") for word in WORDS]  # the byte-level alphabet writes a space as Ġ
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet, *words])}
    core = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\s(?=\d)| ?[A-Za-z]+| ?[^A-Za-z\d\s]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(SPECIAL[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def config(vocabulary: int) -> Qwen3Config:
    """A Qwen3 of 0.9 million parameters: for this data two wide layers learn faster than three narrow ones."""
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=6,
        head_dim=32,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # texts are short
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=SPECIAL.index("<|end|>"),
        pad_token_id=SPECIAL.index("<|pad|>"),
    )


def main() -> None:
    """Write the folder, or a copy of it with weights."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, metavar="FOLDER", help="write model, tokenizer and random weights here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default 0)")
    options = parser.parse_args()
    write(options.weights, options.seed) if options.weights else write(FOLDER, None)


def write(folder: Path, seed: int | None) -> None:
    """Configuration and tokenizer into `folder`; with a seed, random weights too."""
    words = tokenizer()
    words.save_pretrained(folder)
    settings = config(len(words))
    if seed is None:
        settings.save_pretrained(folder)
        return
    set_seed(seed)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)


if __name__ == "__main__":
    main()

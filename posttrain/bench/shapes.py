"""The shapes of models that people train, as far as an op sees them; from the models' published configurations.

`full` measures these. `quick` measures three of them a fourth as wide, with a sixteenth of the vocabulary, so that a
CPU is done in minutes; head widths and ranks stay. `scaling` varies sizes around those of `full` on a GPU, and around
those of `quick` on a CPU.
"""

from dataclasses import dataclass, replace

from posttrain.bench.device import GPU


@dataclass(frozen=True)
class ModelShape:
    """Widths of a decoder-only model.

    Attributes:
        name: of the model, in lower case.
        hidden: H, the width of the residual stream.
        inner: F, the width inside the MLP.
        layers: decoder layers.
        heads, key_heads: Hq and Hkv.
        width: D, of a head.
        vocabulary: V.
        family: prefix of the transformers classes (`<family>ForCausalLM`).
        gate: the op of the MLP's activation.
        window: of the sliding layers, in tokens; None for none.
        rank: R of the LoRA adapters that are measured.
    """

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    width: int
    vocabulary: int
    family: str = "Llama"
    gate: str = "swiglu"
    window: int | None = None
    rank: int = 16

    def narrowed(self) -> "ModelShape":
        """A fourth of the width and of the heads, a sixteenth of the vocabulary, two layers."""
        return replace(
            self,
            name=f"{self.name}/4",
            hidden=self.hidden // 4,
            inner=self.inner // 4,
            layers=2,
            heads=max(1, self.heads // 4),
            key_heads=max(1, self.key_heads // 4),
            vocabulary=self.vocabulary // 16,
            window=self.window and self.window // 4,
        )

    @property
    def layer_weights(self) -> int:
        """Weights of a decoder layer's matrices."""
        return self.hidden * (2 * self.width * (self.heads + self.key_heads) + 3 * self.inner)

    @property
    def weights(self) -> int:
        """Weights of all layers, the embedding and the head."""
        return self.layers * self.layer_weights + 2 * self.vocabulary * self.hidden


MODELS = (
    ModelShape("llama-3-8b", 4096, 14336, 32, 32, 8, 128, 128256),
    ModelShape("llama-3-70b", 8192, 28672, 80, 64, 8, 128, 128256),
    ModelShape("qwen3-0.6b", 1024, 3072, 28, 16, 8, 128, 151936, "Qwen3"),
    ModelShape("qwen3-1.7b", 2048, 6144, 28, 16, 8, 128, 151936, "Qwen3"),
    ModelShape("qwen3-4b", 2560, 9728, 36, 32, 8, 128, 151936, "Qwen3"),
    ModelShape("qwen3-8b", 4096, 12288, 36, 32, 8, 128, 151936, "Qwen3"),
    ModelShape("qwen3-14b", 5120, 17408, 40, 40, 8, 128, 151936, "Qwen3"),
    ModelShape("qwen3-32b", 5120, 25600, 64, 64, 8, 128, 151936, "Qwen3"),
    ModelShape("gemma-3-1b", 1152, 6912, 26, 4, 1, 256, 262144, "Gemma3", "geglu", 512),
    ModelShape("gemma-3-4b", 2560, 10240, 34, 8, 4, 256, 262208, "Gemma3", "geglu", 1024),
    ModelShape("gemma-3-12b", 3840, 15360, 48, 16, 8, 256, 262208, "Gemma3", "geglu", 1024),
    ModelShape("gemma-3-27b", 5376, 21504, 62, 32, 16, 128, 262208, "Gemma3", "geglu", 1024),
    ModelShape("mistral-7b", 4096, 14336, 32, 32, 8, 128, 32768, "Mistral"),
    ModelShape("mistral-small-24b", 5120, 32768, 40, 32, 8, 128, 131072, "Mistral"),
)


@dataclass(frozen=True)
class Suite:
    """What is measured: models, tokens of a batch, and how often.

    Attributes:
        name: quick, full or scaling.
        models: shapes of the ops.
        steps: shapes of training steps and of generation.
        tokens: of the batches of ops, and of a step's.
        rounds: samples of each function.
        seconds: that a case may take; one that can't be done in that time is named instead.
    """

    name: str
    models: tuple[ModelShape, ...]
    steps: tuple[ModelShape, ...]
    tokens: int
    rounds: int
    seconds: float = 300 if GPU else 60


_FEW = tuple(model.narrowed() for model in MODELS if model.name in ("llama-3-8b", "qwen3-0.6b", "gemma-3-4b"))
SUITES = {
    "quick": Suite("quick", _FEW, tuple(m for m in _FEW if m.name == "qwen3-0.6b/4"), 1024, 7),
    "full": Suite("full", MODELS, tuple(m for m in MODELS if m.weights < 10**10), 8192, 15),
    "scaling": Suite("scaling", MODELS[:1], MODELS[2:3], 8192, 9)
    if GPU
    else Suite("scaling", _FEW[1:2], _FEW[1:2], 1024, 5),
}

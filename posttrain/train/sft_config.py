"""SFTConfig: the settings of supervised fine-tuning."""

from dataclasses import dataclass

from posttrain.train.config import ConfigError, TrainConfig, option


@dataclass
class SFTConfig(TrainConfig):
    """`TrainConfig` with what supervised fine-tuning adds."""

    learning_rate: float = option(2e-5, "peak learning rate of AdamW")
    max_length: int | None = option(1024, "longer examples are cut to this many tokens; with packing, size of a bin")
    packing: bool = option(False, "a sequence of the batch is a bin of max_length tokens filled with examples")
    completion_only_loss: bool | None = option(
        None, "train on the completion only; by default so for prompt-completion data"
    )
    assistant_only_loss: bool = option(False, "train on the assistant's messages only")

    def _check_ranges(self) -> None:
        super()._check_ranges()
        if self.max_length is not None and self.max_length < 2:
            raise ConfigError(f"max_length must be at least 2, got {self.max_length}")
        if self.packing and self.max_length is None:
            raise ConfigError("packing needs max_length, the size of a bin")

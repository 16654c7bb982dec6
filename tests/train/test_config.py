import os
from pathlib import Path

import pytest

from posttrain.train.config import ConfigError, check_writable, read_yaml
from posttrain.train.sft_config import SFTConfig


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing")
def test_defaults_are_trls():
    from trl import SFTConfig as TRLConfig

    ours, theirs = SFTConfig(), TRLConfig(use_cpu=True)
    common = [name for name in vars(ours) if hasattr(theirs, name)]
    different = {name for name in common if getattr(ours, name) != getattr(theirs, name)}
    assert len(common) > 25
    assert different == {"use_cpu", "bf16", "report_to"}  # set above; by device; "none" is [] once theirs has read it


@pytest.mark.parametrize(
    ("name", "given", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("learning_rate", 1, 1.0),
        ("max_steps", "12", 12),
        ("packing", "True", True),
        ("packing", "off", False),
        ("max_length", "none", None),
        ("resume_from_checkpoint", "true", True),
        ("resume_from_checkpoint", "runs/a/checkpoint-3", "runs/a/checkpoint-3"),
        ("lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("report_to", "tensorboard", ["tensorboard"]),
        ("output_dir", Path("runs/a"), "runs/a"),
    ],
)
def test_values_take_the_type_of_their_field(name, given, value):
    result = getattr(SFTConfig(**{name: given}), name)
    assert result == value
    assert type(result) is type(value)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("max_steps", "ten", "max_steps must be a whole number, got 'ten'"),
        ("max_steps", 1.5, "max_steps must be a whole number, got 1.5"),
        ("max_steps", True, "max_steps must be a whole number, got True"),
        ("learning_rate", "fast", "learning_rate must be a number, got 'fast'"),
        ("learning_rate", "nan", "learning_rate must be a number, got 'nan'"),
        ("learning_rate", -1, "learning_rate must be at least 0, got -1"),
        ("packing", 2, "packing must be true or false, got 2"),
        ("model", 3, "model must be text, got 3"),
        ("report_to", "mlflow", "report_to must be one of none, tensorboard, wandb; got 'mlflow'"),
        ("lr_scheduler_type", "sawtooth", "lr_scheduler_type must be one of linear, cosine, .*; got 'sawtooth'"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size must be at least 1, got 0"),
        ("seed", 2**32, "seed must be from 0 to 4294967295, got 4294967296"),
        ("seed", -1, "seed must be from 0 to 4294967295, got -1"),
        ("lora_alpha", 0, "lora_alpha must be at least 1, got 0"),
        ("learning_rate", 10**400, "learning_rate must be a number, got 10+"),
        ("adam_beta2", 1, "adam_beta2 must be below 1, got 1"),
        ("lora_dropout", -0.1, "lora_dropout must be at least 0, got -0.1"),
        ("max_length", 1, "max_length must be at least 2, got 1"),
    ],
)
def test_wrong_values_are_errors_that_name_the_field(name, given, message):
    with pytest.raises(ConfigError, match=f"^{message}$"):
        SFTConfig(**{name: given})


def test_packing_needs_a_length():
    with pytest.raises(ConfigError, match="packing needs max_length"):
        SFTConfig(packing=True, max_length=None)


def test_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match=r"^a.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'\?$"):
        SFTConfig.from_mapping({"learning_rat": 1}, source="a.yaml")


def test_mapping_round_trip():
    config = SFTConfig(learning_rate=1e-3, lora_target_modules=["q_proj"], packing=True)
    assert SFTConfig.from_mapping(config.to_mapping()) == config


def test_yaml_errors_name_file_and_line(tmp_path):
    path = tmp_path / "a.yaml"
    with pytest.raises(ConfigError, match=r"a\.yaml does not exist$"):
        read_yaml(path)
    with pytest.raises(ConfigError, match=f"config file {tmp_path} is a folder$"):
        read_yaml(tmp_path)
    path.write_text("model: a\ndata: [1\nseed: 3\n")
    with pytest.raises(ConfigError, match=r"a\.yaml:3: not valid YAML"):
        read_yaml(path)
    path.write_text("- model\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: expected `name: value` lines, found list$"):
        read_yaml(path)
    path.write_bytes(b"model: \xff\n")
    with pytest.raises(ConfigError, match=r"a\.yaml: not UTF-8 text"):
        read_yaml(path)


def test_output_dir_must_be_writable_and_is_not_made(tmp_path):
    check_writable(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file is not a folder"):
        check_writable(tmp_path / "file" / "run")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_dir_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="no permission to write"):
        check_writable(tmp_path / "run")

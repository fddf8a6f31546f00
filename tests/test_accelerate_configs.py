"""The configurations for accelerate's engines: accelerate itself reads them, and they say what their headers say."""

import pathlib

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

FOLDER = pathlib.Path(__file__).parents[1] / "configs" / "accelerate"
ENGINES = {
    "ddp": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "deepspeed_zero2": DistributedType.DEEPSPEED,
}


def load(name: str) -> ClusterConfig:
    """Accelerate's own reading of one file; it refuses unknown keys on the first level."""
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    return config


def nested(config: ClusterConfig) -> dict:
    """The keys of the engine itself."""
    return (config.fsdp_config or {}) | (config.deepspeed_config or {})


def environment(name: str, prepare) -> dict[str, str]:
    """What `accelerate launch` would tell the processes of this file: its command line's values with the file's."""
    config = load(name)
    args = launch_command_parser().parse_args(["--main_process_port", "0", "train.py"])
    args.num_processes, args.num_machines, args.mixed_precision = config.num_processes, 1, config.mixed_precision
    args.dynamo_backend, args.use_fsdp = "no", config.distributed_type == DistributedType.FSDP
    args.deepspeed_fields_from_accelerate_config = ",".join(config.deepspeed_config or {})
    for key, value in nested(config).items():
        setattr(args, key, value)
    made = prepare(args)
    return made[1] if isinstance(made, tuple) else made


@pytest.fixture
def enter(monkeypatch):
    """Stand where a launched process stands: in the environment made from a file."""

    def set_all(name: str, prepare) -> None:
        for key, value in environment(name, prepare).items():
            if key.startswith(("ACCELERATE_", "FSDP_")):
                monkeypatch.setenv(key, value)

    return set_all


def test_every_file_is_tested():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(ENGINES)


@pytest.mark.parametrize("name", ENGINES)
def test_accelerate_reads_it(name):
    config = load(name)
    assert config.distributed_type == ENGINES[name]
    assert config.num_processes >= 2 and config.num_machines == 1
    assert config.mixed_precision == "no"  # a bare no would be read as false, and precision belongs to the trainer


@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_key_is_one_the_launcher_knows(name):
    """The launcher takes over nested keys without a look, so a misspelt one would do nothing and say nothing."""
    known = set(vars(launch_command_parser().parse_args(["train.py"])))
    assert set(nested(load(name))) <= known


def test_fsdp2_reaches_the_plugin(enter):
    enter("fsdp2", prepare_multi_gpu_env)
    plugin = FullyShardedDataParallelPlugin()
    assert plugin.fsdp_version == 2
    assert plugin.reshard_after_forward is True
    assert plugin.cpu_ram_efficient_loading is False
    assert plugin.auto_wrap_policy.__name__ == "transformer_auto_wrap_policy"
    assert plugin.transformer_cls_names_to_wrap is None
    assert not plugin.activation_checkpointing


def test_zero2_reaches_the_plugin_and_leaves_the_rest_to_the_trainer(enter):
    enter("deepspeed_zero2", prepare_deepspeed_cmd_env)
    config = DeepSpeedPlugin().deepspeed_config
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["offload_optimizer"]["device"] == "none"
    assert config["zero_optimization"]["offload_param"]["device"] == "none"
    assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
    assert config["train_micro_batch_size_per_gpu"] == "auto"

"""Typed configuration: sections and defaults, limits, command line, identity."""

from diffpref.config.command_line import known_keys, load, load_config
from diffpref.config.identity import computed, config_hash, differing, name_of, to_dict
from diffpref.config.limits import LIMITS, RUN_CONTRADICTIONS, RUN_LIMITS, check, validate
from diffpref.config.objective import NoiseConfig, ObjectiveConfig, ReferenceConfig
from diffpref.config.sections import (
    CacheConfig,
    Config,
    DataConfig,
    JudgeConfig,
    LoopConfig,
    LoraSettings,
    ModelConfig,
    RunConfig,
    SampleConfig,
    StoreConfig,
    TrainConfig,
)
from diffpref.config.users import UsersConfig

__all__ = [
    "LIMITS",
    "RUN_CONTRADICTIONS",
    "RUN_LIMITS",
    "CacheConfig",
    "Config",
    "DataConfig",
    "JudgeConfig",
    "LoopConfig",
    "LoraSettings",
    "ModelConfig",
    "NoiseConfig",
    "ObjectiveConfig",
    "ReferenceConfig",
    "RunConfig",
    "SampleConfig",
    "StoreConfig",
    "TrainConfig",
    "UsersConfig",
    "check",
    "computed",
    "config_hash",
    "differing",
    "known_keys",
    "load",
    "load_config",
    "name_of",
    "to_dict",
    "validate",
]

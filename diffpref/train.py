"""Tune a diffusion model on preferences:  accelerate launch diffpref/train.py --config configs/quickstart.yaml"""

from diffpref.config import Config, load_config
from diffpref.launch import Runs, launch


def trainer(config: Config) -> Runs:
    """Of a diffusion model."""
    from diffpref.trainer import Trainer

    return Trainer(config)


if __name__ == "__main__":
    launch(load_config, trainer)

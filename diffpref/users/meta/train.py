"""Train an encoder of users: accelerate launch diffpref/users/meta/train.py --config configs/user_encoder_emoji.yaml"""

from diffpref.launch import Runs, launch
from diffpref.users.meta.config import UserEncoderConfig, load_encoder_config


def trainer(config: UserEncoderConfig) -> Runs:
    """Of an encoder."""
    from diffpref.users.meta.trainer import UserEncoderTrainer

    return UserEncoderTrainer(config)


if __name__ == "__main__":
    launch(load_encoder_config, trainer)

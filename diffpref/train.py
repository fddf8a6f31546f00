"""Tune a diffusion model on preferences:  accelerate launch diffpref/train.py --config configs/quickstart.yaml"""

import sys

from diffpref.config import load_config


def main() -> None:
    """Parse the command line and run; a user's mistake is one clear line, not a traceback."""
    try:
        config = load_config()
        from diffpref.trainer import Trainer  # after parsing: --help and mistakes should not wait for torch

        trainer = Trainer(config)
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    try:
        trainer.run()
    except KeyboardInterrupt:
        sys.exit("stopped; --train.resume_from_checkpoint latest goes on from the last checkpoint, if there is one")


if __name__ == "__main__":
    main()

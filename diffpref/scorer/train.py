"""Train a preference scorer:  accelerate launch diffpref/scorer/train.py --config configs/scorer_emoji.yaml"""

from diffpref.launch import Runs, launch
from diffpref.scorer.config import ScorerConfig, load_scorer_config


def trainer(config: ScorerConfig) -> Runs:
    """Of a scorer."""
    from diffpref.scorer.trainer import ScorerTrainer

    return ScorerTrainer(config)


if __name__ == "__main__":
    launch(load_scorer_config, trainer)

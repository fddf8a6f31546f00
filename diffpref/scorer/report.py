"""What a scorer's run leaves in numbers and words: report.json, curves.png, README.md."""

from pathlib import Path
from typing import Any

from diffpref.config import config_hash, to_dict
from diffpref.figures import curves
from diffpref.report import environment, versions, write_report, write_whole
from diffpref.scorer.config import ScorerConfig
from diffpref.scorer.measures import Clusters, Measured, accuracy, brier, calibration_error, log_loss
from diffpref.scorer.validation import Margins


def clusters(margins: Margins) -> Clusters:
    """What choices depend on."""
    by_user = {} if margins.users is None else {"user": margins.users}
    return {"prompt": margins.prompts} | by_user


def measures(margins: Margins, temperature: float) -> dict[str, dict[str, Any]]:
    """How good a scorer is on the held-out pairs, at a temperature."""
    m, y, names = margins.margin / temperature, margins.probability, clusters(margins)
    found: dict[str, Measured] = {
        "accuracy": accuracy(m, (y > 0.5) * 1.0 - (y < 0.5) * 1.0, names),
        "calibration_error": calibration_error(m, y, names),
        "log_loss": log_loss(m, y, names),
        "brier": brier(m, y, names),
    }
    return {name: one.as_dict() for name, one in found.items()}


def conclude(config: ScorerConfig, before: Margins, after: Margins, facts: dict[str, Any]) -> dict[str, Any]:
    """Measure, write and say it; returns the report. The temperature is fitted on the very pairs that its calibration
    is given for, and the report says so."""
    temperature, fitted_on = after.temperature()
    report = {
        "name": config.name,
        "config_hash": config_hash(config),
        "temperature": temperature,
        "temperature_fitted_on": fitted_on,
        "before": measures(before, 1.0),
        "after": measures(after, temperature),
        "held_out_pairs": len(after.margin),
        **facts,
        "environment": environment(),
    }
    folder = config.run_dir
    write_report(folder / "report.json", report)
    curves(folder / "metrics.jsonl", folder / "curves.png", config.name)
    write_whole(folder / "README.md", card(config, report))
    print(line("held-out accuracy", report, "accuracy"), flush=True)
    print(line("calibration error", report, "calibration_error"), flush=True)
    return report


def line(title: str, report: dict[str, Any], key: str) -> str:
    """A measure before and after, in words."""
    was, now = report["before"][key], report["after"][key]
    return (
        f"{title} {now['value']:.3f} [{now['low']:.3f}, {now['high']:.3f}], before {was['value']:.3f}"
        f" [{was['low']:.3f}, {was['high']:.3f}], n={now['n']}"
    )


def card(config: ScorerConfig, report: dict[str, Any]) -> str:
    """README.md of the run."""
    rows = [f"- {line(name, report, key)} ({report['after'][key]['policy']})" for name, key in MEASURES.items()]
    values = to_dict(config)
    return "\n".join(
        [
            f"# {config.name}",
            "",
            f"A preference scorer, trained by diffpref with the loss `{config.loss.name}` and the head"
            f" `{config.head.name}` from `{values['model']['pretrained_model_name_or_path']}` on"
            f" `{config.data.path}`, {report['steps']} steps; kept is step {report['kept_step']}.",
            "",
            *rows,
            f"- temperature {report['temperature']:.4g}, fitted on {report['temperature_fitted_on']}",
            "",
            "![curves](curves.png)",
            "",
            "```python",
            "from diffpref.scorer import PreferenceScorer",
            "",
            f'scorer = PreferenceScorer.from_pretrained("{Path(config.run_dir, "scorer")}")',
            'scorer.score(images="my_pictures/", prompts="a lighthouse at dawn")',
            "```",
            "",
            versions(report["environment"]),
            "",
        ]
    )


MEASURES = {
    "accuracy": "accuracy",
    "calibration error": "calibration_error",
    "log-loss in nats": "log_loss",
    "Brier score": "brier",
}

"""Activations are counted, and recomputed only where they do not fit."""

import pytest
import torch
from tiny_pipelines import tiny_sd
from tiny_runs import distance, make_world, run
from torch import nn

from diffpref.speed import fitting
from diffpref.speed.fitting import decide, for_all, free_bytes, saved_bytes, still_to_come


def test_what_a_pass_keeps_is_counted_once_and_weights_are_not():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4, bias=False))
    x = torch.randn(5, 6)
    # x for the first weight's gradient; the ReLU's result for its own and for the second weight's: one storage
    assert saved_bytes(model, lambda: model(x)) == 4 * (5 * 6 + 5 * 10)
    model.requires_grad_(False)
    assert saved_bytes(model, lambda: model(x)) == 0


def test_recomputing_keeps_less_and_draws_the_same():
    unet = tiny_sd().unet.train()
    inputs = torch.randn(2, 4, 16, 16), torch.tensor([1, 500]), torch.randn(2, 5, unet.config["cross_attention_dim"])
    before = torch.get_rng_state()
    whole = saved_bytes(unet, lambda: unet(*inputs).sample)
    twice = saved_bytes(unet, lambda: unet(*[torch.cat([x, x]) for x in inputs]).sample)
    unet.enable_gradient_checkpointing()
    assert saved_bytes(unet, lambda: unet(*inputs).sample) < 0.7 * whole
    assert 1.9 * whole < twice < 2.1 * whole, "what one item needs says what many do"
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_kept_once_is_counted_once():
    """Weights that autocast has cast: one item says too much of many, two tell them from what each item keeps."""
    unet = tiny_sd().unet.train()
    text = torch.randn(6, 5, unet.config["cross_attention_dim"])
    inputs = torch.randn(6, 4, 16, 16), torch.arange(6) * 100, text

    def kept(count: int) -> int:
        with torch.autocast("cpu", torch.bfloat16):
            return saved_bytes(unet, lambda: unet(*[x[:count] for x in inputs]).sample)

    assert for_all(kept(1), kept(2), 6, 1.0) == pytest.approx(kept(6), rel=0.02) and 6 * kept(1) > 1.2 * kept(6)
    assert for_all(10, 0, 1, 4.0) == 40 and for_all(10, 14, 3, 2.0) == 6 + 3 * 4 * 2


def test_gradients_and_moments_come_later():
    model = nn.Linear(6, 10)
    model.bias.requires_grad_(False)
    assert still_to_come(model) == 3 * 4 * 60


@pytest.mark.parametrize(("needed", "recompute"), [(79, False), (81, True)])
def test_a_fifth_of_the_memory_stays_free(needed, recompute):
    found, said = decide(needed * 10**9, 100 * 10**9, lambda flag: flag)
    assert found is recompute
    what = "they are recomputed" if recompute else "kept, nothing is recomputed"
    assert said == f"activations of a batch: {needed} GB, 1e+02 GB free: {what}"
    assert decide(needed * 10**9, 100 * 10**9, lambda flag: True)[0], "where another process has no room"


def test_free_memory_is_some():
    assert free_bytes(torch.device("cpu")) > 10**6


def test_a_run_recomputes_where_memory_is_short_and_trains_the_same(tmp_path, monkeypatch, capsys):
    world = make_world(tmp_path, ("sd",))
    calm = {"adam_epsilon": 1e-2}
    _, _, plain = run(world, "kept", train=calm)
    assert "free: kept, nothing is recomputed" in capsys.readouterr().out
    monkeypatch.setattr(fitting, "free_bytes", lambda device: 10**5)
    _, _, short = run(world, "short", train=calm)
    assert "activations of a batch: 0.00" in (said := capsys.readouterr().out) and "they are recomputed" in said
    assert 0 < distance(short, plain) < 1e-6 or distance(short, plain) == 0
    run(world, "told", train=calm | {"gradient_checkpointing": False})
    assert "activations" not in capsys.readouterr().out

"""The table of the reference's errors by itself: its file, its name, its keys, and what it is refused for."""

from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset
from tiny_pipelines import tiny_sd

from diffpref.cache.fingerprint import module_facts
from diffpref.cache.team import Team
from diffpref.config import Config, DataConfig, ModelConfig, NoiseConfig, ObjectiveConfig, ReferenceConfig
from diffpref.config.users import UsersConfig
from diffpref.data.sampler import BucketStream, TrainingStream
from diffpref.noise import FIXED_SEED, FixedDraws, generator, parameterization
from diffpref.noise.levels import draw_level
from diffpref.reference_cache import check_draws
from diffpref.reference_cache.identity import path_facts, rows_facts, table_fingerprint
from diffpref.reference_cache.table import ReferenceTable, open_table

CPU = torch.device("cpu")
CELLS = 24  # of four rows with three draws of two items


def opened(folder) -> ReferenceTable:
    """The table of a folder."""
    return open_table(folder, "name", CELLS // 2, 2, Team(), CPU)


def taken(table: ReferenceTable, *cells: int, errors: list[float]) -> list[float]:
    """What the table gives for a batch of which the model's errors are these."""
    return table.errors(np.array(cells), lambda: torch.tensor(errors)).tolist()


# --- reading and writing ----------------------------------------------------------------------------------------------


def test_errors_are_computed_once_and_found_by_the_next_run(tmp_path):
    table = opened(tmp_path)
    assert taken(table, 0, 1, errors=[0.5, 0.25]) == [0.5, 0.25]
    assert taken(table, 1, 2, errors=[9.0, 0.125]) == [0.25, 0.125], "what is known stays; the rest of a batch is taken"
    assert taken(table, 7, 7, errors=[0.75, 0.8]) == [0.75, 0.75], "a cell that comes twice has one error"
    assert taken(table, 2, 7, errors=[]) == [0.125, 0.75], "nothing is asked"
    table.sync()
    assert table.report() == {"reference_draws": {"found": 0, "kept": 4, "passes_made": 3, "passes_saved": 1}}
    again = opened(tmp_path)
    assert again.found == 4 and taken(again, 7, 2, 1, 0, errors=[]) == [0.75, 0.125, 0.25, 0.5]


def test_what_was_not_written_is_lost_and_nothing_else(tmp_path):
    table = opened(tmp_path)
    taken(table, 0, errors=[0.5])
    table.sync()
    taken(table, 1, errors=[0.25])
    assert opened(tmp_path).known.nonzero()[0].tolist() == [0]


def test_errors_that_are_no_numbers_are_not_kept(tmp_path):
    table = opened(tmp_path)
    taken(table, 0, 1, 2, errors=[0.5, float("nan"), float("inf")])
    table.sync()
    assert opened(tmp_path).known.nonzero()[0].tolist() == [0]


def test_files_are_joined_to_four_bytes_a_cell(tmp_path):
    """But not while another run has the table open."""
    table = opened(tmp_path)
    for cell in range(5):
        taken(table, cell, errors=[cell / 8])
        table.sync()
    folder = table.files.store.folder
    beside = opened(tmp_path)
    assert len(list(folder.glob("*.safetensors"))) == 5
    for one in chain(table.locks, beside.locks):
        one.close()
    joined = opened(tmp_path)
    (file,) = folder.glob("*.safetensors")
    assert file.stat().st_size < 4 * CELLS + 400  # and a header
    assert taken(joined, 4, 3, 2, 1, 0, errors=[]) == [0.5, 0.375, 0.25, 0.125, 0.0]
    assert np.isnan(joined.files.read()).sum() == CELLS - 5


@pytest.mark.parametrize("harm", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:40], lambda b: b""])
def test_damaged_files_are_removed_and_said(tmp_path, capfd, harm):
    table = opened(tmp_path)
    for cell in (3, 4):
        taken(table, cell, errors=[0.5])
        table.sync()
    damaged = sorted(table.files.store.folder.glob("*.safetensors"))[0]
    damaged.write_bytes(harm(damaged.read_bytes()))
    again = opened(tmp_path)
    assert "1 damaged file(s) removed from" in capfd.readouterr().out
    assert again.found == 1 and not damaged.exists()


def test_processes_learn_what_the_others_found(tmp_path):
    """The first process's error stays where two have one."""
    tables = [ReferenceTable(opened(tmp_path).files, 2, Team(rank=rank), CPU) for rank in (0, 1)]
    shares = []
    for table, cell in zip(tables, (0, 1), strict=True):
        table.team = replace(table.team, gather=lambda share: shares.append(share[0]) or share)
        taken(table, 5, cell, errors=[0.5 + table.team.rank, 0.25])
        table.sync()
        taken(table, 5, cell, errors=[])
    for table in tables:
        table.fresh = [np.array([5])]
        table.team = replace(table.team, gather=lambda share: shares)
        table.sync()
        assert taken(table, 5, 0, 1, errors=[]) == [0.5, 0.25, 0.25]


# --- keys and draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [None, np.array([[8, 8]] * 4 + [[8, 16]] * 2)], ids=["stream", "buckets"])
def test_every_draw_of_every_row_comes_equally_often(sizes):
    """Six rows, three draws, two cycles of epochs; the order is the seed's, the draws are not."""
    found = {}
    for seed in (0, 1):
        place = {"seed": seed, "batch_size": 2, "accumulation": 1, "steps": range(18)}
        stream = TrainingStream(6, **place) if sizes is None else BucketStream(sizes, **place)
        fixed = FixedDraws(3, stream.rows)
        found[seed] = [fixed.key(row, position) for batch in stream for row, position in batch]
        assert sorted(found[seed]) == sorted([*range(18), *range(18)])
    assert found[0] != found[1]


def test_the_mean_of_a_rows_draws_is_the_mean_over_all_timesteps():
    """f(u) = u² has the mean 1/3 under the uniform sampler. Over 200 rows of K = 8 draws the estimate is within four
    standard errors of it, and with strata these are a tenth."""
    means = {}
    for stratified in (False, True):
        config = NoiseConfig(stratified=stratified)
        draws = [draw_level(generator(FIXED_SEED, key), config, FIXED_SEED, key, 8) for key in range(1600)]
        rows = torch.stack(draws).double().square().view(200, 8).mean(1)
        assert abs(rows.mean() - 1 / 3) < 4 * rows.std() / 200**0.5
        means[stratified] = rows.std()
    assert means[True] < 0.2 * means[False]


def test_a_row_that_stands_in_has_draws_of_its_own():
    """Positions say the epoch; the row says whose draws they are."""
    fixed = FixedDraws(4, 10)
    assert [fixed.key(row, 23) for row in (3, 7)] == [4 * 3 + 2, 4 * 7 + 2]


# --- the name ---------------------------------------------------------------------------------------------------------

BASE = Config(name="run", model=ModelConfig("base"), data=DataConfig("pairs"), reference=ReferenceConfig(draws=2))


@pytest.fixture(scope="module")
def pipe():
    return tiny_sd()


def name(pipe, config: Config = BASE, precision: torch.dtype = torch.float32, **changed) -> str:
    """The name of the table of a set of two pairs."""
    content = {"rows": ["a cat", "a dog"], "digests": np.ones((2, 2, 32), np.uint8), "sizes": (16, 16)} | changed
    rows = Dataset.from_dict({"prompt": content["rows"]})
    facts = rows_facts(rows, content["digests"], content["sizes"])
    weights, schedule = module_facts(pipe.unet), parameterization(pipe.scheduler)
    return table_fingerprint(weights, schedule, config, pipe, None, facts, path_facts(config, precision, pipe.device))


def test_what_does_not_reach_the_reference_shares_the_table(pipe):
    same = (
        replace(BASE, objective=ObjectiveConfig(name="ipo", beta=1.0, error_space="sample")),
        replace(BASE, train=replace(BASE.train, seed=5, learning_rate=1.0, train_batch_size=7)),
        replace(BASE, lora=replace(BASE.lora, rank=2), data=replace(BASE.data, path="elsewhere", num_workers=0)),
    )
    assert {name(pipe, config) for config in same} == {name(pipe)}
    assert name(pipe, sizes=np.array([[16, 16], [16, 16]])) == name(pipe)


def test_what_does_has_a_table_of_its_own(pipe):
    others = [
        name(pipe, replace(BASE, noise=NoiseConfig(strategy="independent"))),
        name(pipe, replace(BASE, train=replace(BASE.train, kernel="torch"))),
        name(pipe, replace(BASE, noise=NoiseConfig(timesteps="logit_normal"))),
        name(pipe, replace(BASE, noise=NoiseConfig(stratified=True))),
        name(pipe, replace(BASE, noise=NoiseConfig(source="philox"))),
        name(pipe, replace(BASE, reference=ReferenceConfig(draws=3))),
        name(pipe, replace(BASE, data=replace(BASE.data, random_flip=True))),
        name(pipe, replace(BASE, data=replace(BASE.data, caption_dropout=0.1))),
        name(pipe, rows=["a cat", "a cow"]),
        name(pipe, digests=np.arange(128, dtype=np.uint8).reshape(2, 2, 32)),
        name(pipe, sizes=(16, 24)),
        name(pipe, precision=torch.bfloat16),
        name(pipe, replace(BASE, train=replace(BASE.train, mixed_precision="bf16"))),
        name(pipe, replace(BASE, train=replace(BASE.train, compile="inductor"))),
        name(pipe, replace(BASE, train=replace(BASE.train, channels_last=True))),
        name(pipe, replace(BASE, model=replace(BASE.model, attention="flash"))),
        name(tiny_sd("v_prediction")),
    ]
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        weight = next(iter(module.parameters()))
        with torch.no_grad():
            weight.view(-1)[0] += 1e-6
        others.append(name(pipe))
    assert len({name(tiny_sd()), *others}) == len(others) + 1


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"objective": ObjectiveConfig(name="sft")}, "objective.name sft asks for no reference, so there is nothing"),
        ({"objective": ObjectiveConfig(name="dspo", beta=0.1)}, "dspo with drift_weight 0 reads the distance of the"),
        ({"objective": ObjectiveConfig(drift_weight=0.5)}, "dpo with drift_weight 0.5 reads the distance of the two"),
        ({"noise": NoiseConfig(strategy="ddim", inversion_network="policy")}, "noise.inversion_network policy makes"),
        ({"data": DataConfig("pairs", streaming=True)}, "data.streaming has no numbers of rows"),
        ({"users": UsersConfig(source="table")}, "users.source table draws with a row's noise, too,"),
    ],
)
def test_what_cannot_be_right_is_refused(changed, message):
    config = replace(BASE, **changed)
    with pytest.raises(ValueError, match=f"^reference.draws: .*{message}"):
        check_draws(config, Accelerator(cpu=True))
    check_draws(replace(config, reference=ReferenceConfig()), Accelerator(cpu=True))


def test_sharded_engines_are_refused(monkeypatch):
    accelerator = Accelerator(cpu=True)
    check_draws(BASE, accelerator)
    monkeypatch.setattr(accelerator.state, "distributed_type", DistributedType.FSDP)
    with pytest.raises(ValueError, match="with FSDP2 and DeepSpeed all processes go through the reference together"):
        check_draws(BASE, accelerator)


def test_inversion_by_the_reference_and_a_safeguard_are_not():
    """The noise is the reference's alone; the safeguard reads the policy's residuals."""
    by_reference = NoiseConfig(strategy="ddim", inversion_network="reference")
    check_draws(replace(BASE, noise=by_reference, objective=ObjectiveConfig(safeguard=0.5)), Accelerator(cpu=True))

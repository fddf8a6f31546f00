"""torch.compile of the denoiser: the same numbers, a fixed number of graphs, and nothing else changed."""

import copy
import logging
import shutil

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from tiny_pipelines import LATENT_SIZE, WIDTH
from torch import Tensor
from torch._dynamo.utils import counters
from user_cases import CASES, Case, lora

from diffpref.adapters import lora_state_dict
from diffpref.predict import adapter_off, frozen_copy
from diffpref.speed.casting import compute_in_input_dtype
from diffpref.speed.compiling import GRAPHS, OPTIONS, compile_denoiser, eagerly
from diffpref.speed.toggle import lora_off, trained_lora
from diffpref.users.adapter import train_user_adapter

pytestmark = [  # torch's own, while it traces
    pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]
BUCKETS = ((8, 12), (12, 12))  # one 24 and 36 patches of a transformer


@pytest.fixture(autouse=True)
def own_graphs():
    """No graphs, counts or limits of other tests, and none left to them."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def no_notes():
    """pytest would format each of the tens of thousands of notes that torch makes while it traces."""
    notes = logging.getLogger("torch.__trace")
    before, notes.propagate = notes.propagate, False
    yield
    notes.propagate = before


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def small_unet() -> UNet2DConditionModel:
    """One level, down and up: to trace the two of the tiny pipeline takes a minute."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        block_out_channels=(8,),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
        attention_head_dim=2,
        norm_num_groups=4,
        cross_attention_dim=WIDTH,
    )


def compiled(
    name: str, backend: str, small: bool = False, users: bool = False, checkpointing: bool = False
) -> tuple[Case, Case]:
    """A denoiser with a LoRA that does something, and the same compiled."""
    case = Case(*CASES[name])
    if small:
        case.denoiser = small_unet()
    case.add() if users else None
    lora(case)
    train_user_adapter(case.denoiser) if users else None
    with torch.no_grad():
        for weight in (p for p in case.denoiser.parameters() if p.requires_grad):
            weight.copy_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    case.denoiser.train()
    other = copy.copy(case)
    other.denoiser = copy.deepcopy(case.denoiser)
    if checkpointing:
        other.denoiser.enable_gradient_checkpointing()
    compile_denoiser(other.denoiser, other.family, backend)
    return case, other


def step(case: Case, size: tuple[int, int], users: Tensor | None = None) -> list[Tensor]:
    """Reference, policy, and the gradient of the square of their difference."""
    case.x_t = torch.randn(3, 4, *size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), adapter_off(case.denoiser)():
        reference = case.predict(users)
    policy = case.predict(users)
    weights = [p for p in case.denoiser.parameters() if p.requires_grad]
    return [reference, policy.detach(), *torch.autograd.grad((policy - reference).square().mean(), weights)]


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("name, backend", [("sd3", "eager"), pytest.param("sd", "aot_eager", marks=pytest.mark.slow)])
def test_steps_are_the_same_and_graphs_are_not_made_again(name: str, backend: str) -> None:
    """Reference and policy in turn, of two sizes in turn, and then of a third."""
    plain, other = compiled(name, backend, small=name == "sd")
    made = []
    for size in (*BUCKETS, *BUCKETS, (16, 12)):
        assert_close(step(other, size), step(plain, size))
        made.append(graphs())
    assert 2 < made[0] and made[1:] == [made[1]] * 4


def test_a_unet_is_one_graph_for_the_policy_and_one_for_the_reference() -> None:
    plain, other = compiled("sd", "eager", small=True)
    before = graphs()
    for _ in range(2):
        assert_close(step(other, BUCKETS[0]), step(plain, BUCKETS[0]))
        assert graphs() == before + 2


def test_blocks_of_a_kind_share_their_graphs_and_can_see_users() -> None:
    """Double blocks and a single one: one graph of each for the reference; for the policy one more, of the first
    block, into which no gradient goes back."""
    plain, other = compiled("flux", "eager", users=True)
    before = graphs()
    assert_close(step(other, BUCKETS[0], other.users), step(plain, BUCKETS[0], plain.users))
    assert graphs() == before + 2 + 3


def test_checkpointed_steps_are_the_same() -> None:
    plain, other = compiled("sd3", "aot_eager", checkpointing=True)
    assert_close(step(other, BUCKETS[0]), step(plain, BUCKETS[0]))


def test_nothing_is_renamed_and_copies_are_not_compiled() -> None:
    plain, other = compiled("sd3", "eager")
    assert [*other.denoiser.state_dict()] == [*plain.denoiser.state_dict()]
    assert [*lora_state_dict(other.denoiser)] == [*lora_state_dict(plain.denoiser)]
    before = graphs()
    with torch.no_grad(), frozen_copy(other.denoiser)() as copied:
        alone = copy.copy(other)
        alone.denoiser = copied
        assert torch.equal(alone.predict(), plain.predict())
    assert graphs() == before


def test_pictures_are_drawn_without_graphs() -> None:
    plain, other = compiled("sd3", "eager")
    before = graphs()
    with torch.no_grad(), eagerly():
        assert torch.equal(other.predict(), plain.predict())
    assert graphs() == before
    with torch.no_grad():
        other.predict()
    assert graphs() > before


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor wants a C++ compiler")
def test_policy_and_reference_round_alike_in_half_precision() -> None:
    """With a LoRA that does nothing yet they are equal to the last bit, although they are two graphs of fused kernels:
    the real compiler, on one block."""
    block = torch.nn.Module()
    block.inner = BasicTransformerBlock(16, 2, 8, cross_attention_dim=16)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), block)
    block.to(torch.bfloat16)
    for weight in (p for p in block.parameters() if p.requires_grad):
        weight.data = weight.data.float()
    compute_in_input_dtype(block)
    off = trained_lora(block)
    x = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    text = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    block.inner.compile(backend="inductor", options=OPTIONS["inductor"])
    with torch.no_grad(), lora_off(off):
        reference = block.inner(x, encoder_hidden_states=text)
    assert torch.equal(block.inner(x, encoder_hidden_states=text), reference)


def test_the_limit_of_graphs_is_raised_and_never_lowered() -> None:
    case = Case(*CASES["sd3"])
    compile_denoiser(case.denoiser, case.family, "eager")
    assert torch._dynamo.config.recompile_limit == GRAPHS
    torch._dynamo.config.recompile_limit = 1000
    compile_denoiser(case.denoiser, case.family, "eager")
    assert torch._dynamo.config.recompile_limit == 1000


def test_a_backend_that_cannot_compile_is_refused() -> None:
    case = Case(*CASES["sd3"])
    with pytest.raises(ValueError, match="train.compile: fortran cannot compile here .*; or set it to none"):
        compile_denoiser(case.denoiser, case.family, "fortran")


def test_none_compiles_nothing() -> None:
    case = Case(*CASES["sd3"])
    compile_denoiser(case.denoiser, case.family, "none")
    with torch.no_grad():
        case.predict()
    assert graphs() == 0

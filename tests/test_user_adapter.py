"""User adapters in real denoisers: nothing at the start, nothing for nobody, beside a LoRA, and by their equations."""

import pytest
import torch
from diffusers import SD3Transformer2DModel
from tiny_pipelines import LATENT_SIZE, WIDTH, tiny_flux, tiny_sd
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, softmax
from user_cases import CASES, Case, N, U, facts, lora

from diffpref.adapters import lora_state_dict
from diffpref.users.adapter import (
    add_user_adapter,
    format_of,
    has_user_adapter,
    load_into,
    set_user_scale,
    train_user_adapter,
    user_adapter_off,
    user_parameters,
    user_state,
)


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return Case(*CASES[request.param])


# --- what it does to the model ----------------------------------------------------------------------------------------


def test_it_starts_as_the_identity_and_can_learn(case):
    base, random = case.predict(), torch.get_rng_state()
    case.add()
    prediction = case.predict(case.users)
    assert torch.equal(prediction, base) and has_user_adapter(case.denoiser)
    assert torch.equal(torch.get_rng_state(), random), "the run's own random numbers are left alone"
    prediction.square().sum().backward()
    for name, parameter in user_parameters(case.denoiser).items():
        assert parameter.dtype == torch.float32
        assert bool(parameter.grad.any()) == ("to_v_ip" in name), "at W_v' = 0 only W_v' has a gradient"


def test_nobody_gets_the_base_model_after_training(case):
    base = case.predict()
    case.add().train()
    assert (case.predict(case.users) - base).abs().amax((1, 2, 3)).min() > 0.01
    mixed = case.users * torch.tensor([1.0, 0.0, 1.0]).view(-1, *[1] * (case.users.ndim - 1))
    assert torch.equal(case.predict(torch.zeros_like(case.users)), base)
    torch.testing.assert_close(case.predict(mixed)[1], base[1], rtol=1e-5, atol=1e-6)


def test_scale_zero_is_the_base_model_and_scales_come_back(case):
    base = case.predict()
    trained = case.add().train().predict(case.users)
    set_user_scale(case.denoiser, 0.5)
    half = case.predict(case.users)
    assert 0.2 < (half - base).norm() / (trained - base).norm() < 0.8
    with pytest.raises(RuntimeError, match="inside"), user_adapter_off(case.denoiser):
        assert torch.equal(case.predict(case.users), base)
        raise RuntimeError("inside")
    assert torch.equal(case.predict(case.users), half)
    set_user_scale(case.denoiser, 1)
    assert torch.equal(case.predict(case.users), trained)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -float("inf")])
def test_a_scale_that_is_no_number_is_refused(scale):
    case = Case(tiny_sd, False).add()
    with pytest.raises(ValueError, match=f"scale of a user adapter must be a finite number, got {scale}"):
        set_user_scale(case.denoiser, scale)


def test_users_in_one_batch_are_as_one_by_one(case):
    case.add().train()
    case.denoiser.double()
    for name in ("x_t", "users"):
        setattr(case, name, getattr(case, name).double())
    case.conditioning = {key: value.double() for key, value in case.conditioning.items()}
    together = case.predict(case.users)
    for i in range(N):
        torch.testing.assert_close(together[i : i + 1], case.predict(case.users, slice(i, i + 1)), rtol=1e-6, atol=1e-6)
    others = case.predict(case.users.roll(1, 0))
    assert (others - together).abs().amax((1, 2, 3)).min() > 1e-3


def test_biases_stay_zero_whatever_trains(case):
    case.add()
    lora(case)
    assert not any(p.requires_grad for p in user_parameters(case.denoiser).values()), "peft freezes what is not its own"
    train_user_adapter(case.denoiser)
    case.train()
    ours = format_of(case.denoiser).parameters(case.denoiser)
    biases = {name: p for name, p in ours.items() if name.endswith(".bias")}
    assert len(biases) >= 2 and not any(p.any() or p.requires_grad for p in biases.values())
    trained = user_parameters(case.denoiser)
    assert len(trained) == len(ours) - len(biases) and all(p.requires_grad for p in trained.values())
    assert {id(p) for p in trained.values()}.isdisjoint(id(p) for p in biases.values())


def test_gradient_checkpointing_gives_the_same_gradients(case):
    case.add().train(1)
    gradients = []
    for checkpointing in (False, True):
        (case.denoiser.enable_gradient_checkpointing if checkpointing else lambda: None)()
        case.denoiser.train().zero_grad()
        users = case.users.clone().requires_grad_()
        case.predict(users).square().sum().backward()
        gradients.append([users.grad, *(p.grad for p in user_parameters(case.denoiser).values())])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)
        assert plain.any()


@pytest.mark.parametrize("autocast", [True, False])
def test_masters_are_fp32_on_a_half_precision_base(case, autocast):
    case.denoiser.to(torch.bfloat16)
    case.conditioning = {key: value.bfloat16() for key, value in case.conditioning.items()}
    case.x_t, one = case.x_t.bfloat16(), slice(0, 1)  # FLUX's processors round batches of bf16 each in its own way

    def predict(users: Tensor | None = None) -> Tensor:
        users = users if users is None else users.bfloat16()  # as the conditioning comes
        with torch.autocast(
            "cpu", torch.bfloat16, enabled=autocast
        ):  # each time anew: it keeps casts of weights that have since moved
            return case.predict(users, one)

    base = predict()
    case.add()
    assert torch.equal(predict(case.users), base)
    trained = user_parameters(case.denoiser)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.03)
    for _ in range(2):
        predict(case.users).float().square().mean().backward()
        optimizer.step()
    assert torch.equal(predict(torch.zeros_like(case.users)), base)
    assert (predict(case.users) - base).abs().max() > 0.01
    loaded = Case(case.make, case.sequence)
    loaded.denoiser.to(torch.bfloat16)
    load_into(loaded.denoiser, user_state(case.denoiser), facts(case))
    assert {p.dtype for p in loaded.denoiser.parameters()} == {torch.bfloat16}, "as the pipeline's other weights"


def test_start_depends_on_its_seed_alone():
    states = []
    for seed, ambient in ((0, 1), (0, 2), (1, 1)):
        case = Case(tiny_sd, False)
        torch.manual_seed(ambient)
        add_user_adapter(case.denoiser, U, seed=seed)
        states.append(user_state(case.denoiser)["image_proj"]["proj.weight"])
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])


# --- beside a LoRA ----------------------------------------------------------------------------------------------------


def test_adapter_and_lora_go_together_in_both_orders(case):
    other = Case(case.make, case.sequence)
    case.add()
    lora(case)
    lora(other)
    other.add()
    for one in (case, other):
        train_user_adapter(one.denoiser)
        one.train()
    assert torch.equal(case.predict(case.users), other.predict(other.users))
    training = [{n for n, p in one.denoiser.named_parameters() if p.requires_grad} for one in (case, other)]
    assert training[0] == training[1]
    assert not any("_ip" in key or "proj" in key.split(".")[0] for key in lora_state_dict(case.denoiser))
    assert not any("lora" in key or "base_layer" in key for part in user_state(case.denoiser).values() for key in part)


def test_a_lora_on_all_linear_maps_leaves_the_adapter_alone(case):
    """A sequence's projection has modules of names that people give a LoRA as targets."""
    case.add()
    before = {n for n, _ in case.denoiser.named_modules() if "_ip" in n or n.startswith(("encoder_hid", "image_proj"))}
    lora(case, target_modules=["to_k", "proj", "ff.net.2"] if case.sequence else ["to_k"])
    after = {n for n, _ in case.denoiser.named_modules() if "_ip" in n or n.startswith(("encoder_hid", "image_proj"))}
    assert before == after and len(before) > 4


def test_the_loras_masters_stay_fp32_when_the_adapter_comes_second():
    case = Case(tiny_sd, False)
    case.denoiser.to(torch.bfloat16)
    lora(case)
    load_into(case.denoiser, user_state(Case(tiny_sd, False).add().denoiser), facts(Case(tiny_sd, False).add()))
    assert {p.dtype for n, p in case.denoiser.named_parameters() if "lora" in n} == {torch.float32}


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", [None, "rms_norm"])
def test_sd3_attends_to_the_user_by_its_equation(norm):
    """Z + s · softmax(q·k'ᵀ/√d)·v', with the layer's norms of queries and of text keys, in fp64; but diffusers takes
    the squares of an RMSNorm in fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=LATENT_SIZE, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH, out_channels=4, pos_embed_max_size=16, qk_norm=norm,
            dual_attention_layers=(0,),
        ).double()  # fmt: skip
        add_user_adapter(transformer, U)
        transformer.double()
        layer, picture, text = transformer.transformer_blocks[0].attn, torch.randn(2, 7, 16), torch.randn(2, 3, 16)
        picture, text, users = picture.double(), text.double(), torch.randn(2, 1, U).double()
        base, base_text = layer(picture, text)
        nn.init.normal_(layer.processor.to_v_ip[0].weight)
    tokens, _ = transformer.image_proj(users, torch.zeros(2))
    projection = transformer.image_proj.image_projection_layers[0].image_embeds.weight
    torch.testing.assert_close(tokens, layer_norm((users @ projection.T).view(2, 4, 16), [16]))
    set_user_scale(transformer, 0.7)
    out, out_text = layer(picture, text, ip_hidden_states=tokens)
    heads = [slice(0, 8), slice(8, 16)]
    q, k, v = layer.to_q(picture), *(tokens @ getattr(layer.processor, x)[0].weight.T for x in ("to_k_ip", "to_v_ip"))
    expected = []
    for head in heads:
        query, key = q[..., head], k[..., head]
        if norm:
            query, key = rms_norm(query, [8], eps=1e-6), rms_norm(key, [8], eps=1e-6)
        expected.append(softmax(query @ key.mT / 8**0.5, dim=-1) @ v[..., head])
    torch.testing.assert_close(out, base + 0.7 * torch.cat(expected, dim=-1), rtol=1e-6, atol=1e-6)
    assert torch.equal(out_text, base_text) and (out - base).abs().max() > 0.1


def test_keys_begin_as_the_models_own_for_text():
    unet = Case(tiny_sd, False).add().denoiser
    layer = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    assert torch.equal(layer.processor.to_k_ip[0].weight, layer.to_k.weight)
    flux = Case(tiny_flux, False).add().denoiser
    layer, token = flux.transformer_blocks[1].attn, torch.randn(4, 2 * WIDTH)
    expected = (token @ flux.context_embedder.weight.T) @ layer.add_k_proj.weight.T
    torch.testing.assert_close(layer.processor.to_k_ip[0](token), expected)

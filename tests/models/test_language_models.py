"""GPT and Llama: shapes, initial loss, causality, sampling, optimizer groups, schedule, FLOPs."""

from __future__ import annotations

import math

import pytest
import torch

from lit_fast.errors import MisconfigurationException
from lit_fast.models import GPT, LanguageModel, Llama
from lit_fast.models.flops import flops_per_token
from lit_fast.models.language_model import warmup_cosine
from lit_fast.models.llama import rotary_tables, rotate

VOCAB, BLOCK = 320, 24


def small_gpt(**options) -> GPT:
    return GPT(vocab_size=VOCAB, block_size=BLOCK, num_layers=2, num_heads=4, embedding_dim=32, **options)


def small_llama(**options) -> Llama:
    options = {"num_kv_heads": 2, **options}
    return Llama(vocab_size=VOCAB, block_size=BLOCK, num_layers=2, num_heads=4, embedding_dim=32, **options)


@pytest.fixture(params=[small_gpt, small_llama], ids=["gpt", "llama"])
def model(request) -> LanguageModel:
    torch.manual_seed(0)
    return request.param()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def test_logits_have_one_row_of_the_vocabulary_a_token(model):
    assert model(random_tokens(3, 7)).shape == (3, 7, VOCAB)


def test_initial_loss_is_within_five_percent_of_the_uniform_guess(model):
    assert model.loss(random_tokens(8, BLOCK + 1)).item() == pytest.approx(math.log(VOCAB), rel=0.05)


def test_a_token_changes_nothing_before_itself(model):
    tokens = random_tokens(2, BLOCK)
    changed = tokens.clone()
    changed[:, 10] = (changed[:, 10] + 1) % VOCAB
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_too_long_a_context_is_refused_with_the_limit(model):
    with pytest.raises(MisconfigurationException, match=f"block_size={BLOCK}"):
        model(random_tokens(1, BLOCK + 1))


def test_every_parameter_gets_a_gradient(model):
    model.loss(random_tokens(4, BLOCK + 1)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_learns_a_repeated_sequence(model):
    batch = random_tokens(1, BLOCK + 1)
    optimizer = model.configure_optimizers()["optimizer"]
    first = model.loss(batch).item()
    for _ in range(30):
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
        optimizer.zero_grad()
        loss = model.loss(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 4


def test_optimizer_groups_hold_every_parameter_once_and_decay_only_matrices(model):
    optimizer = model.configure_optimizers()["optimizer"]
    decayed, free = optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert decayed["betas"] == free["betas"] == (0.9, 0.95)
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert all(p.dim() < 2 for p in free["params"])
    listed = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(listed) == sorted({id(p) for p in model.parameters()})


def test_schedule_steps_with_the_optimizer_and_keeps_its_length_out_of_its_state():
    model = small_gpt(learning_rate=1.0, warmup_steps=2, total_steps=10)
    configured = model.configure_optimizers()
    schedule = configured["lr_scheduler"]
    assert schedule["interval"] == "step"
    rates = []
    for _ in range(10):
        rates.append(configured["optimizer"].param_groups[0]["lr"])
        configured["optimizer"].step()
        schedule["scheduler"].step()
    assert rates == [warmup_cosine(step, 2, 10, 0.1) for step in range(10)]
    assert schedule["scheduler"].state_dict()["lr_lambdas"] == [None, None]


@pytest.mark.parametrize(("step", "factor"), [(0, 0.25), (3, 1.0), (4, 1.0), (54, 0.55), (104, 0.1), (500, 0.1)])
def test_warmup_cosine_at_its_corners(step, factor):
    assert warmup_cosine(step, warmup_steps=4, total_steps=104, floor=0.1) == pytest.approx(factor)


def test_greedy_sampling_continues_with_the_likeliest_token(model):
    prompt = random_tokens(2, 5)
    written = model.generate(prompt, 3, temperature=0)
    assert torch.equal(written[:, :5], prompt)
    model.eval()
    for position in range(5, 8):
        likeliest = model(written[:, :position])[:, -1].argmax(-1)
        assert torch.equal(written[:, position], likeliest)


def test_sampling_goes_past_the_block_and_keeps_the_mode(model):
    model.train()
    assert model.generate(random_tokens(1, BLOCK), 5, top_k=3).shape == (1, BLOCK + 5)
    assert model.training


def test_one_likeliest_token_to_sample_from_is_greedy_and_a_generator_repeats(model):
    prompt = random_tokens(1, 4)
    assert torch.equal(model.generate(prompt, 6, top_k=1), model.generate(prompt, 6, temperature=0))
    drawn = [model.generate(prompt, 6, generator=torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_sampling_ends_at_the_stop_token(model):
    prompt = random_tokens(1, 4)
    stop = int(model.generate(prompt, 1, temperature=0)[0, -1])
    assert model.generate(prompt, 9, temperature=0, stop_token=stop).shape == (1, 5)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}])
def test_sampling_options_out_of_range_are_refused(model, options):
    with pytest.raises(MisconfigurationException, match="are allowed"):
        model.generate(random_tokens(1, 4), 1, **options)


def test_gpt_head_is_the_embedding():
    model = small_gpt()
    assert model.head.weight is model.token_embedding.weight
    assert sum(p is model.head.weight for p in model.parameters()) == 1


def test_gpt2_small_has_its_published_number_of_parameters():
    with torch.device("meta"):
        model = GPT(vocab_size=50257)
    assert sum(p.numel() for p in model.parameters()) == 124_439_808


def test_llama_preset_has_about_a_billion_parameters():
    with torch.device("meta"):
        model = Llama(num_kv_heads=8, hidden_dim=8192)
    attention, mlp, norms = 2 * 2048**2 + 2 * 2048 * 512, 3 * 2048 * 8192, 2 * 2048
    assert sum(p.numel() for p in model.parameters()) == 16 * (attention + mlp + norms) + 2 * 32768 * 2048 + 2048


def test_flops_follow_the_published_formula():
    assert flops_per_token(1000, layers=2, attention_width=8, block_size=16) == 6 * 1000 + 12 * 2 * 8 * 16
    model = small_gpt()
    multiplied = sum(p.numel() for p in model.parameters()) - BLOCK * 32  # positions are only looked up
    assert model.flops_per_token() == 6 * multiplied + 12 * 2 * 32 * BLOCK
    tied, untied = small_llama(tie_embeddings=True), small_llama()
    assert tied.flops_per_token() == untied.flops_per_token()


def test_grouped_queries_equal_repeated_key_value_heads():
    torch.manual_seed(0)
    grouped, full = small_llama(num_kv_heads=2), small_llama(num_kv_heads=4)
    state = grouped.state_dict()
    for name in state:
        if "key_value" in name:
            heads = state[name].view(2, 2, 8, 32)  # key or value, group, head width, embedding
            state[name] = heads.repeat_interleave(2, dim=1).reshape(64, 32)
    full.load_state_dict(state)
    tokens = random_tokens(2, BLOCK)
    # Two attention kernels may add in another order: fp32 rounding of O(1) logits.
    torch.testing.assert_close(grouped(tokens), full(tokens), atol=1e-5, rtol=1e-5)


def test_rotary_products_depend_on_the_distance_only():
    cos, sin = rotary_tables(32, 8, 10000.0)
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned_q = rotate(q.expand(1, 32, 1, 8), cos.double(), sin.double())[0, :, 0]
    turned_k = rotate(k.expand(1, 32, 1, 8), cos.double(), sin.double())[0, :, 0]
    product = turned_q @ turned_k.T
    # The tables are fp32: 2^-24 relative in each of 8 products of O(1) numbers.
    torch.testing.assert_close(product[5, 2], product[25, 22], atol=8 * 4 * 2**-24, rtol=0)
    torch.testing.assert_close(product[0, 0], (q * k).sum(), atol=8 * 4 * 2**-24, rtol=0)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: GPT(VOCAB, BLOCK, 1, num_heads=3, embedding_dim=32), "num_heads=3"),
        (lambda: small_llama(num_kv_heads=3), "num_kv_heads=3"),
        (lambda: Llama(VOCAB, BLOCK, 1, num_heads=4, embedding_dim=12), "odd head width"),
    ],
)
def test_shapes_that_do_not_divide_are_refused(build, said):
    with pytest.raises(MisconfigurationException, match=said):
        build()

"""Tensor parallelism against one device: logits, loss and every gradient."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bloomlm.adapters.bank import AdapterBank
from bloomlm.adapters.base import FullTuning
from bloomlm.adapters.dora import DoraConfig
from bloomlm.adapters.lora import BLOCK_LINEARS, LoraConfig
from bloomlm.adapters.prefix import PrefixConfig
from bloomlm.checkpoint.adapters.peft import PlainAdapter, install_adapter
from bloomlm.data.loader import collate
from bloomlm.generation.config import BeamSearch, GenerationConfig, Sampling
from bloomlm.generation.generate import generate
from bloomlm.model.bloom import BloomForCausalLM
from bloomlm.model.linear import linear
from bloomlm.parallel.collectives import TensorParallelGroup, column_product, copy_to_ranks, own_randomness
from bloomlm.parallel.data_parallel import shard_model
from bloomlm.parallel.layout import tp_dim, whole_tensor
from bloomlm.parallel.mesh import ALONE, Degrees, Mesh
from bloomlm.parallel.tensor_parallel import cut_adapter, cut_model, head_of
from bloomlm.parallel.vocabulary_head import Head
from bloomlm.parallel.vocabulary_log_probs import linear_log_probs
from bloomlm.parallel.vocabulary_loss import linear_cross_entropy
from bloomlm.parallel.vocabulary_scores import score_tokens
from bloomlm.training.objectives.cross_entropy import batch_loss
from bloomlm.training.precision import Precision
from tests.distributed.models import Case, assert_close, some_examples, tiny_model
from tests.distributed.pool import RankPool
from tests.tiny_checkpoint import learned_tensors

ALL_LINEARS = LoraConfig(r=3, target_modules=BLOCK_LINEARS)
CASES = {
    "full": Case(),
    "smoothed": Case(label_smoothing=0.2),
    "lora": Case(adapter=ALL_LINEARS),
    "dora": Case(adapter=DoraConfig(r=3, target_modules=BLOCK_LINEARS)),
    "recomputed dora": Case(adapter=DoraConfig(r=3, target_modules=BLOCK_LINEARS), recompute=True),
    "rows of the embedding": Case(adapter=LoraConfig(r=3, trained_tokens=(47, 5, 20, 3)), label_smoothing=0.1),
    "rows of one rank": Case(adapter=LoraConfig(r=3, trained_tokens=(46, 47)), recompute=True),
    "prefix": Case(adapter=PrefixConfig(num_prefix_tokens=3)),
    "projected prefix": Case(adapter=PrefixConfig(num_prefix_tokens=3, prefix_projection=True)),
    "post layernorm": Case(post_layernorm=True),
    "recompute": Case(recompute=True),
    "recomputed lora": Case(adapter=ALL_LINEARS, recompute=True),
}
IDS = torch.tensor([[7, 5, 40, 9, 11, 30], [3, 3, 3, 20, 47, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1]])


def tensor_parallel_model(case: Case, world_size: int) -> tuple[BloomForCausalLM, Mesh]:
    model = tiny_model(case)
    if world_size == 1:
        return model, ALONE
    mesh = Mesh.over_all_ranks(Degrees(tp=world_size), "cpu")
    cut_model(model, mesh)
    cut_adapter(model, mesh)
    shard_model(model, mesh)
    return model, mesh


def forward_and_backward(case: Case, world_size: int) -> dict[str, Tensor]:
    """Logits, loss and whole gradients."""
    model, mesh = tensor_parallel_model(case, world_size)
    found = {"logits": model.eval()(IDS, MASK).detach()}
    batch = collate(some_examples())
    loss = batch_loss(model.train(), batch, case.precision, scale=1 / 7, label_smoothing=case.label_smoothing)
    loss.backward()
    found["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) is parameter.requires_grad, name
        if parameter.grad is not None:
            gradient = whole_tensor(name, parameter.grad, mesh)
            assert gradient is not None
            found[name] = gradient
    return found


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_logits_loss_and_gradients(ranks: RankPool, name: str, world_size: int) -> None:
    expected = forward_and_backward(CASES[name], 1)
    for found in ranks.run(world_size, forward_and_backward, CASES[name], world_size):
        assert_close(found, expected)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("half_weights", [False, True])
def test_half_precision(ranks: RankPool, half: torch.dtype, half_weights: bool) -> None:
    case = Case(precision=Precision(compute_dtype=half, half_weights=half_weights))
    expected, whole = forward_and_backward(Case(), 1), forward_and_backward(case, 1)
    found = ranks.run(2, forward_and_backward, case, 2)[0]
    for name, exact in expected.items():
        # both round to half in other places: the ranks' error may be about as large as one device's, which may be small
        # by chance
        errors = [float((result[name].double() - exact.double()).norm()) for result in (found, whole)]
        allowed = max(1e-5, torch.finfo(half).eps / 8) * float(exact.double().norm())
        assert errors[0] <= 3 * errors[1] + allowed, (name, errors)


def parts_of_model(case: Case) -> dict[str, tuple[int, ...]]:
    model, _ = tensor_parallel_model(case, 4)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_a_rank_holds_its_part_only(ranks: RankPool) -> None:
    shapes = ranks.run(4, parts_of_model, CASES["lora"])[2]
    block = {name.removeprefix("transformer.h.1."): shape for name, shape in shapes.items() if ".h.1." in name}
    assert block["self_attention.query_key_value.weight"] == (24, 32)
    assert block["self_attention.query_key_value.lora_A"] == (3, 32)
    assert block["self_attention.query_key_value.lora_B"] == (24, 3)
    assert block["mlp.dense_4h_to_h.weight"] == (32, 32)
    assert block["mlp.dense_4h_to_h.bias"] == (32,)
    assert block["mlp.dense_4h_to_h.lora_A"] == (3, 32)
    assert block["mlp.dense_4h_to_h.lora_B"] == (32, 3)
    assert shapes["transformer.word_embeddings.weight"] == (12, 32)


def chunked_loss(max_chunk_bytes: int, label_smoothing: float, world_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 16, generator=generator, requires_grad=True)
    weight = torch.randn(24, 16, generator=generator)
    labels = torch.randint(0, 24, (20,), generator=generator)
    labels[[0, 3, 19]] = -100
    model, mesh = tensor_parallel_model(Case(), world_size)
    group = head_of(model).ranks
    rows = slice(mesh.tp_rank * 24 // world_size, (mesh.tp_rank + 1) * 24 // world_size)
    part = weight[rows].clone().requires_grad_()
    head = Head(part, ranks=group)
    loss = linear_cross_entropy(hidden, head, labels, label_smoothing=label_smoothing, max_chunk_bytes=max_chunk_bytes)
    (loss * 0.5).backward()
    assert hidden.grad is not None and part.grad is not None
    gradient = part.grad if group is None else group.gather(part.grad, 0)
    score = score_tokens(hidden, head, labels)
    return {
        "loss": loss.detach(),
        "hidden": hidden.grad,
        "weight": gradient,
        "eval_loss": score.loss,
        "num_correct": score.num_correct,
    }


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_loss_in_chunks(ranks: RankPool, rows: int, label_smoothing: float) -> None:
    expected = chunked_loss(2**20, label_smoothing, 1)
    for found in ranks.run(4, chunked_loss, rows * 6 * 4, label_smoothing, 4):
        assert_close(found, expected, 1e-6)


def chunked_log_probs(max_chunk_bytes: int, head_learns: bool, world_size: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(20, 16, generator=generator, requires_grad=True)
    weight = torch.randn(24, 16, generator=generator)
    labels = torch.randint(0, 24, (20,), generator=generator)
    labels[[0, 3, 19]] = -100
    model, mesh = tensor_parallel_model(Case(), world_size)
    group = head_of(model).ranks
    rows = slice(mesh.tp_rank * 24 // world_size, (mesh.tp_rank + 1) * 24 // world_size)
    part = weight[rows].clone().requires_grad_(head_learns)
    log_probs = linear_log_probs(hidden, Head(part, ranks=group), labels, max_chunk_bytes=max_chunk_bytes)
    (log_probs * torch.linspace(-1, 2, 17)).sum().backward()
    assert hidden.grad is not None
    found = {"log_probs": log_probs.detach(), "hidden": hidden.grad}
    if part.grad is not None:
        found["weight"] = part.grad if group is None else group.gather(part.grad, 0)
    return found


@pytest.mark.parametrize("head_learns", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_log_probs_in_chunks(ranks: RankPool, rows: int, head_learns: bool) -> None:
    expected = chunked_log_probs(2**20, head_learns, 1)
    assert ("weight" in expected) is head_learns
    for found in ranks.run(4, chunked_log_probs, rows * 6 * 4, head_learns, 4):
        assert_close(found, expected, 1e-6)


def tied_maxima(world_size: int) -> int:
    """Two equal largest logits on different ranks: one device takes the first."""
    weight = torch.zeros(8, 2)
    weight[[1, 6]] = 1.0
    model, mesh = tensor_parallel_model(Case(), world_size)
    rows = slice(mesh.tp_rank * 8 // world_size, (mesh.tp_rank + 1) * 8 // world_size)
    labels = torch.tensor([1, 6, 6])
    score = score_tokens(torch.ones(3, 2), Head(weight[rows], ranks=head_of(model).ranks), labels)
    return int(score.num_correct)


def test_of_equal_logits_the_first_counts(ranks: RankPool) -> None:
    assert tied_maxima(1) == 1
    assert ranks.run(4, tied_maxima, 4) == [1] * 4


def continuations(case: Case, config: GenerationConfig, world_size: int) -> list[list[int]]:
    model, _ = tensor_parallel_model(case, world_size)
    prompts = [[5, 9, 33], [7], [40, 41, 42, 43, 44, 45]]
    return [result.tokens for result in generate(model, prompts, config)]


@pytest.mark.parametrize("name", ["full", "lora", "projected prefix"])
@pytest.mark.parametrize("strategy", [None, Sampling(seed=3, temperature=2.0), BeamSearch(num_beams=3)])
def test_generation_token_for_token(ranks: RankPool, name: str, strategy: Any) -> None:
    config = GenerationConfig(max_new_tokens=12, **({} if strategy is None else {"strategy": strategy}))
    expected = continuations(CASES[name], config, 1)
    assert len({tuple(tokens) for tokens in expected}) > 1
    assert ranks.run(2, continuations, CASES[name], config, 2) == [expected] * 2


NAMED = {
    "lora": ALL_LINEARS,
    "dora": DoraConfig(r=2, target_modules=BLOCK_LINEARS),
    "rows": LoraConfig(r=1, trained_tokens=(47, 5, 20, 3)),
    "prefix": PrefixConfig(num_prefix_tokens=3, prefix_projection=True),
}


def logits_with_named_adapters(world_size: int) -> Tensor:
    """[B * T, V] logits of rows that each use another adapter, read in two parts and continued."""
    model, mesh = tensor_parallel_model(Case(), world_size)
    bank = AdapterBank(model)
    for name, adapter in NAMED.items():
        adapted = bank.base_model()
        whole = tiny_model(Case(adapter=adapter))
        install_adapter(adapted, PlainAdapter(config=adapter, tensors=learned_tensors(whole)))
        cut_adapter(adapted, mesh)
        bank.load(name, adapted)
    rows = model.open_rows(5, 10)
    for row, name in enumerate((None, *NAMED)):
        rows.set_adapter(row, name)
    with torch.inference_mode():
        return torch.cat(
            [
                rows.prefill(
                    [0, 1, 2, 3, 4], [[7, 5, 40], [7, 5], [47], [3, 5, 20, 47], [9]], num_logits=[3, 1, 1, 4, 1]
                ),
                rows.prefill([2, 4], [[7, 5], [20]]),
                rows.decode_step([4, 1, 0, 2, 3], torch.tensor([5, 3, 11, 20, 47])),
            ]
        )


def test_rows_with_named_adapters(ranks: RankPool) -> None:
    expected = logits_with_named_adapters(1)
    for found in ranks.run(2, logits_with_named_adapters, 2):
        assert_close({"logits": found}, {"logits": expected})


def draws() -> tuple[list[float], list[float], list[float], list[float]]:
    torch.manual_seed(1)
    before = torch.rand(3).tolist()
    state = torch.get_rng_state()
    with own_randomness(torch.distributed.get_rank()):
        own = torch.rand(3).tolist()
    after = torch.rand(3).tolist()
    torch.set_rng_state(state)
    with own_randomness(torch.distributed.get_rank()):
        again = torch.rand(3).tolist()
    return before, own, after, again


def test_randomness_of_parts_differs_and_of_wholes_agrees(ranks: RankPool) -> None:
    one, other = ranks.run(2, draws)
    assert one[0] == other[0] and one[2] == other[2] != one[0]
    assert one[1] != other[1]
    assert one[1] == one[3] and other[1] == other[3]


def dropout_run(case: Case) -> dict[str, Tensor]:
    """What some layers of block 0 are given, the loss, and the gradients of what is whole on every rank."""
    model, _ = tensor_parallel_model(case, 2)
    found: dict[str, Tensor] = {}
    for name, module in model.transformer.h[0].named_modules():
        if name in ("self_attention.dense", "mlp.dense_4h_to_h", "mlp.dense_h_to_4h"):
            module.register_forward_hook(lambda m, given, out, name=name: found.update({name: given[0].detach()}))
    torch.manual_seed(3)
    loss = batch_loss(model.train(), collate(some_examples()), case.precision, scale=1.0)
    loss.backward()
    found["loss"] = loss.detach()
    for name, parameter in model.named_parameters():
        if tp_dim(name) is None and parameter.grad is not None:
            found[name] = parameter.grad
    return found


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapter", [FullTuning(), LoraConfig(target_modules=BLOCK_LINEARS, lora_dropout=0.3)])
def test_dropout_keeps_ranks_in_step(ranks: RankPool, adapter: Any, recompute: bool) -> None:
    """What lies whole on every rank (residual stream, norms, loss) must stay the same bits on all of them."""
    one, other = ranks.run(2, dropout_run, Case(adapter=adapter, dropout=0.3, recompute=recompute))
    parts = {"self_attention.dense", "mlp.dense_4h_to_h"}
    assert len(one) > 8
    for name in one.keys() - parts:
        assert torch.equal(one[name], other[name]), name
    for name in parts:
        assert not torch.equal(one[name], other[name]), name


def kept_first_tokens() -> Tensor:
    """Whether dropout keeps what the first token of each document sees of itself, for each head of this rank."""
    model, _ = tensor_parallel_model(Case(dropout=0.5), 2)
    torch.manual_seed(3)
    attention = model.train().transformer.h[0].self_attention
    with torch.no_grad():
        for parameter in attention.query_key_value.parameters():
            parameter.zero_()
        attention.query_key_value.bias.view(2, 3, 8)[:, 2] = 1.0
    found: list[Tensor] = []
    attention.dense.register_forward_hook(lambda module, given, out: found.append(given[0].detach()))
    batch = collate(some_examples() * 4)
    batch_loss(model, batch, Precision(), scale=1.0)
    first = torch.tensor([0, *batch.lengths[:-1]]).cumsum(0)
    values = found[0][first].view(len(first), 2, 8)[:, :, 0]
    assert set(values.flatten().tolist()) == {0.0, 2.0}
    return values


def test_attention_dropout_differs_from_rank_to_rank(ranks: RankPool) -> None:
    one, other = ranks.run(2, kept_first_tokens)
    assert not torch.equal(one, other)


def column(frozen: bool) -> tuple[list[str], list[Tensor | None], list[Tensor | None]]:
    """What column_product's backward pass does in which order; its gradients, and those of enter and product apart."""
    events: list[str] = []

    class Group(TensorParallelGroup):
        def begin_sum(self, tensor: Tensor) -> Any:
            events.append("sum begins")
            work = super().begin_sum(tensor)
            return SimpleNamespace(wait=lambda: (work.wait(), events.append("sum ends")))

    def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        events.append(f"{len(x)} rows")
        return linear(x, weight, bias, scale)

    rank = torch.distributed.get_rank()
    group = Group(torch.distributed.group.WORLD, rank, 2)
    generator = torch.Generator().manual_seed(rank)  # every rank has another part
    weight, bias = torch.randn(7, 8, generator=generator), torch.randn(7, generator=generator)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    gradients = []
    for apart in (False, True):
        leaves = [tensor.clone().requires_grad_(not frozen or tensor is x) for tensor in (x, weight, bias)]
        if apart:
            out = linear(copy_to_ranks(leaves[0], group), leaves[1], leaves[2])
        else:
            out = column_product(leaves[0], leaves[1], leaves[2], group, product)
        (out * torch.arange(35.0).view(5, 7)).sum().backward()
        gradients.append([leaf.grad for leaf in leaves])
    return events, gradients[0], gradients[1]


@pytest.mark.parametrize("frozen", [False, True])
def test_the_input_gradient_is_added_up_beside_the_weights(ranks: RankPool, frozen: bool) -> None:
    weight_gradient = [] if frozen else ["7 rows"]
    for events, found, expected in ranks.run(2, column, frozen):
        # forward [5, 8], the input's gradient [5, 7], the weight's [7, 5]
        assert events == ["5 rows", "5 rows", "sum begins", *weight_gradient, "sum ends"]
        for one, other in zip(found, expected, strict=True):
            assert (one is None and other is None and frozen) or torch.equal(one, other)

"""The stacked peers against one peer at a time and torch's own optimiser; exchanges and clocks."""

import functools
import math

import msgspec
import pytest
import torch
from torch.nn import functional

from benchmarks.simulator import corpora, model
from benchmarks.simulator.corpora import Corpus
from benchmarks.simulator.exchange import Exchange
from benchmarks.simulator.links import Links
from benchmarks.simulator.peers import Peers
from benchmarks.simulator.run import simulate
from benchmarks.simulator.spec import Link, Run
from xpeer.forms import Form
from xpeer.manifest import Optimiser

STEPS = 4


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(corpora, "HELD_OUT_WINDOWS", 32)
    monkeypatch.setattr("benchmarks.simulator.run.QUICK_WINDOWS", 2)
    monkeypatch.setattr("benchmarks.simulator.run.HELD_OUT_WINDOWS", 32)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def texts():
    """Four corpora of a few letters each."""
    generator = torch.Generator().manual_seed(1)
    kinds = []
    for number in range(4):
        drawn = torch.randint(97 + 5 * number, 102 + 5 * number, (40_000,), generator=generator)
        text = drawn.to(torch.uint8)
        kinds.append(Corpus(str(number), text[:35_000], text[35_000:], str(number)))
    return tuple(kinds)


def run(**fields):
    base = {"method": "test", "rule": "gossip", "rate": 3e-3, "steps": STEPS, "slot_steps": 1}
    return msgspec.convert(base | fields, Run)


def start(peers=2, spread=0.01):
    generator = torch.Generator().manual_seed(0)
    theta = model.initial(generator).repeat(peers, 1)
    return theta + spread * torch.randn(theta.shape, generator=generator)


def records(peers=2, batch=2):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(256, (peers, batch, model.CONTEXT + 1), generator=generator)


def test_stacked_gradients_are_those_of_each_peer_alone():
    theta, batch = start(), records()
    together, losses = model.gradients(theta, batch, torch.bmm)
    for peer in range(2):
        alone, loss = model.gradients(theta[peer : peer + 1], batch[peer : peer + 1], torch.bmm)
        torch.testing.assert_close(together[peer], alone[0], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(losses[peer], loss[0])


def test_gradient_is_the_slope_of_the_loss():
    theta, batch = start(1).double(), records(1)
    gradient, _ = model.gradients(theta, batch, torch.bmm)
    direction = gradient / gradient.norm()
    ahead, behind = (
        model.gradients(theta + sign * 1e-4 * direction, batch, torch.bmm)[1]
        for sign in (1.0, -1.0)
    )
    slope = (ahead - behind) / 2e-4
    assert float(slope) == pytest.approx(float(gradient.norm()), rel=1e-4)
    mixed, _ = model.gradients(theta.float(), batch)
    assert float((mixed - gradient).norm()) < 0.02 * float(gradient.norm())


def test_the_first_model_knows_nothing_and_the_future_is_hidden():
    theta, batch = start(1, spread=0.0), records(1)
    assert float(model.evaluate(theta, batch[0])) == pytest.approx(math.log(256), abs=0.1)
    changed = batch.clone()
    changed[:, :, -2:] = 0
    one, other = (
        model._losses(model._views(theta), x, torch.bmm).view(-1, model.CONTEXT)
        for x in (batch, changed)
    )
    torch.testing.assert_close(one[:, :-2], other[:, :-2])


def test_the_model_is_a_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=model.VOCABULARY,
        hidden_size=model.WIDTH,
        intermediate_size=model.HIDDEN,
        num_hidden_layers=model.LAYERS,
        num_attention_heads=model.HEADS,
        num_key_value_heads=model.HEADS,
        rms_norm_eps=model.EPSILON,
        tie_word_embeddings=True,
    )
    reference = LlamaForCausalLM(config)
    theta = start(1)
    ours = {name: view[0] for name, view in model._views(theta).items()}
    theirs = {"model.embed_tokens.weight": ours["embedding"], "model.norm.weight": ours["norm"]}
    for layer in range(model.LAYERS):
        at = f"model.layers.{layer}"
        qkv = ours[f"{layer}.qkv"].T.chunk(3)
        gate, up = ours[f"{layer}.gate_up"].T.chunk(2)
        theirs |= {f"{at}.self_attn.{n}_proj.weight": w for n, w in zip("qkv", qkv, strict=True)}
        theirs |= {
            f"{at}.self_attn.o_proj.weight": ours[f"{layer}.attended"].T,
            f"{at}.mlp.gate_proj.weight": gate,
            f"{at}.mlp.up_proj.weight": up,
            f"{at}.mlp.down_proj.weight": ours[f"{layer}.down"].T,
            f"{at}.input_layernorm.weight": ours[f"{layer}.norm_attention"],
            f"{at}.post_attention_layernorm.weight": ours[f"{layer}.norm_mlp"],
        }
    theirs["lm_head.weight"] = ours["embedding"]
    reference.load_state_dict(theirs)
    assert sum(p.numel() for p in reference.parameters()) == model.NUM_PARAMS
    batch = records(1)[0]
    with torch.no_grad():
        logits = reference(batch[:, :-1]).logits
    expected = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    torch.testing.assert_close(model.evaluate(theta, batch)[0], expected, rtol=1e-4, atol=1e-4)


def test_steps_are_those_of_torch(texts, monkeypatch):
    exact = functools.partial(model.gradients, product=torch.bmm)
    monkeypatch.setattr(model, "gradients", exact)
    options = Optimiser(batch_records=2, weight_decay=0.1)
    peers = Peers(texts, options, seed=3)
    reference = peers.theta.clone().requires_grad_()
    adamw = torch.optim.AdamW([reference], lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    twin = Peers(texts, options, seed=3)
    for _ in range(2):
        batch = torch.stack([twin._records(peer) for peer in range(4)])
        gradient, _ = model.gradients(reference.detach(), batch)
        twin._clip(gradient)
        reference.grad = gradient
        adamw.step()
        peers.step(range(4), [1e-3] * 4)
    torch.testing.assert_close(peers.theta, reference.detach(), rtol=1e-5, atol=1e-6)


def test_some_peers_step_as_they_would_among_all(texts):
    options = Optimiser(batch_records=2)
    one, other = Peers(texts, options, seed=0), Peers(texts, options, seed=0)
    before = other.theta.clone()
    one.step(range(4), [1e-3] * 4)
    other.step([1, 3], [1e-3] * 2)
    torch.testing.assert_close(other.theta[[1, 3]], one.theta[[1, 3]])
    assert torch.equal(other.theta[[0, 2]], before[[0, 2]])
    assert other.steps == [0, 1, 0, 1]


@pytest.mark.parametrize("late", [0, 2])
def test_pairs_keep_the_mean(late):
    what = run(peers=4, fragments=3, codec="int8", late_steps=late)
    theta = start(4)
    mean = theta.mean(dim=0)
    exchange = Exchange(what, theta, Links(None, 4))
    for slot in range(1, 8):
        exchange.slot(slot, float(slot))
        for peer in range(4):
            exchange.merge(peer, float(slot))
    for peer in range(4):
        exchange.merge(peer, 100.0)
    assert exchange.counts.merged > 0
    torch.testing.assert_close(theta.mean(dim=0), mean, rtol=0, atol=1e-6)


def test_everybody_together_becomes_the_mean_and_failures_are_counted():
    theta = start(4)
    mean = theta.mean(dim=0)
    exchange = Exchange(run(peers=4, group="all"), theta, Links(None, 4))
    exchange.slot(1, 1.0)
    for peer in range(4):
        exchange.merge(peer, 1.0)
    torch.testing.assert_close(theta, mean.expand_as(theta), rtol=0, atol=1e-6)

    failing = Exchange(run(peers=4, failing=1.0), theta, Links(None, 4))
    failing.slot(1, 1.0)
    assert failing.counts.missed >= 2


def test_weights_are_those_of_the_rule(texts):
    theta = start(2)
    mean = theta.mean(dim=0)
    fast = theta[1] * 2 / 3 + theta[0] / 3
    exchange = Exchange(run(rule="fedavg", peers=2, slowness=(2, 1)), theta, Links(None, 2))
    exchange.slot(1, 1.0)
    exchange.merge(0, 1.0)
    exchange.merge(1, 1.0)
    torch.testing.assert_close(theta, fast.expand_as(theta), rtol=0, atol=1e-6)

    theta = start(2)
    public = corpora.held_out(texts, model.CONTEXT + 1)[0][:4]
    better = int(model.evaluate(theta, public).argmin())
    best = theta[better].clone()
    exchange = Exchange(run(rule="dynamic", peers=2), theta, Links(None, 2), public)
    exchange.slot(1, 1.0)
    exchange.merge(0, 1.0)
    assert float((theta[0] - best).norm()) <= float((mean - best).norm())


def test_closing_windows_bring_peers_together():
    theta = start(4)
    apart = float((theta - theta.mean(dim=0)).norm())
    exchange = Exchange(run(peers=4, fragments=2, codec="float32"), theta, Links(None, 4))
    exchange.consolidate(10)
    assert float((theta - theta.mean(dim=0)).norm()) < 0.2 * apart


def test_transfers_queue_and_take_bandwidth_and_latency():
    link = Link(bandwidth_mbit_s=8.0, latency_s=0.5, model_params=2 * model.NUM_PARAMS)
    links = Links(link, 2)
    assert links.send(0, 1e6, 10.0) == pytest.approx(12.5)  # 2 MB at 1 MB/s
    assert links.send(0, 1e6, 10.0) == pytest.approx(14.5)
    assert links.send(1, 1e6, 10.0) == pytest.approx(12.5)
    assert links.all_reduce(1e6, 20.0) == pytest.approx(20.0 + 2 * 1.0 + 2 * 0.5)
    assert links.bytes_sent == [3e6, 2e6]


def test_a_run_can_be_repeated_and_counts_its_bytes(texts):
    what = run(fragments=4, codec="int8", exports=True, steps=8)
    one, other = simulate(what, texts), simulate(what, texts)
    assert {**one, "cpu_s": 0} == {**other, "cpu_s": 0}
    assert set(one["exports"]) == {"2/8", "4/8", "6/8"}
    values = -(-model.NUM_PARAMS // 4)
    expected = Form("int8", values).num_bytes / (4 * model.NUM_PARAMS)
    assert one["sent_share"] == pytest.approx(expected, rel=1e-3)
    assert len(one["curve"]) == 8
    assert max(one["closed"]) - min(one["closed"]) < 0.01


def test_a_barrier_waits_for_the_slowest_and_for_the_transfer(texts):
    link = Link(bandwidth_mbit_s=1e9, latency_s=1.0, step_s=1.0)
    slow = simulate(run(barrier=True, group="all", slowness=(1, 2), link=link, peers=2), texts[:2])
    assert slow["steps"] == [1, 1]  # 2 s, then 2 s of latency
    free = simulate(run(slowness=(1, 2), link=link, peers=2), texts[:2])
    assert free["steps"] == [4, 2]


def test_synchronous_peers_stay_together(texts):
    figures = simulate(run(rule="synchronous", group="all", barrier=True), texts)
    assert figures["distance"] == 0.0
    assert figures["sent_share"] == pytest.approx(1.5)

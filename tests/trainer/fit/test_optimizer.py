"""The learning rate: scaled with the batch, warmed up, let down; and what cannot be is refused."""

import math

import pytest
import torch
from runs import fit, tiny, trace

from shardio.errors import PlanError
from trainer.fit.optimizer import OptimizerOptions, build_optimizer, follow_batch, split_groups


@pytest.mark.parametrize(("rule", "peak"), [("none", 0.1), ("linear", 1.6), ("sqrt", 0.4)])
def test_the_highest_rate_follows_the_effective_batch_by_its_rule(rule, peak):
    assert OptimizerOptions(learning_rate=0.1, scaling=rule).peak(16) == pytest.approx(peak)


def test_the_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    options = OptimizerOptions(warmup_steps=4, final_fraction=0.2)
    factors = [options.factor(step, 14) for step in range(15)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert factors[9] == pytest.approx(0.6)  # half way down
    assert factors[14] == pytest.approx(0.2)
    assert options.factor(1000, 14) == pytest.approx(0.2)  # training that goes on


def test_a_final_fraction_of_one_keeps_the_rate():
    options = OptimizerOptions(final_fraction=1.0)
    assert {options.factor(step, 10) for step in range(12)} == {1.0}


@pytest.mark.parametrize(("name", "kind"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_the_schedule_sets_the_rate_of_the_optimizer_step_by_step(name, kind):
    options = OptimizerOptions(name=name, learning_rate=0.5, scaling="sqrt", warmup_steps=1, weight_decay=0.25)
    built = build_optimizer([torch.nn.Parameter(torch.ones(3))], options, effective_batch=4, steps=3)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]["scheduler"]
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["weight_decay"] == 0.25
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1.0, 0.5])


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_matrices_decay_scales_and_biases_do_not(name):
    """Without gradients decay is all that an optimizer does."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    before = {name: weight.detach().clone() for name, weight in network.named_parameters()}
    for weight in network.parameters():
        weight.grad = torch.zeros_like(weight)
    options = OptimizerOptions(name=name, learning_rate=0.5, final_fraction=1.0, weight_decay=0.25)
    built = build_optimizer(network.parameters(), options, 1, 3)
    built["optimizer"].step()
    after = dict(network.named_parameters())
    assert torch.allclose(after["0.weight"], before["0.weight"] * (1.0 - 0.5 * 0.25))
    assert all(torch.equal(after[name], before[name]) for name in ("0.bias", "1.weight", "1.bias"))


def test_a_checkpoint_of_one_group_goes_on_with_the_state_of_each_weight():
    def network():
        return torch.nn.Sequential(torch.nn.LayerNorm(2), torch.nn.Linear(2, 3), torch.nn.Linear(3, 4))

    options, old = OptimizerOptions(), network()
    optimizer = torch.optim.AdamW(old.parameters(), lr=options.learning_rate, weight_decay=options.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: options.factor(step, 9))
    for number, weight in enumerate(old.parameters()):
        weight.grad = torch.full_like(weight, number + 1.0)
    optimizer.step()
    checkpoint = {"lr_schedulers": [schedule.state_dict()], "optimizer_states": [optimizer.state_dict()]}
    new = network()
    built = build_optimizer(new.parameters(), options, 1, 9)
    for _ in range(2):  # once is enough
        split_groups(checkpoint, new.parameters())
    built["optimizer"].load_state_dict(checkpoint["optimizer_states"][0])
    built["lr_scheduler"]["scheduler"].load_state_dict(checkpoint["lr_schedulers"][0])
    for mine, its in zip(new.parameters(), old.parameters(), strict=True):
        assert torch.equal(built["optimizer"].state[mine]["exp_avg"], optimizer.state[its]["exp_avg"])
    assert [group["weight_decay"] for group in built["optimizer"].param_groups] == [0.01, 0.0]
    assert built["lr_scheduler"]["scheduler"].base_lrs == [options.learning_rate] * 2


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"name": "adam"}, "optimizer name 'adam' is unknown. Use one of: adamw, sgd."),
        ({"scaling": "log"}, "optimizer scaling 'log' is unknown. Use one of: none, linear, sqrt."),
        ({"learning_rate": 0.0}, "Use a learning rate above 0"),
        ({"learning_rate": math.nan}, "Use a learning rate above 0"),
        ({"warmup_steps": -1}, "0 steps or more"),
        ({"final_fraction": -0.1}, "final_fraction is -0.1. Use 0 to 1."),
        ({"final_fraction": 1.5}, "final_fraction is 1.5. Use 0 to 1."),
    ],
)
def test_what_cannot_be_is_refused(wrong, words):
    with pytest.raises(PlanError) as raised:
        OptimizerOptions(**wrong)
    assert words in str(raised.value)


def test_a_resumed_run_with_twice_the_batch_keeps_its_place_in_the_schedule():
    options = OptimizerOptions(learning_rate=1.0, scaling="linear")

    def parts(batch, steps):
        made = build_optimizer([torch.nn.Parameter(torch.zeros(1))], options, batch, steps)
        return made["optimizer"], made["lr_scheduler"]["scheduler"]

    optimizer, schedule = parts(2, 100)
    for _ in range(50):
        optimizer.step()
        schedule.step()
    checkpoint = {"lr_schedulers": [schedule.state_dict()], "optimizer_states": [optimizer.state_dict()]}
    follow_batch(checkpoint, options, before=2, now=4)
    resumed, after = parts(4, 50)
    resumed.load_state_dict(checkpoint["optimizer_states"][0])
    after.load_state_dict(checkpoint["lr_schedulers"][0])
    rates = [resumed.param_groups[0]["lr"]]
    for _ in range(25):
        resumed.step()
        after.step()
        rates.append(resumed.param_groups[0]["lr"])
    assert rates == pytest.approx([4.0 * options.factor(step, 50) for step in range(25, 51)], abs=1e-12)


def test_the_rate_of_each_step_is_logged(tmp_path):
    run = fit(tmp_path, *tiny("--model.optimizer.warmup_steps=1", "--trainer.max_steps=3", "--data.batch_size=4"))
    rates = [float(rate) for rate in trace(run.output, "train/learning_rate").values()]
    assert rates == pytest.approx([0.0005, 0.001, 0.0005])

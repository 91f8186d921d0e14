"""What `auto` becomes on a machine."""

import dataclasses
import os

import pytest
import torch
from support.marks import pretend_card

from fastgn.config.cli import parse_config
from fastgn.config.groups import StepConfig
from fastgn.data.cores import count_cores
from fastgn.distributed import World
from fastgn.errors import UserError
from fastgn.models.network import choose_kernels
from fastgn.resolved import (
    Batching,
    check_device,
    choose_grad_sync,
    has_cuda_graphs,
    is_compiled,
)
from fastgn.step.precision import choose_short_precision

ONE_MACHINE = "all processes are on one machine"
NOT_COMPILED = "the step is not compiled for CUDA"
FOUR = "an update has 4 micro-batches"


def step_config(*args: str) -> StepConfig:
    return parse_config(args).step


def world_of(monkeypatch: pytest.MonkeyPatch, nodes: int, device: str) -> World:
    """The first of two ranks on each of some machines."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    pretend_card(monkeypatch, "Tesla V100", (7, 0))
    return World(0, 2 * nodes, torch.device(device))


@pytest.mark.parametrize(
    ("nodes", "device", "micro_batches", "grad_sync", "reason"),
    [
        (1, "cpu", 1, "flat", ONE_MACHINE),
        (1, "cpu", 4, "flat", ONE_MACHINE),
        (1, "cuda", 1, "flat", ONE_MACHINE),
        (1, "cuda", 4, "flat", ONE_MACHINE),
        (2, "cpu", 1, "flat", NOT_COMPILED),
        (2, "cpu", 4, "flat", NOT_COMPILED),
        (2, "cuda", 1, "overlap", "the processes are on 2 machines"),
        (2, "cuda", 4, "flat", FOUR),
        (8, "cuda", 1, "overlap", "the processes are on 8 machines"),
    ],
)
def test_overlap_is_chosen_for_one_micro_batch_on_several_machines(
    nodes: int,
    device: str,
    micro_batches: int,
    grad_sync: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And CUDA graphs are off only if the sums do overlap."""
    cfg, world = step_config(), world_of(monkeypatch, nodes, device)
    assert choose_grad_sync(cfg, world, micro_batches) == (grad_sync, reason)
    graphs = device == "cuda" and grad_sync == "flat"
    assert has_cuda_graphs(cfg, world, micro_batches) == graphs


@pytest.mark.parametrize(
    ("args", "grad_sync", "reason"),
    [
        (("--grad-sync", "overlap"), "overlap", "--grad-sync says so"),
        (("--grad-sync", "flat"), "flat", "--grad-sync says so"),
        (("--cuda-graphs", "on"), "flat", "--cuda-graphs is on"),
        (("--compile", "off"), "flat", NOT_COMPILED),
        (
            ("--schedule", "central-difference"),
            "flat",
            "--schedule central-difference has several backwards",
        ),
    ],
)
def test_options_that_decide_about_overlap(
    args: tuple[str, ...], grad_sync: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(monkeypatch, 2, "cuda")
    assert choose_grad_sync(step_config(*args), world, 1) == (grad_sync, reason)
    alone = World(0, 1, torch.device("cuda"))
    assert choose_grad_sync(step_config(*args), alone, 1) == ("flat", "there is one process")


def test_old_cards_run_without_triton_and_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """They refuse cards below compute capability 7.0, which PyTorch itself still supports."""
    card = pretend_card(monkeypatch, "Tesla P100", (6, 0))
    cfg, world = step_config(), World(0, 1, card)
    assert not is_compiled(cfg, card) and not has_cuda_graphs(cfg, world, 1)
    assert choose_kernels("auto", card) == "reference"
    check_device(step_config("--precision", "fp16"), card)
    reason = "needs compute capability 7.0, but Tesla P100 has only 6.0: leave --"
    with pytest.raises(UserError, match=f"^--compile on {reason}compile on out"):
        check_device(step_config("--compile", "on"), card)
    with pytest.raises(UserError, match=f"^--kernels triton {reason}kernels out"):
        choose_kernels("triton", card)
    card = pretend_card(monkeypatch, "Tesla V100", (7, 0))
    assert is_compiled(cfg, card) and has_cuda_graphs(cfg, world, 1)
    assert choose_kernels("auto", card) == "triton"
    check_device(step_config("--compile", "on"), card)


def test_advice_for_a_card_with_too_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability, precision in (((8, 0), "bf16"), ((7, 0), "fp16"), ((5, 2), None)):
        card = pretend_card(monkeypatch, "a card", capability)
        assert choose_short_precision(card) == precision
    assert choose_short_precision(torch.device("cpu")) == "bf16"


def test_a_divided_batch_has_several_micro_batches() -> None:
    """Whether --grad-accum-steps or the plan of --schedule auto divides it."""
    batching = Batching(batch_size=64, grad_accum_steps=1, ranks=2)
    assert [batching.count_micro_batches(n) for n in (64, 16)] == [1, 4]
    accumulated = dataclasses.replace(batching, grad_accum_steps=2)
    assert [accumulated.count_micro_batches(n) for n in (64, 32)] == [2, 4]


def test_cores_are_those_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the operating system tells them, else those of the machine."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5, 7}, raising=False)
    assert count_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    assert count_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores() == 1

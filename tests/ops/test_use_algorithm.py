"""``use_algorithm``: which calls it applies to, and what is logged of each choice."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import weakref
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import awconv
from awconv.ops import functional
from awconv.ops.algorithm import Algorithm
from awconv.ops.choose import ALGORITHMS, _asked_in_thread, choose, wanted
from awconv.ops.problem import Problem, describe
from tests.ops.problems import TYPICAL

CASE = TYPICAL["per_tap"]  # which all but the gains can run


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The algorithms that were run, in turn."""
    names: list[str] = []

    def noted(name: str) -> Callable[..., Tensor]:
        run = ALGORITHMS[name].run
        return lambda *arguments: (names.append(name), run(*arguments))[1]

    monkeypatch.setattr(functional, "_remembered_plan", functional._remembered_plan.__wrapped__)
    for name, algorithm in list(ALGORITHMS.items()):
        monkeypatch.setitem(ALGORITHMS, name, algorithm._replace(run=noted(name)))
    return names


def usual(ran: list[str]) -> str:
    """What is chosen without any block."""
    CASE.run()
    return ran.pop()


def test_a_block_holds_calls_that_leave_the_choice_open(ran: list[str]) -> None:
    chosen = usual(ran)
    with awconv.use_algorithm("per_sample"):
        CASE.run()
        CASE.run("per_tap")
    CASE.run()
    assert ran == ["per_sample", "per_tap", chosen]
    assert chosen not in ran[:2]


@pytest.mark.parametrize("open_again", [None, "auto"])
def test_blocks_nest_and_give_the_choice_back(open_again: str | None, ran: list[str]) -> None:
    chosen = usual(ran)
    with awconv.use_algorithm("per_sample"):
        with awconv.use_algorithm(open_again):
            CASE.run()
            with pytest.raises(RuntimeError), awconv.use_algorithm("naive"):
                raise RuntimeError
            CASE.run()
        CASE.run()
    assert ran == [chosen, chosen, "per_sample"]


@pytest.mark.parametrize("name", ["fastest", "", 3])
def test_an_unknown_name_lists_those_there_are(name: str) -> None:
    with (
        pytest.raises(ValueError, match=r"None, 'auto' or one of \['output_gain', .*'naive'\], got "),
        awconv.use_algorithm(name),
    ):
        pass


def test_what_cannot_run_a_problem_says_so_and_names_the_block() -> None:
    with (
        awconv.use_algorithm("output_gain"),
        pytest.raises(ValueError, match=r"'output_gain' cannot run this problem.*no use_algorithm around it"),
    ):
        CASE.run()


def in_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_threads_choose_for_themselves(ran: list[str]) -> None:
    chosen = usual(ran)

    def other() -> None:
        CASE.run()
        with awconv.use_algorithm("naive"):
            CASE.run()
            inside.set()
            assert left.wait(10)
            CASE.run()

    inside, left = threading.Event(), threading.Event()
    with awconv.use_algorithm("per_sample"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        CASE.run()
    left.set()
    thread.join()
    CASE.run()
    assert ran == [chosen, "naive", "per_sample", "naive", chosen]


def test_tasks_choose_for_themselves(ran: list[str]) -> None:
    chosen = usual(ran)

    async def held(entered: asyncio.Event, left: asyncio.Event) -> None:
        with awconv.use_algorithm("per_sample"):
            entered.set()
            await left.wait()
            CASE.run()

    async def both() -> None:
        entered, left = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(held(entered, left))
        await entered.wait()
        CASE.run()
        left.set()
        await task

    asyncio.run(both())
    assert ran == [chosen, "per_sample"]


def test_tasks_that_end_in_any_order_leave_no_choice_behind() -> None:
    async def first(inside: asyncio.Event, go: asyncio.Event) -> None:
        with awconv.use_algorithm("per_sample"):
            inside.set()
            await go.wait()

    async def second(left: asyncio.Event) -> None:
        with awconv.use_algorithm("naive"):
            await left.wait()

    async def both() -> None:
        inside, go, left = asyncio.Event(), asyncio.Event(), asyncio.Event()
        one = asyncio.create_task(first(inside, go))
        await inside.wait()
        two = asyncio.create_task(second(left))
        await asyncio.sleep(0)
        go.set()
        await one
        left.set()
        await two

    asyncio.run(both())
    assert wanted("auto") == _asked_in_thread.algorithm == "auto"


def test_a_generator_may_be_closed_in_another_context() -> None:
    def held() -> Iterator[None]:
        with awconv.use_algorithm("naive"):
            yield

    generator = held()
    contextvars.copy_context().run(next, generator)
    generator.close()
    assert wanted("auto") == _asked_in_thread.algorithm == "auto"


def test_a_backward_follows_its_forward_outside_the_block_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ways: list[str] = []
    backward = awconv.ops.per_tap._backward
    monkeypatch.setattr(awconv.ops.per_tap, "_backward", lambda *a: (ways.append("per_tap"), backward(*a))[1])
    weight = CASE.tensors["weight"].clone().requires_grad_()
    with awconv.use_algorithm("per_tap"):
        output = CASE.run(weight=weight)
    in_thread(lambda: output.sum().backward())
    assert ways == ["per_tap"]
    assert weight.grad is not None


class Layer(nn.Module):
    def forward(self, input: Tensor, weight: Tensor, attention: Tensor) -> Tensor:
        return awconv.aw_conv2d(input, weight, attention, padding=1)


TENSORS = (torch.randn(2, 4, 6, 6), torch.randn(6, 4, 3, 3), torch.rand(2, 6, 1, 3, 3))


@pytest.fixture
def compiled() -> Iterator[tuple[nn.Module, list[str]]]:
    """A compiled layer, and the algorithms of its graphs that were run, by the operator that tells each from others."""
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        code = "".join(part.code for part in graph.modules() if isinstance(part, torch.fx.GraphModule))
        signs = {"per_sample": "conv2d", "naive": "einsum"}
        name = next((name for name, sign in signs.items() if sign in code), "another")
        return lambda *arguments: (seen.append(name), graph.forward(*arguments))[1]

    torch._dynamo.reset()
    yield torch.compile(Layer(), fullgraph=True, backend=backend), seen
    torch._dynamo.reset()


def test_a_compiled_function_runs_what_is_asked_for_around_its_call(compiled: tuple[nn.Module, list[str]]) -> None:
    layer, seen = compiled
    names = [None, "per_sample", "naive", "per_sample", None, "auto"]
    for name in names:
        with awconv.use_algorithm(name):
            torch.testing.assert_close(layer(*TENSORS), Layer()(*TENSORS))
    with awconv.use_algorithm("per_sample"):
        in_thread(lambda: layer(*TENSORS))
    assert seen == ["another", "per_sample", "naive", "per_sample", *["another"] * 3]


def test_a_block_inside_a_compiled_function_holds() -> None:
    def function(*tensors: Tensor) -> Tensor:
        with awconv.use_algorithm("output_gain"):
            return awconv.aw_conv2d(*tensors)

    torch._dynamo.reset()
    compiled = torch.compile(function, backend="eager")
    with pytest.raises(ValueError, match="'output_gain' cannot run"):
        compiled(*TENSORS)
    torch._dynamo.reset()


def test_an_exported_program_keeps_what_it_was_exported_with() -> None:
    for strict in (False, True):
        with awconv.use_algorithm("fused"):
            program = torch.export.export(Layer(), TENSORS, strict=strict)
        assert "awconv.fused.default" in [str(node.target) for node in program.graph.nodes]


def test_a_registered_algorithm_can_be_asked_for_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Problem] = []

    def run(problem: Problem, *tensors: Tensor) -> Tensor:
        runs.append(problem)
        return ALGORITHMS["naive"].run(problem, *tensors)

    new = Algorithm("new", run, lambda problem: None, lambda problem, machine: -1.0)
    monkeypatch.setitem(ALGORITHMS, "new", new)
    monkeypatch.setattr(functional, "_remembered_plan", functional._remembered_plan.__wrapped__)
    CASE.run("new")
    with awconv.use_algorithm("new"):
        CASE.run()
    CASE.run()  # the cheapest
    assert len(runs) == 3
    with pytest.raises(ValueError, match="'new'"):
        CASE.run("fastest")


def problem(channels: int = 6) -> Problem:
    shapes = ((2, 4, 6, 6), (channels, 4, 3, 3), (2, channels, 1, 3, 3))
    return describe(2, *map(torch.empty, shapes), None, 1, 1, 1, 1, True)


def test_a_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "awconv.ops.choose")
    chosen = choose(problem(), "auto", "aw_conv2d").name
    (message,) = caplog.messages
    assert f"aw_conv2d: {chosen}, least cost" in message
    assert "size=(6, 6)" in message
    assert "per_tap: " in message
    assert "output_gain: the attention must have size 1" in message
    choose(problem(), "per_sample", "aw_conv2d")
    assert "aw_conv2d: per_sample, asked for" in caplog.messages[-1]


def test_a_plan_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "awconv.ops.choose")
    functional._remembered_plan.cache_clear()
    for _ in range(2):
        CASE.run()
    assert len(caplog.messages) == 1
    with awconv.use_algorithm("naive"):
        CASE.run()
    assert "naive, asked for" in caplog.messages[-1]
    assert len(caplog.messages) == 2


def test_a_compiled_choice_is_logged_when_it_is_traced(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "awconv.ops.choose")
    torch._dynamo.reset()
    compiled = torch.compile(Layer(), fullgraph=True, backend="eager")
    for _ in range(2):
        compiled(*TENSORS)
    torch._dynamo.reset()
    (message,) = [record.message for record in caplog.records if record.name == "awconv.ops.choose"]
    assert message.endswith("compiled")


@pytest.mark.parametrize("more", [dict(stride=True), dict(groups=1.0), dict(padding=False)])
def test_a_remembered_plan_is_not_taken_for_equal_arguments_of_another_type(more: dict) -> None:
    arguments = dict(stride=1, padding=0, groups=1)
    awconv.aw_conv2d(*TENSORS, **arguments)
    with pytest.raises((TypeError, ValueError), match=next(iter(more))):
        awconv.aw_conv2d(*TENSORS, **(arguments | more))


def test_lists_are_taken_as_tuples_are() -> None:
    lists = awconv.aw_conv2d(*TENSORS, stride=[2, 1], padding=[1, 1], dilation=[1, 1])
    assert torch.equal(lists, awconv.aw_conv2d(*TENSORS, stride=(2, 1), padding=(1, 1), dilation=(1, 1)))


def test_a_plan_does_not_keep_tensors_alive() -> None:
    functional._remembered_plan.cache_clear()
    tensors = [tensor.clone() for tensor in TENSORS]
    alive = [weakref.ref(tensor) for tensor in tensors]
    awconv.aw_conv2d(*tensors)
    assert functional._remembered_plan.cache_info().currsize == 1
    del tensors
    assert [reference() for reference in alive] == [None] * 3

"""`verify` as a person or a script calls it."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from shoal import env
from shoal.cluster import Cluster
from shoal.errors import Refused, ShoalError, Stopped, UsageError, WorldError
from shoal.job import check_before_start, resolve
from shoal.launch import Ranks
from shoal.recipe import Component, Recipe
from shoal.recipe.component import read
from shoal.strategy import Strategy
from shoal.verify.certificate import Certificate, Difference


def verify(
    recipe: Recipe | None = None,
    strategy: str | Strategy = "auto",
    *,
    model_fn: Callable[[], Any] | None = None,
    batch_fn: Callable[[int], Any] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    weight_fn: Callable[[Any], Any] | None = None,
    optimizer: str | Mapping[str, Any] = "adamw",
    normalize_over: int | None = None,
    steps: int = 3,
) -> Certificate:
    """Compare `strategy` with one device, in float64, over `steps` training steps.

    Give a recipe, or functions: ``model_fn() -> nn.Module``; ``batch_fn(step) -> (inputs,
    targets)``, the global batch; ``loss_fn(outputs, targets) -> (sum, count)``, or a mean over
    the first dimension of the targets; ``weight_fn(targets) -> count`` overrides that count.
    ``optimizer`` is `sgd`, `adam`, `adamw`, or a mapping with `name` and its options;
    ``normalize_over`` the examples of a statistics group of batch norm, None for the batch.

    Returns a certificate, also where nothing could be compared (``ok`` False, ``refused`` says
    why). Only a keyboard interrupt or a stop leaves as an exception.
    """
    functions = (model_fn, batch_fn, loss_fn)
    given = str(strategy)
    started = time.perf_counter()
    try:
        if steps < 1:
            raise UsageError(f"steps must be 1 or more, given {steps}")
        if recipe is not None and any(each is not None for each in functions):
            raise UsageError("give a recipe, or model_fn, batch_fn and loss_fn: not both")
        if recipe is None and any(each is None for each in functions):
            raise UsageError("give a recipe, or all of model_fn, batch_fn and loss_fn")
        if recipe is not None:
            task, resolved, threads = _of_recipe(recipe, strategy, steps)
        else:
            work = (*functions, weight_fn, _optimizer(optimizer), normalize_over)
            task, resolved, threads = _of_functions(work, strategy, steps)
        given = str(resolved)
        findings = _run(task, resolved.world_size, threads)
    except Stopped:
        raise
    except ShoalError as error:
        return Certificate(False, given, steps, refused=str(error))
    return _certificate(given, steps, findings, time.perf_counter() - started)


def _of_recipe(
    recipe: Recipe, strategy: str | Strategy, steps: int
) -> tuple[Callable[[Any], Any], Strategy, int]:
    resolved = resolve(recipe, strategy, Cluster.local())
    _require_float64(resolved.strategy)
    check_before_start(recipe)
    values = recipe.to_dict()

    def task(make: Any) -> Any:
        return make(work=values, strategy=str(resolved.strategy), steps=steps)

    return task, resolved.strategy, resolved.threads


def _of_functions(
    work: tuple[Any, ...], strategy: str | Strategy, steps: int
) -> tuple[Callable[[Any], Any], Strategy, int]:
    parsed = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    if parsed.is_auto:
        raise Refused("verify needs a strategy, as in strategy='dp2'")
    _require_float64(parsed)
    parsed.check_runnable(batch_size=max(parsed.dp, 1))
    threads = max(1, Cluster.local().cores // parsed.world_size)

    def task(make: Any) -> Any:
        from shoal.verify.on_rank import Functions

        return make(work=Functions(*work), strategy=str(parsed), steps=steps)

    return task, parsed, threads


def _require_float64(strategy: Strategy) -> None:
    if strategy.bf16:
        raise Refused(
            f"strategy {strategy}: verification is in float64, and bf16 is autocast",
            hint="Verify the split without +bf16: it is the same split.",
        )


def _optimizer(given: str | Mapping[str, Any]) -> Component:
    """A component, with a learning rate where only a name is given."""
    values = {"name": given} if isinstance(given, str) else dict(given)
    if values.get("name") == "sgd":
        values = {"lr": 0.1, "momentum": 0.9, **values}
    try:
        return read("optimizer", values)
    except ValueError as error:
        raise UsageError(f"optimizer {given!r}: {error}") from error


def _run(task: Callable[[Any], Any], ranks: int, threads: int) -> dict[str, Any]:
    if env.torchrun_world() is not None:
        raise WorldError(
            "verify starts ranks of its own, and WORLD_SIZE says that others were started",
            hint="Call it without torchrun.",
        )
    from shoal.verify.on_rank import VerifyTask, verify_on_rank

    with Ranks(ranks, threads=threads) as started:
        findings: dict[str, Any] = started.call(verify_on_rank, task(VerifyTask))[0]
    return findings


def _certificate(
    strategy: str, steps: int, findings: dict[str, Any], seconds: float
) -> Certificate:
    first = findings["first_difference"]
    return Certificate(
        ok=first is None,
        strategy=strategy,
        steps=steps,
        max_error=findings["max_error"],
        first_difference=Difference(**first) if first is not None else None,
        cause=findings["cause"],
        seconds=round(seconds, 2),
    )

"""`verify` as a person or a script calls it."""

import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from shoal import env
from shoal.cluster import Cluster
from shoal.errors import Refused, ShoalError, Stopped, UsageError, WorldError
from shoal.job import check_before_start, resolve
from shoal.launch import Ranks
from shoal.recipe import Component, Recipe
from shoal.recipe.component import read
from shoal.strategy import Strategy
from shoal.verify.applies import require_one_device
from shoal.verify.certificate import Certificate, Difference, Moved
from shoal.verify.dtypes import dtype_name


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
    dtype: Any = None,
) -> Certificate:
    """Compare `strategy` with one device over `steps` training steps.

    Give a recipe, or functions: ``model_fn() -> nn.Module``; ``batch_fn(step) -> (inputs,
    targets)``, the global batch; ``loss_fn(outputs, targets) -> (sum, count)``, or a mean over
    the first dimension of the targets; ``weight_fn(targets) -> count`` overrides that count.
    ``optimizer`` is `sgd`, `adam`, `adamw`, or a mapping with `name` and its options;
    ``normalize_over`` the examples of a statistics group of batch norm, None for the batch.
    ``dtype`` is what the ranks compute in: torch.float64 (default: equal to 1e-10), or
    torch.float32 or torch.bfloat16 (autocast; the default of a strategy with +bf16): then what one
    device's own rounding shows is allowed.

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
            work, resolved, threads = _of_recipe(recipe, strategy, dtype)
        else:
            given_work = (*functions, weight_fn, _optimizer(optimizer), normalize_over)
            work, resolved, threads = _of_functions(given_work, strategy, dtype)
        given = str(resolved)
        name = _dtype(dtype, resolved)

        def task(make: Any) -> Any:
            return make(work=work(), strategy=given, steps=steps, dtype=name)

        findings = _run(task, resolved.world_size, threads)
    except Stopped:
        raise
    except ShoalError as error:
        return Certificate(False, given, steps, refused=str(error))
    return _certificate(given, steps, name, findings, time.perf_counter() - started)


def _of_recipe(
    recipe: Recipe, strategy: str | Strategy, dtype: Any
) -> tuple[Callable[[], Any], Strategy, int]:
    resolved = resolve(recipe, strategy, Cluster.local())
    require_one_device(resolved.strategy)
    check_before_start(recipe)
    values = recipe.to_dict()
    return lambda: values, _with_dtype(resolved.strategy, dtype), resolved.threads


def _of_functions(
    work: tuple[Any, ...], strategy: str | Strategy, dtype: Any
) -> tuple[Callable[[], Any], Strategy, int]:
    parsed = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    if parsed.is_auto:
        raise Refused("verify needs a strategy, as in strategy='dp2'")
    parsed.check_runnable(batch_size=max(parsed.dp, 1))
    require_one_device(parsed)
    threads = max(1, Cluster.local().cores // parsed.world_size)

    def functions() -> Any:
        from shoal.verify.on_rank import Functions

        return Functions(*work)

    return functions, _with_dtype(parsed, dtype), threads


def _dtype(dtype: Any, strategy: Strategy) -> str:
    return dtype_name(dtype, bf16=strategy.bf16)


def _with_dtype(strategy: Strategy, dtype: Any) -> Strategy:
    """bf16 is autocast, which a strategy says."""
    return replace(strategy, bf16=_dtype(dtype, strategy) == "bfloat16")


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

    # Made here: whatever becomes of the ranks, it goes.
    with (
        tempfile.TemporaryDirectory(prefix="shoal-verify-", ignore_cleanup_errors=True) as folder,
        Ranks(ranks, threads=threads) as started,
    ):
        told = replace(task(VerifyTask), folder=folder)
        findings: dict[str, Any] = started.call(verify_on_rank, told)[0]
    return findings


def _certificate(
    strategy: str, steps: int, dtype: str, findings: dict[str, Any], seconds: float
) -> Certificate:
    first, moved = findings["first_difference"], findings["checkpoint"]
    low = findings["one_device"]
    return Certificate(
        ok=first is None,
        strategy=strategy,
        steps=steps,
        max_error=findings["max_error"],
        first_difference=Difference(**first) if first is not None else None,
        cause=findings["cause"],
        dtype=dtype,
        seconds=round(seconds, 2),
        gradient_norm=findings["gradient_norm"],
        checkpoint=Moved(**moved) if moved is not None else None,
        one_device=low or {},
        of_allowed=findings["of_allowed"] if low is not None else None,
        split=tuple(findings["split"]),
    )

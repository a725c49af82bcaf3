"""The notation: everything it knows is read and written back; everything else is named."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import RecipeError, Refused, StrategyError
from shoal.strategy import (
    Agreement,
    Async,
    Compress,
    DiLoCo,
    Easgd,
    Gossip,
    Local,
    Schedule,
    Solo,
    Strategy,
    Sync,
    Zero,
)

AXES = ("pp", "dp", "cp", "tp", "ep")
whole = st.integers(1, 10_000)
positive = st.floats(1e-12, 1e12)
share = st.floats(0, 1)


def agreements(replicas: int) -> st.SearchStrategy[Agreement]:
    servers = st.integers(0, replicas - 1)
    non_negative = st.floats(0, 1e9)
    copies = st.integers(0, 1) if replicas > 1 else st.just(0)
    return st.one_of(
        st.just(Sync()),
        st.builds(Async, whole, servers=servers, compensate=non_negative, damp=non_negative),
        st.builds(Async, whole, servers=st.just(0), copies=copies),
        st.builds(Local, whole, after=whole, state=st.sampled_from(["own", "average"])),
        st.builds(
            DiLoCo,
            whole,
            lr=positive,
            momentum=share,
            fragments=whole,
            overlap=st.booleans(),
            wire=st.sampled_from(["float32", "bf16", "int8"]),
        ).filter(lambda made: not made.overlap or made.every > 1),
        st.builds(Easgd, whole, alpha=st.none() | st.floats(0, 1 / replicas)),
        st.builds(Gossip, st.sampled_from(["ring", "exponential", "complete"])),
        st.builds(Solo, full=st.booleans(), init=st.sampled_from(["same", "own"])),
    )


compressions = st.one_of(
    st.builds(Compress, st.sampled_from(["fp16", "bf16"])),
    st.builds(Compress, st.just("powersgd"), whole),
    st.builds(Compress, st.just("topk"), st.floats(1e-9, 100)),
)
schedules = st.one_of(
    st.builds(Schedule, st.sampled_from(["gpipe", "1f1b", "zb", "zbv"])),
    st.builds(Schedule, st.just("interleaved"), whole),
)


def divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]


@st.composite
def splits(draw: st.DrawFn) -> Strategy:
    """Strategies that contradict nothing, over the whole notation."""
    degrees = {axis: draw(st.integers(1, 12)) for axis in AXES}
    degrees["ep"] = draw(st.sampled_from(divisors(degrees["dp"] * degrees["cp"])))
    axes = tuple((axis, degrees[axis]) for axis in draw(st.permutations(AXES)))
    dp, replicas, zero = degrees["dp"], degrees["dp"], None
    if dp > 1 and draw(st.booleans()):
        group = draw(st.none() | st.sampled_from(divisors(dp)[1:]))
        zero = Zero(3 if group else draw(st.integers(1, 3)), group)
        replicas = dp // (group or dp)
    agreement = draw(agreements(replicas)) if zero is None or replicas > 1 else Sync()
    sends = dp * degrees["cp"] > 1 and not isinstance(agreement, Solo)
    sends = sends and getattr(agreement, "wire", "float32") == "float32"
    return Strategy(
        axes=axes,
        zero=zero,
        agreement=agreement,
        compress=draw(st.none() | compressions) if sends else None,
        mb=draw(st.none() | whole),
        sp=degrees["tp"] > 1 and draw(st.booleans()),
        offload=draw(st.booleans()),
        schedule=draw(st.none() | schedules) if degrees["pp"] > 1 else None,
        bf16=draw(st.booleans()),
        compile=draw(st.booleans()),
        channels_last=draw(st.booleans()),
        recompute=draw(st.sampled_from([None, "full", "selective"])),
        exact=draw(st.none() | whole),
    )


@given(splits())
def test_text_of_a_strategy_reads_back_equal_and_is_canonical(strategy: Strategy) -> None:
    again = Strategy.parse(str(strategy))
    assert again == strategy
    assert hash(again) == hash(strategy)
    assert str(again) == str(strategy)
    assert Strategy.from_json(strategy.to_json()) == strategy


@settings(max_examples=60)
@given(splits())
def test_resolved_says_everything_and_means_the_same(strategy: Strategy) -> None:
    resolved = strategy.resolved()
    assert Strategy.parse(resolved) == strategy
    assert Strategy.parse(resolved).resolved() == resolved
    assert f"/mb:{strategy.microbatches}" in resolved
    assert f"/{strategy.agreement.name}" in resolved


@settings(max_examples=40)
@given(splits(), st.randoms(use_true_random=False))
def test_options_and_executions_may_stand_in_any_order(strategy: Strategy, random: object) -> None:
    head, *executions = str(strategy).split("+")
    axes, *options = head.split("/")
    random.shuffle(options)  # type: ignore[attr-defined]
    random.shuffle(executions)  # type: ignore[attr-defined]
    text = "/".join([axes, *options]) + "".join(f"+{each}" for each in executions)
    assert Strategy.parse(text) == strategy


@given(st.text(alphabet="dpcte 0123456789./:+=-singleauozrmb1f", max_size=24))
def test_any_other_text_is_a_strategy_error(text: str) -> None:
    strategy, message = None, ""
    try:
        strategy = Strategy.parse(text)
    except StrategyError as error:
        message = str(error)
    assert repr(text) in message or strategy == Strategy.parse(str(strategy))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("dp1", "single"),
        ("pp1.dp2.tp1", "dp2"),
        ("dp02", "dp2"),
        (" dp2 ", "dp2"),
        ("dp2/sync", "dp2"),
        ("dp2/mb:1", "dp2"),
        ("dp2/async:0", "dp2"),
        ("dp4/zero3:4", "dp4/zero3"),
        ("pp2/1f1b/mb:8", "pp2"),
        ("dp2+exact:4+bf16", "dp2+bf16+exact:4"),
        ("dp2/local:4:after=0:state=own", "dp2/local:4"),
        ("dp2/diloco:8:lr=0.70:momentum=.9:wire=int8", "dp2/diloco:8:wire=int8"),
        ("dp2/diloco:8:lr=1e-3", "dp2/diloco:8:lr=0.001"),
        ("dp3/easgd:4:alpha=0.3", "dp3/easgd:4"),
        ("dp3/easgd:4:alpha=0.25", "dp3/easgd:4:alpha=0.25"),
        ("dp2/solo:init=own", "dp2/solo:init=own"),
        ("dp2/solo:full", "dp2/solo:full"),
        ("single/mb:1", "single"),
        ("auto/zero3+bf16", "auto/zero3+bf16"),
        ("single/local:4", "single/local:4"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    assert str(Strategy.parse(text)) == canonical


def test_the_parts_are_typed_values() -> None:
    strategy = Strategy.parse(
        "pp2.dp8.tp4/zero3:4/local:16:state=average/compress:topk=1/sp/zbv+bf16"
    )
    assert strategy.world_size == 64
    assert (strategy.pp, strategy.dp, strategy.cp, strategy.tp, strategy.ep) == (2, 8, 1, 4, 1)
    assert strategy.replicas == 2
    assert strategy.zero == Zero(3, 4)
    assert strategy.agreement == Local(16, state="average")
    assert strategy.compress == Compress("topk", 1.0)
    assert strategy.schedule == Schedule("zbv")
    assert strategy.microbatches == 8
    assert strategy.sp
    assert strategy.bf16
    assert not strategy.compile
    assert strategy.recompute is None
    assert Strategy.parse("dp4.ep2").world_size == 4
    assert Strategy.parse("dp2+recompute").recompute == "full"


def test_the_order_of_axes_is_their_placement() -> None:
    assert Strategy.parse("tp2.dp2") != Strategy.parse("dp2.tp2")
    assert Strategy.parse("tp2.dp2").axes == (("tp", 2), ("dp", 2))


def test_resolved_writes_the_defaults_out() -> None:
    assert Strategy.parse("single").resolved() == "single/sync/mb:1"
    assert Strategy.parse("dp2+bf16").resolved() == "dp2/sync/mb:1+bf16"
    assert Strategy.parse("pp2.dp2/zero3").resolved() == "pp2.dp2/zero3:2/sync/mb:8/1f1b"
    assert Strategy.parse("dp3/easgd:4").resolved().startswith("dp3/easgd:4:alpha=0.3")
    assert (
        Strategy.parse("dp2/diloco:8").resolved()
        == "dp2/diloco:8:lr=0.7:momentum=0.9:fragments=1:overlap=0:wire=float32/mb:1"
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", ["character 1", "dp2"]),
        ("ddp2", ["'ddp2'", "Did you mean dp2?", "pp, dp, cp, tp, ep"]),
        ("pp2.ddp4", ["character 5", "Did you mean dp4?"]),
        ("DP2", ["Did you mean dp2?"]),
        ("sinlge", ["Did you mean single?"]),
        ("dp", ["needs a degree", "dp2"]),
        ("dp2.5", ["'5'"]),
        ("dp2..tp2", ["character 5", "an axis is missing"]),
        ("auto.dp2", ["auto stands alone"]),
        ("dp2.zero1", ["is an option", "/zero1"]),
        ("dp2/tp2", ["is an axis", "dp2.tp2"]),
        ("dp2/bf16", ["is an execution", "+bf16"]),
        ("dp2+zero1", ["is an option", "/zero1"]),
        ("dp2+bf16/zero1", ["options stand before executions"]),
        ("dp2 /zero1", ["character 4", "' '"]),
        ("dp2/locla:3", ["character 5", "'locla'", "Did you mean local?"]),
        ("dp2/", ["character 5", "no option ''"]),
        ("dp2+bf61", ["Did you mean bf16?"]),
        ("dp2/local", ["needs a value", "local"]),
        ("dp2/local:x", ["'x'", "a whole number, 1 or more"]),
        ("dp2/local:4:aftr=2", ["'aftr=2'", "Did you mean after?"]),
        ("dp2/local:4:after", ["after needs a value"]),
        ("dp2/local:4:after=1:after=2", ["after is given twice"]),
        ("dp2/diloco:4:lr=inf", ["lr", "'inf'"]),
        ("dp2/diloco:4:wire=int4", ["int4", "bf16", "int8"]),
        ("dp2/gossip:rnig", ["Did you mean ring?"]),
        ("dp2/solo:ful", ["Did you mean full?"]),
        ("dp2/compress", ["powersgd"]),
        ("dp2/compress:powersgd", ["compress:powersgd=4"]),
        ("dp2/compress:bf16=3", ["no number"]),
        ("dp2/sp:2", ["sp takes no value"]),
        ("dp2/sync:2", ["sync takes nothing more"]),
        ("pp2/interleaved", ["interleaved:V"]),
        ("dp2+recompute:some", ["selective"]),
    ],
)
def test_text_that_does_not_follow_the_notation(text: str, says: list[str]) -> None:
    with pytest.raises(StrategyError) as caught:
        Strategy.parse(text)
    for piece in [repr(text), *says]:
        assert piece in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dp0", ["dp is 0", "dp1"]),
        ("dp-2", ["dp is -2"]),
        ("dp2.dp4", ["dp2 and dp4", "dp2 or dp4"]),
        ("dp99999999999", ["999999999 at most"]),
        ("single/zero1", ["dp is 1", "dp2/zero1"]),
        ("tp2/zero3", ["dp is 1", "tp2.dp2/zero3"]),
        ("dp4/zero4", ["stages 1, 2 and 3", "zero3"]),
        ("dp4/zero1:2", ["only zero3"]),
        ("dp12/zero3:5", ["5", "dp12", "zero3:4 or zero3:6"]),
        ("dp4/zero3:1", ["2 or more", "zero3:2"]),
        ("dp4/zero1/zero2", ["zero1 and zero2"]),
        ("dp2/zero1/zero1", ["given twice"]),
        ("dp4/local:2/diloco:4", ["two agreements", "local:2 or diloco:4"]),
        ("dp4/sync/local:2", ["two agreements"]),
        ("dp4/zero1/local:2", ["one group", "zero3:2"]),
        ("dp3/zero3/local:2", ["one group", "dp6/zero3:3"]),
        ("dp2/async:-1", ["-1", "0 or more", "async:0"]),
        ("dp2/async:1:servers=2", ["no worker", "servers=1"]),
        ("dp2/async:0:servers=1", ["async:0 is sync", "async:1:servers=1"]),
        ("dp2/local:0", ["1 or more", "local:1"]),
        ("dp2/diloco:4:lr=0", ["more than 0"]),
        ("dp2/diloco:1:overlap=1", ["no inner step", "diloco:2:overlap=1"]),
        ("dp2/diloco:4:wire=int8/compress:fp16", ["both say what is sent"]),
        ("dp2/easgd:4:alpha=1.5", ["1.5", "alpha=1"]),
        ("dp4/easgd:4:alpha=0.5", ["4 replicas", "easgd:4:alpha=0.25"]),
        ("dp2/solo/compress:fp16", ["nothing to compress"]),
        ("dp2/diloco:4:momentum=1.5", ["1.5", "momentum=1"]),
        ("dp2/compress:topk=120", ["100 at most"]),
        ("dp2/compress:bf16/compress:fp16", ["compress"]),
        ("dp2/solo/compress:bf16", ["solo sends nothing"]),
        ("single/compress:bf16", ["dp is 1"]),
        ("dp2/mb:0", ["mb", "1 or more", "mb:1"]),
        ("dp2/mb:2/mb:4", ["2 and 4"]),
        ("dp2/1f1b", ["pp is 1", "pp2"]),
        ("pp2/gpipe/zb", ["two schedules"]),
        ("pp2/interleaved:0", ["interleaved:1"]),
        ("dp4.ep3", ["ep3", "4", "ep2 or ep4"]),
        ("ep2", ["dp2.ep2"]),
        ("dp2/sp", ["tp is 1", "tp2"]),
        ("dp2+exact:0", ["exact:1"]),
        ("dp2+bf16+bf16", ["bf16 is given twice"]),
        ("auto/solo/compress:bf16", ["solo sends nothing"]),
    ],
)
def test_contradictions_are_refused_with_the_nearest_that_works(text: str, says: list[str]) -> None:
    with pytest.raises(Refused) as caught:
        Strategy.parse(text)
    for piece in [repr(text), *says]:
        assert piece in str(caught.value)


def test_fields_given_in_python_are_checked_alike() -> None:
    with pytest.raises(Refused, match="zero1 shards over dp"):
        Strategy(zero=Zero(1))
    with pytest.raises(Refused, match="mb"):
        Strategy(mb=0)
    with pytest.raises(StrategyError, match="each once"):
        Strategy(axes=(("dp", 2), ("dp", 3)))
    with pytest.raises(StrategyError, match="each once"):
        Strategy(axes=(("xp", 2),))
    with pytest.raises(Refused, match="1 or more"):
        Local(0)
    with pytest.raises(StrategyError, match="whole number"):
        Local(1.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "single",
        "dp2",
        "dp4+bf16",
        "dp2+compile+channels_last+recompute",
        "dp1/mb:1",
        "dp3/async:0",
        "dp2/local:4:after=8:state=average",
        "dp2/diloco:4:fragments=2:overlap=1:wire=int8",
        "dp2/easgd:4/compress:topk=1",
        "dp4/gossip:exponential",
        "dp2/gossip:complete/compress:powersgd=2",
        "dp2/solo",
        "dp2/zero1/compress:bf16",
        "dp4/zero3:2/local:4/compress:fp16",
    ],
)
def test_what_this_version_runs(text: str) -> None:
    Strategy.parse(text).check_runnable(batch_size=4, ranks_available=4)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("cp2", "cp2"),
        ("dp2.ep2", "ep2"),
        ("dp2/gossip:ring/compress:bf16", "compress:bf16 with gossip:ring"),
        ("dp2/async:2/compress:topk=1", "compress:topk=1 with async"),
        ("dp2/zero2/compress:bf16", "compress:bf16 with zero2"),
        ("dp2+recompute:selective", "recompute:selective"),
        ("dp2+exact:4", "exact:4"),
    ],
)
def test_what_this_version_can_not_run_is_refused_by_name(text: str, part: str) -> None:
    with pytest.raises(Refused) as caught:
        Strategy.parse(text).check_runnable(batch_size=64)
    assert part in caught.value.message
    assert "not in this version yet" in caught.value.message
    assert "dpN" in str(caught.value.hint)


def test_every_missing_part_is_named_at_once() -> None:
    with pytest.raises(Refused) as caught:
        Strategy.parse("cp2.tp2.dp2/zero1/sp+exact:4+recompute:selective").check_runnable(
            batch_size=64
        )
    for part in ("cp2", "exact:4", "recompute:selective"):
        assert part in caught.value.message


def test_more_replicas_than_examples_or_ranks() -> None:
    with pytest.raises(Refused, match="dp3 on a batch of 2: at most dp2"):
        Strategy.parse("dp3").check_runnable(batch_size=2)
    with pytest.raises(Refused, match="dp2 on a batch of 1: at most single"):
        Strategy.parse("dp2").check_runnable(batch_size=1)
    with pytest.raises(Refused, match=r"needs 4 ranks, and there are 2\nNearest that works: dp2"):
        Strategy.parse("dp4").check_runnable(batch_size=64, ranks_available=2)


def test_auto_is_no_split_yet() -> None:
    auto = Strategy.parse("auto+bf16")
    assert auto.is_auto
    assert auto.to_json() == {"strategy": "auto+bf16", "resolved": None, "world_size": None}
    for use in (auto.resolved, lambda: auto.world_size, lambda: auto.check_runnable(8)):
        with pytest.raises(Refused, match=r"auto\+bf16 is not a split yet"):
            use()


def test_reads_and_writes_a_file(tmp_path: Path) -> None:
    strategy = Strategy.parse("pp2.dp2/diloco:8:lr=0.5+bf16")
    file = tmp_path / "strategy.json"
    strategy.write(file)
    assert Strategy.read(file) == strategy
    assert '"world_size": 4' in file.read_text()
    file.write_text('{"strategi": "dp2"}')
    with pytest.raises(StrategyError, match="the key `strategy`"):
        Strategy.read(file)
    with pytest.raises(RecipeError, match="no such file"):
        Strategy.read(tmp_path / "strateg.json")


def test_values_import_no_torch() -> None:
    code = "import sys, shoal.strategy, shoal.cluster, shoal.env; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

"""hivemind's Optimizer with local updates, as in its quick start: a DHT and an averager a peer.

An epoch is the samples of `every` global batches: when the peers have reported as many, they look
for a group and average their weights.
"""

import os
import time
from pathlib import Path

import hivemind

import local_start

PATIENCE_S = 60.0


def main() -> None:
    given = local_start.arguments()
    address = os.environ["BENCH_ADDRESS"]
    place = Path(given.folder) / "peer"
    listening = [f"/ip4/{address}/tcp/0"]
    if given.rank == 0:
        dht = hivemind.DHT(host_maddrs=listening, start=True)
        place.with_suffix(".part").write_text(str(dht.get_visible_maddrs()[0]))
        place.with_suffix(".part").rename(place)
    else:
        until = time.monotonic() + PATIENCE_S
        while not place.exists() and time.monotonic() < until:
            time.sleep(0.05)
        dht = hivemind.DHT(host_maddrs=listening, initial_peers=[place.read_text()], start=True)
    model = local_start.build()
    optimizer = hivemind.Optimizer(
        dht=dht,
        run_id="bench",
        params=model.parameters(),
        optimizer=local_start.sgd,
        batch_size_per_step=local_start.BATCH // given.ranks,
        target_batch_size=local_start.BATCH * given.every,
        use_local_updates=True,
        delay_state_averaging=False,
        matchmaking_time=3.0,  # its documentation: 3 to 5 s for small local runs
        averaging_timeout=60.0,
        averager_opts={"target_group_size": given.ranks},
        verbose=True,
    )
    meet(Path(given.folder), given)
    rate = local_start.trained(given, model, optimizer)
    local_start.report(given, model, rate, meetings=optimizer.local_epoch)
    meet(Path(given.folder), given, "end")  # neither leaves while the other needs it
    optimizer.shutdown()
    dht.shutdown()


def meet(folder: Path, given: object, name: str = "begin") -> None:
    """Wait for the other peer, so that both begin at once."""
    (folder / f"{name}-{given.rank}").touch()
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        if all((folder / f"{name}-{rank}").exists() for rank in range(given.ranks)):
            return
        time.sleep(0.02)


if __name__ == "__main__":
    main()

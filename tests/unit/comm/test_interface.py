"""The interface that leads to the other ranks, and who has the last word about it."""

import os
import sys

import pytest

from shoal.comm.interface import interface_to, use_the_way_to

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux")


@pytest.fixture(autouse=True)
def unsaid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")


@linux
def test_this_host_is_reached_through_the_loopback() -> None:
    assert interface_to("127.0.0.1", 29500) == "lo"
    use_the_way_to("tcp:127.0.0.1:29500")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"


def test_what_the_user_names_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    use_the_way_to("tcp:127.0.0.1:29500")
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"


def test_ranks_that_meet_in_a_file_or_nowhere_change_nothing() -> None:
    use_the_way_to("file:/somewhere")
    use_the_way_to("agent:no.such.host.invalid:29500")
    assert os.environ["GLOO_SOCKET_IFNAME"] == ""

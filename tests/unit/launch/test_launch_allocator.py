"""Which limits ranks give to the C library's allocator, and when they leave it alone."""

from typing import Any

import pytest

from shoal.launch import allocator


class Library:
    def __init__(self) -> None:
        self.set: list[tuple[int, int]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.set.append((option, value))
        return 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _name: found)
    monkeypatch.setattr(allocator, "_glibc", lambda: (2, 36))
    return found


@pytest.mark.parametrize("started_with", [None, allocator._FAST_BYTES])
def test_memory_goes_back_above_a_fixed_size(
    library: Library, monkeypatch: pytest.MonkeyPatch, started_with: Any
) -> None:
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    if started_with is not None:
        monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(started_with))
    allocator.give_back()
    assert dict(library.set) == {-1: 1 << 20, -3: 1 << 20}


def test_what_the_user_has_set_stays(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "4096")
    allocator.give_back()
    assert library.set == []


def test_another_c_library_is_left_alone(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_glibc", lambda: (0,))
    allocator.give_back()
    assert library.set == []

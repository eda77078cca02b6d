import threading

import pytest

from grokfetch.torrent import read_back
from grokfetch.torrent.read_back import CHUNK, Hashers

DEADLINE_S = 60


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(read_back, "cores", lambda: 2)


def test_who_takes_waits_for_the_first_result_and_not_for_all():
    released = threading.Event()
    with Hashers[str]() as hashers:
        hashers.submit(lambda _: "held" if released.wait(DEADLINE_S) else "never released")
        hashers.submit(lambda _: "done")
        assert hashers.take(DEADLINE_S) == ["done"]
        assert hashers.busy
        assert hashers.take() == []
        released.set()
        assert hashers.take(DEADLINE_S) == ["held"]
        assert not hashers.busy


def test_taking_where_nothing_runs_returns_at_once():
    with Hashers[int]() as hashers:
        assert hashers.take(None) == []


def test_what_a_job_raises_is_raised_to_who_takes_and_the_rest_can_still_be_taken():
    with Hashers[int]() as hashers:
        hashers.submit(lambda _: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            hashers.take(DEADLINE_S)
        hashers.submit(len)
        assert hashers.take(DEADLINE_S) == [CHUNK]


def test_of_many_jobs_few_are_begun_before_the_first_results_are_taken():
    begun = []

    def jobs():
        for number in range(100):
            begun.append(number)
            yield lambda _, number=number: number

    with Hashers[int]() as hashers:
        results = hashers.run(jobs())
        first = next(results)
        assert len(begun) == 8
        assert sorted([first, *results]) == list(range(100))

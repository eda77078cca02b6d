"""Compiling is told apart from computing, and what overlaps is counted once."""

import jax
import jax.numpy as jnp
import pytest

from loader.devices.compile_clock import PREFIX, CompileClock


def spent(*reports):
    """Seconds counted of reports, each the time at which it comes and the duration it names."""
    times = iter([time for time, _ in reports])
    clock = CompileClock(lambda: next(times))
    for _, duration in reports:
        clock.took(f"{PREFIX}a_duration", duration)
    return clock.seconds


@pytest.mark.parametrize(
    ("reports", "seconds"),
    [
        ([], 0),
        ([(2, 1), (5, 2)], 3),
        ([(2, 1), (3, 0.5), (5, 4)], 4),
        ([(1, 1), (3, 0.5), (5, 3)], 4),
        ([(2, 1), (2.5, 1)], 1.5),
    ],
    ids=["nothing", "apart", "within", "one within", "overlapping"],
)
def test_what_happens_at_the_same_time_counts_once(reports, seconds):
    assert spent(*reports) == pytest.approx(seconds)


def test_only_compiling_counts():
    clock = CompileClock()
    clock.took("/jax/compilation_cache/compile_time_saved_sec", 9)
    assert clock.seconds == 0


def test_jax_is_listened_to_between_start_and_stop():
    clock = CompileClock()
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(3))
    assert clock.seconds == 0
    clock.start()
    compiled = jax.jit(lambda x: x * 5 + 2)
    compiled(jnp.ones(3))
    clock.stop()
    first = clock.seconds
    assert first > 0
    jax.jit(lambda x: x * 7 + 3)(jnp.ones(3))
    assert clock.seconds == first

"""Buffers between files and devices: several in flight, bounded, never refilled early, pinned."""

from __future__ import annotations

import threading

import jax
import numpy as np
import pytest
from support import golden

from loader.devices import assemble, transfer
from loader.devices.staging import Staging

PATIENCE_S = 60
SIZE = 4096
TABLE, KEY = (
    "language_model/in_out_embed/embeddings",
    "transformer/decoder_layer_3/multi_head_attention/key/w",
)


class Sent:
    """Stands for an array on its way to a device."""

    def __init__(self):
        self.awaited, self.arrived = threading.Event(), threading.Event()

    def is_ready(self):
        return self.arrived.is_set()

    def block_until_ready(self):
        self.awaited.set()
        assert self.arrived.wait(PATIENCE_S)
        return self


class Client:
    """Keeps account of what is pinned."""

    def __init__(self):
        self.pinned, self.most = {}, 0

    def dma_map(self, address, nbytes):
        assert address not in self.pinned
        self.pinned[address] = nbytes
        self.most = max(self.most, sum(self.pinned.values()))

    def dma_unmap(self, address):
        del self.pinned[address]


class Unable:
    def dma_map(self, _address, _nbytes):
        raise jax.errors.JaxRuntimeError("UNIMPLEMENTED")


def filled(staging, sent, value=0):
    """Fill a buffer and send it; its address."""
    with staging.buffer(SIZE) as (memory, waiting):
        memory[:] = value
        waiting.append(sent)
        return memory.ctypes.data


def test_as_many_buffers_are_under_way_as_memory_is_allowed():
    staging, sent = Staging(Client(), SIZE, 3 * SIZE), [Sent() for _ in range(3)]
    assert len({filled(staging, one) for one in sent}) == 3
    for one in sent:
        one.arrived.set()
    staging.close()


def test_a_buffer_is_filled_again_only_once_it_has_arrived():
    staging, first, second = Staging(Client(), SIZE, 2 * SIZE), Sent(), Sent()
    addresses = [filled(staging, first), filled(staging, second)]
    last, again = Sent(), []
    waiting = threading.Thread(target=lambda: again.append(filled(staging, last)))
    waiting.start()
    second.arrived.set()
    assert first.awaited.wait(PATIENCE_S)
    assert not again
    first.arrived.set()
    waiting.join(PATIENCE_S)
    assert again == addresses[:1]
    last.arrived.set()
    staging.close()


def test_nobody_fills_a_buffer_that_is_under_way():
    staging, first = Staging(Client(), SIZE, SIZE), Sent()
    filled(staging, first)
    entered = threading.Event()

    def fill():
        with staging.buffer(SIZE):
            entered.set()

    waiting = threading.Thread(target=fill)
    waiting.start()
    assert first.awaited.wait(PATIENCE_S)
    assert not entered.is_set()
    first.arrived.set()
    assert entered.wait(PATIENCE_S)
    waiting.join(PATIENCE_S)
    staging.close()


def test_what_has_arrived_is_used_again_before_memory_is_added():
    client, sent = Client(), Sent()
    staging = Staging(client, SIZE, 8 * SIZE)
    sent.arrived.set()
    assert len({filled(staging, sent) for _ in range(5)}) == 1
    staging.close()


def test_buffers_are_pinned_until_the_devices_have_everything():
    client, sent = Client(), Sent()
    staging = Staging(client, SIZE, 2 * SIZE)
    address = filled(staging, sent)
    assert any(start <= address < start + size for start, size in client.pinned.items())
    ending = threading.Thread(target=staging.close)
    ending.start()
    assert sent.awaited.wait(PATIENCE_S)
    assert client.pinned
    sent.arrived.set()
    ending.join(PATIENCE_S)
    assert not client.pinned


@pytest.mark.parametrize(("client", "buffers"), [(Client(), 4), (Unable(), 2), (object(), 2)])
def test_where_nothing_can_be_pinned_the_runtimes_copies_count(client, buffers):
    staging = Staging(client, SIZE, 4 * SIZE)
    sent = [Sent() for _ in range(buffers)]
    assert len({filled(staging, one) for one in sent}) == buffers
    assert staging.most == buffers
    for one in sent:
        one.arrived.set()
    staging.close()


def test_a_buffer_grows_for_a_chunk_of_many_parts():
    client = Client()
    staging = Staging(client, SIZE, SIZE)
    for nbytes in (SIZE, 3 * SIZE):
        with staging.buffer(nbytes) as (memory, _):
            assert memory.size == nbytes
            memory[:] = 1
    assert len(client.pinned) == 1
    staging.close()
    assert not client.pinned


def test_a_reader_that_fails_leaves_its_buffer_to_others():
    staging = Staging(Client(), SIZE, SIZE)

    def fail():
        with staging.buffer(SIZE):
            raise OSError("gone")

    for _ in range(3):
        with pytest.raises(OSError, match="gone"):
            fail()
    staging.close()


def test_a_device_that_failed_is_told_and_the_memory_is_freed():
    class Failed(Sent):
        def block_until_ready(self):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED")

    client = Client()
    staging = Staging(client, SIZE, 2 * SIZE)
    filled(staging, Failed())
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        staging.close()
    assert not client.pinned


def test_no_tensor_waits_for_the_one_before_to_arrive(monkeypatch):
    sent = []

    def corner(_piece):
        sent.append(Sent())
        return sent[-1]

    monkeypatch.setattr(assemble, "on_host", lambda _: False)
    monkeypatch.setattr(assemble, "corner", corner)
    tensors = [golden.CHECKPOINT[name] for name in (TABLE, KEY, TABLE)]
    device = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    coming = transfer.transfer([(tensor, device) for tensor in tensors])
    placed = [next(coming) for _ in tensors]
    assert not any(one.is_ready() for one in sent)
    for one in sent:
        one.arrived.set()
    assert not list(coming)
    for tensor, array in zip(tensors, placed, strict=True):
        weight = array if tensor.scales is None else array.weight
        assert (np.asarray(weight) == tensor.weight).all()

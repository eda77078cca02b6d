"""Bytes, loops and exchanges are counted as they are in the text of a program."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from loader.devices.program_text import cost, remade

SLICED = """HloModule sliced

%inner (p.0: s8[8,64,32], p.1: s32[]) -> s8[64,32] {
  %p.0 = s8[8,64,32]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %taken = s8[1,64,32]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero)
  ROOT %flat = s8[64,32]{1,0} bitcast(%taken)
}

%product (q.0: f32[64], q.1: s8[8,64,32], q.2: s32[]) -> f32[32] {
  %q.0 = f32[64]{0} parameter(0)
  %q.1 = s8[8,64,32]{2,1,0} parameter(1)
  %q.2 = s32[] parameter(2)
  %one = s8[64,32]{1,0} fusion(%q.1, %q.2), kind=kLoop, calls=%inner
  %wide = f32[64,32]{1,0} convert(%one)
  ROOT %sum = f32[32]{0} dot(%q.0, %wide), lhs_contracting_dims={0}, rhs_contracting_dims={0}
}

%body (s: (s32[], f32[64], s8[8,64,32], f32[32])) -> (s32[], f32[64], s8[8,64,32], f32[32]) {
  %s = (s32[], f32[64]{0}, s8[8,64,32]{2,1,0}, f32[32]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[64]{0} get-tuple-element(%s), index=1
  %w = s8[8,64,32]{2,1,0} get-tuple-element(%s), index=2
  %y = f32[32]{0} fusion(%x, %w, %i), kind=kOutput, calls=%product
  ROOT %next = (s32[], f32[64]{0}, s8[8,64,32]{2,1,0}, f32[32]{0}) tuple(%i, %x, %w, %y)
}

%again (s.1: (s32[], f32[64], s8[8,64,32], f32[32])) -> pred[] {
  %s.1 = (s32[], f32[64]{0}, s8[8,64,32]{2,1,0}, f32[32]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: (s32[], f32[64], s8[8,64,32], f32[32])) -> f32[32] {
  %a = (s32[], f32[64]{0}, s8[8,64,32]{2,1,0}, f32[32]{0}) parameter(0)
  %loop = (s32[], f32[64]{0}, s8[8,64,32], f32[32]{0}) while(%a), condition=%again, body=%body TRIPS
  %out = f32[32]{0} get-tuple-element(%loop), index=3
  ROOT %all = f32[32]{0} all-reduce(%out), replica_groups={{0,1}}, to_apply=%add
}
"""

ONE_TRIP = 64 * 32 + 4 * 64 + 4
"""An expert, the activations, and the expert's number."""


def test_of_a_stack_only_the_matrix_that_is_taken_counts_and_a_loop_as_often_as_it_runs():
    known = cost(SLICED.replace("TRIPS", ', backend_config={"known_trip_count":{"n":"3"}}'))
    assert known.read == 3 * ONE_TRIP
    assert known.unknown_loops == 0


def test_a_loop_of_unknown_length_is_told_and_counts_as_assumed():
    unknown = cost(SLICED.replace("TRIPS", ""), assumed_trips=2)
    assert unknown.read == 2 * ONE_TRIP
    assert unknown.unknown_loops == 1


def test_a_loop_whose_counter_is_compared_with_a_constant_is_known():
    compared = SLICED.replace("TRIPS", "").replace(
        "  ROOT %yes = pred[] constant(true)",
        "  %i.1 = s32[] get-tuple-element(%s.1), index=0\n  %four = s32[] constant(4)\n"
        "  ROOT %less = pred[] compare(%i.1, %four), direction=LT",
    )
    found = cost(compared)
    assert (found.read, found.unknown_loops) == (4 * ONE_TRIP, 0)


def test_exchanges_are_told_with_their_bytes():
    found = cost(SLICED.replace("TRIPS", ""))
    assert [(one.name, one.nbytes, one.times) for one in found.collectives] == [
        ("all-reduce", 128, 1)
    ]
    assert found.exchanged == 128


def test_an_operand_in_the_fast_memory_of_a_core_is_not_read_again():
    text = """
ENTRY %main (a: f32[1000], b: f32[1000]) -> f32[1000] {
  %a = f32[1000]{0:T(1024)} parameter(0)
  %b = f32[1000]{0:T(1024)S(1)} parameter(1)
  ROOT %sum = f32[1000]{0:T(1024)} add(%a, %b)
}
"""
    assert cost(text).read == 4000


def test_of_what_is_fetched_to_the_fast_memory_beside_other_work_only_the_slice_counts():
    text = """
ENTRY %main (a: s8[64,32], b: s8[64,32]) -> s8[16,32] {
  %a = s8[64,32]{1,0} parameter(0)
  %b = s8[64,32]{1,0:S(1)} parameter(1)
  %begun = ((s8[64,32]{1,0}), s8[16,32]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:16]}
  %ended = s8[16,32]{1,0:S(1)} slice-done(%begun)
  %all = (s8[64,32]{1,0:S(1)}, s8[64,32]{1,0}, u32[]{:S(2)}) copy-start(%a)
  %here = s8[64,32]{1,0:S(1)} copy-done(%all)
  %back = (s8[64,32]{1,0}, s8[64,32]{1,0:S(1)}, u32[]{:S(2)}) copy-start(%b)
  %there = s8[64,32]{1,0} copy-done(%back)
  ROOT %sum = s8[16,32]{1,0:S(1)} negate(%ended)
}
"""
    assert cost(text).read == 16 * 32 + 64 * 32


def test_a_copied_expert_is_read_twice_and_remade():
    copied = """
%slice (p.0: s8[8,64,32], p.1: s32[]) -> s8[1,64,32] {
  %p.0 = s8[8,64,32]{2,1,0} parameter(0)
  %p.1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %taken = s8[1,64,32]{2,1,0} dynamic-slice(%p.0, %p.1, %zero, %zero)
}

ENTRY %main (w: s8[8,64,32], i: s32[], x: f32[64]) -> f32[32] {
  %w = s8[8,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = f32[64]{0} parameter(2)
  %copied = s8[1,64,32]{2,1,0} fusion(%w, %i), kind=kLoop, calls=%slice
  ROOT %y = f32[32]{0} custom-call(%x, %copied), custom_call_target="gemm"
}
"""
    assert cost(copied).read == 2 * 64 * 32 + 4 + 4 * 64
    assert list(remade(copied, [(64, 32)])) == [("fusion", "s8[1,64,32]{2,1,0}")]


@pytest.mark.parametrize(
    "made",
    ["s8[64,32]{1,0:S(1)}", "s8[32,64]{1,0}", "s8[8,16,32]{2,1,0}", "bf16[2,64,32]{2,1,0}",
     "f32[1,32,64]{2,1,0:T(8,128)S(1)}"],
)  # fmt: skip
def test_a_weight_is_remade_in_any_memory_order_and_type(made):
    """Whole or in parts, one expert or some; a product of tokens is not a weight."""
    text = f"""
ENTRY %main (w: s8[8,64,32], x: f32[5,64]) -> f32[5,32] {{
  %w = s8[8,64,32]{{2,1,0}} parameter(0)
  %x = f32[5,64]{{1,0}} parameter(1)
  %again = {made} copy(%w)
  %fetched = (s8[64,32]{{1,0:S(1)}}, s8[64,32]{{1,0}}, u32[]{{:S(2)}}) copy-start(%w)
  %here = s8[64,32]{{1,0:S(1)}} copy-done(%fetched)
  ROOT %y = f32[5,32]{{1,0}} convolution(%x, %here), dim_labels=bf_io->bf
}}
"""
    assert list(remade(text, [(64, 32), (32, 32)])) == [("copy", made)]
    assert not list(remade(text.replace(made, "f32[5,64]{1,0}"), [(64, 32), (32, 32)]))


def test_text_of_this_version_of_jax_is_understood():
    def step(x, w):
        return lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ w), x)

    x, w = jnp.ones((4, 256)), jnp.ones((256, 256))
    text = jax.jit(step).lower(x, w).compile().as_text()
    found = cost(text)
    assert found.unknown_loops == 0
    # Each iteration reads the matrix, and little else.
    assert 5 * w.nbytes <= found.read < 5.5 * w.nbytes
    unknown = jax.jit(lambda n, x: lax.fori_loop(0, n, lambda _, x: jnp.sin(x), x))
    assert cost(unknown.lower(3, x).compile().as_text()).unknown_loops == 1

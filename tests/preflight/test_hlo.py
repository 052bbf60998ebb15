"""Collectives read from the text of compiled programs, against counts made by hand."""

import pytest

from fbi.preflight import hlo

# A step of two loops around one another (3 x 4 turns), as the CPU and GPU compilers write it.
NESTED = """
HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%layer (p: (s32[], bf16[8,128], bf16[4,16,128])) -> (s32[], bf16[8,128], bf16[4,16,128]) {
  %p = (s32[], bf16[8,128]{1,0}, bf16[4,16,128]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[8,128]{1,0} get-tuple-element(%p), index=1
  %w = bf16[4,16,128]{2,1,0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %slice = bf16[16,128]{1,0} fusion(%w, %i), kind=kLoop, calls=%pick
  %gathered = bf16[128,128]{1,0} all-gather(%slice), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
  %flat = bf16[64,128]{1,0} reshape(%w)
  %same = bf16[512,128]{1,0} all-gather(%flat), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}
  %y = bf16[8,128]{1,0} dot(%x, %gathered), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %out = (s32[], bf16[8,128]{1,0}, bf16[4,16,128]{2,1,0}) tuple(%next, %y, %w)
}

%pick (w: bf16[4,16,128], i: s32[]) -> bf16[16,128] {
  %w.1 = bf16[4,16,128]{2,1,0} parameter(0)
  %i.1 = s32[] parameter(1)
  ROOT %s = bf16[16,128]{1,0} dynamic-slice(%w.1, %i.1), dynamic_slice_sizes={1,16,128}
}

%below (p: (s32[], bf16[8,128], bf16[4,16,128])) -> pred[] {
  %p.2 = (s32[], bf16[8,128]{1,0}, bf16[4,16,128]{2,1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%p.2), index=0
  %bound = s32[] constant(4)
  ROOT %less = pred[] compare(%i.2, %bound), direction=LT
}

%part (p: (s32[], bf16[8,128], bf16[4,16,128])) -> (s32[], bf16[8,128], bf16[4,16,128]) {
  %p.3 = (s32[], bf16[8,128]{1,0}, bf16[4,16,128]{2,1,0}) parameter(0)
  %inner = (s32[], bf16[8,128]{1,0}, bf16[4,16,128]{2,1,0}) while(%p.3), condition=%below, body=%layer
  %x.3 = bf16[8,128]{1,0} get-tuple-element(%inner), index=1
  %start = (bf16[8,128]{1,0}, bf16[8,128]{1,0}) collective-permute-start(%x.3), source_target_pairs={{0,1},{1,0}}
  %done = bf16[8,128]{1,0} collective-permute-done(%start)
  %i.3 = s32[] get-tuple-element(%inner), index=0
  %w.3 = bf16[4,16,128]{2,1,0} get-tuple-element(%inner), index=2
  ROOT %out.3 = (s32[], bf16[8,128]{1,0}, bf16[4,16,128]{2,1,0}) tuple(%i.3, %done, %w.3)
}

ENTRY %main (t: (s32[], bf16[8,128], bf16[4,16,128])) -> f32[32] {
  %t = (s32[], bf16[8,128]{1,0}, bf16[4,16,128]{2,1,0}) parameter(0)
  %outer = (s32[], bf16[8,128]{1,0}, /*index=2*/bf16[4,16,128]{2,1,0}) while(%t), condition=%below, body=%part, backend_config={"known_trip_count":{"n":"3"},"x":[]}
  %g = f32[32]{0} constant({...})
  %h = f32[16]{0} constant({...})
  %both = (f32[32]{0}, f32[16]{0}) all-reduce(%g, /*index=1*/%h), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, to_apply=%add
  ROOT %r = f32[32]{0} get-tuple-element(%both), index=0
}
"""  # noqa: E501


def test_loops_count_as_often_as_they_turn():
    found = {(c.kind, c.name.split("/")[1]): c for c in hlo.collectives(NESTED, 8)}
    assert {name: (c.times, c.bytes, len(c.group)) for (_, name), c in found.items()} == {
        "gathered": (12, 128 * 128 * 2, 8),
        "same": (12, 512 * 128 * 2, 8),
        "start": (3, 8 * 128 * 2, 2),
        "both": (1, (32 + 16) * 4, 4),
    }
    assert found["all-gather", "gathered"].sent == 12 * 128 * 128 * 2 * 7 / 8
    assert found["all-reduce", "both"].sent == 2 * 48 * 4 * 3 / 4
    assert found["collective-permute", "start"].sent == 3 * 8 * 128 * 2


def test_what_is_gathered_alike_at_every_turn_could_be_hoisted():
    assert [c.name for c in hlo.collectives(NESTED, 8) if c.hoistable] == ["layer/same"]


# The TPU compiler writes an asynchronous all-gather as a chain of fusions, and a reduce-scatter as an all-reduce and
# the slice of its result in one; layouts have brackets; groups are named by axes.
TPU = """
%async_collective_fusion (p: bf16[96,768]) -> bf16[768,768] {
  %p = bf16[96,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[768,768]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=2, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="6"}
}

%async_collective_done (p.1: bf16[96,768]) -> bf16[768,768] {
  %p.1 = bf16[96,768]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.2 = bf16[768,768]{1,0:T(8,128)(2,1)} all-gather(%p.1), channel_id=2, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, frontend_attributes={chain_id="6"}
}

%all-reduce-scatter.8 (input: bf16[768,768]) -> bf16[96,768] {
  %input = bf16[768,768]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-reduce.69 = bf16[768,768]{1,0:T(8,128)(2,1)} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = u32[] constant(0)
  ROOT %slice = bf16[96,768]{1,0} dynamic-slice(%all-reduce.69, %zero, %zero), dynamic_slice_sizes={96,768}
}

ENTRY %main (w: bf16[96,768]) -> bf16[96,768] {
  %w = bf16[96,768]{1,0:T(8,128)(2,1)} parameter(0)
  %begun = bf16[768,768]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%async_collective_fusion
  %ended = bf16[768,768]{1,0:T(8,128)(2,1)} fusion(%w), kind=kCustom, calls=%async_collective_done
  ROOT %scattered = bf16[96,768]{1,0} fusion(%ended), kind=kCustom, calls=%all-reduce-scatter.8
}
"""  # noqa: E501


def test_what_the_tpu_compiler_makes_of_collectives():
    gather, scatter = hlo.collectives(TPU, 8)
    assert (gather.kind, gather.times, gather.bytes, gather.group) == ("all-gather", 1, 768 * 768 * 2, tuple(range(8)))
    assert (scatter.kind, scatter.bytes, scatter.sent) == ("reduce-scatter", 768 * 768 * 2, 768 * 768 * 2 * 7 / 8)


@pytest.mark.parametrize(
    ("written", "group", "axis"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6), "data"),
        ("replica_groups={{0,1},{2,3}}", (0, 1), "model"),
        ("replica_groups=[4,2]<=[8]", (0, 1), "model"),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6), "data"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6), "data"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}", (0, 1), "model"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0','axis_1'}", tuple(range(8)), "data+model"),
        ("replica_groups={}", tuple(range(8)), "data+model"),
    ],
)
def test_groups_and_the_axis_that_they_span(written, group, axis):
    (found,) = hlo.collectives(
        f"ENTRY %main (x: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} parameter(0)\n"
        f"  ROOT %y = f32[4]{{0}} all-reduce(%x), channel_id=1, {written}, to_apply=%add\n}}\n",
        8,
    )
    assert found.group == group
    assert hlo.axis_of(found.group, 4, 2) == axis


@pytest.mark.parametrize(
    ("shape", "size"),
    [("bf16[8,128]{1,0}", 2048), ("f32[]", 4), ("pred[3]", 3), ("s4[10]", 5), ("(f32[2], u8[5]{0:T(8,128)})", 13),
     ("f8e4m3fn[7]", 7), ("c64[2]", 16)],
)  # fmt: skip
def test_bytes_of_shapes(shape, size):
    assert hlo.shape_bytes(shape) == size

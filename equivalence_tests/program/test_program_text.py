"""The text that XLA prints of a compiled program is read as it is written."""

from flax_resnet.devices import program

TEXT = """
HloModule jit_step

%looked_up (p.0: f32[1000,8], p.1: s32[4]) -> f32[4,8] {
  %p.1 = s32[4]{0} parameter(1)
  %p.0 = f32[1000,8]{1,0} parameter(0)
  ROOT %gather = f32[4,8]{1,0} gather(%p.0, %p.1), offset_dims={1}
}

%cut (p: f32[1000,8]) -> bf16[2,8] {
  %p = f32[1000,8]{1,0} parameter(0)
  %narrow = bf16[1000,8]{1,0} convert(%p)
  ROOT %slice = bf16[2,8]{1,0} slice(%narrow), slice={[4:6], [0:8]}
}

%body (t: (bf16[4,8])) -> (bf16[4,8]) {
  %t = (bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%t), index=0
  %y = bf16[4,8]{1,0} negate(%x), metadata={op_name="jit(f)/transpose(jvp(fc))/neg"}
  ROOT %out = (bf16[4,8]{1,0}) tuple(%y)
}

ENTRY %main (a: f32[1000,8], i: s32[4], b: f32[8,16]) -> f32[4,16] {
  %a = f32[1000,8]{1,0} parameter(0)
  %i = s32[4]{0} parameter(1)
  %b = f32[8,16]{1,0:T(8,128)S(1)} parameter(2)
  %rows = f32[4,8]{1,0} fusion(%a, %i), kind=kLoop, calls=%looked_up
  %some = bf16[2,8]{1,0} fusion(%a), kind=kLoop, calls=%cut
  %loop = (bf16[4,8]{1,0}) while(%rows), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %sum = (f32[4,8]{1,0}, f32[4,8]{1,0}) all-reduce-start(%rows, %rows), to_apply=%add
  ROOT %dot = f32[4,16]{1,0} dot(%rows, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="jit(f)/jvp(fc)/dot_general"}
}
"""  # noqa: E501


def test_the_text_of_a_program_is_read_as_it_is_written():
    rows, some, negated, reduced, dot = program.kernels(program.parse(TEXT), {"fc"})
    assert rows.bytes == 4 * 8 * 4 + 4 * 4 + 4 * 8 * 4  # four rows of a thousand, their numbers
    assert some.bytes == 2 * 8 * 4 + 2 * 8 * 2  # two rows, rounded as they are read
    assert (negated.times, negated.bytes) == (5, 2 * 4 * 8 * 2)
    assert (negated.layer, negated.phase) == ("fc", "backward")
    assert program.collectives([reduced]) == [
        {"kind": "all-reduce", "dtype": "f32", "count": 1, "bytes": 256, "in_forward": 0}
    ]
    assert dot.flops == 2 * 4 * 16 * 8
    assert dot.bytes == 4 * 8 * 4 + 4 * 16 * 4  # one operand lies on the chip
    assert (dot.kind, dot.layer, dot.phase) == ("dot", "fc", "forward")

"""What is read from compiled text: loops times their trips, products, what travels."""

import pytest

from experiments.harness.training import hlo, kernels

TEXT = """
HloModule step, is_scheduled=true

%fused.1 (param_0: s8[64,32], param_1: s8[32,16]) -> s32[64,16] {
  %param_0 = s8[64,32]{1,0:T(8,128)(4,1)} parameter(0)
  %param_1 = s8[32,16]{1,0:T(8,128)(4,1)} parameter(1)
  ROOT %convolution.1 = s32[64,16]{1,0:T(8,128)} convolution(%param_0, %param_1), dim_labels=bf_io->bf, \
metadata={op_name="jit(step)/transpose(jvp())/while/body/drhs/dot_general"}
}

%body (state: (s32[], s8[64,32])) -> (s32[], s8[64,32]) {
  %state = (s32[]{:T(128)}, s8[64,32]{1,0}, /*index=5*/f32[2]{0:T(256)}) parameter(0)
  %bitcast.1 = u32[2,256]{1,0} bitcast(%update.1)
  %update.1 = s8[64,32]{1,0} dynamic-update-slice(%zeros, %part)
  %all-reduce.1 = u32[2,256]{1,0} all-reduce(%bitcast.1), channel_id=3, \
replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, to_apply=%add
  %fusion.1 = s32[64,16]{1,0} fusion(%a, %b), kind=kOutput, calls=%fused.1
  %count.1 = s32[]{:T(128)} get-tuple-element(%state), index=0
  %two = s32[] constant(2)
  %add.1 = s32[]{:T(128)} add(%two, %count.1)
  ROOT %tuple.1 = (s32[], s8[64,32]) tuple(%add.1, %y)
}

%condition (state: (s32[], s8[64,32])) -> pred[] {
  %constant.53 = s32[]{:T(128)} constant(53)
  %count = s32[]{:T(128)} get-tuple-element(%state.1), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%count, %constant.53), direction=LT
}

ENTRY %main (argument: s8[64,32]) -> f32[] {
  %argument = bf16[8,5,24]{2,1,0} parameter(0)
  %other = bf16[8,24,7]{2,1,0} parameter(1)
  %while.1 = (s32[], s8[64,32]) while(%tuple.0), condition=%condition, body=%body
  %dot.1 = f32[8,5,7]{2,1,0} dot(%argument, %other), lhs_batch_dims={0}, lhs_contracting_dims={2}, \
rhs_batch_dims={0}, rhs_contracting_dims={1}, metadata={op_name="jit(step)/jvp()/dot_general"}
  %gather.1 = (bf16[8,4]{1,0}, bf16[32,4]{1,0}) all-gather-start(%x.1), channel_id=5, \
replica_groups=[2,4]<=[8], dimensions={0}
  %scatter.1 = f32[8]{0} reduce-scatter(%x.2), channel_id=6, replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %permute.1 = f32[16]{0} collective-permute(%x.3), channel_id=7, source_target_pairs={{0,1},{1,0}}
}
"""


def test_loops_count_as_often_as_they_run():
    dot, convolution = sorted(hlo.parse(TEXT).products(), key=lambda x: x.times)
    assert (dot.times, dot.kinds, dot.phase) == (1, ("bf16", "bf16"), "forward")
    assert dot.flops == 2 * 8 * 5 * 7 * 24
    assert convolution.times == 27
    assert (convolution.kinds, convolution.phase) == (("s8", "s8"), "wgrad")
    assert convolution.flops == 27 * 2 * 64 * 32 * 16


def test_what_travels_is_counted_in_the_type_of_its_numbers():
    found = {x.kind: x for x in hlo.parse(TEXT).collectives()}
    reduced = found["all-reduce"]  # int8 numbers, in words of 32 bits
    assert (reduced.arrays, reduced.devices, reduced.times) == ((hlo.Array("s8", (2048,)),), 4, 27)
    assert reduced.nbytes == 27 * 2048 * 2 * 3 / 4
    gathered = found["all-gather"]
    assert (gathered.arrays, gathered.devices) == ((hlo.Array("bf16", (32, 4)),), 4)
    assert gathered.nbytes == 256 * 3 / 4
    assert found["reduce-scatter"].nbytes == 32 * 3
    assert found["collective-permute"].nbytes == 64


@pytest.mark.parametrize(
    ("change", "words"),
    [(("ENTRY ", ""), "no ENTRY"), (("constant(53)", "copy(%x)"), "trips of while.1")],
)
def test_text_that_cannot_be_read_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        hlo.parse(TEXT.replace(*change))


def test_a_loop_may_say_its_trips():
    known = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    assert {x.times for x in hlo.parse(known).products()} == {1, 5}


CALLED = """
%fused.1 (param_0: s8[8,16,16,32]) -> f32[8] {
  %param_0 = s8[8,16,16,32]{3,2,1,0} parameter(0)
  ROOT %convert.1 = f32[8]{0} convert(%param_0)
}

ENTRY %main (image: s8[8,16,16,32], kernel: s8[64,3,3,32]) -> f32[8] {
  %image = s8[8,16,16,32]{3,2,1,0} parameter(0)
  %kernel = s8[64,3,3,32]{3,2,1,0} parameter(1)
  %gradient = bf16[8,16,16,64]{3,2,1,0} parameter(2)
  %conv.1 = (f32[8,16,16,64]{3,2,1,0}, u8[0]{0}) custom-call(%image, %kernel), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  %conv.2 = (bf16[64,3,3,32]{3,2,1,0}, u8[0]{0}) custom-call(%image, %gradient), \
window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBackwardFilter"
  %rows = f8e4m3fn[128,64]{1,0} parameter(3)
  %columns = f8e4m3fn[32,64]{1,0} parameter(4)
  %matmul.1 = (f32[128,32]{1,0}, s8[100]{0}) custom-call(%rows, %columns), \
custom_call_target="__cublas$lt$matmul$f8", backend_config={"gemm_backend_config":{"dot_dimension_numbers":\
{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"]}}}
  %topk.1 = f32[8]{0} custom-call(%rows), custom_call_target="TopK"
  ROOT %fusion.1 = f32[8]{0} fusion(%image), kind=kLoop, calls=%fused.1
}
"""


def test_products_of_libraries_are_found_with_their_operations():
    forward, gradient, matrix = hlo.parse(CALLED).products()
    assert (forward.kinds, forward.multiplications) == (("s8", "s8"), 8 * 16 * 16 * 64 * 9 * 32)
    assert (gradient.kinds, gradient.multiplications) == (("bf16", "s8"), 8 * 16 * 16 * 64 * 9 * 32)
    assert (matrix.kinds[0], matrix.multiplications) == ("f8e4m3fn", 128 * 32 * 64)


def test_kernels_are_counted_with_the_bytes_of_what_they_read_and_write():
    found = kernels.kernels(hlo.parse(CALLED))
    assert [x.instruction.name for x in found] == [
        "conv.1",
        "conv.2",
        "matmul.1",
        "topk.1",
        "fusion.1",
    ]
    assert found[-1].nbytes == 8 * 16 * 16 * 32 + 8 * 4

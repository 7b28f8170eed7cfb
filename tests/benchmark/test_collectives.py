import pytest

from varjax.benchmark.collectives import count_traffic

HLO = """
ENTRY %main (x: f32[1024]) -> f32[256] {
  %x = f32[1024]{0} parameter(0)
  OPERATION
}
"""
GROUPS = "replica_groups={{0,1,2,3}}, to_apply=%add"
MOST = 3 / 4 * 4096  # bytes; each of four devices sends three quarters of 1,024 float32 numbers


@pytest.mark.parametrize(
    ("operation", "kind", "sent"),
    [
        (f"ROOT %y = f32[256]{{0}} reduce-scatter(%x), {GROUPS}", "reduce-scatter", MOST),
        (f"ROOT %y = f32[1024]{{0}} all-reduce(%x), {GROUPS}", "all-reduce", 2 * MOST),
        (f"ROOT %y = f32[4096]{{0}} all-gather(%x), {GROUPS}", "all-gather", 4 * MOST),
        (
            f"%s = (f32[1024]{{0}}, f32[256]{{0}}) reduce-scatter-start(%x), {GROUPS}",
            "reduce-scatter",
            MOST,
        ),
    ],
)
def test_a_ring_sends_all_but_the_device_s_own_part(operation, kind, sent):
    found = count_traffic(HLO.replace("OPERATION", operation))
    assert {name: traffic.bytes for name, traffic in found.items()} == {kind: sent}

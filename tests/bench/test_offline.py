"""Kernels compile for GPUs that are not here, fit them, and do what they are counted for."""

from importlib.util import find_spec

import pytest

from ssa.bench.offline import CASES, Loop, _loops, compiled

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")
SHARED = {90: 227 * 1024, 80: 163 * 1024}  # most shared memory of a program

EXPECTED = {
    "selection": ["pool_kernel", "resident_score_kernel", "select_kernel"],
    "selection-long": ["pool_kernel", "resident_score_kernel", "refine_kernel"],
    "selection-8b": ["pool_kernel", "lse_kernel", "score_kernel", "select_kernel"],
    "decode": ["score_kernel", "sum_kernel", "select_kernel"],
    "sparse": None,
}


@pytest.mark.parametrize(("name", "capability"), [*((name, 90) for name in EXPECTED), ("sparse", 80)])
def test_kernels_compile_and_fit(name: str, capability: int) -> None:
    found = compiled(CASES[name](), capability)
    assert EXPECTED[name] in (None, [x.name for x in found])
    for x in found:
        assert x.registers * 32 * x.warps <= 65536
        assert x.shared <= SHARED[capability]
        assert x.instructions > 50


def test_every_exponential_of_a_resident_tile_is_worth_its_instructions() -> None:
    """Sums over heads and blocks stay in registers: no shuffles in the first loop, few in the second."""
    (resident,) = (x for x in compiled(CASES["selection"]()) if x.name == "resident_score_kernel")
    sums, _edge, scores = (x for x in resident.loops if x.exponentials == 64)
    assert (sums.shuffles, sums.spills) == (0, 0)
    assert sums.instructions < 360
    assert scores.instructions < 512  # an exponential of a warp takes 8 clocks: the other units wait for it
    assert scores.shuffles <= 16


def test_loops_are_found_in_code() -> None:
    code = """
    .L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
    .L_x_1:
        /*0010*/                   MUFU.EX2 R2, R3 ;
        /*0020*/             @!P0  LDL R4, [R1] ;
        /*0030*/                   HGMMA.64x32x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
    .L_x_2:
        /*0060*/                   BRA `(.L_x_2) ;
    """
    assert _loops(code) == ((Loop(4, 1, 0, 1, 1),), 7)

"""Every Triton kernel compiles to PTX and machine code for A100, H100 and B200, which needs no GPU, and fits
their shared memory and registers.

The sizes are those of InternImage's stages and of Mask2Former's pixel decoder; features in bf16 and fp32, the
rest in fp32.
"""

import os
import re
import subprocess
from pathlib import Path

import pytest

from internseg_ds.models.intern_image.dcnv3_geometry import Geometry

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing under TRITON_INTERPRET=1"
)

CAPABILITIES = (80, 90, 100)
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""The most that a block may have (CUDA programming guide, technical specifications per compute
capability)."""
FEATURES = ("x", "value", "out", "grad")
NUMBERS = {"scale": "fp32"}
LEVELS = ("odd_heights", "odd_widths")


def compiled(kernel, known: dict[str, int], capability: int, features: str, wide: bool = False):
    """kernel for this GPU, its constants known; features: Triton's name of their type. wide: `rows` beyond
    2^31."""
    from triton.backends.compiler import GPUTarget

    counts = {"rows": "i64"} if wide else {}
    types = (
        {name: f"*{features}" for name in FEATURES}
        | NUMBERS
        | counts
        | {name: ("i32",) * known.get("LEVELS", 0) for name in LEVELS}
    )
    pointers = [
        name
        for name in kernel.arg_names
        if name.startswith("grad_") or name in ("offset", "mask", "locations", "weights")
    ]
    types |= dict.fromkeys(pointers, "*fp32")
    signature = {name: "constexpr" if name in known else types.get(name, "i32") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(
        kernel,
        signature,
        constexprs={(kernel.arg_names.index(name),): value for name, value in known.items()},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})


def check(
    kernel, known: dict[str, int], capability: int, features: str, folder: Path, wide: bool = False
) -> None:
    made = compiled(kernel, known, capability, features, wide)
    assert f".target sm_{capability}" in made.asm["ptx"]
    assert made.metadata.shared <= SHARED_BYTES[capability]
    (folder / "kernel.cubin").write_bytes(made.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run(
        [tool, "-res-usage", folder / "kernel.cubin"], capture_output=True, text=True, check=True
    ).stdout
    stack, registers = int(re.search(r"STACK:(\d+)", usage)[1]), int(re.search(r"REG:(\d+)", usage)[1])
    # what registers have no room for goes to the stack: a number or two do no harm
    assert stack <= 16 and registers <= 255, usage


def dcnv3(group: int, channels: int) -> list[tuple]:
    """Kernels and constants for 3 x 3 points."""
    from internseg_ds.models.intern_image import dcnv3_triton as kernels

    made = kernels.constants(Geometry((3, 3), (1, 1), (1, 1), (1, 1), group, 1.0, False), channels)
    block = triton.next_power_of_2(channels)
    pairs = zip((kernels.forward_kernel, kernels.backward_kernel), kernels.ELEMENTS.values(), strict=True)
    return [(kernel, made | {"BLOCK_R": elements // block, "BLOCK_C": block}) for kernel, elements in pairs]


def attention(heads: int, channels: int, levels: int = 3, points: int = 4) -> list[tuple]:
    from internseg_ds.models.sampling import deformable_attention_triton as kernels

    pairs = zip((kernels.forward_kernel, kernels.backward_kernel), kernels.ELEMENTS.values(), strict=True)
    return [
        (kernel, kernels.constants(heads, channels, levels, points, elements)) for kernel, elements in pairs
    ]


@pytest.fixture(autouse=True)
def nothing_from_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


@pytest.mark.parametrize("made", [dcnv3, attention])
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_of_the_h_models_compile_in_bf16(made, capability: int, tmp_path: Path):
    for kernel, known in made(10, 32) if made is dcnv3 else made(32, 32):
        check(kernel, known, capability, "bf16", tmp_path)


@pytest.mark.parametrize("made", [dcnv3, attention])
def test_kernels_compile_in_fp32_for_odd_channels_and_for_more_rows_than_int32_holds(made, tmp_path: Path):
    for kernel, known in made(7, 12):
        check(kernel, known, 90, "fp32", tmp_path, wide=True)


@pytest.mark.slow
@pytest.mark.parametrize("features", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("first_groups", "channels"),
    [(4, 16), (5, 16), (7, 16), (10, 16), (12, 16), (10, 32), (16, 32)],
    ids=["T", "S", "B", "L", "XL", "H", "G"],
)
def test_kernels_of_every_stage_compile(
    first_groups: int, channels: int, capability: int, features: str, tmp_path: Path
):
    for stage in range(4):
        for kernel, known in dcnv3(first_groups << stage, channels):
            check(kernel, known, capability, features, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("features", ["bf16", "fp32"])
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("heads", "channels", "levels"), [(32, 32, 3), (8, 32, 3), (8, 32, 4), (2, 8, 3), (4, 4, 1)]
)
def test_kernels_of_every_pixel_decoder_compile(
    heads: int, channels: int, levels: int, capability: int, features: str, tmp_path: Path
):
    for kernel, known in attention(heads, channels, levels):
        check(kernel, known, capability, features, tmp_path)


@pytest.mark.parametrize("made", [dcnv3, attention])
def test_other_sizes_of_images_compile_nothing_anew(made):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    for kernel, known in made(32, 32):
        binder = create_function_from_signature(
            kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
        )
        numbers = dict.fromkeys(kernel.arg_names, 7) | {"scale": 1.0} | known
        keys = set()
        for sides in ((1, 2, 3), (28, 56, 112), (32, 64, 128)):
            given = dict.fromkeys(
                ("rows", "queries", "tokens", "height", "width", "out_height", "out_width"), sides[0]
            )
            given |= dict.fromkeys(LEVELS, tuple(2 * side + 1 for side in sides))
            keys.add(
                str(binder(**numbers | {name: value for name, value in given.items() if name in numbers})[1])
            )
        assert len(keys) == 1

"""Exported files compute what the segmentor does, where neither torch nor this package is; and what cannot be exported
is refused before weights are read."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from internseg_ds.errors import ConfigError, OutputError
from internseg_ds.evaluation.deployment import comparison, export, onnx_file
from internseg_ds.evaluation.deployment.export import export_segmentor
from tests.evaluation.deployment.small_segmentors import written

MEAN = torch.tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
STRANGER = """
import json, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
told = session.get_modelmeta().custom_metadata_map
for file in sys.argv[2:]:
    np.save(file + ".logits.npy", session.run(["logits"], {"image": np.load(file)})[0])
assert not {"torch", "internseg_ds", "mmcv"} & set(sys.modules)
print(json.dumps({"told": told, "input": session.get_inputs()[0].shape}))
"""


def of_a_stranger(file: Path, images: list[torch.Tensor]) -> tuple[list[torch.Tensor], dict]:
    """Logits of images (b, 3, h, w) in a process that has neither torch nor this package, and what the file says of
    itself."""
    paths = []
    for number, image in enumerate(images):
        paths.append(str(file.with_name(f"image{number}.npy")))
        np.save(paths[-1], image.numpy())
    command = [sys.executable, "-c", STRANGER, str(file), *paths]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stderr
    return [torch.from_numpy(np.load(f"{path}.logits.npy")) for path in paths], json.loads(done.stdout)


def assert_agrees(
    segmentor, logits: list[torch.Tensor], images: list[torch.Tensor], bgr: bool = False
) -> None:
    """Logits to 1e-4 of the largest, and labels but where two classes are closer than that."""
    for ours, image in zip(logits, images, strict=True):
        with torch.no_grad():
            pixels = (image - MEAN) / STD if not bgr else (image.flip(1) - MEAN) / STD
            expected = segmentor.encode_decode(pixels, [{}])
        largest = expected.abs().max().item()
        assert ours.shape == expected.shape
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 * largest)
        best = expected.topk(2, dim=1).values
        clear = best[:, 0] - best[:, 1] > 2e-4 * largest
        assert clear.float().mean() > 0.9
        assert (expected - expected.mean((2, 3), keepdim=True)).std() > 0.02 * largest  # pixels differ
        assert torch.equal(ours.argmax(1)[clear], expected.argmax(1)[clear])


def pixels(*sizes: tuple[int, int, int]) -> list[torch.Tensor]:
    random = torch.Generator().manual_seed(3)
    return [255 * torch.rand(b, 3, h, w, generator=random) for b, h, w in sizes]


def test_a_file_runs_where_neither_torch_nor_this_package_is_and_says_what_it_is(tmp_path):
    segmentor, weights = written("smallest", tmp_path)
    (file,) = export_segmentor(weights, tmp_path / "out" / "segmentor.onnx")
    assert list(file.parent.iterdir()) == [file]
    images = pixels((1, 56, 56))
    logits, said = of_a_stranger(file, images)
    assert_agrees(segmentor, logits, images)
    assert said["input"] == [1, 3, 56, 56]
    told = said["told"]
    assert json.loads(told["classes"]) == [f"class {number}" for number in range(7)]
    assert json.loads(told["palette"])[3] == [3, 252, 7]
    assert json.loads(told["windows"]) == {"mode": "slide", "crop_size": [56, 56], "stride": [28, 28]}
    np.testing.assert_allclose(json.loads(told["mean"]), MEAN.flatten())
    np.testing.assert_allclose(json.loads(told["std"]), STD.flatten())
    assert json.loads(told["size_multiple"]) is None and "RGB" in told["input"]
    assert b".py" not in file.read_bytes()  # nothing of where it was written


@pytest.mark.slow
def test_internvit_takes_images_of_any_size(tmp_path):
    segmentor, weights = written("internvit", tmp_path)
    (file,) = export_segmentor(weights, tmp_path / "segmentor.onnx", dynamic="size")
    images = pixels((1, 70, 70), (3, 84, 126), (2, 112, 70))
    logits, said = of_a_stranger(file, images)
    assert_agrees(segmentor, logits, images)
    assert said["input"] == ["batch", 3, "height", "width"]
    assert json.loads(said["told"]["size_multiple"]) == 14


@pytest.mark.slow
def test_internimage_runs_by_grid_sample_and_without_its_operator(tmp_path):
    segmentor, weights = written("internimage", tmp_path, to_rgb=False)
    (file,) = export_segmentor(weights, tmp_path / "segmentor.onnx", dynamic="batch")
    images = pixels((1, 64, 64), (2, 64, 64))
    logits, said = of_a_stranger(file, images)
    assert_agrees(segmentor, logits, images, bgr=True)
    assert said["input"] == ["batch", 3, 64, 64]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("dinov3", "none"),
        ("dinov3", "batch"),
        ("eomt", "none"),
        ("eomt", "batch"),
        ("internimage", "size"),
        ("internvit_adapter", "batch"),
        ("convnext", "size"),
        ("transformers_dinov2", "batch"),
        ("transformers_dinov3", "batch"),
        ("transformers_swin", "none"),
        ("transformers_convnext", "size"),
        ("mask2former", "none"),
        ("mask2former_internimage", "none"),
    ],
)
def test_other_segmentors(name, dynamic, tmp_path):
    segmentor, weights = written(name, tmp_path)
    (file,) = export_segmentor(weights, tmp_path / "segmentor.onnx", dynamic=dynamic)
    sizes = {"none": [(1, 64, 64)], "batch": [(1, 64, 64), (4, 64, 64)], "size": [(2, 64, 64), (1, 96, 160)]}
    images = pixels(*sizes[dynamic])
    if name in ("transformers_dinov2", "mask2former"):  # patches of 14 pixels
        images = [image[..., :56, :56] for image in images]
    logits, _ = of_a_stranger(file, images)
    assert_agrees(segmentor, logits, images)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["internvit", "internimage", "eomt"])
def test_torchscript_of_one_size_needs_torch_alone(name, tmp_path):
    segmentor, weights = written(name, tmp_path)
    export_segmentor(weights, tmp_path / "segmentor.pt", size=(56, 84) if name == "internvit" else None)
    side = {"internvit": (56, 84)}.get(name, (64, 64))
    (image,) = pixels((1, *side))
    torch.save(image, tmp_path / "image")
    code = (
        "import sys, torch; made = torch.jit.load('segmentor.pt', _extra_files=(said := {'classes': ''}));"
        "torch.save((made(torch.load('image')), said), 'logits'); assert 'internseg_ds' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    logits, said = torch.load(tmp_path / "logits")
    assert_agrees(segmentor, [logits], [image])
    assert len(json.loads(said["classes"])) == segmentor.out_channels


@pytest.mark.slow
def test_weights_that_one_file_cannot_hold_lie_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    segmentor, weights = written("smallest", tmp_path)
    files = export_segmentor(weights, tmp_path / "segmentor.onnx")
    assert [file.name for file in files] == ["segmentor.onnx.data", "segmentor.onnx"]
    images = pixels((1, 56, 56))
    logits, _ = of_a_stranger(files[1], images)
    assert_agrees(segmentor, logits, images)
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 2**31)  # a file that needs none takes their place
    assert export_segmentor(weights, files[1], overwrite=True) == files[1:]
    assert not files[0].exists()


@pytest.mark.slow
def test_a_file_that_computes_something_else_is_not_left(tmp_path, monkeypatch):
    _, weights = written("smallest", tmp_path)
    opened = onnx_file.opened
    monkeypatch.setattr(onnx_file, "opened", lambda path: lambda image: opened(path)(image) * 1.001)
    with pytest.raises(OutputError, match="not left there: its logits differ"):
        export_segmentor(weights, tmp_path / "out/segmentor.onnx")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_a_model_that_cannot_follow_sizes_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    _, weights = written("dinov3", tmp_path)
    monkeypatch.setattr(export, "with_weights", lambda *_: pytest.fail("weights are read"))
    with pytest.raises(
        ConfigError, match=r"TimmBackbone cannot be exported for images of any size.*--dynamic batch"
    ):
        export_segmentor(weights, tmp_path / "segmentor.onnx", dynamic="size")


def test_what_cannot_be_is_refused_before_anything_is_captured(tmp_path, monkeypatch):
    _, weights = written("smallest", tmp_path)
    monkeypatch.setattr(export, "captured", lambda *_: pytest.fail("it has begun"))
    out = tmp_path / "segmentor.onnx"
    with pytest.raises(ConfigError, match=r"'\.engine' is none of \.onnx, \.pt"):
        export_segmentor(weights, tmp_path / "segmentor.engine")
    with pytest.raises(ConfigError, match="TorchScript is traced for images of one size"):
        export_segmentor(weights, tmp_path / "segmentor.pt", dynamic="batch")
    out.write_text("mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_segmentor(weights, out)
    assert out.read_text() == "mine"
    with monkeypatch.context() as patch:
        patch.setattr(export.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(OutputError, match=r"needs \d\.\d MiB but only 0\.0 MiB are free"):
            export_segmentor(weights, tmp_path / "other.onnx")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"pip install internseg-ds\[onnx\]"):
        export_segmentor(weights, tmp_path / "other.onnx")


def test_what_it_takes_is_said_before_it_begins(tmp_path, monkeypatch, caplog):
    """Where weights lie beside the file, it takes less memory; scarce memory is a warning and refuses nothing."""

    class Begun(Exception):
        pass

    def begins(*_):
        raise Begun

    segmentor, weights = written("smallest", tmp_path)
    tensors = (*segmentor.named_parameters(), *segmentor.named_buffers())
    held = 4 * sum(each.numel() for name, each in tensors if not name.startswith("auxiliary_head"))
    monkeypatch.setattr(export, "_prepared", begins)
    monkeypatch.setattr(export, "PROCESS", 0)
    caplog.set_level("INFO")

    def said(free: int) -> tuple[str, str]:
        caplog.clear()
        monkeypatch.setattr(export, "free_memory", lambda *_, **__: free)
        with pytest.raises(Begun):
            export_segmentor(weights, tmp_path / "segmentor.onnx")
        (line,) = [record for record in caplog.records if "of disk" in record.getMessage()]
        return line.levelname, line.getMessage()

    level, text = said(free=2**40)
    assert level == "INFO" and "free now" not in text
    assert f"{held / 2**20:.1f} MiB of disk" in text and f"{5 * held / 2**20:.1f} MiB of host memory" in text
    level, text = said(free=1000)
    assert level == "WARNING" and "0.0 MiB are free now" in text
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    assert f"{2.2 * held / 2**20:.1f} MiB of host memory" in said(free=2**40)[1]


def test_a_difference_of_logits_is_a_part_of_the_largest_and_nan_is_none():
    given = export.Input((8, 8), "none", 1)
    model = lambda image: image  # noqa: E731
    assert comparison.largest_difference(model, model, given, 3) == 0
    found = comparison.largest_difference(lambda image: image * 1.01, model, given, 3)
    assert found == pytest.approx(0.01, rel=1e-3)
    assert comparison.largest_difference(lambda image: image * float("nan"), model, given, 3) == float("inf")

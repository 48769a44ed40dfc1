"""What the project relies on inside torch, one test for each function of torch_internals."""

import ast
import threading
import traceback
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.overrides import TorchFunctionMode

from internseg_ds import torch_internals
from internseg_ds.torch_internals import (
    BACKWARD_FILE,
    BACKWARD_FUNCTION,
    BATCH_NORM,
    NORM_WITH_MOMENTS,
    TorchDispatchMode,
    adam_step_count,
    build_was_interrupted,
    compilation_error,
    convert_tensors,
    copy_tensors,
    cpu_multiplies_bf16,
    extension_folder,
    fake_tensor_mode,
    has_load_hooks,
    in_backward_pass,
    is_fake,
    operator_schema,
    persistent_buffers,
    position_in_file,
    reset_parameters_of,
    run_backward,
    scaled_product,
    set_schedule_position,
    storage_id,
    tree_leaves,
    tree_map,
)


def test_norms():
    for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
        assert issubclass(kind, BATCH_NORM) and issubclass(kind, NORM_WITH_MOMENTS)
    assert issubclass(nn.InstanceNorm2d, NORM_WITH_MOMENTS)
    assert not issubclass(nn.InstanceNorm2d, BATCH_NORM) and not issubclass(nn.LayerNorm, NORM_WITH_MOMENTS)


def test_trees():
    tree = {"a": [1, (2, 3)], "b": 4}
    assert tree_leaves(tree) == [1, 2, 3, 4]
    assert tree_map(lambda leaf: leaf + 1, tree) == {"a": [2, (3, 4)], "b": 5}


def test_cpu_multiplies_bf16():
    flags = Path("/proc/cpuinfo").read_text()
    assert cpu_multiplies_bf16() == ("avx512bw" in flags and "avx512vl" in flags and "avx512dq" in flags)


def test_storage_id():
    tensor, other = torch.ones(4), torch.ones(4)
    assert storage_id(tensor) == storage_id(tensor[1:]) != storage_id(other)
    with fake_tensor_mode():
        tensor, other = torch.ones(4), torch.ones(4)
        assert storage_id(tensor) == storage_id(tensor[1:]) != storage_id(other)


def test_position_in_file(tmp_path):
    value = torch.arange(100, 108, dtype=torch.uint8)
    torch.save({"value": value}, tmp_path / "file.pth")
    assert position_in_file(value) is None
    if torch.__version__ >= (2, 13):
        loaded = torch.load(tmp_path / "file.pth", map_location="meta")["value"]
    else:
        with fake_tensor_mode():
            loaded = torch.load(tmp_path / "file.pth", map_location="meta")["value"]
    start = position_in_file(loaded)
    assert (tmp_path / "file.pth").read_bytes()[start : start + 8] == bytes(range(100, 108))


def test_fake_tensor_mode():
    with fake_tensor_mode(allow_non_fake_inputs=True):
        assert (torch.empty(2**50) + torch.ones(1)).shape == (2**50,)


def test_is_fake():
    with fake_tensor_mode():
        made = torch.ones(1)
    assert is_fake(made) and not is_fake(torch.ones(1)) and not is_fake(None)


def test_copy_tensors():
    sources, targets = [torch.ones(2), torch.ones(3)], [torch.zeros(2), torch.zeros(3)]
    copy_tensors(sources, targets)
    assert all(torch.equal(*pair) for pair in zip(sources, targets, strict=True))


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_operator_schema():
    with Operators() as operators:
        torch.ones(2).add_(1)
    schema = operator_schema(operators.seen[-1])
    assert schema.name == "aten::add_" and schema.arguments[0].alias_info.is_write


def test_convert_tensors():
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    convert_tensors(module, lambda tensor: torch.full_like(tensor, 7))
    assert all((tensor == 7).all() for tensor in (*module.parameters(), *module.buffers()))


def test_persistent_buffers():
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Module())
    module[1].register_buffer("kept", torch.ones(1))
    module[1].register_buffer("dropped", torch.ones(1), persistent=False)
    params = {name for name, _ in module.named_parameters()}
    assert persistent_buffers(module) == module.state_dict().keys() - params
    assert "1.kept" in persistent_buffers(module)


def test_has_load_hooks():
    module = nn.Linear(2, 2)
    assert not has_load_hooks(module)
    module.register_load_state_dict_pre_hook(lambda *_: None)
    assert has_load_hooks(module)


def test_reset_parameters_of():
    attention = nn.MultiheadAttention(4, 2)
    attention.in_proj_weight.data.zero_()
    reset_parameters_of(attention)()
    assert attention.in_proj_weight.std() > 0
    linear = nn.Linear(2, 2)
    assert reset_parameters_of(linear) == linear.reset_parameters
    assert reset_parameters_of(nn.Sequential()) is None


def test_run_backward():
    class Functions(TorchFunctionMode):
        seen = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    param = nn.Parameter(torch.tensor(3.0))
    loss = param.square()
    with Functions() as functions:
        run_backward(loss)
        seen = functions.seen
    assert param.grad == 6 and seen <= 1  # torch.ones_like alone


@pytest.mark.parametrize("settings", [{}, {"fused": True}, {"foreach": True}, {"capturable": False}])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_adam_step_count(kind, settings):
    param = nn.Parameter(torch.ones(2))
    optimizer = kind([param], **settings)
    for _ in range(3):
        param.grad = torch.ones(2)
        optimizer.step()
    theirs, ours = optimizer.state[param]["step"], adam_step_count(optimizer, 3, param.device)
    assert torch.equal(theirs, ours) and (theirs.dtype, theirs.device) == (ours.dtype, ours.device)
    on_device = bool(settings.get("fused"))
    assert (adam_step_count(optimizer, 3, torch.device("meta")).is_meta) == on_device


def scheduler_of(rates: list[float]) -> LambdaLR:
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    return LambdaLR(torch.optim.SGD(groups), lambda updates: 1 / (1 + updates))


def test_set_schedule_position():
    theirs, ours = scheduler_of([1.0, 2.0]), scheduler_of([1.0, 2.0])
    for _ in range(3):
        theirs.optimizer.step()
        theirs.step()
    set_schedule_position(ours, 3, [0.25, 0.5])
    assert ours.state_dict() == theirs.state_dict() and ours.get_last_lr() == [0.25, 0.5]
    for scheduler in (theirs, ours):
        scheduler.optimizer.step()
        scheduler.step()
    assert ours.get_last_lr() == theirs.get_last_lr() == [0.2, 0.4]


def test_extension_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert extension_folder("name") == tmp_path / "name" and (tmp_path / "name").is_dir()


def test_build_was_interrupted(tmp_path, monkeypatch):
    """torch makes the file while it compiles: it waits for it to go away."""
    from torch.utils import cpp_extension

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    folder, found = extension_folder("name"), []
    monkeypatch.setattr(
        cpp_extension,
        "_write_ninja_file_and_build_library",
        lambda **_: found.append(build_was_interrupted(folder)),
    )
    monkeypatch.setattr(cpp_extension, "_import_module_from_library", lambda *_: None)
    cpp_extension.load_inline("name", "int one() { return 1; }")
    assert found == [True] and not build_was_interrupted(folder)


def test_the_thread_that_called_backward_stands_where_stacks_are_looked_for():
    frames = []

    def note(grad: torch.Tensor) -> None:
        frames.extend(traceback.extract_stack())

    param = nn.Parameter(torch.ones(1))
    param.register_hook(note)
    thread = threading.Thread(target=lambda: param.square().backward())
    thread.start()
    thread.join()
    assert any(
        frame.filename.endswith(f"/{BACKWARD_FILE}") and frame.name == BACKWARD_FUNCTION for frame in frames
    )


def test_scaled_product():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 32, generator=generator).to(torch.float8_e4m3fn) for _ in range(2))
    a_scale, b_scale = torch.rand(16, 1, generator=generator), torch.rand(1, 16, generator=generator)
    expected = (a.double() * a_scale) @ (b.double().T * b_scale)
    found = scaled_product(a, b.T, a_scale, b_scale, torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=2**-8)


def test_compilation_error():
    def breaks(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1

    with pytest.raises(compilation_error()):
        torch.compile(breaks, backend="eager", fullgraph=True)(torch.ones(2))


def test_every_function_of_torch_internals_has_a_test_of_its_name():
    tree = ast.parse(Path(torch_internals.__file__).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert functions == {name.removeprefix("test_") for name in globals()} & functions


def test_in_backward_pass():
    seen = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: seen.append(in_backward_pass()))
    (2 * x).backward()
    assert seen == [True] and not in_backward_pass()

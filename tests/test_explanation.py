"""fastnn.explain: what its rows say of a model's runs, and that nothing is changed by asking."""

import copy
import gc
import re
import weakref

import pytest
import torch
import torch.nn.functional as F
from support import block_traffic
from support.ops_log import paths_of_a_gpu
from torch import nn

import fastnn
from fastnn import dispatch, explanation, graph_observation, observation, plans
from fastnn.nn import sequential


def stack(**settings):
    return fastnn.nn.Sequential(
        nn.Linear(784, 100, bias=False), nn.BatchNorm1d(100, **settings), nn.ReLU(), nn.Dropout(0.5), nn.Linear(100, 10)
    )


class Encoder(nn.Module):
    """A stack within a model of another kind, which calls it twice and another one never."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = stack(), nn.Linear(10, 784)
        self.unused = fastnn.nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def forward(self, x, scale=1.0):
        return self.encoder(self.head(self.encoder(x))) * scale


def rows_of(model, *inputs):
    return {row.modules: row for row in fastnn.explain(model, *inputs).rows}


def test_a_training_step(device):
    rows = rows_of(stack(), torch.randn(64, 784))
    block, head = rows["0-3"], rows["4"]
    assert block.layers == "Linear + BatchNorm1d + ReLU + Dropout"
    assert (block.fused, block.path, block.reason) == (True, dispatch.device_path(device).name, "")
    assert (block.forward, block.backward) == ("whole_batch", "columns + library")  # one gradient: x needs none
    assert block.accesses == 2 + 3 + 1
    assert set(block.microseconds["forward"]) == {"whole_batch", "columns", "epilogue"}
    assert block.why[0].startswith("forward: whole_batch, by the cost model (whole_batch 2.")
    assert (head.fused, head.forward, head.backward, head.accesses) == (True, "library", "grouped", 1 + 1)


def test_eval_without_gradients():
    model = stack().eval()
    with torch.no_grad():
        rows = rows_of(model, torch.randn(64, 784))
    assert (rows["0-3"].forward, rows["0-3"].backward, rows["0-3"].accesses) == ("epilogue", "", 1)
    assert rows["4"].reason == "alone, and at most one gradient"
    with_gradients = rows_of(model, torch.randn(64, 784))["0-3"]
    assert (with_gradients.forward, with_gradients.backward) == ("apply", "columns + library")


def test_autocast_is_the_callers(device):
    x = torch.randn(64, 784)
    with torch.autocast(device.type, torch.bfloat16):
        row = rows_of(stack(), x)["0-3"]
    assert row.microseconds["forward"]["whole_batch"] < rows_of(stack(), x)["0-3"].microseconds["forward"]["columns"]
    assert "gradients" in row.microseconds  # one launch for the weight's gradient in fp32, and no cast
    assert row.backward == "columns + grouped"


@pytest.mark.parametrize("case", block_traffic.TRAINING)
def test_accesses_are_those_the_interpreter_counts(case):
    names, M, N, settings = block_traffic.TRAINING[case]
    norm = [nn.BatchNorm1d(N)] if settings.get("norm", "batch") == "batch" else []
    model = fastnn.nn.Sequential(nn.Linear(8, N, bias=bool(settings)), *norm, nn.ReLU(), nn.Dropout(0.5))
    with fastnn.forced_plan(*names.split()):
        (row,) = fastnn.explain(model, torch.randn(M, 8, requires_grad=True)).rows
    counted = dict(zip(block_traffic.TRAINING, (6, 8, 8, 11, 8, 10, 7), strict=True))
    assert row.accesses == counted[case]
    assert ", forced (cost model: " in row.why[0]


def test_runs_within_any_model_by_their_names():
    rows = fastnn.explain(Encoder(), torch.randn(64, 784), 2.0).rows
    # Called twice, as x needs no gradient the first time; then what fuse would fuse.
    assert [row.modules for row in rows] == ["encoder.0-3", "encoder.4", "encoder.0-3", "unused", "head"]
    assert rows[3].reason == observation.NOT_REACHED
    assert rows[4].reason == "alone, and the library's gradients are the plan"
    assert (rows[0].backward, rows[2].backward) == ("columns + library", "columns + grouped")


class Handwritten(nn.Module):
    """Runs of functions and modules, across a break of the graph."""

    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.drop = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5)
        self.scale, self.average = nn.Parameter(torch.ones(16, 16)), nn.BatchNorm1d(16, momentum=None)
        self.net = nn.Sequential(nn.Linear(16, 4), nn.ReLU())
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.drop(F.gelu(self.bn(self.fc(x))))
        x = F.linear(x, self.scale).tanh()
        if x.sum() > 1e6:
            return x
        return self.net(self.average(x).sin())


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
def test_any_model_by_what_fuse_would_do():
    model, x = Handwritten(), torch.randn(12, 8)
    found = fastnn.explain(model, x)
    rows = {row.modules: row for row in found.rows}
    assert {name: (row.layers, row.fused) for name, row in rows.items()} == {
        "fc, bn, drop": ("Linear + BatchNorm1d + gelu + Dropout", True),
        "model": ("linear + tanh", True),
        "net.0-1": ("Linear + ReLU", True),
        "average": ("BatchNorm1d", False),
        "unused": ("Linear", False),
    }
    assert rows["fc, bn, drop"].forward == "whole_batch"
    assert rows["average"].reason == observation.CUMULATIVE
    assert rows["unused"].reason == observation.NOT_REACHED
    breaks = found.notes[dispatch.INTERPRETED :]
    assert [note.partition(":")[0] for note in breaks] == [graph_observation.BREAK] * len(breaks) != []
    assert found.notes[0] == explanation.INTERPRETED or not dispatch.INTERPRETED
    assert fastnn.explain(fastnn.fuse(model), x) == found


class Branching(nn.Module):
    """Equal blocks, whose code is compiled once for all, and a break of the graph in each."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Branch() for _ in range(12))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.bn, self.drop, self.other = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.BatchNorm1d(8)

    def forward(self, x):
        x = self.drop(F.relu(self.bn(self.fc(x))))
        return self.other(x) if x.sum() < 1e6 else x


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
def test_equal_blocks_are_told_apart():
    found = {row.modules: row.fused for row in fastnn.explain(Branching(), torch.randn(12, 8)).rows}
    runs = {f"blocks.{i}.fc, blocks.{i}.bn, blocks.{i}.drop": True for i in range(12)}
    assert found == runs | {f"blocks.{i}.other": False for i in range(12)}


@pytest.mark.real_empty
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_explaining_leaves_torch_compile_its_limits():
    """Dynamo compiles each code eight times at most."""
    model, x = Branching(), torch.randn(12, 8)
    for _ in range(2):
        fastnn.explain(model, x)
    fastnn.unfuse(fastnn.fuse(model))(x)
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(model, backend=counter)(x)
    assert counter.frame_count > 1


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_explained_and_fused_models_are_freed():
    model, x = fastnn.fuse(Branching()), torch.randn(12, 8)
    fastnn.explain(model, x)
    model(x)
    found = weakref.ref(model)
    del model
    gc.collect()
    assert found() is None


def test_a_layer_used_twice_is_named_by_its_place():
    relu = nn.ReLU()
    model = fastnn.nn.Sequential(nn.Linear(8, 8), relu, nn.Linear(8, 8), relu)
    assert list(rows_of(model, torch.randn(4, 8))) == ["0-1", "2-3"]


class Subclass(nn.Linear):
    pass


def hooked():
    model = stack()
    model[1].register_forward_hook(lambda *args: None)
    return model


def patched():
    model = stack()
    model[1].forward = model[1].forward
    return model


def in_place():
    return fastnn.nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm1d(784))


UNFUSED = {
    "hook": (hooked, "1", "it has a hook"),
    "patch": (patched, "1", "its forward is patched"),
    "subclass": (lambda: fastnn.nn.Sequential(Subclass(784, 8), nn.ReLU()), "0", "a subclass of Linear, which may"),
    "in place": (in_place, "0", "in place, it changes the input"),
    "alone": (lambda: fastnn.nn.Sequential(nn.BatchNorm1d(784)), "0", "nothing beside it to fuse with"),
    "one gradient": (lambda: fastnn.nn.Sequential(nn.Linear(784, 8, bias=False)), "0", "alone, and at most one"),
    "deep": (lambda: fastnn.nn.Sequential(nn.Linear(784, 2048)), "0", "alone, and the library's gradients are the"),
}


@pytest.mark.parametrize("case", UNFUSED)
def test_what_is_not_fused_says_why(case):
    make, place, reason = UNFUSED[case]
    row = rows_of(make(), torch.randn(1024 if case == "deep" else 64, 784))[place]
    assert not row.fused
    assert row.reason.startswith(reason)
    assert row.accesses is None


@pytest.mark.parametrize(
    ("layers", "x", "reason"),
    [
        ((nn.BatchNorm1d(4), nn.ReLU()), torch.randn(2, 4, 3), "BatchNorm of an input that is not 2-D"),
        ((nn.ReLU(), nn.Dropout()), torch.randn(4, 2).t(), "its input is not contiguous"),
        ((nn.Linear(4, 4), nn.ReLU()), torch.randn(4), "its input is 1-D"),
        ((nn.Linear(4, 4).double(), nn.ReLU()), torch.randn(2, 4).double(), "no kernels for torch.float64"),
    ],
)
def test_inputs_that_are_not_served_say_why(layers, x, reason):
    (row,) = fastnn.explain(fastnn.nn.Sequential(*layers), x).rows
    assert (row.fused, row.reason) == (False, reason)


def test_softplus_under_autocast_runs_eagerly(device):
    with torch.autocast(device.type, torch.bfloat16):
        (row,) = fastnn.explain(fastnn.nn.Sequential(nn.Linear(4, 4), nn.Softplus()), torch.randn(2, 4)).rows
    assert (row.path, row.reason) == ("eager", "autocast runs Softplus in fp32")


def test_without_kernels_every_run_is_eager(monkeypatch):
    monkeypatch.setattr(dispatch, "HAS_KERNELS", False)
    monkeypatch.setattr(dispatch, "NO_KERNELS", dispatch.NOT_INSTALLED)
    rows = rows_of(stack(), torch.randn(64, 784))
    assert {row.reason for row in rows.values()} == {"Triton is not installed"}


def test_a_global_hook_is_named():
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        (row,) = fastnn.explain(stack(), torch.randn(64, 784)).rows
    finally:
        handle.remove()
    assert (row.modules, row.reason) == ("model", observation.FOLLOWED)


def state_of(model, *inputs):
    tensors = [*model.parameters(), *model.buffers(), *inputs]
    return [
        ([(id(t), t._version, t.grad, t.detach().clone()) for t in tensors]),
        {name: module.training for name, module in model.named_modules()},
        torch.get_rng_state(),
    ]


def equal(before, after):
    (tensors, modes, generator), (others, their_modes, their_generator) = before, after
    same = all(a[:2] == b[:2] and a[2] is b[2] and a[3].equal(b[3]) for a, b in zip(tensors, others, strict=True))
    return same and modes == their_modes and generator.equal(their_generator)


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.drop = nn.Conv1d(784, 8, 1), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(F.relu(self.bn(self.conv(x.unsqueeze(2)))))


class StartsInPlace(fastnn.nn.Sequential):
    def __init__(self):
        super().__init__(nn.ReLU(inplace=True), *stack(momentum=None))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo's
@pytest.mark.parametrize("make", [stack, Encoder, hooked, StartsInPlace, Convolutions])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_is_changed(make, training, grad):
    model, x = make().train(training), torch.randn(64, 784)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    before = state_of(model, x)
    with torch.set_grad_enabled(grad):
        fastnn.explain(model, x)
    assert equal(before, state_of(model, x))
    assert sequential.observer is None


def test_inference_mode_is_the_callers():
    with torch.inference_mode():
        rows = rows_of(stack().eval(), torch.randn(64, 784))
    assert (rows["0-3"].forward, rows["0-3"].backward) == ("epilogue", "")


def test_nothing_is_changed_where_the_model_raises():
    model, x = stack(), torch.randn(64, 700)
    before = state_of(model)
    with pytest.raises(RuntimeError, match="input must be"):
        fastnn.explain(model, x)
    assert equal(before, state_of(model))
    assert sequential.observer is None


def test_hooks_are_called_once():
    model, seen = stack(), []
    model[3].register_forward_hook(lambda *args: seen.append(1))
    fastnn.explain(model, torch.randn(64, 784))
    assert seen == [1]


@pytest.mark.real_empty
@pytest.mark.parametrize("compiled", [lambda model: torch.compile(model, backend="eager"), lambda model: model])
def test_a_compiled_model_is_explained_as_it_was(compiled):
    model = stack()
    wrapped = compiled(model)
    if wrapped is model:
        model.compile(backend="eager")
    assert list(rows_of(wrapped, torch.randn(64, 784))) == ["0-3", "4"]


def test_a_copy_and_a_deep_copy_are_explained_alike():
    model, x = stack(), torch.randn(64, 784)
    assert fastnn.explain(model, x) == fastnn.explain(copy.deepcopy(model), x)


def test_bad_input():
    with pytest.raises(TypeError, match=re.escape("model must be a torch.nn.Module, got function")):
        fastnn.explain(stack, torch.randn(64, 784))
    with pytest.raises(ValueError, match="model must have been called once before, got lazy modules"):
        fastnn.explain(fastnn.nn.Sequential(nn.LazyLinear(4), nn.ReLU()), torch.randn(64, 784))


def test_a_terminal_and_a_notebook_show_it():
    found = fastnn.explain(hooked(), torch.randn(64, 784))
    text = str(found)
    assert repr(found) == text
    lines = text.splitlines()
    assert lines[0].split() == list(explanation.Explanation.HEADER)
    assert lines[1].startswith("0   ")
    assert "    not fused: it has a hook" in lines
    assert (lines[-1] == explanation.INTERPRETED) == dispatch.INTERPRETED
    assert "<td>it has a hook" not in found._repr_html_()
    assert found._repr_html_().count("<tr>") == 1 + len(found.rows)
    assert "not fused: it has a hook" in found._repr_html_()


def test_a_model_without_runs_says_so():
    found = fastnn.explain(nn.ReLU(), torch.randn(3, 2))
    assert (found.rows, str(found)) == ((), explanation.NO_RUNS)


def test_plans_on_a_gpu_are_those_of_its_kernels():
    with paths_of_a_gpu():
        found = fastnn.explain(stack(), torch.randn(64, 784))
    assert {row.path for row in found.rows} == {"triton"}
    assert found.notes == ()


def test_measured_plans_are_named(monkeypatch, device):
    monkeypatch.setattr(plans, "_measured", {})
    choice = plans.batch_norm_choice(64, 100, 784, torch.float32, device)
    plans.learn(device, {choice.problem: {"columns": 1.5, "whole_batch": 2.5}})
    row = rows_of(stack(), torch.randn(64, 784))["0-3"]
    assert row.forward == "columns"
    assert row.why[0] == "forward: columns, measured by fastnn.tune (whole_batch 2.5, columns 1.5 µs)"


def test_a_module_under_two_names_keeps_its_buffers():
    """torch.func.functional_call leaves such a one with the copies."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = fastnn.nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
            self.norm = self.net[1]

        def forward(self, x):
            return self.net(x)

    model = Model()
    before = list(model.norm.buffers())
    values = [buffer.clone() for buffer in before]
    fastnn.explain(model, torch.randn(6, 8))
    assert all(a is b for a, b in zip(model.norm.buffers(), before, strict=True))
    torch.testing.assert_close(before, values, rtol=0, atol=0)

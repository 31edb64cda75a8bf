"""What a selection says of itself: patterns, defaults, what is not read, tied layers, and models that change under it."""

import copy
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DataParallel
from torch.optim.swa_utils import AveragedModel

import orthokit as ok
from orthokit.audit import unread_parameters


def names(model, where=ok.layers):
    return [layer.name for layer in ok.select(model, where)]


def regularizer(model, where=ok.linears):
    return ok.Regularizer(model, ok.SO(), strength=1.0, where=where)


class Language(nn.Module):
    """A word embedding whose weight is the output layer's, too."""

    def __init__(self):
        super().__init__()
        self.words, self.block, self.out = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj, self.scale = nn.Parameter(torch.ones(3, 4, 8)), nn.Parameter(torch.ones(1, 1, 8))


# -- predicates


def test_embeddings_tied_and_head():
    model = Language()
    assert names(model, ok.embeddings) == ["words"]
    assert names(model, ok.layers) == ["block", "out"]
    assert names(model, ok.layers | ok.embeddings) == ["words", "block"]
    assert names(model, ok.tied & ok.linears) == names(model, ok.head) == ["out"]
    assert names(model, ok.linears & ~ok.tied) == names(model, ok.layers & ~ok.head) == ["block"]
    assert names(model, lambda name, m: ok.tied(name, m) and ok.linears(name, m)) == ["out"]
    assert ok.kernel_of(model.words).matrix.shape == (1, 7, 4)
    with pytest.raises(ValueError, match="tied selects no layer"):
        ok.select(nn.Linear(2, 2), ok.tied)
    with pytest.raises(TypeError, match="look at a whole model; pass them as where="):
        ok.tied("out", model.out)
    ok.Regularizer(model, ok.SO(), strength=1.0, where=ok.embeddings)().backward()
    assert model.words.weight.grad.abs().sum() > 0


def test_the_model_may_say_which_is_its_head():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.classifier, self.distilled = nn.Linear(2, 3), nn.Sequential(nn.Linear(2, 3), nn.ReLU())
            self.auxiliary = nn.Linear(2, 3)

    assert names(Net(), ok.head) == ["auxiliary"]
    Net.get_classifier = lambda self: (self.classifier, self.distilled)
    assert names(Net(), ok.head) == ["classifier", "distilled.0"]
    Net.get_output_embeddings = lambda self: None  # as transformers' models without one
    assert names(Net(), ok.head) == ["classifier", "distilled.0"]


def test_a_selection_in_a_selection():
    model = nn.Sequential(Language(), nn.Linear(2, 2))
    chosen = names(model, lambda name, m: m is model[1] and names(model[0], ok.tied & ok.linears) == ["out"] and ok.head(name, m))
    assert chosen == ["1"]


def test_each_pattern_must_match_some_layer():
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 4, 3), "layer1": nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())})
    assert names(model, ok.matching("stem", "layer1.*")) == ["stem", "layer1.0"]
    for where in (
        ok.matching("stem", "layer_1.*"),
        ok.convs & ~ok.matching("layer_1.*"),
        ok.linears & (ok.stem | ~ok.matching("stem", "layer_1.*")),
    ):
        with pytest.raises(ValueError, match=r"the pattern 'layer_1\.\*' of matching matches no layer with a kernel view"):
            ok.select(model, where)
    with pytest.raises(ValueError, match=r"'layer1'.*; did you mean 'layer1.0'"):
        ok.select(model, ok.matching("layer1"))


# -- what is said once


def test_a_default_that_selects_next_to_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 4), *(nn.TransformerEncoderLayer(8, 2, 16) for _ in range(3)))
    with pytest.warns(
        UserWarning, match=r"selects 1 of 13 layers .* leaves out 6 Linear, 3 MultiheadAttention, .*where=orthokit.linears"
    ):
        ok.Regularizer(model, ok.SO(), strength=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ok.Regularizer(model, ok.SO(), strength=1.0)  # once
        regularizer(model)
        ok.Regularizer(nn.Sequential(nn.Conv2d(3, 8, 4), *(nn.Linear(2, 2) for _ in range(9))), ok.SO(), strength=1.0)


def test_weights_that_nobody_reads():
    model = nn.ModuleDict(
        {
            "words": nn.Embedding(10, 6),
            "gru": nn.GRU(6, 4, num_layers=2),
            "lstm": nn.LSTM(6, 4),
            "experts": Experts(),
            "norm": nn.LayerNorm((3, 4)),
            "prelu": nn.PReLU(5),
            "fc": nn.Linear(4, 2),
            "attention": nn.MultiheadAttention(4, 2),
        }
    )
    unread = unread_parameters(model)
    assert [name for name, _ in unread.parameters] == [
        "words.weight",
        *(f"gru.weight_{kind}_l{place}" for place in (0, 1) for kind in ("ih", "hh")),
        *(f"lstm.weight_{kind}_l0" for kind in ("ih", "hh")),
        "experts.gate_up_proj",
        "norm.weight",
        "norm.bias",
    ]
    assert unread.kinds["weight_ih_l0"] == 2
    assert unread.numbers == sum(parameter.numel() for _, parameter in unread.parameters)
    assert unread.total == unread.numbers + 8 + 4 * 4 * 4
    line = str(unread)
    assert line.startswith("not read: 2 weight_ih_l0, 2 weight_hh_l0, 1 gate_up_proj, 1 embedding,")
    assert line.endswith(f"({unread.numbers:,} of {unread.total:,} weights)")
    assert line in ok.report(model).notes
    assert line in ok.plan(model, None, where=ok.linears).notes
    assert "embedding" not in str(ok.report(model, where=ok.layers | ok.embeddings).notes)
    assert not any("not read" in note for note in ok.report(nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))).notes)
    assert str(unread_parameters(model.to("meta"))) == line
    assert str(unread_parameters(nn.LSTM(300, 300))) == "not read: 1 weight_ih_l0, 1 weight_hh_l0 (0.7 of 0.7 M weights)"


def test_layers_of_ones_own_and_lazy_ones_are_not_called_unread():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(3, 7))

    @ok.kernel_of.register
    def _(layer: Table) -> ok.Kernel:
        return ok.Kernel(layer.table.unsqueeze(0))

    model = nn.Sequential(Table(), nn.LazyLinear(3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert str(unread_parameters(model)) == ""
    assert str(unread_parameters(nn.Sequential(Table()).to("meta"))) == ""


def test_tied_layers_are_told():
    with pytest.warns(UserWarning, match=r"1 of 2 selected layers \('out'\) have the weight of an embedding \(words\)"):
        regularizer(Language())
    regularizer(Language(), ok.linears & ~ok.tied)
    regularizer(Language(), ok.embeddings)


class Adapted(nn.Module):
    """As peft wraps a Linear."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.out_features, bias=False)})


def adapt(model):
    model.requires_grad_(False)
    model["q"] = Adapted(model["q"])
    return model


def test_adapters_without_their_base_are_told():
    model = adapt(nn.ModuleDict({"q": nn.Linear(4, 4), "other": nn.Linear(4, 4)}))
    with pytest.warns(
        UserWarning, match=r"1 of 4 selected layers are frozen base layers .*; 2 are the adapters .*'q.lora_A.default'"
    ):
        regularizer(model)
    regularizer(model, ok.matching("*lora_*"))


# -- a model that changes


def test_a_regularizer_made_before_adapters():
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "k": nn.Linear(4, 4)})
    ortho = regularizer(model)
    assert ortho().item() > 0
    adapt(model)
    for call in (ortho, ortho.per_layer, ortho.add_grad_, ortho.retract_):
        with pytest.raises(ValueError, match=r"'q' is now 'q.base_layer', frozen \(1 of 2 layers\).*after get_peft_model"):
            call()


def test_a_layer_that_was_replaced_or_removed():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    ortho = regularizer(model)
    model[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"the model has changed .*'1' is now Identity \(1 of 2 layers\)"):
        ortho()
    del model[1]
    with pytest.raises(ValueError, match="'1' is gone"):
        ortho.add_grad_()
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)))
    ortho = regularizer(model)
    model[0] = copy.deepcopy(model[0])
    with pytest.raises(ValueError, match=r"'0\.0' is now Linear"):
        ortho()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_changes_that_do_no_harm():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.ReLU())
    ortho = regularizer(model)
    expected = ortho().item()
    model[1] = torch.compile(model[1])
    model[0] = nn.Sequential(model[0], nn.Dropout())
    model[2] = nn.GELU()
    DataParallel(model)
    assert ortho().item() == expected
    again = copy.deepcopy(ortho)
    assert again().item() == expected
    again.model[0][0] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="has changed"):
        again()
    assert ortho().item() == expected
    plain = regularizer(nn.Sequential(nn.Linear(4, 4)))
    copied = pickle.loads(pickle.dumps(plain))
    assert copied().item() == plain().item()
    copied.model[0] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="has changed"):
        copied()
    nn.utils.parametrizations.weight_norm(plain.model[0])
    plain()


def test_all_frozen_since():
    model = nn.Sequential(nn.Linear(4, 4))
    ortho = regularizer(model)
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match="all 1 selected layers are frozen now, so the penalty is 0"):
        assert ortho().item() == 0


# -- names


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "wrap",
    [
        AveragedModel,
        lambda m: torch.compile(DataParallel(m)),
        lambda m: DataParallel(torch.compile(m)),
        lambda m: torch.compile(AveragedModel(DataParallel(m))),
        lambda m: _engine(m),
    ],
    ids=["averaged", "compiled-parallel", "parallel-compiled", "three", "engine"],
)
def test_names_are_those_of_the_bare_model(wrap):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ModuleDict({"module": nn.Conv2d(4, 4, 1)}))
    expected = ["0", "1.module"]
    assert names(wrap(model)) == expected
    assert [row["layer"] for row in ok.report(wrap(model)).rows] == expected
    model[1] = DataParallel(model[1])
    assert names(wrap(model)) == expected


def _engine(model):
    engine = nn.Module()
    engine.module = model
    return engine


def test_names_inside_fabric_and_checkpointing():
    fabric = pytest.importorskip("lightning.fabric")
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = nn.Sequential(nn.Conv2d(3, 4, 3), checkpoint_wrapper(nn.Sequential(nn.Conv2d(4, 4, 1))))
    wrapped = fabric.Fabric(accelerator="cpu", devices=1).setup(model)
    assert names(wrapped) == ["0", "1.0"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("part", [False, True])
def test_modules_of_torchscript_have_no_kernel_view(part):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 1)))
    scripted = torch.jit.trace(net.eval(), torch.randn(1, 3, 8, 8))
    for m in (scripted, torch.jit.script(net)):
        m = nn.Sequential(m) if part else m
        for call in (ok.report, lambda m: ok.Regularizer(m, ok.SO(), strength=0.1)):
            with pytest.raises(ValueError, match=r"(convs|layers) selects no layer of .*which has: no layer with a kernel view"):
                call(m)
    if part:  # beside layers that can be read
        beside = nn.Sequential(nn.Conv2d(3, 3, 1), scripted)
        ortho = ok.Regularizer(beside, ok.SO(), strength=0.1)
        assert list(ortho.per_layer()) == ["0"]
        assert ortho().item() > 0


# Facts that change after the Regularizer was made


class Switched(nn.Conv2d):
    """Standardises its weight where a switch says so, which may lie anywhere."""

    def __init__(self, where):
        super().__init__(3, 6, 3)
        self.where, self.on, self.by_name, self.switches = where, False, {"on": False}, [False]
        self.config, self.part = types.SimpleNamespace(on=False), nn.Identity()
        self.part.on = False
        self.register_buffer("flag", torch.zeros(1))

    def turn(self, on):
        self.flag[0] = on if self.where == "buffer" else 0
        if self.where == "attribute":
            self.on = on
        self.by_name["on"] = on and self.where == "dictionary"
        self.switches[0] = on and self.where == "list"
        self.config.on = on and self.where == "object"
        self.part.on = on and self.where == "part"

    def forward(self, x):
        on = self.on or self.by_name["on"] or self.switches[0] or self.config.on or self.part.on or bool(self.flag.item())
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True) if on else self.weight
        return self._conv_forward(x, weight, self.bias)


@pytest.mark.parametrize("where", ["attribute", "buffer", "dictionary", "list", "object", "part"])
def test_a_forward_pass_that_is_switched_is_followed(where):
    m = nn.Sequential(nn.Conv2d(3, 6, 3), Switched(where))
    ortho = ok.Regularizer(m, ok.SO(), strength=0.1)
    first = ortho().item()
    m, ortho = copy.deepcopy((m, ortho))
    for on in (True, False, True):
        m[1].turn(on)
        expected = ok.Regularizer(m, ok.SO(), strength=0.1)
        assert ortho().item() == pytest.approx(expected().item(), rel=1e-6)
        assert (ortho().item() == pytest.approx(first, rel=1e-6)) is not on


@pytest.mark.parametrize("later", ["stride", "dilation", "class", "forward"])
def test_what_a_layer_is_is_read_at_each_call(later):
    m = nn.Sequential(nn.Conv2d(3, 6, 5), nn.Conv2d(6, 6, 5, stride=2))
    ortho = ok.Regularizer(m, ok.ConvOrth(), strength=0.1)
    first = ortho().item()
    if later in ("stride", "dilation"):
        setattr(m[1], later, (2, 2) if later == "dilation" else (3, 3))
    elif later == "class":
        m[1].__class__ = Twice
    else:
        m[1].forward = types.MethodType(Twice.forward, m[1])
    expected = ok.Regularizer(m, ok.ConvOrth(), strength=0.1)
    assert ortho().item() == pytest.approx(expected().item(), rel=1e-6) != pytest.approx(first, rel=1e-6)
    assert ortho.per_layer() == pytest.approx(expected.per_layer())


class Twice(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, 2 * self.weight, self.bias)


@pytest.mark.parametrize("kind", [nn.Conv2d, Twice])
@pytest.mark.parametrize("penalty", [ok.SO(), ok.SRIP()], ids=repr)
def test_weights_that_are_tied_later_count_once(kind, penalty):
    m = nn.Sequential(kind(4, 4, 3), kind(4, 4, 3), nn.Conv2d(4, 4, 1))
    ortho = ok.Regularizer(m, penalty, strength=0.5)
    m[1].weight = m[0].weight
    expected = ok.Regularizer(m, penalty, strength=0.5)
    assert list(ortho.per_layer()) == ["0", "2"]
    assert ortho().item() == pytest.approx(expected().item()) == pytest.approx(0.5 * sum(ortho.per_layer().values()))
    ortho.add_grad_()
    added = m[0].weight.grad.clone()
    m.zero_grad()
    expected().backward()
    assert torch.allclose(added, m[0].weight.grad)
    m[1].weight = nn.Parameter(torch.randn(4, 4, 3, 3))
    assert list(ortho.per_layer()) == ["0", "1", "2"]


def test_groups_that_change_after_a_transition_dimension_was_chosen():
    m = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3))
    ortho = ok.Regularizer(m, ok.Disentangled(relax=ok.share(0.2)), strength=0.1)
    m[1].groups = 2
    for call in (ortho, ortho.per_layer):
        with pytest.raises(ValueError, match=r"layer '1' had 1 groups .* and has 2 now; .* make a new Regularizer"):
            call()

"""docs/models.md: which models a method can be applied to. Every cell of its tables is tried here."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from pathlib import Path
from types import MethodType

import accelerate
import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForMaskedLM, BertForSequenceClassification, BertModel, LlamaModel, ViTModel

import meftbench
from long_profile import sampled
from meftbench.backbones.quantize import quantize
from meftbench.errors import UserError
from meftbench.reversible import ReversibleStack
from tests.models import a_batch, a_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
TOKENS = torch.arange(5, 41).view(3, 12)


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """A process group of this process alone: what wraps and shards models asks for one."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_compiled():
    """Other tests count what was compiled and where graphs broke."""
    yield
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def a_bert():
    return a_model(2, torch.float32, dropout=0.0)


def a_llama():
    return a_model(2, torch.float32, "llama", dropout=0.0, head="causal_lm")


def bare(kind, backbone):
    return kind(a_model(2, torch.float32, backbone, dropout=0.0).config)


class Fewer(BertForSequenceClassification):
    def forward(self, input_ids, labels=None):
        return super().forward(input_ids=input_ids, labels=labels)


class Own(nn.Module):
    def __init__(self, *trunks):
        super().__init__()
        self.trunks = nn.ModuleList(trunks)
        self.head = nn.Linear(32, 2)

    def forward(self, **inputs):
        return self.head(self.trunks[0](**inputs).last_hidden_state)


def offloaded(model, tmp_path, where):
    if where == "disk":
        accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(model, execution_device="cpu")
    return model


def hooked(model):
    return accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)


def with_compiled_layers(model):
    for module in model.modules():
        if type(module).__name__ in ("BertLayer", "LlamaDecoderLayer"):
            module.compile(backend="eager")
    return model


def with_bound_attention(model):
    for module in model.modules():
        if type(module).__name__ in ("BertSelfAttention", "LlamaAttention"):
            module.forward = MethodType(type(module).forward, module)
    return model


def with_layers_of_others(model):
    for module in model.modules():
        if type(module).__name__ in ("BertLayer", "LlamaDecoderLayer"):
            module.forward = (lambda forward: lambda *args, **kwargs: forward(*args, **kwargs))(module.forward)
    return model


def with_hooks(model, *names):
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda *_: None)
    return model


def with_mlp_of_others(model, mixing):
    def forward(self, x_BLD):
        output_BLD = type(self).forward(self, x_BLD)
        return output_BLD + mixing * output_BLD.mean(1, keepdim=True)

    for layer in model.model.layers:
        layer.mlp.forward = MethodType(forward, layer.mlp)
    return model


def quantized(model):
    if importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("4 bits need bitsandbytes, of the extra `quantize`")
    return quantize(model).to("cpu")


def for_inference(model):
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def by_quantizer(model):
    model.hf_quantizer = type("SomeQuantizer", (), {"is_trainable": False})()
    return model


def spread(model):
    """Over two devices: the embeddings' on one that every machine has."""
    model.get_input_embeddings().to("meta")
    return model


def made_for_inference():
    with torch.inference_mode():
        return a_bert()


def unloaded(model, method="meft1-exact"):
    return meftbench.unload(meftbench.apply_method(model, method))


LORA = peft.LoraConfig(r=2, target_modules=["query"])

# By a row's name: models that it stands for, and what is given to `apply_method` beside the method.
BEFORE = {
    "with a head for a task": ([lambda _: a_bert()], {}),
    "with a language model's head": ([lambda _: a_llama()], {}),
    "with a masked language model's head": ([lambda _: bare(BertForMaskedLM, "bert")], {}),
    "without a head (BertModel, LlamaModel, ViTModel)": (
        [lambda _: bare(BertModel, "bert"), lambda _: bare(LlamaModel, "llama"), lambda _: bare(ViTModel, "vit")],
        {},
    ),
    "inside a module of your own": (
        [lambda _: Own(bare(BertModel, "bert")), lambda _: Own(bare(LlamaModel, "llama"))],
        {},
    ),
    "two of them inside a module of your own": ([lambda _: Own(a_bert().bert, bare(ViTModel, "vit"))], {}),
    "the same, one named by `module=`": (
        [lambda _: Own(a_bert().bert, bare(ViTModel, "vit"))],
        {"module": "trunks.0"},
    ),
    "with a forward of fewer arguments": ([lambda _: bare(Fewer, "bert")], {}),
    "a module with no transformers model inside": ([lambda _: nn.Sequential(nn.Linear(12, 2))], {}),
    "with an adapter of peft, around it or inside": (
        [
            lambda _: peft.get_peft_model(a_bert(), LORA),
            lambda _: peft.get_peft_model(a_bert(), LORA).get_base_model(),
            lambda _: Own(peft.get_peft_model(bare(BertModel, "bert"), LORA)),
        ],
        {},
    ),
    "with a method of meftbench": (
        [
            lambda _: meftbench.apply_method(a_bert(), "parallel"),
            lambda _: meftbench.apply_method(Own(a_bert().bert), "meft1-exact"),
            lambda _: meftbench.apply_method(a_bert(), "full"),
        ],
        {},
    ),
    "after `meftbench.unload`": ([lambda _: unloaded(a_bert()), lambda _: unloaded(a_llama(), "lora")], {}),
    "wrapped: DataParallel, DistributedDataParallel, torch.compile, AveragedModel": (
        [
            lambda _: nn.DataParallel(a_bert()),
            lambda _: DistributedDataParallel(a_llama()),
            lambda _: torch.compile(a_bert()),
            lambda _: torch.optim.swa_utils.AveragedModel(a_bert()),
        ],
        {},
    ),
    "sharded: fully_shard, tensor parallelism": ([lambda _: fully_shard(a_bert())], {}),
    "with layers compiled in place (`layer.compile()`)": (
        [lambda _: with_compiled_layers(a_llama())],
        {},
    ),
    "in bfloat16": ([lambda _: a_bert().bfloat16(), lambda _: a_llama().bfloat16()], {}),
    "in 4 bits of bitsandbytes": ([lambda _: quantized(a_bert()), lambda _: quantized(a_llama())], {}),
    "quantised for inference (torch.ao, transformers' quantizers that cannot train)": (
        [lambda _: for_inference(a_llama()), lambda _: by_quantizer(a_bert())],
        {},
    ),
    "hooked by accelerate on one device (device_map with 4 bits)": (
        [lambda _: hooked(a_bert()), lambda _: hooked(a_llama())],
        {},
    ),
    "offloaded by accelerate to the host or the disk": (
        [lambda _: offloaded(a_bert(), None, "host"), lambda folder: offloaded(a_llama(), folder, "disk")],
        {},
    ),
    "spread over several devices": ([lambda _: spread(a_bert())], {}),
    "with attention's forward replaced by a method bound to it": (
        [lambda _: with_bound_attention(a_bert()), lambda _: with_bound_attention(a_llama())],
        {},
    ),
    "with a layer's forward replaced by a function": (
        [lambda _: with_layers_of_others(a_bert()), lambda _: with_layers_of_others(a_llama())],
        {},
    ),
    "with hooks on its embeddings, projections or feed-forwards": (
        [
            lambda _: with_hooks(a_bert(), "bert.embeddings", "bert.encoder.layer.1.intermediate"),
            lambda _: with_hooks(a_llama(), "model.layers.0.self_attn.o_proj", "model.layers.0.mlp"),
        ],
        {},
    ),
    "with hooks on the attention of a decoder (Llama)": (
        [lambda _: with_hooks(a_llama(), "model.layers.0.self_attn")],
        {},
    ),
    "with a feed-forward's forward replaced": ([lambda _: with_mlp_of_others(a_llama(), mixing=False)], {}),
    "the same, by one in which tokens see each other": ([lambda _: with_mlp_of_others(a_llama(), mixing=True)], {}),
    "made under torch.inference_mode": ([lambda _: made_for_inference()], {}),
}


def table_of(heading):
    """Cells of the table with that first heading: row and column -> what it says."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    columns = [cell.strip().strip("`") for cell in lines[first].strip("|").split("|")][1:]
    found = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            break
        row, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        found |= {(row, column): cell for column, cell in zip(columns, cells, strict=True)}
    return found


EARLIER = table_of("the model, before the method is applied")
LATER = table_of("what is done with the model, after the method is applied")


def a_batch_of(model):
    if isinstance(model, Own):
        return {"input_ids": TOKENS}
    inner = getattr(model, "main_input_name", "input_ids")
    if inner == "pixel_values":
        return {"pixel_values": torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    if isinstance(model, BertModel | LlamaModel):
        return {"input_ids": TOKENS}
    if isinstance(model, Fewer):
        return {"input_ids": TOKENS, "labels": torch.tensor([0, 1, 0])}
    if isinstance(model, BertForSequenceClassification):
        return a_batch()
    return {"input_ids": TOKENS, "labels": TOKENS}


def loss_of(model, batch):
    if isinstance(model, nn.Sequential):
        return model(torch.ones(1, 12)).sum()
    output = model(**batch)
    if isinstance(output, torch.Tensor):
        return output.float().pow(2).mean()
    return output["loss"] if "loss" in output else output.last_hidden_state.float().pow(2).mean()


def trains(model, batch):
    """A step: something that is trained has a gradient, and nothing that has one is not finite."""
    loss = loss_of(model.train(), batch)
    loss.backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return bool(loss.isfinite()) and any(bool(g.any()) for g in found) and all(bool(g.isfinite().all()) for g in found)


def types_of(model):
    return {name: type(module) for name, module in model.named_modules()}


def check_refused(build, folder, method, settings):
    model = build(folder)
    before = types_of(model)

    with pytest.raises(UserError) as caught:
        meftbench.apply_method(model, method, seed=1, **settings)

    assert len(str(caught.value).splitlines()) == 1
    assert types_of(model) == before


def check_trains(build, folder, method, settings):
    """It starts where the model stood, and a step trains something."""
    torch.manual_seed(0)
    model = build(folder)
    if any(parameter.is_meta for parameter in model.parameters()):  # a device that computes nothing
        meftbench.apply_method(model, method, seed=1, **settings)
        return
    batch = a_batch_of(model)
    with torch.no_grad():
        expected = float(loss_of(model.eval(), batch))
        applied = meftbench.apply_method(model, method, seed=1, **settings)
        if method != "prompt-tuning":  # whose new prompts are read
            assert float(loss_of(applied.eval(), batch)) == pytest.approx(
                expected, rel=0.02
            )  # bfloat16 has three digits
    assert trains(applied, batch)


@pytest.mark.filterwarnings("ignore")  # of what is deprecated in torch.ao and accelerate
@pytest.mark.parametrize("row", sampled(BEFORE, 3))
def test_a_model_as_it_comes(row, tmp_path):
    builds, settings = BEFORE[row]
    said = {column: cell for (name, column), cell in EARLIER.items() if name == row}
    methods = {column: f"full{column}" if column.startswith("+") else column for column in said}

    for number, build in enumerate(builds):
        for column, method in methods.items():
            expected = said[column]
            if isinstance(build(tmp_path / "look"), ViTModel) and method == "prompt-tuning":
                expected = "refused"  # images have no prompts
            check = {"yes": check_trains, "refused": check_refused}[expected]
            check(build, tmp_path / f"{number}{column}", method, settings)


def test_both_tables_are_tried_whole():
    assert {row for row, _ in EARLIER} == set(BEFORE)
    assert {row for row, _ in LATER} == set(AFTER)


def by_layers(model):
    for module in list(model.modules()):
        if type(module).__name__ == "BertLayer" and not any(
            isinstance(other, ReversibleStack) and module in list(other.modules()) for other in model.modules()
        ):
            fully_shard(module)
        elif isinstance(module, ReversibleStack):
            for block in module.blocks:
                fully_shard(block)
    return fully_shard(model)


def as_replicas(model):
    for module in model.modules():
        module._is_replica = True  # as torch.nn.parallel.replicate marks copies on other devices
    return model


AFTER = {
    "torch.compile of the whole model": lambda model: torch.compile(model, backend="eager"),
    "DistributedDataParallel": lambda model: DistributedDataParallel(model, find_unused_parameters=True),
    "fully_shard of the whole model": fully_shard,
    "fully_shard of each layer (of MEFT: each block)": by_layers,
    "copied by DataParallel to several devices": as_replicas,
    "deepcopy, pickle": lambda model: pickle.loads(pickle.dumps(copy.deepcopy(model))),
    "`.to(torch.bfloat16)`": lambda model: model.to(torch.bfloat16),
}


def outcome_after(row, method):
    model = AFTER[row](meftbench.apply_method(a_bert(), method, seed=1))
    try:
        return "yes" if trains(model, a_batch()) else "no gradient"
    except UserError:
        return "refused"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("row", "column"), LATER)
def test_what_is_done_afterwards(row, column):
    assert outcome_after(row, column) == LATER[row, column]

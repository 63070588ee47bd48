"""The methods of HF peft besides LoRA: which a suite may name, which models they fit, and which do not apply here.

A row of PEFT_METHODS is applied by `methods/peft_zoo.py`, through peft's own classes. Every type of peft is a row here
or in NOT_APPLICABLE; tests/methods/test_peft_zoo.py checks this with the installed peft.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from meftbench.catalogue.settings import WIDEST, Settings


class Peft(Settings):
    """Settings that every method of peft has.

    config: any other fields of peft's configuration class for the method; peft checks them.
    size: the name of the setting that decides the adapter's size; "": the method has none.
    """

    size: ClassVar[str] = ""

    config: dict[str, Any] = Field(default_factory=dict)


class Targeted(Peft):
    """targets: names of the modules that are adapted; None: those of `PeftMethod.targets`."""

    targets: list[str] | None = None


class Ranked(Targeted):
    """The rank of an update: 8 as for `lora` here, so that methods are comparable; peft's own defaults differ."""

    size = "rank"

    rank: int = Field(default=8, ge=1, le=WIDEST)


class Projected(Ranked):
    """The rank of random projections: large, because they are shared by layers and not trained."""

    rank: int = Field(default=256, ge=1, le=WIDEST)


class Subspaces(Ranked):
    """The rank of the decomposition that is cut into subspaces."""

    rank: int = Field(default=100, ge=1, le=WIDEST)


class Blocks(Targeted):
    """The size of the blocks of a weight; it must divide the weight's rows and columns."""

    size = "block_size"

    block_size: int = Field(default=32, ge=1, le=WIDEST)


class Butterflies(Blocks):
    """The size of the blocks of a butterfly factor."""

    block_size: int = Field(default=4, ge=1, le=WIDEST)


class Vectors(Targeted):
    """The length of vectors in a shared bank; it must divide the rows and columns of a weight."""

    size = "vector_length"

    vector_length: int = Field(default=64, ge=1, le=WIDEST)


class Frequencies(Targeted):
    """The number of trained coefficients of each weight."""

    size = "frequencies"

    frequencies: int = Field(default=1000, ge=1, le=WIDEST**2)


class Prompt(Peft):
    """The number of trained positions before every sample."""

    size = "virtual_tokens"

    virtual_tokens: int = Field(default=16, ge=1, le=WIDEST)


@dataclass(frozen=True)
class PeftMethod:
    """A method of peft.

    peft_type: its name in peft.PeftType.  size: the fields of peft's configuration that the settings' size is put into.
    fixed: values of peft's fields that the method is defined by, or that a short run needs.
    targets: what is adapted where the settings do not say: the projections that LoRA adapts ("attention"), the last
        of them ("value"), every norm ("norms"), or what peft itself chooses ("peft").
    only: the key in ONLY of the models that it fits; None: every backbone.
    positions: whether the virtual tokens take positions of the backbone.
    refuses: memory optimisations (levers) that do not work with the method, and why.
    """

    peft_type: str
    settings: type[Peft]
    summary: str
    size: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)
    targets: Literal["attention", "value", "norms", "peft"] = "attention"
    only: Literal["text", "cached", "llama", "decoders", "named"] | None = None
    positions: bool = False
    refuses: dict[str, str] = field(default_factory=dict)

    @property
    def line(self) -> str:
        """The summary in `list methods`."""
        return f"{self.summary} (HF peft{f'; only {ONLY[self.only]}' if self.only else ''})"


ONLY = {
    "text": "text, of encoder-decoders seq2seq_lm",
    "cached": "text, of encoder-decoders seq2seq_lm, where every layer attends",
    "llama": "Llama and Mistral",
    "decoders": "decoders",
    "named": "backbones of the catalogue, unless config names the modules",
}

R = ("r",)
_CACHE = {"checkpoint": "its prompt is a cache, which a layer that runs again would extend again"}
_LOSSES = ("chunked_loss", "liger_loss", "cut_loss")
_WRAPS = {"tiled_mlp": "peft puts a module of its own around what would run in tiles"}

PEFT_METHODS: dict[str, PeftMethod] = {
    "dora": PeftMethod("LORA", Ranked, "lora, directions and magnitudes apart", R, {"use_dora": True}),
    "rslora": PeftMethod("LORA", Ranked, "lora, scaled by 1/sqrt(rank)", R, {"use_rslora": True}),
    "pissa": PeftMethod("LORA", Ranked, "lora from the principal singular vectors", R, {"init_lora_weights": "pissa"}),
    "olora": PeftMethod("LORA", Ranked, "lora from a QR decomposition", R, {"init_lora_weights": "olora"}),
    # A script would reallocate the rank between steps; here it stays in the first phase: all of init_r is trained.
    "adalora": PeftMethod(
        "ADALORA", Ranked, "lora as P·Λ·Q, orthogonality in the loss", ("init_r", "target_r"), {"total_step": 1000}
    ),
    "adamss": PeftMethod("ADAMSS", Subspaces, "low-rank updates in subspaces of the weight (needs scikit-learn)", R),
    "adaption-prompt": PeftMethod(
        "ADAPTION_PROMPT",
        Prompt,
        "prompts in attention, behind a gate",
        ("adapter_len",),
        targets="peft",
        only="llama",
        refuses=_WRAPS | dict.fromkeys(_LOSSES, "peft calls the forward that the model had before the lever"),
    ),
    "beft": PeftMethod("BEFT", Targeted, "the bias of value projections", targets="value"),
    "boft": PeftMethod("BOFT", Butterflies, "weights turned by butterfly factors", ("boft_block_size",)),
    "c3a": PeftMethod("C3A", Blocks, "updates of circulant blocks", ("block_size",)),
    "cartridge": PeftMethod(
        "CARTRIDGE",
        Prompt,
        "a trained cache of keys and values",
        ("num_virtual_tokens",),
        targets="peft",
        only="cached",
        positions=True,
        refuses=_CACHE,
    ),
    "deft": PeftMethod("DEFT", Ranked, "a low-rank part of the weight is replaced", R),
    "delora": PeftMethod("DELORA", Ranked, "lora, angle and strength apart", R),
    "fourierft": PeftMethod("FOURIERFT", Frequencies, "updates by Fourier coefficients", ("n_frequency",)),
    "frod": PeftMethod("FROD", Targeted, "sparse rotations in a basis that layers share", fixed={"progressbar": False}),
    "glora": PeftMethod("GLORA", Ranked, "low-rank scales and shifts of weight, bias and input", R),
    "gralora": PeftMethod("GRALORA", Ranked, "lora in blocks of the weight", R),
    "hira": PeftMethod("HIRA", Ranked, "the weight times a low-rank factor, element by element", R),
    "hra": PeftMethod("HRA", Ranked, "weights turned by Householder reflections", R),
    "ia3": PeftMethod(
        "IA3",
        Targeted,
        "factors on keys, values and the feed-forward",
        targets="peft",
        only="named",
    ),
    "lily": PeftMethod("LILY", Ranked, "lora whose second factors layers share by a router", R),
    "ln-tuning": PeftMethod("LN_TUNING", Targeted, "norms", targets="norms"),
    "loha": PeftMethod("LOHA", Ranked, "products, element by element, of two low-rank factors", R),
    "lokr": PeftMethod("LOKR", Ranked, "Kronecker products of low-rank factors", R),
    "miss": PeftMethod("MISS", Ranked, "one matrix, shared by shards of the weight", R),
    "oft": PeftMethod("OFT", Blocks, "weights turned by orthogonal blocks", ("oft_block_size",)),
    "osf": PeftMethod("OSF", Targeted, "singular vectors of the weight, the leading half frozen"),
    "p-tuning": PeftMethod(
        "P_TUNING",
        Prompt,
        "prompt embeddings through an encoder",
        ("num_virtual_tokens",),
        targets="peft",
        only="text",
        positions=True,
    ),
    "peanut": PeftMethod("PEANUT", Ranked, "updates by a small network that reads the weight", R),
    "prefix-tuning": PeftMethod(
        "PREFIX_TUNING",
        Prompt,
        "trained keys and values before every layer's own",
        ("num_virtual_tokens",),
        targets="peft",
        only="cached",
        positions=True,
        refuses=_CACHE,
    ),
    "prompt-tuning": PeftMethod(
        "PROMPT_TUNING",
        Prompt,
        "prompt embeddings",
        ("num_virtual_tokens",),
        targets="peft",
        only="text",
        positions=True,
    ),
    "psoft": PeftMethod("PSOFT", Ranked, "the principal subspace of a weight, turned", R),
    "pvera": PeftMethod("PVERA", Projected, "vera with a drawn latent", R),
    "randlora": PeftMethod("RANDLORA", Ranked, "sums of scaled random low-rank bases", R),
    "road": PeftMethod("ROAD", Blocks, "pairs of outputs turned", ("group_size",)),
    "shadow": PeftMethod(
        "SHADOW",
        Ranked,
        "a small model beside the layers, its state injected",
        R,
        targets="peft",
        only="decoders",
        refuses=_WRAPS | dict.fromkeys(_LOSSES, "a loss of its own takes the whole logits"),
    ),
    "shira": PeftMethod("SHIRA", Ranked, "sparse updates, as many as a lora of this rank", R),
    "supertuning": PeftMethod("SUPERTUNING", Targeted, "the largest weights, a hundredth of them"),
    "tinylora": PeftMethod("TINYLORA", Targeted, "64 numbers a weight through fixed projections"),
    "unilora": PeftMethod("UNILORA", Targeted, "lora of one vector, projected to all factors"),
    "vblora": PeftMethod("VBLORA", Vectors, "lora of vectors from a shared bank", ("vector_length",)),
    "vera": PeftMethod("VERA", Projected, "scales of random projections that layers share", R),
    "waveft": PeftMethod("WAVEFT", Frequencies, "updates by wavelet coefficients", ("n_frequency",)),
}


@dataclass(frozen=True)
class NotApplicable:
    """A type of peft that is not offered as a method here, and why."""

    peft_type: str
    reason: str


NOT_APPLICABLE: dict[str, NotApplicable] = {
    "bone": NotApplicable("BONE", "it is called miss from peft 0.19 on"),
    "cpt": NotApplicable("CPT", "its prompt is a task's own labelled examples, and a benchmark has none"),
    "multitask-prompt-tuning": NotApplicable(
        "MULTITASK_PROMPT_TUNING", "needs the ids of several tasks in every batch, and a benchmark has one"
    ),
    "poly": NotApplicable("POLY", "needs the ids of several tasks in every batch, and a benchmark has one"),
    "trainable-tokens": NotApplicable(
        "TRAINABLE_TOKENS", "trains the embeddings of tokens that a task adds, and a benchmark adds none"
    ),
    "xlora": NotApplicable("XLORA", "trains a router over several LoRA adapters that were trained before"),
}


def refusal(method: str, model_type: str, head: str, heads: tuple[str, ...]) -> str | None:
    """Why the method does not fit the model, None where it fits or is not one of peft.

    head: the head that is trained.  heads: all that the model's type can have; they tell models of images, decoders and
        encoder-decoders apart.
    """
    row = PEFT_METHODS.get(method)
    text = "image_classification" not in heads and (head == "seq2seq_lm" or "seq2seq_lm" not in heads)
    fits = {
        "text": text,
        # Gated delta nets have no keys and values before which others can be put.
        "cached": text and not model_type.startswith(("qwen3_5", "qwen3_next")),
        "llama": model_type in ("llama", "mistral"),
        "decoders": "causal_lm" in heads,
    }
    if row is None or row.only is None or fits.get(row.only, True):
        return None
    return f"{method} fits only {ONLY[row.only]}, not {model_type} with {head}"


def positions_taken(method: str, settings: dict[str, Any]) -> int:
    """How many positions of the backbone the method's virtual tokens take, besides those of a sample."""
    row = PEFT_METHODS.get(method)
    return Prompt.model_validate(settings).virtual_tokens if row is not None and row.positions else 0

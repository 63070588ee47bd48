"""Losses over a vocabulary that never hold the whole logits, for models that predict tokens: what their levers share.

The model's own forward runs up to its head. The hidden states that the head would read, the head and the labels then go
to a loss that makes the logits itself, in parts (chunked_loss.py) or within a kernel (fused_loss.py).

Shape suffixes: N tokens of the batch, V vocabulary, D hidden size.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from meftbench.backbones.own import transformers_part
from meftbench.backbones.patched import FORWARD, foreign_forward, name_of_forward
from meftbench.catalogue.backbones import BACKBONES
from meftbench.errors import UserError
from meftbench.methods.applied import Applied, predicts_tokens
from meftbench.methods.levers.base import Lever, WatchedStep, held_at


@dataclass(frozen=True)
class Head:
    """What a model makes of its last hidden states until its loss.

    module: its projection onto the vocabulary; `weight` is (V, D).  bias: of the logits, beside the module's own:
    (1, V); None: there is none.  cap: logits x become cap · tanh(x / cap); None: they stay as they are.
    in_float32: whether transformers computes the loss of logits in any dtype in float32.
    """

    module: Any
    bias: Tensor | None
    cap: float | None
    in_float32: bool

    def summed(self, h_ND: Tensor, labels_N: Tensor, ignored: int) -> Tensor:
        """The sum of the tokens' cross-entropies by way of their logits, as transformers computes it."""
        logits_NV = self.module(h_ND)
        if self.bias is not None:
            logits_NV = logits_NV + self.bias.to(logits_NV.device)
        if self.cap is not None:
            logits_NV = torch.tanh(logits_NV / self.cap) * self.cap
        if self.in_float32 or logits_NV.dtype in (torch.float16, torch.bfloat16):
            logits_NV = logits_NV.float()  # also from float64, as transformers' loss does
        return F.cross_entropy(logits_NV, labels_N, ignore_index=ignored, reduction="sum")

    @property
    def is_linear(self) -> bool:
        """Whether the module is a plain Linear: not one with LoRA, for example, which may use dropout."""
        return type(self.module) is nn.Linear


class SummedLoss(ABC):
    """A way to compute the sum of the cross-entropies of all tokens from hidden states."""

    @abstractmethod
    def __call__(self, head: Head, h_ND: Tensor, labels_N: Tensor, ignored: int) -> Tensor:
        """The sum (a scalar) over tokens whose label is not `ignored`.

        Raises UserError: it cannot be computed on the device or in the dtype of the hidden states.
        """

    def refusal(self, head: Head) -> str | None:
        """Why the loss cannot be computed for this head, whatever the hidden states; None: it can."""
        return None

    def watching(self) -> AbstractContextManager[object]:
        """Entered around the model's forward, up to its head."""
        return nullcontext()


class LossLever(Lever):
    """Replaces the loss of a model with a head over its vocabulary by one that never holds the whole logits.

    Where labels are given and gradients recorded, the model's output has no logits; otherwise nothing changes.
    name: in LEVERS.
    """

    name: ClassVar[str]
    # With the pre-trained model, too, the whole logits might not fit the device.
    on_reference_model = True

    def __init__(self) -> None:
        self._forward: VocabularyLoss | None = None
        self._most_rows = 0  # of logits that the head gave in one call

    @abstractmethod
    def loss_of(self, model: PreTrainedModel, applied: Applied) -> SummedLoss:
        """The loss to compute for `model`, which is the one inside of peft's wrapper."""

    def apply(self, applied: Applied) -> None:
        model: Any = applied.model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # the model inside peft's wrapper
        name = type(model).__name__
        place = name_of_forward(model)
        if place == FORWARD and FORWARD in vars(model):
            what = "its forward was replaced on the instance, and would be left out"
            raise UserError(name, what, "apply the method first, then replace it (or prepare it by accelerate)")
        if not isinstance(model, PreTrainedModel) or not predicts_tokens(model):
            cure = "leave the lever out, or take a model for language modelling (head: causal_lm or seq2seq_lm)"
            raise UserError(name, f"{self.name} needs a head over a vocabulary, and the model has none", cure)
        try:
            inspect.signature(model.forward).bind(input_ids=None, return_dict=True)
        except TypeError:
            what = "its forward cannot be called without labels, or takes no return_dict"
            raise UserError(name, what, f"leave {self.name} out") from None
        if not hasattr(model.get_output_embeddings(), "weight"):
            raise UserError(name, "its head is no single projection", f"leave {self.name} out")
        replacement = self._forward = VocabularyLoss(model, self.loss_of(model, applied))
        if refusal := replacement.loss.refusal(replacement.head):
            raise UserError(name, refusal, "take chunked_loss instead")
        if not (_has_known_loss(model) or replacement.agrees()):
            raise UserError(name, "its loss is not the cross-entropy of its head's output", f"leave {self.name} out")
        # Set on the instance, so that parameters keep their names, and it is copied and pickled with the model.
        setattr(model, place, replacement)

    def without(self) -> AbstractContextManager[object]:
        return held_at(self._forward, "enabled", False)

    def in_evaluation(self) -> AbstractContextManager[object]:
        return held_at(self._forward, "always", True)

    def called_in_pieces(self, applied: Applied) -> list[Any]:
        return [_head_of(applied)]

    @contextmanager
    def watched(self, applied: Applied) -> Iterator[None]:
        self._most_rows = 0

        def note(head: nn.Module, args: Any, logits: Tensor) -> None:
            self._most_rows = max(self._most_rows, logits.shape[:-1].numel())

        hook = _head_of(applied).register_forward_hook(note)
        try:
            yield
        finally:
            hook.remove()

    def missing(self, seen: WatchedStep) -> str | None:
        if self._most_rows >= seen.labels > 1:
            return f"the head gave {self._most_rows} rows of logits at once"
        return None


def _head_of(applied: Applied) -> Any:
    model: Any = transformers_part(applied.model)
    return model.get_output_embeddings()


def _has_known_loss(model: Any) -> bool:
    """Whether the loss is known without a trial: the class is one of transformers that only predicts tokens, of a
    family in the catalogue, and neither its loss nor its forward was replaced."""
    kind = type(model)
    only_tokens = kind.__name__.endswith(("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel"))
    from_transformers = only_tokens and kind.__module__.startswith("transformers.models.")
    keeps_own_loss = from_transformers and model.config.model_type in BACKBONES and "_loss_function" not in vars(model)
    return keeps_own_loss and foreign_forward(kind) is None


class VocabularyLoss:
    """Replaces the forward of `model`. The loss is that of transformers, except for rounding.

    loss: computes it from hidden states.
    always: compute it so also where no gradients are recorded; else the model's own forward runs there.
    enabled: False makes the model's own forward run always.
    """

    def __init__(self, model: Any, loss: SummedLoss) -> None:
        self.model, self.loss = model, loss
        self.enabled = True
        self.always = False
        # transformers computes the loss in one of two ways: by `loss_function`, in float32, with shifted labels unless
        # it is a masked language model; or by plain cross-entropy of the head's output (BART).
        self._has_loss_function = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
        self._shifts = self._has_loss_function and model.loss_type != "ForMaskedLM"

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own forward, which `generate` and Trainer inspect for the arguments that it takes."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

    @property
    def head(self) -> Head:
        """What the model makes of its last hidden states at present."""
        model = self.model
        return Head(
            module=model.get_output_embeddings(),
            bias=getattr(model, "final_logits_bias", None),
            cap=getattr(model.config.get_text_config(), "final_logit_softcapping", None),
            in_float32=self._has_loss_function,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, forward = self.model, type(self.model).forward
        arguments = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        if not self.enabled or arguments.get("labels") is None or not (self.always or torch.is_grad_enabled()):
            return forward(model, *args, **kwargs)
        labels = arguments.pop("labels")
        return_dict = arguments.pop("return_dict", None)
        if model.config.is_encoder_decoder:
            # The model's own forward does the same where it is given labels.
            arguments["use_cache"] = False
            if arguments.get("decoder_input_ids") is None and arguments.get("decoder_inputs_embeds") is None:
                arguments["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        head_inputs: list[Tensor] = []

        def take_hidden_states(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            head_inputs.append(args[0])
            return (args[0][:, :0],)

        hook = model.get_output_embeddings().register_forward_pre_hook(take_hidden_states)
        try:
            with self.loss.watching():
                output = forward(model, **arguments, return_dict=True)
        finally:
            hook.remove()
        (h_BLD,) = head_inputs
        fields = {name: value for name, value in output.items() if name != "logits"}
        loss = self._loss(h_BLD, labels.to(h_BLD.device), arguments)
        if output.get("aux_loss") is not None:
            # The loss that balances the experts of a mixture, where it is asked for.
            loss = loss + model.router_aux_loss_coef * output.aux_loss.to(loss.device)
        output = type(output)(loss=loss, **fields)
        as_dict = model.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _loss(self, h_BLD: Tensor, labels: Tensor, arguments: dict[str, Any]) -> Tensor:
        """The mean over tokens that have a label, or their sum divided by `num_items_in_batch`, as in transformers."""
        options = arguments if self._has_loss_function else {}
        ignored: int = options.get("ignore_index", -100)
        if options.get("shift_labels") is not None:
            labels = options["shift_labels"].to(h_BLD.device)
        elif self._shifts:
            labels = F.pad(labels, (0, 1), value=ignored)[..., 1:]
        labels_N = labels.flatten()
        total = self.loss(self.head, h_BLD.flatten(0, -2), labels_N, ignored)
        items = options.get("num_items_in_batch")
        if items is not None:
            return total / (items.to(total.device) if torch.is_tensor(items) else items)
        count = (labels_N != ignored).sum()
        # Without any label, transformers' mean is NaN and its gradient zero.
        return total / count.clamp(min=1) + torch.where(count == 0, torch.nan, 0.0).to(total.dtype)

    def agrees(self) -> bool:
        """Whether the cross-entropy of the head's output equals the model's own loss on a few tokens: other families
        may scale or mask their logits."""
        model = self.model
        if model.get_output_embeddings().weight.is_meta:
            return True
        training = {module: module.training for module in model.modules()}
        model.eval()
        tokens = torch.arange(8, device=model.device).view(2, 4) % model.get_output_embeddings().weight.shape[0]
        # By way of the logits: what computes the loss later may need another device than the one the model is on now.
        by_logits = VocabularyLoss(model, _ByLogits())
        try:
            found_loss, own_loss = (
                call(input_ids=tokens, labels=tokens, use_cache=False).loss.detach().float()
                for call in (by_logits, model)
            )
        except (AttributeError, TypeError, KeyError):  # the model has no loss, no logits, or other arguments
            return False
        finally:
            for module, mode in training.items():
                module.training = mode
        return bool(torch.isclose(found_loss, own_loss, rtol=1e-4 if model.dtype.itemsize >= 4 else 1e-2))


class _ByLogits(SummedLoss):
    """The loss of the whole logits."""

    def __call__(self, head: Head, h_ND: Tensor, labels_N: Tensor, ignored: int) -> Tensor:
        return head.summed(h_ND, labels_N, ignored)

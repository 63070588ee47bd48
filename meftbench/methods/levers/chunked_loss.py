"""`+chunked_loss` (a lever): cross-entropy over a vocabulary without the whole logits, for models that predict tokens.

The model's own forward runs up to its head. The hidden states that the head would read then go through head and loss
a chunk of tokens at a time, under checkpointing: only they and the head's weight are kept for the backward pass.

Shape suffixes: N tokens of the batch, T tokens of a chunk, D hidden size.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from meftbench.backbones.own import transformers_part
from meftbench.backbones.patched import FORWARD, foreign_forward, name_of_forward
from meftbench.catalogue.backbones import BACKBONES
from meftbench.errors import UserError
from meftbench.methods.applied import Applied, predicts_tokens
from meftbench.methods.levers.base import Lever, WatchedStep, held_at

# A chunk has 1 / CHUNKS of the tokens (+tiled_mlp has as many tiles), or fewer: it is held several times over (logits,
# their logarithm, gradient), so its float32 logits are limited to LARGEST bytes. The limit does not go below FEWEST
# tokens: each chunk reads the whole weight of the head, and for fewer tokens this would take most of the time.
CHUNKS = 16
LARGEST = 64 * 2**20
FEWEST = 256


class ChunkedLossLever(Lever):
    """Computes the loss of a model with a head over its vocabulary in chunks of tokens, without the whole logits.

    Where labels are given and gradients recorded, the model's output has no logits; otherwise nothing changes.
    """

    # With the pre-trained model, too, the whole logits might not fit the device.
    on_reference_model = True

    def __init__(self) -> None:
        self._forward: ChunkedLoss | None = None
        self._most_rows = 0  # of logits that the head gave in one call

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
            raise UserError(name, "chunked_loss needs a head over a vocabulary, and the model has none", cure)
        try:
            inspect.signature(model.forward).bind(input_ids=None, return_dict=True)
        except TypeError:
            what = "its forward cannot be called without labels, or takes no return_dict"
            raise UserError(name, what, "leave chunked_loss out") from None
        chunked = self._forward = ChunkedLoss(model)
        if not hasattr(model.get_output_embeddings(), "weight"):
            raise UserError(name, "its head is no single projection", "leave chunked_loss out")
        if not (_has_known_loss(model) or chunked.agrees()):
            raise UserError(name, "its loss is not the cross-entropy of its head's output", "leave chunked_loss out")
        # Set on the instance, so that parameters keep their names, and it is copied and pickled with the model.
        setattr(model, place, chunked)

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


class ChunkedLoss:
    """Replaces the forward of `model`. The loss is that of transformers, except for rounding.

    fused: whether to use torch's linear_cross_entropy; None: where it is known to be as good (`_fused_is_as_good`).
    always: compute the loss in chunks also where no gradients are recorded; else the model's own forward runs there.
    enabled: False makes the model's own forward run always.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.enabled = True
        self.always = False
        self.fused: bool | None = None
        # transformers computes the loss in one of two ways: by `loss_function`, in float32, with shifted labels unless
        # it is a masked language model; or by plain cross-entropy of the head's output (BART).
        self._has_loss_function = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
        self._shifts = self._has_loss_function and model.loss_type != "ForMaskedLM"

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the model's own forward, which `generate` and Trainer inspect for the arguments that it takes."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

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
        h_ND, labels_N = h_BLD.flatten(0, -2), labels.flatten()
        rows = chunk_rows(len(h_ND), self.model.get_output_embeddings().weight.shape[0])
        fused = self._fused_is_as_good(h_ND) if self.fused is None else self.fused
        total = self._fused(h_ND, labels_N, ignored, rows) if fused else self._in_chunks(h_ND, labels_N, ignored, rows)
        items = options.get("num_items_in_batch")
        if items is not None:
            return total / (items.to(total.device) if torch.is_tensor(items) else items)
        count = (labels_N != ignored).sum()
        # Without any label, transformers' mean is NaN and its gradient zero.
        return total / count.clamp(min=1) + torch.where(count == 0, torch.nan, 0.0).to(total.dtype)

    def _in_chunks(self, h_ND: Tensor, labels_N: Tensor, ignored: int, rows: int) -> Tensor:
        # A head that is not a plain Linear (one with LoRA, for example) may use dropout.
        drops = type(self.model.get_output_embeddings()) is not nn.Linear
        # `split` instead of slices: the gradient of each slice would be as large as the whole.
        sums = [
            checkpoint(self._summed, h_TD, labels_T, ignored, use_reentrant=False, preserve_rng_state=drops)
            for h_TD, labels_T in zip(h_ND.split(rows), labels_N.split(rows), strict=True)
        ]
        return torch.stack(sums).sum()

    def _summed(self, h_TD: Tensor, labels_T: Tensor, ignored: int) -> Tensor:
        logits = self.model.get_output_embeddings()(h_TD)
        bias, cap = self._bias(), self._cap()
        if bias is not None:
            logits = logits + bias.to(logits.device)
        if cap is not None:
            logits = torch.tanh(logits / cap) * cap
        if self._has_loss_function or logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()  # also from float64, as transformers' loss does
        return F.cross_entropy(logits, labels_T, ignore_index=ignored, reduction="sum")

    def _fused(self, h_ND: Tensor, labels_N: Tensor, ignored: int, rows: int) -> Tensor:
        head, bias = self.model.get_output_embeddings(), self._bias()
        # allow_retain_graph: plain cross-entropy allows a second backward pass, too.
        options = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None, allow_retain_graph=True)  # type: ignore[attr-defined,unused-ignore]
        return F.linear_cross_entropy(  # type: ignore[attr-defined,no-any-return,unused-ignore]
            h_ND,
            head.weight,
            labels_N,
            linear_bias=head.bias if bias is None else bias[0],
            reduction="sum",
            ignore_index=ignored,
            options=options,
        )

    def _fused_is_as_good(self, h_ND: Tensor) -> bool:
        """Whether torch's linear_cross_entropy may replace the chunks here.

        Not in half precision, because it rounds the loss to half precision. Not on the CPU, where it is one operator,
        and memory inside it cannot be counted (torch 2.13: neither a trace nor a dispatch mode sees its chunks).
        """
        head = self.model.get_output_embeddings()
        return (
            hasattr(F, "linear_cross_entropy")
            and h_ND.device.type == "cuda"
            and h_ND.dtype == head.weight.dtype == torch.float32
            and not torch.is_autocast_enabled("cuda")
            and type(head) is nn.Linear
            and (head.bias is None or self._bias() is None)
            and self._cap() is None
        )

    def _bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.model, "final_logits_bias", None)  # (1, vocabulary)
        return bias

    def _cap(self) -> float | None:
        return getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)

    def agrees(self) -> bool:
        """Whether the loss equals the model's own on a few tokens: other families may scale or mask their logits."""
        model = self.model
        if model.get_output_embeddings().weight.is_meta:
            return True
        training = {module: module.training for module in model.modules()}
        model.eval()
        tokens = torch.arange(8, device=model.device).view(2, 4) % model.get_output_embeddings().weight.shape[0]
        try:
            chunked_loss, own_loss = (
                call(input_ids=tokens, labels=tokens, use_cache=False).loss.detach().float() for call in (self, model)
            )
        except (AttributeError, TypeError, KeyError):  # the model has no loss, no logits, or other arguments
            return False
        finally:
            for module, mode in training.items():
                module.training = mode
        return bool(torch.isclose(chunked_loss, own_loss, rtol=1e-4 if model.dtype.itemsize >= 4 else 1e-2))


def chunk_rows(tokens: int, vocabulary: int) -> int:
    """Number of tokens in a chunk: a sixteenth of all, or fewer where their float32 logits are large."""
    return max(1, min(-(-tokens // CHUNKS), max(LARGEST // (4 * vocabulary), FEWEST)))

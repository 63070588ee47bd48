"""Cross-entropy over a vocabulary without the whole logits: what `+chunked_loss` does to a model that predicts tokens.

The model's own forward runs up to its head. Of the hidden states that arrive there a chunk of tokens at a time goes
through head and loss, under checkpointing: what is kept for backward are the hidden states and the head's weight.

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

# As many as +tiled_mlp has tiles. A chunk is held several times over (logits, their logarithm, gradient), so where the
# sixteenth of a long batch is large, its float32 logits are held to LARGEST bytes. But a chunk reads the whole weight
# of the head: of fewer than FEWEST tokens a device would wait for memory.
CHUNKS = 16
LARGEST = 64 * 2**20
FEWEST = 256


class ChunkedLossLever(Lever):
    """The loss of a model with a head over its vocabulary in chunks of tokens, without the whole logits.

    Where labels are given and gradients recorded, the model's output has no logits; otherwise nothing changes.
    """

    # The whole logits might not fit the device there either.
    on_reference_model = True

    def __init__(self) -> None:
        self._forward: ChunkedLoss | None = None
        self._most_rows = 0  # of logits that the head gave in one call

    def apply(self, applied: Applied) -> None:
        model: Any = applied.model
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()  # peft has its own wrapper around
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
        if not (_is_known(model) or chunked.agrees()):
            raise UserError(name, "its loss is not the cross-entropy of its head's output", "leave chunked_loss out")
        # On the instance: parameters keep their names, and it is copied and pickled with the model.
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


def _is_known(model: Any) -> bool:
    """Whether the loss is known without trying: a class of transformers that predicts tokens and nothing else, of a
    family in the catalogue, and with its own loss."""
    kind = type(model)
    alone = kind.__name__.endswith(("ForCausalLM", "ForMaskedLM", "ForConditionalGeneration", "LMHeadModel"))
    own = alone and kind.__module__.startswith("transformers.models.")
    known = own and model.config.model_type in BACKBONES and "_loss_function" not in vars(model)
    return known and foreign_forward(kind) is None


class ChunkedLoss:
    """The forward of `model`, whose loss is transformers' own to rounding.

    fused: use torch's function for it; None: where that is known to be as good (`_fused_is_as_good`).
    always: compute the loss so where no gradients are recorded, too; else logits are given there.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.enabled = True
        self.always = False
        self.fused: bool | None = None
        # Of transformers' two ways the one goes through `loss_function`: shifted labels unless it is a masked language
        # model, float32. The other is plain cross-entropy at the head's output (BART).
        self._has_loss_function = "loss_function" in inspect.unwrap(type(model).forward).__code__.co_names
        self._shifts = self._has_loss_function and model.loss_type != "ForMaskedLM"

    @property
    def __signature__(self) -> inspect.Signature:
        """As of the model's own forward: `generate` and Trainer look for the arguments they may give."""
        return inspect.signature(type(self.model).forward.__get__(self.model))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, forward = self.model, type(self.model).forward
        given = dict(zip(self.__signature__.parameters, args, strict=False)) | kwargs
        if not self.enabled or given.get("labels") is None or not (self.always or torch.is_grad_enabled()):
            return forward(model, *args, **kwargs)
        labels = given.pop("labels")
        return_dict = given.pop("return_dict", None)
        if model.config.is_encoder_decoder:
            # What their forward does where it is given labels.
            given["use_cache"] = False
            if given.get("decoder_input_ids") is None and given.get("decoder_inputs_embeds") is None:
                given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(labels)
        arrived: list[Tensor] = []

        def take(head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            arrived.append(args[0])
            return (args[0][:, :0],)

        hook = model.get_output_embeddings().register_forward_pre_hook(take)
        try:
            output = forward(model, **given, return_dict=True)
        finally:
            hook.remove()
        (h_BLD,) = arrived
        fields = {name: value for name, value in output.items() if name != "logits"}
        loss = self._loss(h_BLD, labels.to(h_BLD.device), given)
        if output.get("aux_loss") is not None:
            # Of a mixture of experts, where it is asked for: what keeps the experts equally used.
            loss = loss + model.router_aux_loss_coef * output.aux_loss.to(loss.device)
        output = type(output)(loss=loss, **fields)
        wanted = model.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()

    def _loss(self, h_BLD: Tensor, labels: Tensor, given: dict[str, Any]) -> Tensor:
        """Mean over the tokens that have a label, or their sum over `num_items_in_batch`, as transformers has it."""
        options = given if self._has_loss_function else {}
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
        # Without any label transformers' mean is NaN, its gradient zero.
        return total / count.clamp(min=1) + torch.where(count == 0, torch.nan, 0.0).to(total.dtype)

    def _in_chunks(self, h_ND: Tensor, labels_N: Tensor, ignored: int, rows: int) -> Tensor:
        # A head of other modules than one Linear (LoRA on it) may drop out.
        drops = type(self.model.get_output_embeddings()) is not nn.Linear
        # `split`, not slices: their gradients are each as large as the whole.
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
            logits = logits.float()  # float64 too: transformers' loss does so
        return F.cross_entropy(logits, labels_T, ignore_index=ignored, reduction="sum")

    def _fused(self, h_ND: Tensor, labels_N: Tensor, ignored: int, rows: int) -> Tensor:
        head, bias = self.model.get_output_embeddings(), self._bias()
        # allow_retain_graph: reference autograd allows it.
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
        """Not of half precision, whose loss it rounds to half; not on the CPU, where it is one operator whose chunks
        no counter sees (torch 2.13: a trace and a dispatch mode both miss them)."""
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
        """Whether the loss is transformers' own, on a few tokens: other families may scale or mask their logits."""
        model = self.model
        if model.get_output_embeddings().weight.is_meta:
            return True
        training = {module: module.training for module in model.modules()}
        model.eval()
        tokens = torch.arange(8, device=model.device).view(2, 4) % model.get_output_embeddings().weight.shape[0]
        try:
            ours, theirs = (
                call(input_ids=tokens, labels=tokens, use_cache=False).loss.detach().float() for call in (self, model)
            )
        except (AttributeError, TypeError, KeyError):  # no loss, no logits, or other arguments
            return False
        finally:
            for module, mode in training.items():
                module.training = mode
        return bool(torch.isclose(ours, theirs, rtol=1e-4 if model.dtype.itemsize >= 4 else 1e-2))


def chunk_rows(tokens: int, vocabulary: int) -> int:
    """Tokens of a chunk: a sixteenth of all; fewer where their float32 logits are large."""
    return max(1, min(-(-tokens // CHUNKS), max(LARGEST // (4 * vocabulary), FEWEST)))

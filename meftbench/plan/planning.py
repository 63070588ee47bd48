"""The candidates of a plan: methods × lever sets × precisions, those left out that the catalogue refuses.

Levers are open to every method that can take them, so that no method is compared in its plain form with another in its
best.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from meftbench.catalogue.choices import PRECISIONS
from meftbench.catalogue.combinations import check_together
from meftbench.catalogue.labels import label_of, read_label
from meftbench.catalogue.levers import LEVERS
from meftbench.catalogue.methods import METHODS, Reversible
from meftbench.catalogue.peft_methods import NOT_APPLICABLE
from meftbench.errors import UserError, unknown

PLANNED_METHODS = (
    *("full", "lora", "lora-fa", "parallel", "meft1-exact", "meft2-exact", "meft3-exact", "midpoint"),
    "mezo",  # last: it needs many more steps than the others
)
# Shares of a model's layers that are reversed or checkpointed; the others keep what they save, and are faster.
SHARES = (0.25, 0.5, 0.75)
ALL, NONE = "all", "none"
OPTIMIZER, SMALLER_OPTIMIZER = "adamw", "adamw-8bit"

Settings = dict[str, Any]
Parts = list[tuple[str, Settings]]


@dataclass(frozen=True)
class Candidate:
    """One thing to predict: a method with its settings and levers as a label, a precision, an optimizer.

    explain: only asked for so that a lever can be compared with its absence, and no answer by itself.
    """

    label: str
    precision: str
    optimizer: str = OPTIMIZER
    explain: bool = False

    @property
    def method(self) -> str:
        """The name of the method, without settings and levers."""
        return name_in(self.label)


def candidates(
    methods: Sequence[str] = PLANNED_METHODS,
    levers: str | Sequence[str] = ALL,
    precisions: Sequence[str] = ("bf16",),
    optimizer: str | None = None,
    depth: int | None = None,
    over_vocabulary: bool = True,
    explain: bool = False,
) -> list[Candidate]:
    """All candidates in the order of `methods`, none twice.

    methods: labels. One with levers is taken as it is; to one without, each lever set is added in turn.
    levers: "all", "none", or names of LEVERS; then only lever sets of these.
    optimizer: None: adamw, and for full fine-tuning also 8-bit states.
    depth: layers of the model, of which shares are reversed or checkpointed; None: not known, so all of them.
    over_vocabulary: whether the model predicts tokens, and levers for its loss apply.
    explain: whether to add what is missing so that each lever has a partner that differs in it alone.

    Raises UserError: a method, lever or precision is unknown; methods and levers leave nothing to look at.
    """
    wanted = _names_of(levers)
    for precision in precisions:
        if precision not in PRECISIONS:
            raise unknown("plan: precision", "precision", precision, PRECISIONS)
    found: dict[Candidate, None] = {}
    for typed in methods:
        parts = _parts("plan: method", typed)
        fixed = len(parts) > 1
        for precision in precisions:
            for label, own_optimizer in [(parts, None)] if fixed else _forms(parts, depth, over_vocabulary, wanted):
                chosen = optimizer or own_optimizer or OPTIMIZER
                if own_optimizer and optimizer:
                    continue  # the user's optimizer takes the place of the variant with another
                if _applies(label, precision, fixed):
                    found[Candidate(_joined(label), precision, chosen)] = None
    if not found:
        raise UserError("plan", "methods, levers and precisions leave nothing to look at", "name fewer restrictions")
    if explain:
        for candidate in list(found):
            for partner in _partners(candidate):
                if replace(partner, explain=False) not in found:
                    found[partner] = None
    return list(found)


def canonical(label: str) -> str:
    """The label with its levers in the order of the catalogue, as a cell's own. Raises UserError: a name is unknown."""
    return _joined(_parts("plan: method", label))


def name_in(label: str) -> str:
    """The name of the method in a label, without settings and levers. Raises UserError: it is no label."""
    return read_label("plan: method", label)[0][0]


def _names_of(levers: str | Sequence[str]) -> set[str] | None:
    """The names of levers that may be taken; None: any of the default lever sets."""
    if levers == ALL:
        return None
    names = [] if levers == NONE else [levers] if isinstance(levers, str) else list(levers)
    for name in names:
        if name not in LEVERS:
            raise unknown("plan: levers", "lever", name, [*LEVERS, ALL, NONE])
    return set(names)


def _parts(where: str, label: str) -> Parts:
    """The method and the levers of a label with their settings. Raises UserError: a name is unknown."""
    (method, settings), *levers = read_label(where, label)
    if method in NOT_APPLICABLE:
        raise UserError(where, f"{method} does not apply: {NOT_APPLICABLE[method].reason}", "choose another method")
    if method not in METHODS:
        raise unknown(where, "method", method, METHODS)
    for lever, _ in levers:
        if lever not in LEVERS:
            raise unknown(where, "lever", lever, LEVERS)
    return [(method, settings), *levers]


def _joined(parts: Parts) -> str:
    """The label, its levers in the order of the catalogue, as a cell's label has them."""
    method, *levers = parts
    order = list(LEVERS)
    in_order = sorted(levers, key=lambda lever: order.index(lever[0]))
    return "+".join(label_of(name, settings) for name, settings in [method, *in_order])


def _applies(parts: Parts, precision: str, must: bool = False) -> bool:
    """Whether the catalogue takes the combination.

    must: raise its UserError where it does not. What precision refuses is then left to the checks of the cell.
    """
    (method, settings), *levers = parts
    try:
        check_together(f"plan: {_joined(parts)}", method, dict(levers))
    except UserError:
        if must:
            raise
        return False
    if must:
        return True
    try:
        whole = METHODS[method].settings.model_validate(settings).whole
    except ValidationError:
        return True  # the cell's own check says what is wrong with the settings, and where
    works = [LEVERS[lever].precisions for lever, _ in levers]
    return not (whole and precision == "nf4") and all(known is None or precision in known for known in works)


def _forms(
    parts: Parts, depth: int | None, over_vocabulary: bool, wanted: set[str] | None
) -> Iterable[tuple[Parts, str | None]]:
    """The method in its plain form, then with each lever set; and the optimizer where a form has one of its own."""
    ((method, settings),) = parts
    forms = [
        (({**settings, **more}, dict(levers)), optimizer)
        for more, levers, optimizer in _default_forms(method, settings, depth, over_vocabulary)
    ]
    if wanted is not None:
        known = {lever for (_, levers), _ in forms for lever in levers}
        forms = [form for form in forms if form[0][1].keys() <= wanted and (wanted or form[0][0] == settings)]
        # A lever that is in none of the default sets is tried on each of those that are left.
        reversible = issubclass(METHODS[method].settings, Reversible)
        extras = [name for name in LEVERS if name in wanted - known]
        for extra in [name for name in extras if LEVERS[name].adds_to_reversal or not reversible]:
            forms += [((own, {**levers, extra: {}}), optimizer) for (own, levers), optimizer in forms]
    for (own, levers), optimizer in forms:
        yield [(method, own), *levers.items()], optimizer


_Form = tuple[Settings, list[tuple[str, Settings]], str | None]


def _default_forms(method: str, settings: Settings, depth: int | None, over_vocabulary: bool) -> list[_Form]:
    """Settings to add, levers, and an optimizer: from what is kept whole to what saves most; offloading last.

    Shares of layers are combined with the loss in chunks alone, since whole logits are large and buy little time.
    """
    loss: list[tuple[str, Settings]] = [("chunked_loss", {})] if over_vocabulary else []
    fused: list[tuple[str, Settings]] = [("liger_loss", {})]
    counts = sorted({max(1, round(depth * share)) for share in SHARES} - {depth}) if depth else []
    if not METHODS[method].backward:
        return _distinct([({}, [], None), ({}, loss, None), ({}, [*loss, ("tiled_mlp", {})], None)])
    if issubclass(METHODS[method].settings, Reversible):
        shares = [] if "reversible_layers" in settings else [{"reversible_layers": count} for count in counts]
        forms: list[_Form] = [({}, [], None), ({}, loss, None)]
        forms += [({}, fused, None)] if over_vocabulary else []
        forms += [(share, loss, None) for share in shares]
        return _distinct([*forms, ({}, [*loss, ("offload", {"what": "checkpoints"})], None)])
    checkpoint: list[tuple[str, Settings]] = [("checkpoint", {})]
    forms = [({}, [], None), ({}, loss, None), ({}, checkpoint, None), ({}, [*checkpoint, *loss], None)]
    if over_vocabulary:
        forms += [({}, fused, None), ({}, [*checkpoint, *fused], None)]
    forms += [({}, [("checkpoint", {"layers": count}), *loss], None) for count in counts]
    forms.append(({}, [*checkpoint, ("tiled_mlp", {}), *loss], None))
    if method == "full":
        forms.append(({}, [*checkpoint, *loss], SMALLER_OPTIMIZER))
        forms.append(({}, [*checkpoint, *loss, ("optimizer_in_backward", {})], None))
    forms.append(({}, [*checkpoint, ("offload", {}), *loss], None))
    return _distinct(forms)


def _distinct(forms: list[_Form]) -> list[_Form]:
    """`forms`, none twice: without a loss over a vocabulary some are the same."""
    return [form for index, form in enumerate(forms) if form not in forms[:index]]


def _partners(candidate: Candidate) -> Iterable[Candidate]:
    """The candidate without each of its levers in turn, where that is allowed."""
    method, *levers = _parts("plan: method", candidate.label)
    for lever in levers:
        rest = [method, *(other for other in levers if other != lever)]
        if _applies(rest, candidate.precision):
            yield replace(candidate, label=_joined(rest), explain=True)

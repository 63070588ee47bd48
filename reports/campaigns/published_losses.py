"""Memory of losses over a vocabulary that others measured and published, beside what is predicted for them.

    python reports/campaigns/published_losses.py

Prints a row a measurement. The measurements are tests/groundtruth/data/fused_losses.csv; README-losses.md beside it
says whose they are, and what was taken where they do not say it.

As of single operators (published_operators.py), an iteration of forward and backward is traced ten times by CUDA's
rules, and the median of the ten peaks is taken. Gradients of the iteration before are alive in it, and both workspaces
of cuBLAS, which other measurements in the same process had taken: of cut cross-entropy, which calls no cuBLAS, too.
Shape suffixes: R rows (tokens), V vocabulary, D hidden size.
"""

from __future__ import annotations

import argparse
import csv
import sys
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from published_operators import DATA, Mark, Prepared, predicted_peak
from torch import Tensor, nn

from meftbench.catalogue.profiles import find_profile
from meftbench.catalogue.versions import Versions
from meftbench.prediction.fused_losses import LigerRule, cut_sum

MEASURED = DATA / "fused_losses.csv"
PROFILES = {"NVIDIA A100-SXM4-80GB": "a100-80gb", "H100": "h100"}


def _plain(h_RD: Tensor, weight_VD: Tensor, labels_R: Tensor) -> Tensor:
    # The logits keep their name in the script, so that they are alive in the backward pass.
    logits_RV = (h_RD @ weight_VD.t()).float()
    return F.cross_entropy(logits_RV, labels_R)


def _loss_of(row: dict[str, str]) -> Any:
    """The function of hidden states, weight and labels that `row` measured."""
    if row["loss"] == "plain":
        return _plain
    if row["loss"] == "cut":
        return lambda h_RD, weight_VD, labels_R: cut_sum(h_RD, weight_VD, labels_R, -100, None)
    capability = tuple(map(int, find_profile(PROFILES[row["device"]]).compute_capability.split(".")))
    rule = LigerRule.of(Versions.parse(f"liger={row['liger_version']}"), capability)
    return lambda h_RD, weight_VD, labels_R: rule.summed(h_RD, weight_VD, labels_R, None, -100, None)


def prepared(row: dict[str, str], tokens: int, mark: Mark) -> Prepared:
    """The loss of a head in bfloat16, forward and backward."""
    vocabulary, hidden = int(row["vocabulary"]), int(row["hidden"])
    _take_workspaces(mark)
    heads = [
        nn.Linear(hidden, vocabulary, bias=False, dtype=torch.bfloat16, device="meta")
        for _ in range(2 if row["second_head"] == "yes" else 1)
    ]
    h_RD = torch.randn(tokens, hidden, dtype=torch.bfloat16, device="meta", requires_grad=True)
    labels_R = torch.randint(vocabulary, (tokens,), device="meta")
    loss_of = _loss_of(row)

    def iteration(mark: Mark) -> None:
        loss = loss_of(h_RD, heads[0].weight, labels_R)
        mark("backward")
        loss.backward()

    return Prepared(iteration, held=tuple(heads[1:]))


def _take_workspaces(mark: Mark) -> None:
    """A product and its gradient, for which both threads of autograd take the workspace that they keep."""
    one = torch.ones(1, 1, dtype=torch.bfloat16, device="meta", requires_grad=True)
    product = one @ one
    mark("backward")
    product.sum().backward()
    mark("forward")


def predicted_losses() -> list[dict[str, Any]]:
    """A row a measurement: id, source, profile, measured_bytes (as published, with as many digits as that has),
    rounding_bytes (half of its last digit), predicted_bytes, rules."""
    rows = []
    with MEASURED.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            profile, unit = PROFILES[row["device"]], int(row["unit_bytes"])
            peak = predicted_peak(partial(prepared, row), int(row["tokens"]), find_profile(profile))
            versions = Versions.parse(f"liger={row['liger_version']}" if row["liger_version"] else "")
            rows.append(
                {
                    "id": f"{row['source']}-{row['loss']}-loss-{row['tokens']}x{row['vocabulary']}-{profile}",
                    "source": row["source"],
                    "profile": profile,
                    "measured_bytes": round(float(row["published"]) * unit),
                    "rounding_bytes": unit * 10.0 ** -int(row["digits"]) / 2,
                    "predicted_bytes": peak,
                    "rules": str(versions),
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Predict and print; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args(arguments)
    print(f"{'loss':<48}{'measured':>16}{'predicted':>16}{'ratio':>9}  bytes")
    for row in predicted_losses():
        measured, predicted = row["measured_bytes"], row["predicted_bytes"]
        print(f"{row['id']:<48}{measured:>16,d}{predicted:>16,d}{predicted / measured:>9.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

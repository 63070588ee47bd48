"""What a peak consists of, in a sentence."""

import pytest

from meftbench.report.views.savings import composition_sentence

ROW = {"method": "full", "peak_allocated_bytes_source": "counted", "peak_phase": "backward"}


@pytest.mark.parametrize("peak", [10**12, 1e308, 0])
def test_a_peak_of_which_no_category_has_a_share_to_show_has_no_sentence(peak):
    """The categories of a damaged record are far below its peak, or there is none."""
    assert composition_sentence(ROW | {"peak_allocated_bytes": peak, "gradients_bytes": 5}) is None


def test_a_category_that_has_a_share_to_show_is_in_the_sentence():
    said = composition_sentence(ROW | {"peak_allocated_bytes": 2**20, "gradients_bytes": 2**19, "inputs_bytes": 1})

    assert said == "of full's 1.0 MiB (counted), gradients are 50 %; the peak is in backward"
